"""One image in many containers: by how much map, embedding, nuclei and tiles differ from those of the plain image.

    python benchmarks/pixel_values.py                # a table, and benchmarks/results/pixel-values.json
    python benchmarks/pixel_values.py --size 1000

The plain image is that of a simulated section: three colors, 8 bits. The others hold the same picture in other types and
ranges, with opacity, as a pyramid, turned and mirrored, and with a border that shows nothing: as glass, transparent, and NaN.
Spots lie within the border in all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine

from stgen import datasets, pp, tl

RESULTS = Path(__file__).parent / "results"
MPP = 1.0
BORDER_UM = 40.0
SPACING_UM = 40.0  # of tiles


class Variant(NamedTuple):
    """One way to hold the image, of ``(3, n, n)`` 8-bit values."""

    change: Callable[[np.ndarray], np.ndarray]
    channels: str = "rgb"
    pyramid: bool = False
    to_plain: tuple[tuple[int, int, int], tuple[int, int, int]] = ((1, 0, 0), (0, 1, 0))
    """The matrix over x, y from its pixels to those of the plain image; the last column in sides of the image."""
    back: Callable[[np.ndarray], np.ndarray] = lambda labels: labels
    """Labels of its pixels as those of the plain image."""
    against: str = "plain"
    """The variant with the same picture."""


def _framed(pixels: np.ndarray, value: float) -> np.ndarray:
    """The image with a border of one value."""
    width = round(BORDER_UM / MPP)
    inner = (slice(None), slice(width, -width), slice(width, -width))
    out = np.full_like(pixels, value)
    out[inner] = pixels[inner]
    return out


def _opaque(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[:1], 255)])


VARIANTS = {
    "plain": Variant(lambda he: he),
    "uint16, 8 bits": Variant(lambda he: he.astype(np.uint16)),
    "uint16, 12 bits": Variant(lambda he: he.astype(np.uint16) * 16),
    "uint16, 16 bits": Variant(lambda he: he.astype(np.uint16) * 257),
    "float32, to 1": Variant(lambda he: he.astype(np.float32) / 255),
    "float32, to 255": Variant(lambda he: he.astype(np.float32)),
    "float32, to 65,535": Variant(lambda he: he.astype(np.float32) * 257),
    "opacity, all opaque": Variant(_opaque, "rgba"),
    "pyramid": Variant(lambda he: he, pyramid=True),
    "turned": Variant(
        lambda he: np.rot90(he, axes=(1, 2)), to_plain=((0, -1, 1), (1, 0, 0)), back=lambda labels: np.rot90(labels, -1)
    ),
    "mirrored": Variant(
        lambda he: he[:, :, ::-1], to_plain=((-1, 0, 1), (0, 1, 0)), back=lambda labels: labels[:, ::-1]
    ),
    "white border": Variant(lambda he: _framed(he, 255)),
    "transparent border": Variant(lambda he: _framed(_opaque(he), 0), "rgba", against="white border"),
    "NaN border": Variant(lambda he: _framed(he.astype(np.float32) / 255, np.nan), against="white border"),
}


def results(he: np.ndarray, section: SpatialData, variant: Variant) -> dict[str, Any]:
    """Map, embedding, nuclei and tiles from one variant, in the place and order of the plain image."""
    side = he.shape[1]
    matrix = np.vstack([np.array(variant.to_plain, float) * MPP * [1, 1, side], [0, 0, 1]])
    image = Image2DModel.parse(
        np.ascontiguousarray(variant.change(he)), dims=("c", "y", "x"), c_coords=list(variant.channels),
        transformations={"um": Affine(matrix, ("x", "y"), ("x", "y"))}, **({"scale_factors": [2, 2]} if variant.pyramid else {}),
    )  # fmt: skip
    sdata = SpatialData(
        images={"he": image, "bins": section["bins"]},
        shapes={"spots": section["spots"]},
        tables={"spot_counts": section["spot_counts"].copy()},
        attrs=dict(section.attrs),
    )
    tl.superresolve(sdata, "he", low_res="spot_counts", like="bins", n_samples=1, progress=False)
    pp.embed(sdata, image_key="he", table_key="spot_counts", patch_um=(128, 256), key_added="X", progress=False)
    pp.segment_nuclei(sdata, image_key="he", progress=False)
    pp.tile_grid(sdata, image_key="he", spacing_um=SPACING_UM)
    tiles = np.column_stack([sdata["tiles"].geometry.x, sdata["tiles"].geometry.y])
    return {
        "map": np.asarray(sdata["superresolved"].data),
        "embedding": sdata["spot_counts"].obsm["X"],
        "nuclei": variant.back(np.asarray(sdata["nuclei"].data)),
        "tiles": tiles @ matrix[:2, :2].T + matrix[:2, 2],
    }


def differences(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """By how much results differ; all are 0 if they are equal, but ``map_r``, ``nuclei_iou`` and ``tiles_shared``, which are 1.

    Of maps: root mean square over standard deviation, of the worst gene, on bins that both have; the smallest correlation over genes;
    and the share of bins that only one has. Of embeddings: the same ratio, over all features. Of nuclei: difference in their
    number, and intersection over union. Of tiles: the same difference, and the share of the plain ones that another lies as near to
    as in any hexagonal grid of the spacing (0.58 of it).
    """
    both = np.isfinite(found["map"][0]) & np.isfinite(plain["map"][0])
    either = np.isfinite(found["map"][0]) | np.isfinite(plain["map"][0])
    new, old = (maps[:, both].astype(float) for maps in (found["map"], plain["map"]))
    spread = plain["embedding"].std(0) + 1e-6
    n_new, n_old = (int(which["nuclei"].max()) for which in (found, plain))
    new_nuclei, old_nuclei = (which["nuclei"] > 0 for which in (found, plain))
    near, _ = cKDTree(found["tiles"]).query(plain["tiles"])
    return {
        "map_rms": float((np.sqrt(((new - old) ** 2).mean(1)) / old.std(1)).max()),
        "map_r": float(min(np.corrcoef(a, b)[0, 1] for a, b in zip(new, old, strict=True))),
        "map_bins": 1 - both.sum() / either.sum(),
        "embedding_rms": float(np.sqrt((((found["embedding"] - plain["embedding"]) / spread) ** 2).mean())),
        "nuclei_number": abs(n_new - n_old) / n_old,
        "nuclei_iou": (new_nuclei & old_nuclei).sum() / (new_nuclei | old_nuclei).sum(),
        "tiles_number": abs(len(found["tiles"]) - len(plain["tiles"])) / len(plain["tiles"]),
        "tiles_shared": float((near <= 0.58 * SPACING_UM).mean()),
    }


def simulated(size_um: float = 400.0, seed: int = 1) -> tuple[np.ndarray, SpatialData]:
    """Pixels of the plain image ``(3, n, n)``, and the section with spots within the border and bins of 10 µm."""
    section = datasets.simulated_section(
        seed=seed, size_um=size_um, mpp=MPP, n_genes=6, spot_pitch_um=45, spot_diameter_um=35
    )
    pp.rasterize(section, bin_um=10, bounds_um=(0, 0, size_um, size_um), mask_um=None, key_added="bins")
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    kept = ((xy > BORDER_UM) & (xy < size_um - BORDER_UM)).all(1)
    he = np.asarray(section["he"].data)
    section["spots"], section["spot_counts"] = section["spots"][kept], section["spot_counts"][kept].copy()
    return he, section


def table(size_um: float = 400.0, seed: int = 1) -> pd.DataFrame:
    """A row per variant, and what it was compared with: the plain image, and another with the same picture."""
    he, section = simulated(size_um, seed)
    found = {name: results(he, section, variant) for name, variant in VARIANTS.items()}
    rows = {}
    for name, variant in VARIANTS.items():
        for other in dict.fromkeys(["plain", variant.against]):
            if name != other:
                rows[name, other] = differences(found[name], found[other])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["image", "against"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=640.0, help="side of the simulated section in µm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "pixel-values.json")
    arguments = parser.parse_args()
    logging.getLogger("stgen").setLevel(logging.ERROR)
    rows = table(arguments.size, arguments.seed).reset_index()
    arguments.out.write_text(
        json.dumps(
            {"size_um": arguments.size, "seed": arguments.seed, "rows": rows.to_dict("records")},
            indent=1,
            default=float,
        )
        + "\n"
    )
    print(rows.to_string(index=False, float_format=lambda value: f"{value:.2g}" if value < 0.1 else f"{value:.4f}"))


if __name__ == "__main__":
    main()

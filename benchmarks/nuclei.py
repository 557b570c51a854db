"""Nuclei: how well those of the simulated section are found, time per mm², and a picture on real tissue.

    python benchmarks/nuclei.py                               # F1 at IoU 0.5, counts, areas, seconds per mm²
    python benchmarks/nuclei.py --picture B4 --at 1700 6900   # outlines over a crop of a HER2ST section

The section's image and truth are drawn from the same random numbers. F1 counts a nucleus as found where a label shares
more than half of their union with it. Seconds are of processor time, the threshold included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

from stgen import datasets, pp
from stgen.datasets._render import _Canvas
from stgen.datasets._tissue import CELL_TYPES, draw_tissue

RESULTS = Path(__file__).parent / "results"


def true_nuclei(shape: tuple[int, int], *, seed: int, size_um: float, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the nuclei that ``simulated_section`` drew, the cell's row plus one, and the type of each cell.

    Where two overlap, a pixel belongs to the one in whose middle it lies deeper.
    """
    tissue = draw_tissue(np.random.default_rng([seed, 0]), float(size_um))
    drawn = _Canvas(tissue, np.random.default_rng([seed, 2])).nuclei
    labels, rim = np.zeros(shape, np.int32), np.ones(shape)
    for i, (x, y) in enumerate(drawn.xy):
        a, b, angle = drawn.a[i], drawn.b[i], drawn.angle[i]
        reach = 1.3 * max(a, b) + 1
        window = tuple(slice(max(0, int((at - reach) / mpp)), int((at + reach) / mpp) + 2) for at in (y, x))
        dy, dx = (((np.arange(n)[where] + 0.5) * mpp - at) for n, where, at in zip(shape, window, (y, x), strict=True))
        u = dx * np.cos(angle) + dy[:, None] * np.sin(angle)
        v = dy[:, None] * np.cos(angle) - dx * np.sin(angle) + drawn.bend[i] * u**2
        turn = np.arctan2(v / b, u / a)
        waves = zip((2, 3, 4), drawn.irregular[i], drawn.phase[i], strict=True)
        radius = np.hypot(u / a, v / b) / (1 + 0.7 * sum(amount * np.cos(k * turn + at) for k, amount, at in waves))
        deeper = radius < rim[window]
        labels[window][deeper], rim[window][deeper] = i + 1, radius[deeper]
    return labels, tissue.cells["cell_type"].to_numpy()


def found_of(true: np.ndarray, labels: np.ndarray, iou: float = 0.5) -> tuple[np.ndarray, float]:
    """The true labels that are found, each by one label only, and F1."""
    n = int(labels.max()) + 1
    pairs, shared = np.unique(true.astype(np.int64) * n + labels, return_counts=True)
    t, f = np.divmod(pairs, n)
    area_true, area = np.bincount(true.ravel()), np.bincount(labels.ravel())
    found = t[(t > 0) & (f > 0) & (shared > iou * (area_true[t] + area[f] - shared))]
    return found, 2 * len(found) / max(np.count_nonzero(area_true[1:]) + np.count_nonzero(area[1:]), 1)


def score(seed: int, size_um: float, mpp: float) -> dict:
    """F1, counts, median areas and time on one simulated section."""
    sdata = datasets.simulated_section(seed=seed, size_um=size_um, mpp=mpp)
    start = time.process_time()
    pp.segment_nuclei(sdata, image_key="he", progress=False)
    seconds = time.process_time() - start
    labels = np.asarray(sdata["nuclei"].data)
    true, kinds = true_nuclei(labels.shape, seed=seed, size_um=size_um, mpp=mpp)
    found, f1 = found_of(true, labels)
    visible = np.unique(true[true > 0])
    areas = [np.bincount(x[x > 0])[1:] * mpp**2 for x in (true, labels)]
    return {
        "seed": seed, "size_um": size_um, "mpp": mpp, "f1": f1, "precision": len(found) / max(labels.max(), 1),
        "recall": len(found) / len(visible), "true": len(visible), "outlined": int(labels.max()),
        "true_um2": float(np.median(areas[0][areas[0] > 0])), "outlined_um2": float(np.median(areas[1])),
        "seconds_per_mm2": seconds / (size_um / 1000) ** 2,
        "recall_of": {
            kind: float(np.isin(visible[kinds[visible - 1] == kind], found).mean())
            for kind in CELL_TYPES if (kinds[visible - 1] == kind).any()
        },
    }  # fmt: skip


def picture(section: str, at: tuple[int, int], side: int, out: Path) -> dict:
    """A crop of a HER2ST section, plain and with outlines, at twice its size.

    Outlined with its surroundings of 400 pixels, from which the threshold is estimated too.
    """
    from PIL import Image
    from skimage.segmentation import find_boundaries

    source = datasets.her2st(section)
    mpp = source.attrs["stgen"]["source"]["mpp"]
    around = tuple(slice(max(0, start - 400), start + side + 400) for start in at[::-1])
    crop = tuple(
        slice(start - where.start, start - where.start + side) for start, where in zip(at[::-1], around, strict=True)
    )
    pixels = source["he"]["scale0"]["image"].data[:, *around].compute()
    scale = {"um": Scale([mpp, mpp], axes=("x", "y"))}
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=scale)})
    pp.segment_nuclei(sdata, progress=False)
    labels, plain = np.asarray(sdata["nuclei"])[crop], pixels.transpose(1, 2, 0)[crop]
    areas = np.unique(labels[labels > 0], return_counts=True)[1] * mpp**2
    labels, plain = (np.repeat(np.repeat(x, 2, 0), 2, 1) for x in (labels, plain))
    outlined = np.where(find_boundaries(labels, mode="inner")[..., None], np.uint8([255, 255, 0]), plain)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([plain, outlined], axis=1)).save(out)
    return {
        "picture": str(out), "section": section, "at": at, "side_px": side, "mpp": mpp, "outlined": len(areas),
        "um2_quartiles": np.quantile(areas, [0.25, 0.5, 0.75]).round(1).tolist(),
        "threshold": sdata.attrs["stgen"]["nuclei"]["threshold"],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=float, default=600.0, help="side of the simulated section in µm")
    parser.add_argument("--mpp", type=float, nargs="+", default=[0.5, 1.0], help="µm per pixel")
    parser.add_argument("--picture", metavar="SECTION", help="draw a crop of this HER2ST section instead")
    parser.add_argument(
        "--at", type=int, nargs=2, default=(1700, 6900), help="left and upper edge of the crop in pixels"
    )
    parser.add_argument("--side", type=int, default=600, help="side of the crop in pixels")
    parser.add_argument("--out", type=Path, help="the picture, default benchmarks/results/nuclei-<section>.png")
    arguments = parser.parse_args()
    if arguments.picture:
        out = arguments.out or RESULTS / f"nuclei-{arguments.picture}.png"
        print(json.dumps(picture(arguments.picture, tuple(arguments.at), arguments.side, out), indent=1))
        return
    for mpp in arguments.mpp:
        for seed in arguments.seeds:
            print(json.dumps(score(seed, arguments.size, mpp), default=float))


if __name__ == "__main__":
    main()

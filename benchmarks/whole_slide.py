"""Whole slides and many genes: memory and time as the image and the panel grow, and how little the tiles matter.

    python benchmarks/whole_slide.py memory 10000     # H&E of 10,000 x 10,000 px, 200 genes, to a zarr store
    python benchmarks/whole_slide.py memory 20000
    python benchmarks/whole_slide.py genes 300        # 300 of the 2,000 genes that a C3-Diff is for, on 1 mm²
    python benchmarks/whole_slide.py tiles runs/P4-10x-DiffST-0 --out tiles.png

``memory`` makes a blank slide of that size on disk (0.5 µm per pixel, read lazily) with random low-resolution counts, and an
unfitted Diff-ST: what is measured is memory and time. So does ``genes`` with an unfitted C3-Diff. ``tiles`` samples the pancreas section with fitted weights in one
window and cut into 4 and 16, and draws the largest difference and what crosses a border.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import dask.array as da
import matplotlib as mpl
import numpy as np
import torch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

from stgen import models, tl

RESULTS = Path(__file__).parent / "results"
MPP, BIN_UM, FACTOR, N_GENES = 0.5, 10.0, 10, 200


def slide(folder: Path, side_px: int, genes: list[str]) -> SpatialData:
    """A blank slide on disk, read lazily, with random low-resolution counts."""
    low_px = int(side_px * MPP / (BIN_UM * FACTOR))
    counts = np.random.default_rng(0).poisson(20.0, (len(genes), low_px, low_px)).astype(np.float32)

    def scale(um: float) -> dict:
        return {"um": Scale([um, um], axes=("x", "y"))}

    pixels = da.random.default_rng(0).integers(0, 255, (3, side_px, side_px), dtype=np.uint8, chunks=(3, 2048, 2048))
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=scale(MPP))
    SpatialData(images={"he": image}).write(folder / "slide.zarr")
    sdata = SpatialData.read(folder / "slide.zarr")
    sdata.images["low"] = Image2DModel.parse(
        counts, dims=("c", "y", "x"), c_coords=genes, transformations=scale(BIN_UM * FACTOR)
    )
    return sdata


def measure(model: models.MapModel, side_px: int, n_genes: int, name: str, steps: int) -> None:
    """Time and peak memory of super-resolving some genes of a blank slide into a store."""
    model.record = {"sections": []}  # memory and time do not ask for training
    with tempfile.TemporaryDirectory() as folder:
        sdata = slide(Path(folder), side_px, model.genes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.perf_counter()
        tl.superresolve(
            sdata, "he", model.genes[:n_genes], model=model, low_res="low", n_samples=2, steps=steps,
            store=Path(folder) / "out.zarr", progress=False,
        )  # fmt: skip
        content = {
            "model": type(model).__name__, "side_px": side_px, "bins": int(side_px * MPP / BIN_UM), "genes": n_genes,
            "n_samples": 2, "steps": steps, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
            "seconds": time.perf_counter() - start, "before_mb": before,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1))
    print(content)


def tiles(folder: str, out: Path, steps: int, n_genes: int) -> None:
    """Samples of the same section in one window, in 4 and in 16, with trained weights."""
    import matplotlib.pyplot as plt
    from superresolution import ROWS, genes, part

    mpl.use("Agg")
    ROWS["whole"] = (0, 2920)
    section, model = part("whole", "10x"), models.load(folder)
    maps, seconds = {}, {}
    for tile in (640, 320, 160):
        for batch_size in (1, 2) if tile == 320 else (2,):
            start = time.perf_counter()
            done = tl.superresolve(
                section, "stains", genes()[:n_genes], model=model, low_res="low", tile=tile, n_samples=2, steps=steps,
                batch_size=batch_size, consistency=True, keep_samples=True, copy=True, progress=False,
            )  # fmt: skip
            maps[tile, batch_size] = np.asarray(done.images["superresolved_samples"])
            seconds[tile, batch_size] = time.perf_counter() - start
    whole = maps[640, 2]
    content = {
        "model": type(model).__name__,
        "steps": steps,
        "genes": n_genes,
        "std": float(np.nanmean(np.nanstd(whole, (1, 2)))),
    }
    for (tile, batch_size), values in maps.items():
        difference = np.abs(np.log1p(values) - np.log1p(whole))
        content[f"tile {tile}, batch {batch_size}"] = {
            "largest": float(np.nanmax(difference)), "99.9 %": float(np.nanquantile(difference, 0.999)),
            "rms": float(np.sqrt(np.nanmean(difference**2))), "seconds": seconds[tile, batch_size],
        }  # fmt: skip
    (RESULTS / f"tiles-{Path(folder).name}.json").write_text(json.dumps(content, indent=1))
    print(json.dumps(content, indent=1))
    gene, i = f"{genes()[1]}, one sample", 2
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    y, x = slice(110, 210), slice(110, 210)
    top = np.nanquantile(whole[i, y, x], 0.99)
    for ax, (label, values) in zip(
        axes, [("one window", whole), ("cut at bin 160 (lines outside)", maps[160, 2]), ("difference", maps[160, 2] - whole)],
        strict=True,
    ):  # fmt: skip
        limits = (
            {"vmin": -top / 20, "vmax": top / 20, "cmap": "RdBu_r"}
            if label == "difference"
            else {"vmin": 0, "vmax": top}
        )
        drawn = ax.imshow(values[i, y, x], extent=(x.start, x.stop, y.stop, y.start), **limits)
        ax.set_title(f"{gene}: {label}")
        for line in (160,):
            ax.plot([line, line], [y.start - 3, y.start], color="k", clip_on=False)
            ax.plot([x.start - 3, x.start], [line, line], color="k", clip_on=False)
        figure.colorbar(drawn, ax=ax, shrink=0.8, label="counts per 10 µm bin")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "genes", "tiles"])
    parser.add_argument("argument", help="side of the slide in pixels, number of genes, or folder of a fitted model")
    parser.add_argument("--steps", type=int, default=None, help="sampling steps: 2, or 25 for tiles")
    parser.add_argument("--genes", type=int, default=50, help="how many, for tiles")
    parser.add_argument("--out", type=Path, default=Path("tiles.png"))
    arguments = parser.parse_args()
    if arguments.what == "memory":
        side = int(arguments.argument)
        model = models.DiffST([f"gene {i}" for i in range(N_GENES)])
        measure(model, side, N_GENES, f"whole-slide-{side}", arguments.steps or 2)
    elif arguments.what == "genes":
        number = int(arguments.argument)
        model = models.C3Diff([f"gene {i}" for i in range(2000)])
        measure(model, 2000, number, f"genes-C3Diff-{number}", arguments.steps or 2)
    else:
        tiles(arguments.argument, arguments.out, arguments.steps or 25, arguments.genes)


if __name__ == "__main__":
    main()

"""Expression of single cells of the pancreas test rows (P4, 10x), summed from maps made of one half of the molecules.

    python benchmarks/cells.py

The truth of a cell is the other half of the molecules, those that lie in it. Maps are of the 50 genes of P4, in bins of 10 µm:
interpolated, predicted by the models that superresolution.py has fitted (those in benchmarks/runs), and measured, once by the
half that models see (a replicate) and once by the true half itself, which loses nothing but what lies within a bin. The result is
benchmarks/results/cells-P4-10x.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import superresolution as p4
from scipy.spatial import cKDTree
from spatialdata import SpatialData

import stgen
from stgen import datasets, metrics, models, tl

FILE = Path(__file__).parent / "results" / "cells-P4-10x.json"
FITTED = ["RegressionUNet", "DiffST", "C3Diff", "HaDMST"]


def cells_of(test: SpatialData) -> SpatialData:
    """Cells whose circle lies in the test rows, as a new element of ``test``."""
    circles = datasets.xenium_pancreas().shapes["cells"]
    x, y, radius = circles.geometry.x, circles.geometry.y, circles.radius
    (low, high), width = p4.ROWS["test"], p4.SCALES["10x"]["width_um"]
    inside = (y - radius > low) & (y + radius < high) & (x - radius > 0) & (x + radius < width)
    test.shapes["cells"] = circles[inside]
    return test


def molecules_in(test: SpatialData) -> np.ndarray:
    """Counts of the true half in each cell, ``(cells, genes)``."""
    circles, found = test.shapes["cells"], test.points["true"].compute()
    found = found[found["gene"].isin(p4.genes())]
    code = pd.Index(p4.genes()).get_indexer(found["gene"].astype(str))
    centers = np.column_stack([circles.geometry.x, circles.geometry.y])
    inside = cKDTree(found[["x", "y"]].to_numpy()).query_ball_point(centers, circles.radius.to_numpy())
    return np.array([np.bincount(code[np.asarray(rows, int)], minlength=len(p4.genes())) for rows in inside])


def main() -> None:
    """Sum every map over the cells and score it."""
    if FILE.exists():
        return
    test = cells_of(p4.part("test", "10x"))
    truth = np.log1p(molecules_in(test).astype(float))
    maps = {"the true half in 10 µm bins": "true_map", "the other half in 10 µm bins": "measured_map"}
    for name in ("nearest", "bicubic", *FITTED):
        if name in FITTED:
            model = models.load(p4.MODELS_KEPT / f"P4-10x-{name}-0")
        else:
            model = p4.MODELS[name](p4.genes(), bin_um=10.0, factor=10)
            tl.fit(model, test, map_key="true_map", low_res="low")  # an interpolation learns nothing
        labels = {}
        if model.needs_labels:
            test.labels["nuclei"] = p4.nuclei()
            labels = {"labels_key": "nuclei"}
        tl.superresolve(
            test, "stains" if model.needs_image else None, model=model, low_res="low", like="true_map", n_samples=1,
            key_added=name, progress=False, **labels,
        )  # fmt: skip
        maps[name] = name
    rows = {}
    for label, key in maps.items():
        tl.aggregate_cells(test, map_key=key, shapes_key="cells", key_added=f"{key}_cells")
        table = test[f"{key}_cells"]
        kept = test.shapes["cells"].index.get_indexer(table.obs["instance_id"])
        found = np.log1p(np.asarray(table[:, p4.genes()].X.todense(), dtype=float))
        pcc, rmse = metrics.pcc(found, truth[kept]), metrics.rmse(found, truth[kept])
        rows[label] = {"PCC": pcc.mean(), "PCC_median": float(np.median(pcc)), "RMSE": rmse.mean(), "GSC": metrics.gsc(found, truth[kept]), "cells": table.n_obs}  # fmt: skip
        print(label, {k: round(float(v), 4) for k, v in rows[label].items()}, flush=True)
    FILE.write_text(
        json.dumps(
            {"protocol": "P4 10x", "seed": 0, "stgen": stgen.__version__, "scale": "log1p(counts)", "rows": rows},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

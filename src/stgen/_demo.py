"""The two main jobs on the built-in sections: ``stgen demo --out demo-output``."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stgen import datasets, models, pl, pp, tl

logger = logging.getLogger("stgen.demo")

TRAIN, TEST = (0, 1, 2, 3), 4
SIZE_UM = 1000.0
SHOWN = ["ERBB2", "COL1A1", "CD3E"]
MAP_GENES = ["EPCAM", "ERBB2", "KRT5", "SCGB2A2", "CA9", "COL1A1", "FAP", "PECAM1", "CD3E", "MS4A1", "CD68", "PLIN1"]
COLUMNS = {
    "PCC": "PCC", "MSE": "MSE", "RVD": "RVD", "RVD_sample": "RVD, one sample", "GSC": "GSC",
    "coverage_90%": "in 90 % interval",
}  # fmt: skip
MAP_COLUMNS = {
    "PCC": "PCC", "RMSE": "RMSE", "SSIM": "SSIM", "RVD": "RVD", "RVD_sample": "RVD, one sample", "CRPS": "CRPS",
    "residual_mean": "residual",
}  # fmt: skip


def run(out: Path) -> None:
    """Train on four simulated patients, predict and sharpen a fifth, score, draw, save to a folder, explain."""
    warnings.simplefilter("ignore")  # of the libraries below: the demo says what matters
    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    logger.info("1. Five simulated patients: four to learn from, one that no model sees.")
    train = {f"patient {seed}": datasets.simulated_section(seed=seed, size_um=SIZE_UM) for seed in TRAIN}
    test = datasets.simulated_section(seed=TEST, size_um=SIZE_UM)
    _predict_expression(train, test, out)
    _sharpen_maps(train, test, out)
    test.write(out / "patient-4.zarr", overwrite=True)

    for what, name in {
        "Pictures": "demo.png", "": "superresolved.png", "SpatialData": "patient-4.zarr", "Scores": "scores.csv",
        " ": "map-scores.csv", "Fitted models": "stem", "  ": "diffst",
    }.items():  # fmt: skip
        logger.info("%-15s%s", what, (out / name).resolve())
    logger.info("Took %.0f s.", time.monotonic() - start)


# ---- expression from histology alone ---------------------------------------------------------------------------------


def _predict_expression(train: Mapping[str, SpatialData], test: SpatialData, out: Path) -> None:
    """Predict the spots of a patient of whom only the histology is known, and score against their counts."""
    logger.info("2. Expression from the H&E alone: fit Stem, and the simple models that it has to beat, on the four.")
    for section in [*train.values(), test]:
        pp.embed(section, image_key="he", table_key="spot_counts")
    genes = pp.select_genes(train, 50, table_key="spot_counts")
    width = test["spot_counts"].obsm["X_texture"].shape[1]
    fitted = {}
    for name in ("TrainingMean", "Retrieval", "LinearProbe", "Stem"):
        fitted[name] = tl.fit(getattr(models, name)(genes, embedding_dim=width), train, table_key="spot_counts")
    fitted["Stem"].save(out / "stem")

    logger.info("3. Predict the spots of the fifth from its H&E, and score against what was measured.")
    rows = {}
    for name, model in fitted.items():
        tl.predict_expression(test, model=model, table_key="spot_counts", key_added=name, keep_samples=model.stochastic)
        rows[name] = tl.evaluate(test, key=name, table_key="spot_counts").summary
    table = _table(rows, COLUMNS)
    table.to_csv(out / "scores.csv")

    title = "Scores on the unseen patient, over 50 genes, on the scale log1p(counts per 10,000)"
    figure, axes = _figure(table, title, n_columns=4)
    pl.maps(test, SHOWN, keys="Stem", panels=("histology", "measured", "predicted", "spread"), image_key="he",
            table_key="spot_counts", axes=axes)  # fmt: skip
    figure.savefig(out / "demo.png", dpi=130)

    stem, probe = table.loc["Stem"], table.loc["LinearProbe"]
    logger.info("\n%s\n", table.to_string(na_rep=""))
    logger.info(
        "What this shows. The tissue is simulated, so this says that the software works, not how well it does on real\n"
        "tissue (benchmarks/README.md does). From the H&E image alone, Stem's mean prediction correlates with the measured\n"
        "counts by %.2f over the spots, per gene; a linear probe on the same image features by %.2f. Where the two differ\n"
        "is variance: one sample of Stem varies over the tissue as real spots do (RVD %.2f, 0 is right), the probe is too\n"
        "flat (RVD %.2f). The spread says how sure it is: the 90 %% intervals hold %.0f %% of the measured values.\n",
        stem["PCC"], probe["PCC"], stem["RVD, one sample"], probe["RVD"], 100 * stem["in 90 % interval"],
    )  # fmt: skip


# ---- sharper maps ----------------------------------------------------------------------------------------------------


def _sharpen_maps(train: Mapping[str, SpatialData], test: SpatialData, out: Path) -> None:
    """Make maps of 20 µm from spots of 55 µm and histology, and score against molecules that the spots did not see."""
    logger.info("4. Sharper maps: every molecule goes to the spots (55 µm, 100 µm apart) or to the true map (20 µm).")
    bins: dict[str, Any] = {"bin_um": 20.0, "factor": 5}
    for section in [*train.values(), test]:
        pp.simulate_spots(section, points_key="transcripts", genes=MAP_GENES, thin=0.5, key_added="visium")
        pp.rasterize(section, points_key="visium_rest", genes=MAP_GENES, bin_um=bins["bin_um"],
                     bounds_um=(0, 0, SIZE_UM, SIZE_UM), key_added="truth")  # fmt: skip

    logger.info("5. Fit Diff-ST, and the network that it has to beat, on the four: about a minute on two cores.")
    fitted: dict[str, models.Model] = {"bicubic": models.Interpolate(MAP_GENES, kernel="cubic", **bins)}
    for name in ("RegressionUNet", "DiffST"):
        model = getattr(models, name)(MAP_GENES, **bins)
        fitted[name] = tl.fit(model, train, map_key="truth", image_key="he", low_res="visium_counts",
                              steps=150, batch_size=4)  # fmt: skip
    fitted["DiffST"].save(out / "diffst")

    logger.info("6. Maps of the fifth from its spots and its H&E, scored against the molecules that no spot saw.")
    rows = {}
    for name, model in fitted.items():
        tl.superresolve(test, "he", model=model, low_res="visium_counts", keep_samples=model.stochastic, key_added=name)
        rows[name] = tl.evaluate(test, key=name, truth_key="truth", low_res="visium_counts").summary
    table = _table(rows, MAP_COLUMNS)
    table.to_csv(out / "map-scores.csv")

    title = f"Scores on the unseen patient, over {len(MAP_GENES)} genes and bins of 20 µm, on the scale log1p(counts)"
    figure, axes = _figure(table, title, n_columns=5)
    pl.maps(test, ["EPCAM", "COL1A1", "CD3E"], keys="DiffST", low_res="visium_counts", truth_key="truth", image_key="he",
            panels=("histology", "measured", "predicted", "spread", "truth"), axes=axes)  # fmt: skip
    figure.savefig(out / "superresolved.png", dpi=130)

    diffst, unet, bicubic = (table.loc[name] for name in ("DiffST", "RegressionUNet", "bicubic"))
    n_bins = int(np.isfinite(test["truth"][0].to_numpy()).sum())
    measured = test["visium_counts"].n_obs * np.pi * (55 / 2) ** 2 / (n_bins * bins["bin_um"] ** 2)
    logger.info("\n%s\n", table.to_string(na_rep=""))
    logger.info(
        "What this shows. The spots cover %.0f %% of the tissue and say nothing finer than 55 µm; the rest is read from the\n"
        "image. Diff-ST's map correlates with the held-out molecules by %.2f over bins of 20 µm, per gene, interpolation of\n"
        "the spots by %.2f, and a network of the same kind that is only trained to predict the mean by %.2f. A bin holds few\n"
        "molecules, so that no map could reach 1. One sample of Diff-ST varies as the tissue does (RVD %.2f, 0 is right; the\n"
        "network's map %.2f). Summed over a spot, every map gives back what the spot measured (mean relative error %.0e).\n",
        100 * measured, diffst["PCC"], bicubic["PCC"], unet["PCC"], diffst["RVD, one sample"], unet["RVD"],
        rows["DiffST"]["residual_mean"],
    )  # fmt: skip


# ---- what both share -------------------------------------------------------------------------------------------------


def _table(rows: Mapping[str, pd.Series], columns: Mapping[str, str]) -> pd.DataFrame:
    """The scores to show, a row per model."""
    return pd.DataFrame(rows).T[list(columns)].rename(columns=columns).astype(float).round(2)


def _figure(table: pd.DataFrame, title: str, *, n_columns: int) -> tuple[Figure, np.ndarray]:
    """A figure with the scores at the bottom, and axes for three genes above."""
    figure = plt.figure(figsize=(3 * n_columns, 11.5), layout="constrained")
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[9.5, 2])
    ax = lower.subplots()
    ax.axis("off")
    text = [[f"{v:.2f}" if v == v else "" for v in row] for row in table.to_numpy()]
    drawn = ax.table(text, rowLabels=list(table.index), colLabels=list(table.columns), loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(11)
    drawn.scale(0.85, 1.7)
    ax.set_title(title, fontsize=11)
    return figure, upper.subplots(3, n_columns)

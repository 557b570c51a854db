"""The main job on the built-in section: ``python -m stgen._demo --out demo-output``."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stgen import datasets, models, pl, pp, tl

logger = logging.getLogger("stgen.demo")

TRAIN, TEST = (0, 1, 2, 3), 4
SHOWN = ["ERBB2", "COL1A1", "CD3E"]
COLUMNS = {
    "PCC": "PCC", "MSE": "MSE", "RVD": "RVD", "RVD_sample": "RVD, one sample", "GSC": "GSC",
    "coverage_90%": "in 90 % interval",
}  # fmt: skip


def main() -> None:
    """Train on four simulated patients, predict a fifth, score against its counts, draw, save, explain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the results")
    out = parser.parse_args().out
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    warnings.simplefilter("ignore")  # of the libraries below: the demo says what matters
    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    logger.info("1. Five simulated patients: four to learn from, one to predict.")
    train = {f"patient {seed}": _section(seed) for seed in TRAIN}
    test = _section(TEST)

    logger.info("2. Fit Stem, and the simple models that it has to beat, on the four.")
    genes = pp.select_genes(train, 50, table_key="spot_counts")
    width = test["spot_counts"].obsm["X_texture"].shape[1]
    fitted = {}
    for name in ("TrainingMean", "Retrieval", "LinearProbe", "Stem"):
        fitted[name] = tl.fit(getattr(models, name)(genes, embedding_dim=width), train, table_key="spot_counts")

    logger.info("3. Predict the fifth patient from its histology alone, and score against what was measured.")
    rows = {}
    for name, model in fitted.items():
        tl.predict_expression(test, model=model, table_key="spot_counts", key_added=name, keep_samples=model.stochastic)
        rows[name] = tl.evaluate(test, key=name, table_key="spot_counts").summary
    table = pd.DataFrame(rows).T[list(COLUMNS)].rename(columns=COLUMNS).astype(float).round(2)

    figure = _draw(test, table)
    figure.savefig(out / "demo.png", dpi=130)
    test.write(out / "patient-4.zarr", overwrite=True)
    fitted["Stem"].save(out / "stem")
    table.to_csv(out / "scores.csv")
    _explain(out, table, time.monotonic() - start)


def _section(seed: int) -> SpatialData:
    """A simulated patient with histology embeddings for its spots."""
    sdata = datasets.simulated_section(seed=seed)
    pp.embed(sdata, image_key="he", table_key="spot_counts")
    return sdata


def _draw(test: SpatialData, table: pd.DataFrame) -> Figure:
    """Histology, measured, predicted and spread for a few genes, with the scores below."""
    figure = plt.figure(figsize=(12, 11.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[9.5, 2])
    axes = upper.subplots(len(SHOWN), 4)
    pl.maps(test, SHOWN, keys="Stem", panels=("histology", "measured", "predicted", "spread"), image_key="he",
            table_key="spot_counts", axes=axes)  # fmt: skip
    ax = lower.subplots()
    ax.axis("off")
    text = [[f"{v:.2f}" if v == v else "" for v in row] for row in table.to_numpy()]
    drawn = ax.table(text, rowLabels=list(table.index), colLabels=list(table.columns), loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(11)
    drawn.scale(0.85, 1.7)
    ax.set_title("Scores on the unseen patient, over 50 genes, on the scale log1p(counts per 10,000)", fontsize=11)
    return figure


def _explain(out: Path, table: pd.DataFrame, seconds: float) -> None:
    """Say where everything is and what it means, in plain words and from the figures just measured."""
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
    logger.info("Picture       %s", (out / "demo.png").resolve())
    logger.info("SpatialData   %s", (out / "patient-4.zarr").resolve())
    logger.info("Scores        %s", (out / "scores.csv").resolve())
    logger.info("Fitted model  %s", (out / "stem").resolve())
    logger.info("Took %.0f s.", seconds)


if __name__ == "__main__":
    main()

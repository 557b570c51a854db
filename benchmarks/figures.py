"""The figures of the four papers, drawn from models that were fitted on real sections (P1 and P4), and a contact sheet of them.

    python benchmarks/comparison.py P1        # leaves the models of P1
    python benchmarks/superresolution.py 10x  # leaves those of P4
    python benchmarks/figures.py

Figures go to benchmarks/runs/figures, one PNG each, and small to benchmarks/results/contact_sheet.jpg.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import comparison
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import superresolution as p4
from PIL import Image, ImageDraw, ImageFont

from stgen import datasets, metrics, models, pl, pp, tl

FOLDER = Path(__file__).parent / "runs" / "figures"
SHEET = Path(__file__).parent / "results" / "contact_sheet.jpg"
COLUMNS, WIDTH, TALLEST = 3, 820, 460
TITLES: dict[str, str] = {}


def save(name: str, title: str) -> None:
    """Keep the current figure, and what it shows."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    plt.gcf().savefig(FOLDER / f"{name}.png", dpi=120, bbox_inches="tight")
    plt.close("all")
    TITLES[name] = title


def spots() -> None:
    """Stem: section C4, predicted from other sections of the patient (P1)."""
    sdata = datasets.her2st("C4")
    pp.embed(sdata, image_key="he", progress=False)
    runs = comparison.FOLDERS / "compare-P1" / "runs"
    fitted = {"stem": "Stem", "probe": "LinearProbe", "retrieval": "Retrieval", "mean": "TrainingMean"}
    for key, name in fitted.items():
        model = models.load(runs / name / "seed_0" / "model")
        tl.predict_expression(sdata, model=model, key_added=key, keep_samples=model.stochastic, progress=False)
        if key == "stem":
            pl.history(model)
            save("stem_history", "training of Stem (P1)")
    table = sdata["spot_counts"]
    genes = [gene for gene in ("GNAS", "FASN") if table.var["stem"].get(gene, False)]
    genes += [gene for gene in ("ERBB2", "CD74", "COL1A1") if table.var["stem"].get(gene, False)][: 3 - len(genes)]
    pl.maps(
        sdata, genes, keys=["stem", "probe"], image_key="he", panels=["histology", "measured", "predicted", "spread"]
    )
    save("stem_maps", "Stem, Fig. 3 (2): marker genes")

    tl.find_domains(sdata, genes=list(table.var_names[table.var["stem"]]), n_domains=5, key_added="measured")
    for key in ("stem", "probe"):
        tl.find_domains(sdata, layer=key, n_domains=5, key_added=f"{key}_domains")
    pl.domains(sdata, ["stem_domains", "probe_domains"], reference="measured", image_key="he")
    save("stem_domains", "Stem, Fig. 3 (1): Leiden domains")
    for key in ("stem_domains", "probe_domains"):
        print(key, metrics.label_agreement(table.obs[key], table.obs["measured"]))

    pl.gene_variation(sdata, keys=["stem", "probe"])
    save("stem_variation", "Stem, Figs. 4-7, 9, 10: gene variation")
    mean = np.asarray(table.X.mean(0)).ravel()
    best = pd.Series(mean, table.var_names)[table.var["stem"].to_numpy()].nlargest(6).index
    pl.samples(sdata, [(best[0], best[1]), (best[2], best[3]), (best[4], best[5])], location=40, key="stem")
    save("stem_samples", "Stem, Fig. 8: samples of gene pairs")
    pl.calibration(sdata, keys="stem")
    save("stem_calibration", "calibration of Stem (P1)")
    pl.scores({key: tl.evaluate(sdata, key=key) for key in fitted})
    save("stem_scores", "PCC of 300 genes (P1)")
    pl.gene_correlation(tl.gene_correlation(sdata, key="stem"))
    save("stem_correlation", "gene-gene correlation, Stem (P1)")


def maps() -> None:
    """Diff-ST, C3-Diff and HaDM-ST: the test rows of the pancreas section (P4, 10x)."""
    test = p4.part("test", "10x")
    scores = {}
    for name in ("RegressionUNet", "DiffST", "C3Diff", "HaDMST"):
        model = models.load(p4.MODELS_KEPT / f"P4-10x-{name}-0")
        labels = {}
        if model.needs_labels:
            test.labels["nuclei"] = p4.nuclei()
            labels = {"labels_key": "nuclei"}
        tl.superresolve(
            test, "stains", model=model, low_res="low", like="true_map", n_samples=4, steps=10, keep_samples=model.stochastic,
            key_added=name, progress=False, **labels,
        )  # fmt: skip
        scores[name] = tl.evaluate(test, key=name, truth_key="true_map", gene_scale=p4.gene_scale("10x"))
        if name == "HaDMST":
            pl.history(model)
            save("hadmst_history", "training of HaDM-ST with its discriminator")
    bicubic = p4.MODELS["bicubic"](p4.genes(), bin_um=10.0, factor=10)
    tl.fit(bicubic, test, map_key="true_map", low_res="low")
    tl.superresolve(test, model=bicubic, low_res="low", like="true_map", key_added="bicubic", progress=False)
    scores["bicubic"] = tl.evaluate(test, key="bicubic", truth_key="true_map", gene_scale=p4.gene_scale("10x"))
    genes = list(scores["HaDMST"].genes["PCC"].nlargest(12).index[[0, 5, 11]])
    window = (1500, 800, 2700, 1600)
    pl.maps(test, genes, keys=["bicubic", "RegressionUNet", "DiffST", "C3Diff", "HaDMST"], low_res="low", truth_key="true_map",
            panels=["measured", "predicted", "truth"], bounds_um=window)  # fmt: skip
    save("maps", "restored maps (Diff-ST Fig. 3, C3-Diff Fig. 3, HaDM-ST Fig. 4)")
    pl.maps(test, genes, keys="HaDMST", truth_key="true_map", image_key="stains", panels=["histology", "predicted", "spread", "error"],
            bounds_um=window)  # fmt: skip
    save("maps_spread", "HaDM-ST over the stains, spread and error")
    pl.local_ssim(test, genes, keys=["bicubic", "HaDMST"], truth_key="true_map", bounds_um=window)
    save("local_ssim", "HaDM-ST, Fig. 2: local SSIM")
    pl.gene_scatter({"C3-Diff": scores["C3Diff"], "HaDM-ST": scores["HaDMST"]})
    save("gene_scatter", "HaDM-ST, Fig. 3: SSIM per gene")
    pl.gene_correlation(tl.gene_correlation(test, key="C3Diff", truth_key="true_map"))
    save("gene_correlation", "C3-Diff, Fig. 4b: gene-gene correlation")
    pl.scores(scores)
    save("map_scores", "PCC of 50 genes (P4, 10x)")
    pl.calibration(test, keys=["C3Diff", "HaDMST"], truth_key="true_map")
    save("map_calibration", "calibration, 4 samples (P4, 10x)")


def contact_sheet() -> None:
    """All figures small, in rows."""
    figures = []
    for name, title in TITLES.items():
        figure = Image.open(FOLDER / f"{name}.png").convert("RGB")
        figure.thumbnail((WIDTH - 20, TALLEST), Image.Resampling.LANCZOS)
        figures.append((title, figure))
    rows = [figures[i : i + COLUMNS] for i in range(0, len(figures), COLUMNS)]
    heights = [max(figure.height for _, figure in row) + 60 for row in rows]
    sheet = Image.new("RGB", (COLUMNS * WIDTH, sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for i, row in enumerate(rows):
        for j, (title, figure) in enumerate(row):
            x, y = j * WIDTH, sum(heights[:i])
            draw.text((x + 10, y + 8), title, fill="black", font=font)
            sheet.paste(figure, (x + (WIDTH - figure.width) // 2, y + 40))
    sheet.save(SHEET, quality=85)


if __name__ == "__main__":
    spots()
    maps()
    contact_sheet()

"""P4: gene maps of a real pancreas section made 5 and 10 times finer, by each model and by the simple baselines.

    python benchmarks/superresolution.py 10x                              # every model, seed 0
    python benchmarks/superresolution.py 10x 5x --models DiffST --seeds 0 1
    python benchmarks/superresolution.py 10x --models DiffST --ablations --fit-steps 200  # each module off in turn
    python benchmarks/superresolution.py steps                            # 25 solver steps against 1,000 ancestral ones
    python benchmarks/superresolution.py --table

The section is read from the folder named by STGEN_DATA (see stgen.datasets.xenium_pancreas). Its molecules are split once
in two halves: one is what was measured, the other the truth. Everything is fitted on the training rows. Each run leaves one
JSON in benchmarks/results and is skipped when it is there; fitted models stay in benchmarks/runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cache
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import spatialdata as sd
import torch
from spatialdata.models import PointsModel
from xarray import DataArray

import stgen
from stgen import datasets, models, pp, tl

RESULTS = Path(__file__).parent / "results"
MODELS_KEPT = Path(__file__).parent / "runs"

ROWS = {"train_top": (0, 700), "train_bottom": (1700, 2400), "test": (800, 1600), "validation": (2500, 2900)}  # µm
SCALES = {
    "10x": {"bin_um": 10.0, "factor": 10, "width_um": 5690},
    "5x": {"bin_um": 20.0, "factor": 5, "width_um": 5680},
}
N_GENES = 50
COMMON = {"image_channels": 4}
MODELS = {
    "nearest": lambda genes, **scale: models.Interpolate(genes, kernel="nearest", **COMMON, **scale),
    "bilinear": lambda genes, **scale: models.Interpolate(genes, kernel="linear", **COMMON, **scale),
    "bicubic": lambda genes, **scale: models.Interpolate(genes, kernel="cubic", **COMMON, **scale),
    "PixelProbe": lambda genes, **scale: models.PixelProbe(genes, **COMMON, **scale),
    "RegressionUNet": lambda genes, **scale: models.RegressionUNet(genes, **COMMON, **scale),
    "RegressionUNet image only": lambda genes, **scale: models.RegressionUNet(
        genes, use_low_res=False, **COMMON, **scale
    ),
    "DiffST": lambda genes, **scale: models.DiffST(genes, **COMMON, **scale),
    "C3Diff": lambda genes, **scale: models.C3Diff(genes, **COMMON, **scale),
    "HaDMST": lambda genes, **scale: models.HaDMST(
        genes, **COMMON, **{"text_encoder": "hashed", "alignment_weight": 0.05, **scale}
    ),
    "HaDMST image and nuclei": lambda genes, **scale: models.HaDMST(genes, **COMMON, **scale),  # the default
}
ABLATIONS: dict[str, dict[str, dict]] = {
    "DiffST": {
        "complete": {},
        "without modulation": {"modulation": False},
        "without graph": {"graph": False},
        "without hierarchy": {"hierarchy": False},
        "without residual": {"residual": False},
    },
    "C3Diff": {
        "complete": {},
        "without augmentation": {"augmentation": False},
        "without modal loss": {"modal_weight": 0.0},
        "without content loss": {"content_weight": 0.0},
        "without inter-sphere loss": {"inter_sphere_weight": 0.0},
        "without any of the losses": {"modal_weight": 0.0, "content_weight": 0.0, "inter_sphere_weight": 0.0},
        "drop": {"imputation": "drop"},
        "zero padding": {"imputation": "zero"},
        "arithmetic mean": {"imputation": "mean"},
    },
    "HaDMST": {
        "complete": {},
        "image only": {"segmentation": False, "text_encoder": "none"},
        "image and nuclei": {"text_encoder": "none"},
        "image and prompt": {"segmentation": False},
        "without semantic distillation": {"semantic": False},
        "without alignment": {"alignment_weight": 0.0},
        "image and nuclei, without alignment": {"text_encoder": "none", "alignment_weight": 0.0},
        "without discriminator": {"adversarial_weight": 0.0},
    },
}
PROMPT = "Immunofluorescence of human pancreas: nuclei, membranes, cytoplasm and stroma"
FITTED = (
    "RegressionUNet",
    "RegressionUNet image only",
    "DiffST",
    "C3Diff",
    "HaDMST",
    "HaDMST image and nuclei",
)  # by chance: once for each seed
BLIND = (
    "RegressionUNet image only",
    "C3Diff",
    "HaDMST",
    "HaDMST image and nuclei",
)  # also applied without the low-resolution map
TABLE = ["RMSE", "PCC", "PCC/ceiling", "SSIM", "SSIM_sample", "GSC", "RVD", "RVD_sample", "GSC_sample", "coverage_90%", "CRPS",
         "residual_mean", "fit_s", "predict_s"]  # fmt: skip


@cache
def halves() -> sd.SpatialData:
    """The section with its molecules split in two halves at random, seed 0."""
    section = datasets.xenium_pancreas()
    molecules = section.points["transcripts"].compute()
    half = np.random.default_rng(0).random(len(molecules)) < 0.5
    points = {}
    for name, kept in (("measured", half), ("true", ~half)):
        part = dd.from_pandas(molecules[kept].reset_index(drop=True), npartitions=4)
        points[name] = PointsModel.parse(
            part, coordinates={"x": "x", "y": "y"}, feature_key="gene",
            transformations=sd.transformations.get_transformation(section.points["transcripts"], get_all=True),
        )  # fmt: skip
    out = sd.SpatialData(images={"stains": section.images["stains"]}, points=points)
    return out


@cache
def nuclei() -> DataArray:
    """The nuclei of the section."""
    pp.segment_nuclei(halves(), channel="dapi", progress=False)
    return halves().labels["nuclei"]


@cache
def genes() -> list[str]:
    """The most abundant genes of the training rows, both halves."""
    counts = 0
    for name in ("measured", "true"):
        frame = halves().points[name].compute()
        rows = np.any([(frame.y >= a) & (frame.y < b) for a, b in (ROWS["train_top"], ROWS["train_bottom"])], 0)
        counts = counts + frame.gene[rows].astype(str).value_counts()
    return list(counts.sort_values(ascending=False, kind="stable").index[:N_GENES])


@cache
def part(name: str, scale: str) -> sd.SpatialData:
    """Some rows of the section: the maps "true" and "measured", and the low-resolution map "low" of the measured half."""
    (low, high), spec = ROWS[name], SCALES[scale]
    out = sd.SpatialData(images={"stains": halves().images["stains"]}, points=dict(halves().points.items()))
    for key in ("true", "measured"):
        bounds = (0, low, spec["width_um"], high)
        pp.rasterize(
            out,
            points_key=key,
            genes=genes(),
            bin_um=spec["bin_um"],
            bounds_um=bounds,
            mask_um=None,
            key_added=f"{key}_map",
        )
    pp.degrade(out, map_key="measured_map", factor=spec["factor"], key_added="low")
    return out


@cache
def gene_scale(scale: str) -> pd.Series:
    """Per gene, the 99.9th percentile of log1p counts in the training rows, at least log 2."""
    maps = [np.asarray(part(name, scale).images["true_map"]) for name in ("train_top", "train_bottom")]
    values = np.concatenate([np.log1p(m).reshape(len(m), -1) for m in maps], 1)
    return pd.Series(np.maximum(np.quantile(values, 0.999, axis=1), np.log(2)), index=genes())


def constant(name: str, scale: str) -> None:
    """The zero map, or the training mean of log1p counts, as a result in the test rows."""
    test = part("test", scale)
    value = np.zeros(N_GENES)
    if name == "mean":
        maps = [np.asarray(part(k, scale).images["true_map"]) for k in ("train_top", "train_bottom")]
        value = np.expm1(np.concatenate([np.log1p(m).reshape(len(m), -1) for m in maps], 1).mean(1))
    test.images["constant"] = test.images["true_map"] * 0 + value[:, None, None].astype(np.float32)


def run(
    scale: str,
    name: str,
    seed: int,
    *,
    consistency: bool,
    blind: bool = False,
    label: str | None = None,
    file: str | None = None,
    fit: dict,
    single: bool = False,
    **options,
) -> None:
    """One model on one scale, unless its JSON is there already; a model is fitted once for all ways to apply it.

    ``blind`` hides the low-resolution map when the model is applied; ``single`` scores the one sample as the prediction.
    """
    label = label or name
    suffix = "-blind" if blind else "" if consistency else "-free"
    file = RESULTS / (file or f"P4-{scale}-{label.replace(' ', '_')}-{seed}{suffix}.json")
    if file.exists():
        return
    RESULTS.mkdir(exist_ok=True)
    test, load = part("test", scale), os.getloadavg()[0]
    timing, record = {}, {}
    if name in MODELS:
        folder = MODELS_KEPT / f"P4-{scale}-{label.replace(' ', '_')}-{seed}"
        if folder.exists():
            model = models.load(folder)
        else:
            config = {k: SCALES[scale][k] for k in ("bin_um", "factor")} | fit.pop("config", {})
            model = MODELS[name](genes(), **config)
            train = {k: part(k, scale) for k in ("train_top", "train_bottom")}
            if model.needs_labels:
                for section in (*train.values(), part("validation", scale)):
                    section.labels["nuclei"] = nuclei()
            more = {"seed": seed, "progress": False, **fit} if name in FITTED else {}
            more |= {"labels_key": "nuclei"} if model.needs_labels else {}
            more |= {"prompt": PROMPT} if model.needs_text else {}
            start = time.perf_counter()
            tl.fit(model, train, map_key="true_map", image_key=None if not model.needs_image else "stains", low_res="low",
                   validation=part("validation", scale), **more)  # fmt: skip
            model.record["fit_s"] = time.perf_counter() - start
            if name in FITTED:
                model.save(folder)
        if model.needs_labels:
            test.labels["nuclei"] = nuclei()
        start = time.perf_counter()
        tl.superresolve(
            test, "stains", model=model, low_res=None if blind else "low", like="true_map", consistency=consistency, seed=seed,
            labels_key="nuclei" if model.needs_labels else None, keep_samples=model.stochastic, key_added="result", overwrite=True, progress=False, **options,
        )  # fmt: skip
        if single:
            test.images["result"] = test.images["result_samples"].assign_coords(c=test.images["result"].coords["c"])
        timing = {"fit_s": model.record.get("fit_s"), "predict_s": time.perf_counter() - start}
        record = {
            "config": model.config | {"genes": N_GENES},
            "steps_taken": (model.record["history"].get("step") or [0])[-1],
        }
    else:
        constant(name, scale)
    scores = tl.evaluate(
        test,
        key="result" if name in MODELS else "constant",
        truth_key="true_map",
        replicate_key="measured_map",
        low_res="low",
        gene_scale=gene_scale(scale),
    )
    content = {
        "protocol": f"P4 {scale}", "model": label + (" without map" if blind else ""), "seed": seed, "consistency": consistency and name in MODELS, **options,
        "stgen": stgen.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "load_before": load, "load_after": os.getloadavg()[0], **record, "scores": scores.summary.to_dict() | timing,
    }  # fmt: skip
    file.write_text(json.dumps(content, indent=1))
    print(file.name, scores.summary.round(4).to_dict(), flush=True)


def steps() -> None:
    """Few solver steps against many ancestral ones, on the same weights."""
    for solver, number in (("dpm++", 10), ("dpm++", 25), ("dpm++", 50), ("ddpm", 1000)):
        run("10x", "DiffST", 0, consistency=False, fit={}, single=True, n_samples=1, steps=number, solver=solver,
            file=f"steps-P4-10x-DiffST-0-{solver}-{number}.json")  # fmt: skip


def steps_table() -> pd.DataFrame:
    """The comparison of samplers in the results folder."""
    runs = [json.loads(file.read_text()) for file in RESULTS.glob("steps-P4-*.json")]
    columns = ["predict_s", "RMSE", "PCC", "SSIM", "RVD", "GSC"]
    rows = [{"sampler": r["solver"], "steps": r["steps"], **{c: r["scores"][c] for c in columns}} for r in runs]
    return pd.DataFrame(rows, columns=["sampler", "steps", *columns]).sort_values(["sampler", "steps"]).round(4)


def print_table(cells: pd.DataFrame) -> None:
    """Print a table as Markdown."""
    print("| " + " | ".join(cells.columns) + " |")
    print("|" + "---|" * len(cells.columns))
    for _, values in cells.iterrows():
        print("| " + " | ".join(values.astype(str)) + " |")


def table(ablations: bool = False) -> pd.DataFrame:
    """Mean (and spread over seeds, where there are several) of everything in the results folder, or of ablations."""
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("P4-*x-*.json"))]
    runs = [r for r in runs if (r["model"].removesuffix(" without map") not in {"zero", "mean", *MODELS}) == ablations]
    frame = pd.DataFrame([{**{k: r[k] for k in ("protocol", "model", "consistency")}, **r["scores"]} for r in runs])
    frame = frame.sort_values(["protocol", "PCC"], kind="stable")
    groups = frame.groupby(["protocol", "model", "consistency"], sort=False)
    mean, spread, count = groups.mean(numeric_only=True), groups.std(numeric_only=True), groups.size()
    cells = pd.DataFrame(index=mean.index, columns=[c for c in TABLE if c in mean], dtype=object)
    for row in cells.index:
        for column in cells:
            value = mean.loc[row, column]
            text = "" if np.isnan(value) else f"{value:.0f}" if column.endswith("_s") else f"{value:.4f}"
            cells.loc[row, column] = f"{text} ± {spread.loc[row, column]:.4f}" if text and count[row] > 1 else text
    return cells.reset_index()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*SCALES, "steps", []], default=[])
    parser.add_argument("--models", nargs="+", choices=["zero", "mean", *MODELS], default=["zero", "mean", *MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--n-samples", type=int, default=8)
    parser.add_argument("--sample-steps", type=int, default=25, help="of the sampler, in ablations")
    parser.add_argument("--fit-steps", type=int, help="training steps at most; the model's own by default")
    parser.add_argument("--ablations", action="store_true", help="the models with each of their modules off in turn")
    parser.add_argument("--table", action="store_true", help="print the table of all results as Markdown")
    arguments = parser.parse_args()
    fit = {} if arguments.fit_steps is None else {"steps": arguments.fit_steps}
    for scale in [what for what in arguments.what if what in SCALES]:
        if arguments.ablations:
            for name in [name for name in arguments.models if name in ABLATIONS]:
                for label, config in ABLATIONS[name].items():
                    label = f"{name} {label}" + (
                        "" if arguments.fit_steps is None else f", {arguments.fit_steps} steps"
                    )
                    for blind in (False, True) if name in BLIND else (False,):
                        run(scale, name, 0, label=label, consistency=False, blind=blind, n_samples=arguments.n_samples, steps=arguments.sample_steps,
                            fit={**fit, "config": config})  # fmt: skip
            continue
        for name in arguments.models:
            for seed in arguments.seeds if name in FITTED else [0]:
                ways = [{"consistency": False}, {"consistency": True}] if name in MODELS else [{"consistency": False}]
                if name in BLIND:
                    ways = [{"consistency": False, "blind": True}, *([] if "only" in name else ways)]
                for way in ways:
                    run(scale, name, seed, **way, n_samples=arguments.n_samples, fit=dict(fit))
    if "steps" in arguments.what:
        steps()
    if arguments.table or not arguments.what:
        print_table(table())
        print()
        print_table(steps_table())
        print()
        print_table(table(ablations=True))


if __name__ == "__main__":
    main()

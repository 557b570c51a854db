"""P1, P2, P3: expression of an unseen section from its histology, Stem beside the simple baselines.

    python benchmarks/expression.py P1 --scale norm --seeds 0 1 2
    python benchmarks/expression.py P2 P3 --scale norm raw
    python benchmarks/expression.py --table

Real sections are read from the folder named by STGEN_DATA (see stgen.datasets). Each run leaves one JSON in
benchmarks/results; runs that are there already are skipped, so that a table can be completed piece by piece.
Everything (genes, scales, penalties, number of steps) is decided on the training sections.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import pandas as pd
import torch

import stgen
from stgen import datasets, models, pp, tl

RESULTS = Path(__file__).parent / "results"
MODELS_KEPT = Path(__file__).parent / "runs"

PROTOCOLS = {
    "P1": {"reader": datasets.her2st, "train": ["C2", "C3", "C5"], "test": "C4", "n_genes": 300},
    "P2": {"reader": datasets.her2st, "train": ["C2", "C3", "C4", "C5"], "test": "B4", "n_genes": 300},
    "P3": {"reader": datasets.mouse_olfactory_bulb, "train": ["MOB1", "MOB2"], "test": "MOB3", "n_genes": 200},
}
SCALES = {"norm": "log1p_norm", "raw": "log1p_raw"}
MODELS = {
    "TrainingMean": models.TrainingMean,
    "LinearProbe": models.LinearProbe,
    "Retrieval": models.Retrieval,
    "Stem": models.Stem,
}
TABLE = ["PCC-10_oracle", "PCC-50_oracle", "PCC", "PCC-50_ranked", "MAE", "MSE", "RVD", "RVD_median", "RVD_sample",
         "RVD_sample_median", "GSC", "SSC", "coverage_90%", "CRPS", "fit_s", "predict_s"]  # fmt: skip

_sections: dict = {}


def section(reader, name: str):
    """A section with its texture embedding, read once."""
    if name not in _sections:
        sdata = reader(name)
        pp.embed(sdata, image_key="he")
        _sections[name] = sdata["spot_counts"]
    return _sections[name].copy()


def run(protocol: str, scale: str, model_name: str, seed: int, n_samples: int, steps: int) -> None:
    """One model on one protocol, unless its JSON is there already."""
    file = RESULTS / f"{protocol}-{scale}-{model_name}-{seed}.json"
    if file.exists():
        return
    spec = PROTOCOLS[protocol]
    train = {name: section(spec["reader"], name) for name in spec["train"]}
    test = section(spec["reader"], spec["test"])
    shared = set(test.var_names)
    ranked = pp.select_genes(
        train, 2 * spec["n_genes"], flavor="mean_var", transform=SCALES[scale], exclude=None, key_added=None
    )
    genes = [gene for gene in ranked if gene in shared][: spec["n_genes"]]
    model = MODELS[model_name](genes, embedding_dim=test.obsm["X_texture"].shape[1], transform=SCALES[scale])
    load = os.getloadavg()[0]
    start = time.perf_counter()
    tl.fit(model, train, seed=seed)
    fitted = time.perf_counter()
    tl.predict_expression(test, model=model, n_samples=n_samples, steps=steps, seed=seed, keep_samples=model.stochastic)
    predicted = time.perf_counter()
    scores = tl.evaluate(test, ranking=genes)
    model.save(MODELS_KEPT / file.stem)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "protocol": protocol, "scale": scale, "model": model_name, "seed": seed, "n_samples": n_samples, "steps": steps,
        "stgen": stgen.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "load_before": load, "load_after": os.getloadavg()[0], "config": model.config | {"genes": len(genes)},
        "steps_taken": (model.record["history"].get("step") or [0])[-1],
        "scores": scores.summary.to_dict() | {"fit_s": fitted - start, "predict_s": predicted - fitted},
    }  # fmt: skip
    file.write_text(json.dumps(content, indent=1))
    print(file.name, scores.summary.round(3).to_dict())


def table() -> pd.DataFrame:
    """Mean (and spread over seeds, where there are several) of everything in the results folder."""
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("P[123]-*.json"))]
    frame = pd.DataFrame([{**{k: r[k] for k in ("protocol", "scale", "model", "seed")}, **r["scores"]} for r in runs])
    groups = frame.groupby(["protocol", "scale", "model"], sort=False)
    mean, spread, count = groups.mean(numeric_only=True), groups.std(numeric_only=True), groups.size()
    cells = mean.astype(object)
    for row in mean.index:
        for column in mean:
            value = mean.loc[row, column]
            text = f"{value:.0f}" if column.endswith("_s") or abs(value) >= 100 else f"{value:.3f}"
            several = count[row] > 1 and row[2] == "Stem"
            cells.loc[row, column] = f"{text} ± {spread.loc[row, column]:.3f}" if several else text
    return cells[[c for c in TABLE if c in cells]].replace("nan", "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="*", choices=[*PROTOCOLS, []], default=[])
    parser.add_argument("--scale", nargs="+", choices=list(SCALES), default=list(SCALES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--n-samples", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--table", action="store_true", help="print the table of all results as Markdown")
    arguments = parser.parse_args()
    for protocol in arguments.protocols:
        for scale in arguments.scale:
            for name in arguments.models:
                for seed in arguments.seeds if name == "Stem" else [0]:
                    run(protocol, scale, name, seed, arguments.n_samples, arguments.steps)
    if arguments.table or not arguments.protocols:
        text = table()
        print("| " + " | ".join([*text.index.names, *text.columns]) + " |")
        print("|" + "---|" * (text.index.nlevels + len(text.columns)))
        for row, values in text.iterrows():
            print("| " + " | ".join([*row, *values.astype(str)]) + " |")


if __name__ == "__main__":
    main()

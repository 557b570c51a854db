"""Few steps against many: 25 steps of DPM-Solver++ and 1,000 of ancestral sampling, on the same weights.

    python benchmarks/sampling.py [MODEL_FOLDER]

Needs a model that benchmarks/expression.py left in benchmarks/runs (by default P1-norm-Stem-0). Writes one JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from stgen import datasets, models, pp, tl

RUNS = {"dpm++ 10": ("dpm++", 10), "dpm++ 25": ("dpm++", 25), "ddim 25": ("ddim", 25), "ddpm 1000": ("ddpm", 1000)}
N_SAMPLES = 10


def main() -> None:
    """Predict C4 with each sampler, time it, score it."""
    here = Path(__file__).parent
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "runs" / "P1-norm-Stem-0"
    model = models.load(folder)
    sdata = datasets.her2st("C4")
    pp.embed(sdata, image_key="he")
    table = sdata["spot_counts"]
    results = {}
    for name, (solver, steps) in RUNS.items():
        start = time.perf_counter()
        tl.predict_expression(table, model=model, solver=solver, steps=steps, n_samples=N_SAMPLES, key_added=solver,
                              keep_samples=True, overwrite=True)  # fmt: skip
        seconds = time.perf_counter() - start
        summary = tl.evaluate(table, key=solver).summary
        results[name] = {"seconds": seconds, **summary.to_dict()}
        print(name, f"{seconds:.1f} s", summary[["PCC", "MSE", "RVD", "RVD_sample", "GSC", "CRPS"]].round(4).to_dict())
    content = {
        "model": folder.name, "n_samples": N_SAMPLES, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "ratio_1000_to_25": results["ddpm 1000"]["seconds"] / results["dpm++ 25"]["seconds"], "results": results,
    }  # fmt: skip
    (here / "results" / f"sampling-{folder.name}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

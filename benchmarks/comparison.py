"""P1 and P2 by `tl.compare`: Stem beside the simple models over three seeds, and once more from what the first run left.

    python benchmarks/comparison.py P1 P2
    python benchmarks/comparison.py --table

Real sections are read from the folder named by STGEN_DATA (see stgen.datasets). The folder of each comparison stays in
benchmarks/runs/compare-P1 and so on; an interrupted one goes on where it stopped. The table of scores is kept in
benchmarks/results/compare-P1.csv, and compare-P1-repeat.json says whether a comparison that was given nothing but that folder
and the sections came to the same numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import pandas as pd
import torch

import stgen
from stgen import datasets, pp, tl

RESULTS = Path(__file__).parent / "results"
FOLDERS = Path(__file__).parent / "runs"
PROTOCOLS = {
    "P1": {"sections": ["C2", "C3", "C5", "C4"], "test": "C4", "allow_same_patient": True},
    "P2": {"sections": ["C2", "C3", "C4", "C5", "B4"], "test": "B4", "allow_same_patient": False},
}
MODELS = ["Stem", "LinearProbe", "Retrieval", "TrainingMean"]
TABLE = [
    "PCC-10_oracle",
    "PCC-50_oracle",
    "PCC",
    "PCC-50_ranked",
    "MSE",
    "RVD",
    "RVD_sample",
    "GSC",
    "coverage_90%",
    "CRPS",
]


def sections(names: list[str]) -> dict[str, object]:
    """Sections of HER2ST by name, with their texture embedding."""
    out = {}
    for name in names:
        sdata = datasets.her2st(name)
        pp.embed(sdata, image_key="he", progress=False)
        out[name] = sdata["spot_counts"]
    return out


def run(protocol: str) -> None:
    """Compare, then repeat from the folder alone, and say whether every number is the same."""
    spec = PROTOCOLS[protocol]
    data = sections(spec["sections"])
    first, again = FOLDERS / f"compare-{protocol}", FOLDERS / f"compare-{protocol}-again"
    file = RESULTS / f"compare-{protocol}-repeat.json"
    if file.exists():
        return
    shutil.rmtree(again, ignore_errors=True)
    table = tl.compare(
        MODELS, data, test=spec["test"], patients={name: name[0] for name in data}, genes=300, seeds=(0, 1, 2),
        allow_same_patient=spec["allow_same_patient"], gene_options={"flavor": "mean_var", "exclude": None}, folder=first,
        device="cpu", progress=False,
    )  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"compare-{protocol}.csv", index=False)
    start = time.perf_counter()
    repeated = tl.compare(first, data, folder=again, device="cpu", progress=False)
    same_weights = []
    for file in sorted(first.glob("runs/*/seed_*/scores.json")):
        other = json.loads((again / file.relative_to(first)).read_text())
        same_weights.append(json.loads(file.read_text())["weights_sha256"] == other["weights_sha256"])
    content = {
        "protocol": protocol, "identical_scores": repeated.equals(table), "runs": len(same_weights), "identical_weights": sum(same_weights),
        "repeat_s": time.perf_counter() - start, "stgen": stgen.__version__, "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    file.write_text(json.dumps(content, indent=1))
    print(content, flush=True)


def print_table() -> None:
    """Mean and standard deviation over seeds of each model, as Markdown."""
    columns = ["protocol", "model", "same patient", *TABLE]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for file in sorted(RESULTS.glob("compare-P?.csv")):
        groups = pd.read_csv(file).groupby("model", sort=False)
        for model, rows in groups:
            cells = [
                ""
                if rows[c].isna().all()
                else f"{rows[c].mean():.3f}" + (f" ± {rows[c].std():.3f}" if len(rows) > 1 else "")
                for c in TABLE
            ]
            print("| " + " | ".join([file.stem[-2:], model, str(rows["same_patient"].iloc[0]), *cells]) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="*", choices=[*PROTOCOLS, []], default=[])
    parser.add_argument("--table", action="store_true", help="print the table of all results as Markdown")
    arguments = parser.parse_args()
    for protocol in arguments.protocols:
        run(protocol)
    if arguments.table or not arguments.protocols:
        print_table()


if __name__ == "__main__":
    main()

"""Runs that are killed at any moment, and then asked for again: nothing is lost, nothing mixed, the result has the same bits.

Each run is a fork of one process that has imported everything and made its data, so that a hundred kills cost one import.
Where it is killed is either a moment of its time, or the n-th thing that it does to a file or folder (``sys.addaudithook``),
which finds the instants between two renames that no clock would.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
from damaged_folders import model_of
from small_world import FACTOR, fingerprint_of_model, quiet

from stgen import datasets, models, pp, tl
from stgen.data import SpotData

TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.move", "shutil.rmtree")


# -- jobs: begin from what was there, work, tell what there is -----------------------------------------------------------


class Save:
    """``model.save`` over an older model."""

    allowed = ("old", "new")

    def __init__(self) -> None:
        self.models = {word: model_of("Stem", seed).eval() for word, seed in (("old", 1), ("new", 2))}
        self.known = {fingerprint_of_model(model): word for word, model in self.models.items()}

    def begin(self, folder: Path) -> None:
        """The older model."""
        self.models["old"].save(folder / "model")

    def work(self, folder: Path) -> None:
        """Save the newer one in its place."""
        self.models["new"].save(folder / "model")

    def state(self, folder: Path) -> str:
        """Which of both is there."""
        return self.known.get(fingerprint_of_model(models.load(folder / "model")), "a mix")


class Fit:
    """``tl.fit`` with a checkpoint; what is left is judged by going on."""

    allowed = ("to be continued",)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        h = rng.normal(size=(30, 4)).astype(np.float32)
        self.data = SpotData(rng.poisson(3.0, (30, 3)).astype(np.float32), h, np.arange(30) // 5)

    def begin(self, folder: Path) -> None:
        """Nothing."""

    def work(self, folder: Path) -> None:
        """Fit, and save the model when it is done."""
        model = models.Stem(["A", "B", "C"], embedding_dim=4, width=8, depth=1, heads=2, genes_per_token=1)
        options = {"steps": 12, "batch_size": 4, "evaluate_every": 2, "progress": False, "device": "cpu"}
        model.fit(self.data, self.data.subset(np.arange(8)), checkpoint=folder / "checkpoint", **options)
        model.record = {"weights": model.weights_sha256()}
        model.save(folder / "done")

    def state(self, folder: Path) -> str:
        """The final weights, if it came that far."""
        if not (folder / "done").exists():
            return "to be continued"
        try:
            return f"weights {models.load(folder / 'done').weights_sha256()[:12]}"
        except FileNotFoundError:  # of the first save, before the weights had their name
            return "to be continued"


class Stream:
    """``tl.superresolve(store=)``, in windows, where a result of another call is in the store already."""

    allowed = ("old", "nothing")

    def __init__(self) -> None:
        self.sdata = datasets.simulated_section(seed=1, size_um=400, mpp=4.0, n_genes=6)
        self.genes = list(self.sdata["spot_counts"].var_names[:2])
        pp.rasterize(self.sdata, genes=self.genes, bin_um=10, bounds_um=(0, 0, 400, 400))
        pp.degrade(self.sdata, map_key="counts", factor=FACTOR)
        self.model = models.Interpolate(self.genes, factor=FACTOR)
        self.model.record = {"note": "has nothing to fit"}

    def begin(self, folder: Path) -> None:
        """An earlier result, of another gene."""
        self.stream(folder, self.genes[:1])

    def work(self, folder: Path) -> None:
        """Replace it."""
        self.stream(folder, self.genes)

    def stream(self, folder: Path, genes: list[str]) -> None:
        """Write maps of genes to the store."""
        options = {"low_res": f"counts_{FACTOR}x", "tile": 16, "batch_size": 1, "overwrite": True, "progress": False}
        tl.superresolve(self.sdata, genes=genes, model=self.model, store=folder / "maps.zarr", copy=True, **options)

    def state(self, folder: Path) -> str:
        """The genes of the map in the store, and its bits."""
        import spatialdata

        store = folder / "maps.zarr"
        if not store.exists():
            return "nothing"
        found = spatialdata.read_zarr(store).images["superresolved"]
        names = list(map(str, found.coords["c"].values))
        if names == self.genes[:1]:
            return "old"
        return f"maps {hashlib.sha256(np.asarray(found.data).tobytes()).hexdigest()[:12]}"


class Compare:
    """``tl.compare``, which goes on from the runs that are in its folder."""

    allowed = ("to be continued",)

    def __init__(self) -> None:
        from anndata import AnnData

        self.data = {}
        for seed, name in enumerate("ABC"):
            rng = np.random.default_rng(seed)
            table = AnnData(rng.poisson(3.0, (24, 6)).astype(np.float32))
            table.obs_names = [f"{name}{i}" for i in range(24)]
            table.var_names = [f"gene{i}" for i in range(6)]
            table.obsm.update(
                {"spatial": np.indices((4, 6)).reshape(2, -1).T * 100.0, "X_colors": rng.normal(size=(24, 3))}
            )
            table.uns["stgen"] = {"X_colors": {"function": "pp.embed", "model": "colors", "patch_um": 60.0}}
            self.data[name] = table

    def begin(self, folder: Path) -> None:
        """Nothing."""

    def work(self, folder: Path) -> None:
        """Compare two baselines with two seeds."""
        options = {
            "genes": list(self.data["A"].var_names[:3]),
            "n_samples": 2,
            "steps": 2,
            "seeds": (0, 1),
            "progress": False,
        }
        made = tl.compare(
            ["TrainingMean", "LinearProbe"],
            self.data,
            test="C",
            folder=folder / "runs",
            device="cpu",
            allow_same_patient=True,
            **options,
        )
        (folder / "table.part").write_text(made.to_csv())
        os.replace(folder / "table.part", folder / "table.csv")

    def state(self, folder: Path) -> str:
        """The table, if it came that far."""
        done = folder / "table.csv"
        return f"table {hashlib.sha256(done.read_bytes()).hexdigest()[:12]}" if done.exists() else "to be continued"


JOBS: dict[str, Callable[[], Any]] = {"save": Save, "fit": Fit, "streaming": Stream, "compare": Compare}


# -- kills ---------------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None], at_touch: int | None, place: Path, after_s: float | None) -> int:
    """Do the work in a process of its own, which is killed; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if at_touch is not None:
                _kill_at(at_touch, place)
            work()
            code = 0
        except BaseException:  # noqa: BLE001  a fork must end here
            traceback.print_exc()
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(n: int, place: Path) -> None:
    """End this process before the n-th thing that it does below a folder."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in TOUCHES and str(place) in str(arguments[:2]):
            seen += 1
            if seen > n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_touches(work: Callable[[], None], place: Path) -> tuple[int, float]:
    """How often a whole run touches its folder, and its seconds."""
    (Path(place) / "count").mkdir()
    report = Path(place).parent / "touches.json"
    start = time.monotonic()

    def counted() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            seen += event in TOUCHES and str(place) in str(arguments[:2])

        sys.addaudithook(hook)
        work()
        report.write_text(json.dumps(seen))

    if forked(counted, None, place, None):
        raise RuntimeError("the run fails although nobody kills it")
    shutil.rmtree(Path(place) / "count")
    return json.loads(report.read_text()), time.monotonic() - start


@dataclass(frozen=True)
class Outcome:
    """How a killed run ended: ``"resumed"``, or what must not be."""

    job: str
    moment: str
    word: str
    said: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was lost or mixed, and the same call came to the same bits."""
        return self.word == "resumed"

    def __str__(self) -> str:
        return f"{self.word:10} {self.job} {self.moment}: {self.said:.300}"


def run(name: str, n: int, folder: Path, report: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Kill a job ``n`` times, half at moments of its time and half at what it does to files, and ask for it again."""
    job = JOBS[name]()
    whole = folder / f"{name}-whole"
    whole.mkdir(parents=True)
    job.begin(whole)
    touches, seconds = count_touches(partial(job.work, whole), whole)
    right = job.state(whole)
    outcomes = []
    for number in range(n):
        place = folder / f"{name}-{number}"
        place.mkdir()
        job.begin(place)
        work = partial(job.work, place)
        share = (number // 2 + 0.5) / max(1, (n + 1) // 2)
        at = (
            {"at_touch": int(touches * share), "after_s": None}
            if number % 2 == 0
            else {"at_touch": None, "after_s": seconds * share}
        )
        moment = (
            f"touch {at['at_touch']} of {touches}" if number % 2 == 0 else f"{at['after_s']:.2f} of {seconds:.2f} s"
        )
        code = forked(work, place=place, **at)
        word, said = "resumed", ""
        try:
            left = job.state(place)
            if left not in (*job.allowed, right):
                word, said = "mixed", f"{left} after the kill"
        except Exception as error:  # noqa: BLE001  that is what is looked for
            word, said = "lost", f"{type(error).__name__}: {error}"
        if word == "resumed":
            again = forked(work, None, place, None)
            end = job.state(place) if again == 0 else "the same call fails"
            word, said = ("resumed", f"exit code {code}") if end == right else ("differs", f"{end} instead of {right}")
        outcomes.append(Outcome(name, moment, word, said))
        report(outcomes[-1])
        shutil.rmtree(place, ignore_errors=True)
    return outcomes


def run_all(
    n: int, report: Callable[[Outcome], None] = lambda outcome: None, names: tuple[str, ...] = tuple(JOBS)
) -> list[Outcome]:
    """Kill every job ``n`` times."""
    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, dask.config.set(scheduler="synchronous"), quiet():
        for name in names:
            outcomes += run(name, n, Path(folder), report)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """The figures of a run."""
    counts = Counter(outcome.word for outcome in outcomes)
    rows = [("kills", len(outcomes)), ("resumed to the same bits", counts["resumed"]), ("lost", counts["lost"]),
            ("mixed", counts["mixed"]), ("resumed to others, or not", counts["differs"])]  # fmt: skip
    return "\n".join(f"  {name:36}{n:7,}" for name, n in rows)


def main() -> int:
    """Kill every job 25 times, or as often as is asked for: ``python kills.py [N [JOB ...]]``."""

    def report(outcome: Outcome) -> None:
        print(outcome, flush=True)

    outcomes = run_all(int(sys.argv[1]) if sys.argv[1:] else 25, report, tuple(sys.argv[2:]) or tuple(JOBS))
    print(table(outcomes))
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

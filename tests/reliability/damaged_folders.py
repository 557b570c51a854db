"""Saved models that were damaged: each loads as what was saved, or is refused with an error that names the file.

Truncated files, flipped bits, edited values, swapped weights, renamed tensors, NaN, other types, sizes that would need
gigabytes: for every family, in today's format and in the first one, which had no checksums.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_world import TINY_MAPS, TINY_STEM, fingerprint_of_model

from stgen import models

GENES = ["A", "B", "C"]
FAMILIES: dict[str, dict[str, Any]] = {
    "C3Diff": {**TINY_MAPS, "width": 8, "code": 8, "control_widths": [8, 8]},
    "DiffST": {**TINY_MAPS, "width": 8, "mean_widths": [8, 8], "region": 4},
    "HaDMST": {
        **TINY_MAPS,
        "width": 8,
        "mean_widths": [8, 8],
        "text_dim": 16,
        "semantic_width": 8,
        "gene_width": 8,
        "token": 2,
    },
    "Interpolate": {"factor": 4},
    "KernelRegression": {},
    "LinearProbe": {"embedding_dim": 4},
    "PixelProbe": {"factor": 4},
    "RegressionUNet": TINY_MAPS,
    "Retrieval": {"embedding_dim": 4},
    "Stem": {"embedding_dim": 4, **TINY_STEM},
    "TrainingMean": {"embedding_dim": 4},
}
ODD: tuple[Any, ...] = (None, -1, 0, 10**9, 1e30, float("nan"), "x", "", [], {}, True, [1], [10**9] * 3)
SIZES = {"blocks", "code", "depth", "embedding_dim", "gene_width", "image_channels", "layers", "width"}
"""Arguments that decide how large weights are."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_MB = 500


def model_of(family: str, seed: int) -> models.Model:
    """A small model of a family with weights that a seed decides."""
    torch.manual_seed(seed)
    model = getattr(models, family)(GENES, **FAMILIES[family])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator))
    model.record = {"note": f"seed {seed}", "history": {"loss": [0.5, 0.25]}}
    return model


def as_format_1(folder: Path) -> None:
    """Rewrite ``config.json`` as the first version of the package did: without checksums and shapes."""
    entry = json.loads((folder / CONFIG).read_text())
    for key in ("format", "weights", "sha256"):
        entry.pop(key, None)
    (folder / CONFIG).write_text(json.dumps(entry, indent=1))


# -- damages: each changes a folder; those of FIRST also where nothing but the content itself shows it -------------------


def truncate(folder: Path, rng: np.random.Generator) -> None:
    """Cut off one of the files."""
    path = folder / rng.choice([CONFIG, WEIGHTS])
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])


def flip_bit(folder: Path, rng: np.random.Generator) -> None:
    """Change one bit of one of the files."""
    path = folder / rng.choice([CONFIG, WEIGHTS])
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def overwrite_bytes(folder: Path, rng: np.random.Generator) -> None:
    """Put random bytes where others were."""
    path = folder / rng.choice([CONFIG, WEIGHTS])
    content = bytearray(path.read_bytes())
    at, n = int(rng.integers(len(content))), int(rng.integers(1, 65))
    content[at : at + n] = rng.bytes(n)
    path.write_bytes(content)


def append_bytes(folder: Path, rng: np.random.Generator) -> None:
    """Add to the end of one of the files."""
    path = folder / rng.choice([CONFIG, WEIGHTS])
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 65))))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a nested JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def edit_value(folder: Path, rng: np.random.Generator) -> None:
    """Give one value of ``config.json`` another meaning, or take it out."""
    entry = json.loads((folder / CONFIG).read_text())
    chosen = list(places(entry))
    *path, last = chosen[rng.integers(len(chosen))]
    inner = entry
    for key in path:
        inner = inner[key]
    if rng.integers(4) == 0:
        del inner[last]
    else:
        inner[last] = ODD[rng.integers(len(ODD))]
    (folder / CONFIG).write_text(json.dumps(entry))


def remove_key(folder: Path, rng: np.random.Generator) -> None:
    """Take one of the necessary keys out of ``config.json``, or an argument of the constructor that has no default."""
    entry = json.loads((folder / CONFIG).read_text())
    key = rng.choice(["class", "config", "record", "genes"])
    (entry["config"] if key == "genes" else entry).pop(key)
    (folder / CONFIG).write_text(json.dumps(entry))


def no_content(folder: Path, rng: np.random.Generator) -> None:
    """``config.json`` is JSON of another kind, or none."""
    texts = ["null", "[1]", "3", "", "{}", '"x"', "[" * 100_000, "\x00", '{"class"']
    (folder / CONFIG).write_text(texts[rng.integers(len(texts))])


def other_class(folder: Path, rng: np.random.Generator) -> None:
    """The name of another class."""
    entry = json.loads((folder / CONFIG).read_text())
    names = [name for name in [*FAMILIES, "Nothing", "Model", "", "load"] if name != entry["class"]]
    entry["class"] = names[rng.integers(len(names))]
    (folder / CONFIG).write_text(json.dumps(entry))


def huge_size(folder: Path, rng: np.random.Generator) -> None:
    """A size that would need gigabytes, beside small weights."""
    entry = json.loads((folder / CONFIG).read_text())
    names = (
        sorted(SIZES & entry["config"].keys())
        if entry["class"] not in ("Interpolate", "KernelRegression", "TrainingMean", "Retrieval")
        else []
    )
    if not names:  # no size of these decides a shape
        names = ["genes"]
    name = names[rng.integers(len(names))]
    entry["config"][name] = int(10 ** rng.integers(6, 10))
    (folder / CONFIG).write_text(json.dumps(entry))


def remove_file(folder: Path, rng: np.random.Generator) -> None:
    """One of the files is missing."""
    (folder / rng.choice([CONFIG, WEIGHTS])).unlink()


def folder_for_file(folder: Path, rng: np.random.Generator) -> None:
    """A folder in place of a file."""
    path = folder / rng.choice([CONFIG, WEIGHTS])
    path.unlink()
    path.mkdir()


def swap_weights(folder: Path, rng: np.random.Generator) -> None:
    """The weights of another model of the family, or of another family."""
    name = json.loads((folder / CONFIG).read_text())["class"]
    other = name if rng.integers(2) else rng.choice([family for family in FAMILIES if family != name])
    shutil.copy(saved(other, 2) / WEIGHTS, folder / WEIGHTS)


def other_family(folder: Path, rng: np.random.Generator) -> None:
    """The weights of a model of another family."""
    name = json.loads((folder / CONFIG).read_text())["class"]
    shutil.copy(saved(rng.choice([family for family in FAMILIES if family != name]), 2) / WEIGHTS, folder / WEIGHTS)


def edit_tensor(folder: Path, rng: np.random.Generator) -> None:
    """One tensor has another name, type, shape, or is NaN, infinite, missing; or there is one too many."""
    weights = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    names = sorted(weights)
    floats = [name for name in names if weights[name].is_floating_point() and weights[name].numel()]
    kind = rng.integers(7)
    if not floats or kind == 0:
        weights["another"] = torch.zeros(2)
    else:
        name = floats[rng.integers(len(floats))]
        value = weights.pop(name)
        if kind == 1:
            weights[f"{name}_"] = value
        elif kind == 2:
            weights[name] = value.to(torch.float16 if value.dtype != torch.float16 else torch.float32)
        elif kind == 3:
            weights[name] = torch.cat([value.flatten(), torch.zeros(3)])
        elif kind in (4, 5):
            value.flatten()[rng.integers(value.numel())] = float("nan") if kind == 4 else float("inf")
            weights[name] = value
    save_file(weights, folder / WEIGHTS)


def extra_files(folder: Path, rng: np.random.Generator) -> None:
    """Files that are no part of the model, which do no harm; leftovers of a save that ended early too."""
    for name in rng.choice(
        ["README.md", "config.json.new", "model.safetensors.new", ".DS_Store", "old/config.json"], 2
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.bytes(9))


Damage = Callable[[Path, np.random.Generator], None]
ANY: tuple[Damage, ...] = (
    truncate, flip_bit, overwrite_bytes, append_bytes, edit_value, remove_key, no_content, other_class, huge_size, remove_file,
    folder_for_file, swap_weights, edit_tensor, extra_files,
)  # fmt: skip
FIRST: tuple[Damage, ...] = (
    remove_key,
    no_content,
    huge_size,
    remove_file,
    folder_for_file,
    other_family,
    edit_tensor,
    extra_files,
)
"""What shows although the first format has no checksums."""


# -- trials --------------------------------------------------------------------------------------------------------------

_SAVED: dict[tuple[str, int], tuple[Path, str]] = {}
_HOME = tempfile.TemporaryDirectory()


def saved(family: str, seed: int) -> Path:
    """The folder of a whole model."""
    if (family, seed) not in _SAVED:
        model = model_of(family, seed).eval()
        _SAVED[family, seed] = model.save(Path(_HOME.name) / f"{family}-{seed}"), fingerprint_of_model(model)
    return _SAVED[family, seed][0]


@dataclass(frozen=True)
class Outcome:
    """What became of a damaged folder: ``"refused"``, ``"same"``, or what must not be."""

    family: str
    damage: str
    first: bool
    number: int
    word: str
    said: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was refused in the package's words, or loaded as it was saved."""
        return self.word in ("refused", "same")

    def __str__(self) -> str:
        return f"{self.word:10} {self.family} {self.damage}{' format 1' * self.first} #{self.number}: {self.said:.200}"


def run(number: int, folder: Path) -> Outcome:
    """Damage a folder in a way that a number decides, and load it."""
    rng = np.random.default_rng(number)
    family = list(FAMILIES)[number % len(FAMILIES)]
    first = rng.random() < 0.3
    damage = (FIRST if first else ANY)[rng.integers(len(FIRST if first else ANY))]
    place = folder / f"model-{number}"
    shutil.copytree(saved(family, 1), place)
    if first:
        as_format_1(place)
    damage(place, rng)
    word, said = "same", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = models.load(place)
        if fingerprint_of_model(model) != _SAVED[family, 1][1]:
            word, said = "other", "another model than was saved"
    except (ValueError, FileNotFoundError) as error:
        word, said = ("refused" if place.name in str(error) else "unnamed"), f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001  that is what is looked for
        word, said = "foreign", f"{type(error).__name__}: {error}"
    shutil.rmtree(place)
    return Outcome(family, damage.__name__, first, number, word, said)


def run_all(n: int, report: Callable[[Outcome], None] = lambda outcome: None) -> tuple[list[Outcome], float]:
    """The first ``n`` damages, and the MB that loading has needed at most beyond what was in use."""
    for family in FAMILIES:
        models.load(saved(family, 1))
        saved(family, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(n):
            outcomes.append(run(number, Path(folder)))
            report(outcomes[-1])
    return outcomes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def table(outcomes: list[Outcome], mb: float) -> str:
    """The figures of a run."""
    counts = Counter(outcome.word for outcome in outcomes)
    rows = [("damaged model folders", len(outcomes)), ("refused by a named file", counts["refused"]),
            ("loaded as they were saved", counts["same"]), ("loaded as something else", counts["other"]),
            ("unrelated tracebacks", counts["foreign"]), ("file not named", counts["unnamed"]),
            ("MB of memory at most beyond", round(mb))]  # fmt: skip
    return "\n".join(f"  {name:36}{n:7,}" for name, n in rows)


def main() -> int:
    """Damage 2,000 folders, or as many as are asked for: ``python damaged_folders.py [N]``."""
    import sys

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # so that no machine is brought down

    def report(outcome: Outcome) -> None:
        if not outcome.ok:
            print(outcome, flush=True)

    outcomes, mb = run_all(int(sys.argv[1]) if sys.argv[1:] else 2000, report)
    print(table(outcomes, mb))
    return int(not all(outcome.ok for outcome in outcomes) or mb > MOST_MB)


if __name__ == "__main__":
    raise SystemExit(main())

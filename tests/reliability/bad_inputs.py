"""Bad input for every argument of every public function, made from the signatures.

For every argument the annotation says which values are wrong: NaN where a number belongs, text where a whole number does, a
name that is not there. A new function or argument is tried without anyone thinking of it; a new function only needs one
valid call in ``small_world.calls``. Each trial changes one argument of that call and asks

- for a ``KeyError``, ``TypeError``, ``ValueError``, ``FileNotFoundError`` or ``ImportError``,
- raised by the package itself, in words that name the argument,
- before any work: no pixel read, no module of a network run, within ten seconds,
- with the objects, the models and the disk as they were.

What is taken although it looks wrong stands in ``RIGHT``, each with its reason.
"""

from __future__ import annotations

import collections.abc
import hashlib
import inspect
import math
import os
import resource
import signal
import socket
import time
import traceback
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
from dask.callbacks import Callback
from small_world import World, calls, quiet

import stgen
from stgen import datasets, io, models, pl, pp, tl, train

SPACES = {"datasets": datasets, "io": io, "models": models, "pl": pl, "pp": pp, "tl": tl}
RESULTS = (
    "pp.AlignmentReport",
    "tl.GeneCorrelation",
    "tl.Scores",
    *(f"models.{name}" for name in models.__all__ if "Options" in name),
)
"""Classes that functions make and users do not, and those whose fields are options of another."""

LIMIT_S = 10
NEW_NAMES = ("key_added", "table_key_added")
REFUSALS = (KeyError, TypeError, ValueError, FileNotFoundError, ImportError)
NAN, INF = math.nan, math.inf


# -- what is public, and what it takes -----------------------------------------------------------------------------------


def public() -> dict[str, Callable[..., Any]]:
    """Every public function and every class that a user makes, by name."""
    found = {f"{space}.{name}": getattr(module, name) for space, module in SPACES.items() for name in module.__all__}
    return {name: one for name, one in found.items() if name not in RESULTS and not inspect.isabstract(one)}


def arguments(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The annotation, resolved, and the default of every argument; of the training loop too, where it is reached."""
    inner = inspect.unwrap(function.__init__ if isinstance(function, type) else function)
    found = {}
    for name, parameter in inspect.signature(inner).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and function is tl.fit:
            options = arguments(train.fit)
            found |= {
                option: options[option] for option in options if option not in ("model", "train", "validation", "seed")
            }
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD and isinstance(function, type):
            found |= options_of(function)
        elif name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            found[name] = resolved(parameter.annotation, inner), parameter.default
    return found


def options_of(model: type) -> dict[str, tuple[Any, Any]]:
    """The options of a family of models, which are the fields of a dataclass of their own; None is the preset's value."""
    options = getattr(models, f"{model.__name__}Options", None)
    hints = typing.get_type_hints(options) if options else {}
    return {name: (hints[name], None) for name in hints}


class Unseen(dict):
    """Names of a module; one that only the type checker imports stands for a class that nothing is of."""

    def __missing__(self, name: str) -> Any:
        builtin = __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
        return builtin.get(name) or type(name, (), {})


def resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """An annotation as a type."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {}, Unseen(function.__globals__))
    except AttributeError:  # pd.DataFrame, where only the type checker imports pandas
        return Any


def members(kind: Any) -> list[Any]:
    """The kinds that a union is made of."""
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


# -- what is wrong for a kind --------------------------------------------------------------------------------------------

WRONG_WHOLE = {"0": 0, "-1": -1, "1e30": 10**30, "1.5": 1.5, "nan": NAN, "inf": INF}
WRONG_NUMBER = {"0": 0.0, "-1": -1.0, "1e30": 1e30, "nan": NAN, "inf": INF, "-inf": -INF}
WRONG_TEXT = {"empty": "", "absent": "absent"}
WRONG_NEW_NAMES = {"empty": "", "300 letters": "x" * 300, "path": "../x", "space": "a b", "__x": "__x"}
WRONG_NAMES = {"none of them": [], "[absent]": ["absent"], "[1]": [1], "[None]": [None], "['']": [""], "[nan]": [NAN]}
ODD = {"None": None, "True": True, "text": "x", "3": 3, "[]": [], "{}": {}, "b''": b"x", "{1}": {1}, "object": object()}
"""Values that are of another kind than most arguments."""


def is_of(value: Any, kind: Any) -> bool:
    """Whether an odd value is nothing odd for one of the kinds of an argument."""
    origin = get_origin(kind) or kind
    if kind is type(None) or value is None:
        return kind is type(None) and value is None
    if kind is Any:
        return True
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float)
    if origin is Literal:
        return value in get_args(kind)
    if origin is tuple or (
        isinstance(origin, type) and issubclass(origin, collections.abc.Sequence) and origin is not str
    ):
        return isinstance(value, list)
    if isinstance(origin, type):
        return isinstance(value, origin)
    return False


def wrong_values(argument: str, kind: Any, default: Any) -> dict[str, Any]:
    """Values that an argument of this annotation cannot mean, by a name for the report."""
    kinds = members(kind)
    found = {name: value for name, value in ODD.items() if not any(is_of(value, one) for one in kinds)}
    if default is None:
        found.pop("None", None)
    for one in kinds:
        found |= WRONG_NEW_NAMES if argument in NEW_NAMES and one is str else _wrong_of_one(one, kinds)
    return found


def _wrong_of_one(kind: Any, kinds: list[Any]) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is int:
        return {k: v for k, v in WRONG_WHOLE.items() if not (float in kinds and isinstance(v, float))}
    if kind is float:
        return WRONG_NUMBER
    if kind is str or kind in (Path, os.PathLike):
        return WRONG_TEXT
    if origin is Literal:
        return {"absent": "absent", "empty": ""}
    if origin is tuple:
        many = inner[-1] is Ellipsis
        n = 1 if many else len(inner)
        return {
            "nans": (NAN,) * n,
            "texts": ("x",) * n,
            "one more": (1.0,) * (n + 1),
            "reversed": tuple(range(n, 0, -1)),
        }
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return {"{}": {}, "{absent: absent}": {"absent": "absent"}, "{1: 1}": {1: 1}, "{'a': nan}": {"a": NAN}}
    if isinstance(origin, type) and issubclass(origin, collections.abc.Sequence):
        if inner == (str,) or str in members(inner[0]):
            return WRONG_NAMES | ({} if str in kinds else {"a string": "EPCAM"})
        if inner[0] in (int, float):
            return {"[nan]": [NAN], "[-1]": [-1], "['x']": ["x"], "[True]": [True], "[]": []}
        return {"[1]": [1], "['x']": ["x"], "[]": []}
    return {}


# -- what is right although it looks wrong -------------------------------------------------------------------------------

RIGHT: dict[str, tuple[str, ...]] = {
    "*.seed": ("0",),
    "*.validation": ("0",),  # none is held out
    "*.lr": ("0", "1e30"),  # nothing is learned, or what diverges: which is said when it does
    "*.weight_decay": ("0", "1e30"),
    "*.max_grad_norm": ("1e30",),  # no limit
    "*.mask_um": ("0",),  # only bins with molecules
    "*.min_covered": ("0",),
    "*.min_tissue": ("0",),
    "*.resolution": ("1e30",),  # each bin a domain
    "*.temperature": ("1e30",),  # all types alike
    "*.threshold": ("1e30",),  # no nuclei
    "*.channel": ("0",),
    "*.exclude": ("empty", "absent"),  # any text is a pattern
    "*.num_workers": ("0",),
    "*.ema_decay": ("0",),  # no average
    "tl.compare.folder": ("absent",),  # is made
    "tl.compare.gene_options": ("{}",),
    "tl.fit.checkpoint": ("absent",),  # is made
    "tl.fit.steps": ("None",),  # the preset's
    "tl.fit.batch_size": ("None",),
    "*.title": ("empty", "absent"),
    "*.fill": ("0", "1e30"),  # a value like any other
    "*.alpha": ("0",),
    "*.guidance": ("0", "1e30"),
    "*.p_unconditional": ("0",),
    "*.p_missing": ("0",),
    "*.attention": ("reversed",),  # levels in any order
    "*.text_encoder": ("absent",),  # looked for when a prompt is embedded
    "*.px_per_bin": ("None",),  # what the size of a bin asks for
    "pl.samples.location": ("0", "-1"),
}
"""``"function.argument"`` with ``*`` for any function: names of values that are taken or may be, each with its reason."""


def is_right(trial: Trial) -> bool:
    """Whether a value of a trial is one that the function is right to take."""
    if trial.argument.endswith("_weight") and trial.label in (
        "0",
        "1e30",
    ):  # a term is left out, or nothing else counts
        return True
    if trial.function.startswith("models.") and trial.argument == "genes" and trial.label == "[absent]":  # any names
        return True
    keys = (f"{trial.function}.{trial.argument}", f"{trial.name}.{trial.argument}", f"*.{trial.argument}")
    return any(trial.label in RIGHT.get(key, ()) for key in keys)


# -- trials --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One argument of one valid call, with a value that is wrong."""

    name: str
    argument: str
    label: str
    value: Any = field(compare=False)

    @property
    def function(self) -> str:
        """The public name, without the way in which it is called."""
        return self.name.split("/")[0]

    def __str__(self) -> str:
        return f"{self.name}({self.argument}={self.label})"


def trials() -> list[Trial]:
    """All trials: every wrong value of every argument of every valid call."""
    functions = public()
    found = []
    for name in calls():
        for argument, (kind, default) in arguments(functions[name.split("/")[0]]).items():
            for label, value in wrong_values(argument, kind, default).items():
                found.append(Trial(name, argument, label, value))
    return found


def quick_trials(share: int = 12) -> list[Trial]:
    """One in ``share`` of all, the same every time, and at least one for each argument."""
    chosen, seen = [], set()
    for trial in trials():
        place = (trial.name, trial.argument)
        first = place not in seen
        if first or int(hashlib.sha256(str(trial).encode()).hexdigest(), 16) % share == 0:
            chosen.append(trial)
            seen.add(place)
    return chosen


# -- how a trial ends ----------------------------------------------------------------------------------------------------

FAULTS = ("accepted", "foreign", "unnamed", "after work", "slow", "changed")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: ``"refused"``, ``"right"``, or one or more of :data:`FAULTS`, and what was said."""

    trial: Trial
    words: tuple[str, ...]
    said: str
    seconds: float
    changed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it ended as it must."""
        return not set(self.words) & set(FAULTS)


class Work(Callback):
    """Counts what a call must not begin before it has looked at its arguments."""

    def __init__(self) -> None:
        super().__init__(start=self._began)
        self.began = 0

    def _began(self, *_: Any) -> None:
        self.began += 1


class TooLong(BaseException):
    """A call took longer than it may; no exception that a function would catch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End what takes longer, in seconds of the processor: others may use this machine too."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def no_network() -> Iterator[None]:
    """Refuse connections: a bad argument is no reason to ask for anything."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("a trial asked for the network")

    before = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        socket.socket.connect = before  # type: ignore[method-assign]


def raised_here(error: BaseException) -> bool:
    """Whether an error is the package's own: raised in its files, or by the call of a function in them."""
    frames = traceback.extract_tb(error.__traceback__)
    home = str(Path(stgen.__file__).parent)
    return bool(frames) and frames[-1].filename.startswith(home)


def called(function: Callable[..., Any], options: dict[str, Any], work: Work) -> BaseException | None:
    """The error of a call, or None."""
    network = torch.nn.modules.module.register_module_forward_pre_hook(work._began)
    try:
        with work, at_most(LIMIT_S), no_network():
            function(**options)
    except (Exception, TooLong) as error:  # noqa: BLE001  whatever it is, it is the result of the trial
        return error
    finally:
        network.remove()
    return None


def named(argument: str, text: str) -> bool:
    """Whether a text names an argument, as it is written or in words: coordinate_system, the coordinate system."""
    return argument in text or argument.replace("_", " ") in text or argument.removesuffix("s") in text.split("`")


def run(trial: Trial, world: World, before: dict[str, str]) -> Outcome:
    """Make the call with the wrong value, and see what became of it."""
    options = calls()[trial.name](world) | {trial.argument: trial.value}
    work, start = Work(), time.process_time()
    error = called(public()[trial.function], options, work)
    seconds = time.process_time() - start
    said = "" if error is None else f"{type(error).__name__}: {error}"
    after = world.fingerprint()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if is_right(trial):
        return Outcome(trial, ("right",), said, seconds, tuple(changed))
    words = []
    if isinstance(error, TooLong):
        words.append("slow")
    elif error is None:
        words.append("accepted")
    else:
        if not isinstance(error, REFUSALS) or not raised_here(error):
            words.append("foreign")
        if not named(trial.argument, str(error)):
            words.append("unnamed")
        if work.began:
            words.append("after work")
    if changed and error is not None:
        words.append("changed")
        said += f" | changed: {', '.join(changed[:4])}"
    return Outcome(trial, tuple(words) or ("refused",), said, seconds, tuple(changed))


def run_all(
    chosen: list[Trial], folder: Path, report: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Run trials one after the other in an empty folder of their own."""
    import matplotlib.pyplot as plt

    (folder / "files").mkdir(parents=True)
    home = Path.cwd()
    outcomes = []
    with quiet():
        world = World(folder / "files")
        before = world.fingerprint()
        (folder / "cwd").mkdir()
        os.chdir(folder / "cwd")
        try:
            for trial in chosen:
                outcome = run(trial, world, before)
                plt.close("all")
                outcomes.append(outcome)
                report(outcome)
                if outcome.changed:
                    world = renewed(world)
                    before = world.fingerprint()
        finally:
            os.chdir(home)
    return outcomes


def renewed(world: World) -> World:
    """The world as it was; a new one where a model or a file has changed."""
    import shutil

    world.renew()
    for path in list(world.folder.iterdir()):
        if path != world.saved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return World(world.folder) if any(not model.record for model in (world.probe, world.stem)) else world


def table(outcomes: list[Outcome]) -> str:
    """The figures of a run."""
    counts = Counter(word for outcome in outcomes for word in outcome.words)
    rows = [
        ("bad inputs", len(outcomes)),
        ("right to take", counts["right"]),
        ("refused as they must be", counts["refused"]),
    ]
    rows += [("accepted silently", counts["accepted"]), ("unrelated tracebacks", counts["foreign"]),
             ("argument not named", counts["unnamed"]), ("after work", counts["after work"]),
             (f"above {LIMIT_S} s", counts["slow"]), ("objects, models or files changed", counts["changed"])]  # fmt: skip
    return "\n".join(f"  {name:36}{n:7,}" for name, n in rows)


def main() -> int:
    """Run one in ``SHARE`` (all) of those whose name contains a word: ``python bad_inputs.py [SHARE [WORD ...]]``."""
    import sys
    import tempfile

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # so that no machine is brought down
    share, *words = sys.argv[1:] or ["1"]
    chosen = quick_trials(int(share)) if share != "1" else trials()
    chosen = [trial for trial in chosen if not words or any(word in str(trial) for word in words)]

    def report(outcome: Outcome) -> None:
        if not outcome.ok:
            print(f"{','.join(outcome.words):24} {outcome.trial}  {' '.join(outcome.said.split())[:230]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all(chosen, Path(folder) / "trials", report)
    print(table(outcomes))
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

"""What is to be compared: models, sections, genes and seeds, checked and as JSON values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from inspect import isabstract, isclass, signature
from typing import Any

import numpy as np

from stgen import models as families
from stgen import train as training
from stgen.models import Model
from stgen.tl.fitting.fit import Data
from stgen.train import Trainable
from stgen.transforms import TransformName, unit

__all__ = ["PLAN", "check_sections", "construct", "is_random", "is_stepped", "make_plan", "specs_of"]

PLAN = ("models", "train", "test", "patients", "same_patient", "genes", "genes_chosen", "transform", "seeds", "n_samples",
        "steps", "solver")  # fmt: skip
EXPORTED = {name: getattr(families, name) for name in families.__all__}
KNOWN = {name: cls for name, cls in EXPORTED.items() if isclass(cls) and issubclass(cls, Model) and not isabstract(cls)}
FIT_OPTIONS = {p.name for p in signature(training.fit).parameters.values() if p.kind == p.KEYWORD_ONLY}
FIT_OPTIONS -= {"seed", "device", "progress", "checkpoint"}  # which the comparison sets itself


def make_plan(
    models: Any,
    data: Mapping[str, Data],
    *,
    test: str | Sequence[str] | None,
    patients: Mapping[str, str | int] | None,
    allow_same_patient: bool,
    genes: int | Sequence[str],
    gene_options: Mapping[str, Any] | None,
    transform: TransformName,
    seeds: Sequence[int],
    n_samples: int,
    steps: int,
    solver: str,
) -> dict[str, Any]:
    """All choices as JSON values, in an order that does not depend on that of the sections and seeds."""
    if test is None or not len(test):
        raise ValueError("name the section to test on, or several: test=<names in `data`>.")
    test = sorted({test} if isinstance(test, str) else set(test))
    check_sections(data, test)
    train = sorted(set(data) - set(test))
    if not train:
        raise ValueError(f"every section is a test section ({', '.join(test)}), and none is left to train on.")
    same_patient = _same_patient(train, test, patients, allow_same_patient)
    seeds = np.ravel(seeds).tolist()
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"`seeds` must be different whole numbers of at least 0, such as (0, 1, 2); found {seeds}.")
    chosen = None
    if isinstance(genes, int | np.integer):
        genes = int(genes)
        chosen = {"n": genes, **(gene_options or {})}
        unknown = set(chosen) - {"n", "flavor", "groupby", "exclude", "transform"}
        if unknown:
            raise ValueError(
                f"`gene_options` takes flavor, groupby, exclude and transform, found {', '.join(sorted(unknown))}."
            )
    elif isinstance(genes, str) or gene_options:
        raise ValueError("`genes` must be a number, or a list of names, which takes no `gene_options`.")
    else:
        genes = list(map(str, genes))
    for name, value in (("n_samples", n_samples), ("steps", steps), *((("genes", genes),) if chosen else ())):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, found {value!r}.")
    unit(transform)
    return {
        "models": models, "train": train, "test": test, "same_patient": same_patient,
        "patients": None if patients is None else {name: str(patients[name]) for name in [*train, *test]},
        "genes": genes, "genes_chosen": chosen, "transform": transform, "seeds": sorted(seeds), "n_samples": n_samples,
        "steps": steps, "solver": solver,
    }  # fmt: skip


def check_sections(data: Mapping[str, Data], names: Sequence[str], *, others: bool = True) -> None:
    """Refuse data that are no named sections, that lack one, or that have one too many."""
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise TypeError('`data` must be a mapping of names to sections, such as {"A": adata_a, "B": adata_b}.')
    found = f"`data` has the sections {', '.join(map(repr, data)) or 'none'}"
    missing = [name for name in names if name not in data]
    if missing:
        raise KeyError(f"{found}; there is no {', '.join(map(repr, missing))}.")
    if not others and len(data) > len(names):
        raise KeyError(f"{found}; the comparison is of {', '.join(map(repr, names))} only.")


def _same_patient(
    train: list[str], test: list[str], patients: Mapping[str, str | int] | None, allowed: bool
) -> dict[str, bool | None]:
    """For each test section, whether its patient is trained on; ``None`` if that is not known. Refused unless allowed."""
    if patients is None:
        if allowed:
            return dict.fromkeys(test)
        entries = ", ".join(f"{name!r}: ..." for name in [*train, *test])
        raise ValueError(
            f"a fair test is on tissue of another patient: pass patients={{{entries}}}, or allow_same_patient=True if "
            "it is not known whose tissue it is."
        )
    missing = [name for name in [*train, *test] if name not in patients]
    if missing:
        raise KeyError(f"`patients` has no entry for {', '.join(map(repr, missing))}; each section needs one.")
    trained_on = {str(patients[name]): name for name in train}
    same: dict[str, bool | None] = {name: str(patients[name]) in trained_on for name in test}
    if any(same.values()) and not allowed:
        name = next(name for name in test if same[name])
        patient = str(patients[name])
        raise ValueError(
            f"patient {patient!r} stands on both sides of the split: {trained_on[patient]!r} is trained on, {name!r} "
            "tested on. Test on another patient, or pass allow_same_patient=True, and the table will say so."
        )
    return same


def specs_of(models: Any) -> dict[str, dict[str, Any]]:
    """Label -> name of the model, configuration, options of its fit; every name known, all of it JSON."""
    named = models if isinstance(models, Mapping) else dict(zip(models, models, strict=True))
    if not named or len(named) < len(models) or len({str(label).lower() for label in named}) < len(named):
        raise ValueError(f"`models` must hold at least one model, and each label once; found {list(models)}.")
    return {label: _spec(label, given) for label, given in named.items()}


def _spec(label: Any, given: Any) -> dict[str, Any]:
    if not isinstance(given, str | Mapping):
        raise TypeError(
            "`models` takes names, or labels with names and configurations, such as "
            f'{{"wide": {{"model": "Stem", "config": {{"width": 96}}}}}}: all are constructed on the genes that the '
            f"comparison chooses. Found {type(given).__name__}."
        )
    if not isinstance(label, str) or not re.fullmatch(r"\w([\w.,+()= -]*[\w)])?", label):
        raise ValueError(f"a label names a folder: letters, digits and any of .,+()=- inside; found {label!r}.")
    spec: dict[str, Any] = {"model": None, "config": {}, "fit": {}}
    spec |= {"model": given} if isinstance(given, str) else given
    cls, names = KNOWN.get(spec["model"]), ", ".join(name for name, cls in KNOWN.items() if cls.takes == "locations")
    if cls is None:
        raise ValueError(f'model {label!r}: "model" must be one of {names}; found {spec["model"]!r}.')
    if cls.takes != "locations":
        raise ValueError(
            f"model {label!r}: {cls.__name__} makes maps, and models of locations are compared here: {names}. Fit it "
            "with stgen.tl.fit(model, data, map_key=...), and score its maps with stgen.tl.evaluate(..., "
            "truth_key=...)."
        )
    allowed = {"validation"} | (FIT_OPTIONS if is_stepped(cls) else set())
    unknown = [f'"{name}"' for name in set(spec) - {"model", "config", "fit"}]
    unknown += [f'"{name}" of "fit"' for name in set(spec["fit"]) - allowed]
    unknown += [f'"{name}" of "config"' for name in {"genes", "embedding_dim", "transform"} & set(spec["config"])]
    if unknown:
        raise ValueError(
            f'model {label!r} takes "model", "config" (without genes, embedding_dim and transform, which are the same '
            f'for all) and "fit" ({", ".join(sorted(allowed))}); found {", ".join(sorted(unknown))}.'
        )
    try:
        return json.loads(json.dumps(spec, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"model {label!r}: its configuration must be JSON values: {error}.") from error


def is_random(spec: Mapping[str, Any]) -> bool:
    """Whether another seed gives another fit or other samples."""
    cls = KNOWN[spec["model"]]
    return cls.stochastic or is_stepped(cls)


def is_stepped(cls: type[Model]) -> bool:
    """Whether a model is trained in steps, with a checkpoint and a progress bar."""
    return issubclass(cls, Trainable)


def construct(label: str, content: Mapping[str, Any], embedding_dim: int) -> Model:
    """A new model, as the comparison describes the one with this label."""
    spec = content["models"][label]
    shared = {"embedding_dim": embedding_dim, "transform": content["transform"]}
    return KNOWN[spec["model"]](genes=content["genes"], **shared, **spec["config"])

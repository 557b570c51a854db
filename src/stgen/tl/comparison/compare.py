"""Several models on the same sections, genes, embedding and scores."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from inspect import isabstract, isclass, signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from tqdm.auto import tqdm

from stgen import models as families
from stgen import train as training
from stgen._spatial.tables import embedding_record, expression
from stgen.models import Model
from stgen.models._base import SteppedModel
from stgen.tl.comparison.data import ELSEWHERE, choose_genes, hashes, named, own_tables
from stgen.tl.evaluation.evaluate import evaluate
from stgen.tl.evaluation.scores import Scores
from stgen.tl.fitting.fit import Data, Source, fit, gather, hold_out
from stgen.tl.prediction.predict import predict_expression
from stgen.transforms import TransformName, unit

__all__ = ["compare"]

logger = logging.getLogger("stgen")

PLAN = ("models", "train", "test", "patients", "same_patient", "genes", "genes_chosen", "transform", "seeds", "n_samples",
        "steps", "solver")  # fmt: skip
KNOWN = {name: getattr(families, name) for name in families.__all__}
KNOWN = {name: cls for name, cls in KNOWN.items() if isclass(cls) and issubclass(cls, Model) and not isabstract(cls)}
FIT_OPTIONS = {p.name for p in signature(training.fit).parameters.values() if p.kind == p.KEYWORD_ONLY}
FIT_OPTIONS -= {"seed", "device", "progress", "checkpoint"}  # which the comparison sets itself


def compare(
    models: Sequence[str] | Mapping[str, str | Mapping[str, Any]] | str | Path,
    data: Mapping[str, Data],
    *,
    folder: str | Path,
    test: str | Sequence[str] | None = None,
    patients: Mapping[str, str] | None = None,
    allow_same_patient: bool = False,
    genes: int | Sequence[str] = 200,
    gene_options: Mapping[str, Any] | None = None,
    transform: TransformName = "log1p_norm",
    seeds: Sequence[int] = (0,),
    n_samples: int = 20,
    steps: int = 25,
    solver: Literal["dpm++", "ddim", "ddpm"] = "dpm++",
    embedding_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare models that predict expression from histology: same split, genes, embedding and scores, several seeds.

    Each model is fitted on the training sections (:func:`stgen.tl.fit`), predicts the test sections
    (:func:`stgen.tl.predict_expression`) and is scored there (:func:`stgen.tl.evaluate`). Genes, scales and the number of
    training steps are decided on the training sections; of the test sections only the names of their genes are looked at
    before. Report the simple models beside the others: ``["Stem", "LinearProbe", "Retrieval", "TrainingMean"]``.

    The folder holds all that it takes to repeat the comparison. The same call continues one that was interrupted, also in
    the middle of a fit, and only reads one that is complete. A comparison is repeated from its folder by
    ``compare(folder, data, folder=another)``; with the same versions on the same CPU, every number is the same.

    Parameters
    ----------
    models
        Names of models of locations, such as ``"Stem"`` or ``"LinearProbe"``; or a mapping from labels to names or to
        ``{"model": "Stem", "config": {"width": 96}, "fit": {"steps": 3000}}``, JSON values all: ``"config"`` for the
        constructor (``genes``, ``embedding_dim`` and ``transform`` are the same for all and not part of it), ``"fit"`` for
        :func:`stgen.tl.fit` (``validation``, and the options of :func:`stgen.train.fit` of models that train in steps). Or
        the folder of an earlier comparison, to repeat it: then everything but ``data``, where things are in it, ``folder``,
        ``device`` and ``progress`` is taken from there.
    data
        Sections by name, each with counts and the same histology embedding (:func:`stgen.pp.embed`). Those that are not in
        ``test`` are trained on. To repeat a comparison, save the embeddings with the sections: another machine may compute
        other last digits, and data that differ are refused.
    folder
        Where the results go; made if need be. It is new or empty, or holds this same comparison.
    test
        Name of the test section, or of several, each of which is scored by itself.
    patients
        Patient of each section. A model that has seen a patient's tissue is not tested on a new one.
    allow_same_patient
        Allow sections of one patient on both sides, or leave ``patients`` out; the table then says so.
    genes
        How many genes to choose by :func:`stgen.pp.select_genes` on the training sections, of those that the test sections
        measure too; or a list, best first, that was chosen on training tissue. Its order is what PCC-10 and PCC-50 "ranked" go by.
    gene_options
        Options of :func:`stgen.pp.select_genes`: ``flavor``, ``groupby``, ``exclude``, ``transform``.
    transform
        Scale on which all models are fitted and scored, see :func:`stgen.transforms.transform_counts`.
    seeds
        Random seeds. A model with no randomness in its fit or its samples runs once, with the smallest.
    n_samples, steps, solver
        Samples of each location, and their sampler, see :func:`stgen.tl.predict_expression`.
    embedding_key, table_key, layer
        The embedding in ``obsm``, by default the one that :func:`stgen.pp.embed` recorded; the table, needed only where
        there are several; the layer with the counts, by default ``X``.
    device
        ``"cpu"``, ``"cuda"``, ...; by default the best there is.
    progress
        Show progress bars.

    Returns
    -------
    One row per model, seed and test section. ``"model"`` (the label), ``"seed"``, ``"section"``, ``"same_patient"`` (whether
    tissue of the section's patient was trained on, nullable boolean; missing without ``patients``), then a column for each score
    of the ``summary`` of :func:`stgen.tl.evaluate`, on the scale ``transform``; NaN for scores that a model does not have.
    ``table.groupby("model")["PCC"].agg(["mean", "std"])`` averages over seeds, ``table.melt(["model", "seed", "section"], ["PCC",
    "GSC"])`` makes the long form. Written to ``folder``, models as safetensors, all else as text:

    - ``comparison.json``: models and their configuration, split, patients, gene list, seeds, sampler, hashes of the data,
      versions and device
    - ``scores.csv``: the table
    - ``runs/<label>/seed_<seed>/scores.json``: for each test section ``"summary"`` and, gene by gene, ``"genes"``; the hash of the
      weights, seconds that fit and prediction took, versions and device
    - ``runs/<label>/seed_<seed>/model``: the fitted model, for :func:`stgen.models.load`; ``checkpoint`` beside it while it is fitted

    Raises
    ------
    FileNotFoundError
        If ``models`` is a folder without a comparison.
    KeyError
        If a section, an embedding, a layer or a gene is missing.
    TypeError
        If models or sections are given in another form.
    ValueError
        If a patient stands on both sides, a section does too, ``folder`` holds something else (the message says what
        differs), data are not those of the comparison to repeat, or models, genes, seeds or sampler are impossible.
        Nothing is written then, and nothing fitted.

    Examples
    --------
    >>> import stgen
    >>> data = {}
    >>> for seed, name in enumerate(["A", "B"]):
    ...     sdata = stgen.datasets.simulated_section(seed=seed, size_um=600)
    ...     stgen.pp.embed(sdata, image_key="he", table_key="spot_counts", patch_um=128, progress=False)
    ...     data[name] = sdata["spot_counts"]
    >>> table = stgen.tl.compare(
    ...     ["LinearProbe", "TrainingMean"],
    ...     data,
    ...     test="B",
    ...     patients={"A": "Ada", "B": "Bo"},
    ...     genes=10,
    ...     folder="comparison",
    ...     progress=False,
    ... )
    >>> table[["model", "section", "same_patient"]]
              model section  same_patient
    0   LinearProbe       B         False
    1  TrainingMean       B         False
    >>> again = stgen.tl.compare("comparison", data, folder="repeated", progress=False)
    >>> again.equals(table)
    True
    """
    device, folder = str(training.check_device(device)), Path(folder)
    there = _read(folder) if _holds_comparison(folder) else None
    choices = {
        "test": test, "patients": patients, "allow_same_patient": allow_same_patient, "genes": genes,
        "gene_options": gene_options, "transform": transform, "seeds": seeds, "n_samples": n_samples, "steps": steps,
        "solver": solver,
    }  # fmt: skip
    if isinstance(models, str | Path):
        source, earlier = Path(models), _read(Path(models))
        defaults = signature(compare).parameters
        given = [name for name, value in choices.items() if value is not defaults[name].default]
        if given:
            raise ValueError(f"the comparison in {source} is repeated as it was; leave {', '.join(given)} out.")
        _check_data(data, [*earlier["train"], *earlier["test"]], others=False)
        plan = {name: earlier[name] for name in PLAN}
    else:
        source, earlier = folder, there
        plan = _plan(models, data, **choices)
    plan["models"] = _specs(plan["models"])
    key, tables = own_tables(data, [*plan["train"], *plan["test"]], embedding_key, table_key, layer)
    train, held_out = ({name: tables[name] for name in plan[side]} for side in ("train", "test"))
    if isinstance(plan["genes"], int):
        plan["genes"] = choose_genes(train, held_out, plan["genes"], gene_options or {})
    content = plan | {
        "embedding": {k: v for k, v in embedding_record(train[plan["train"][0]], key).items() if k not in ELSEWHERE},
        "data": {name: hashes(table, key) for name, table in tables.items()},
    }
    content = json.loads(json.dumps(content, default=int))
    _check_work(content, train, held_out, key)
    made_with = _made_with(device)
    for place, other in {source: earlier, folder: there}.items():
        if other is not None:
            _check_same(content, made_with, other, place)
    if there is None:
        _write(folder / "comparison.json", _json(content | {"made_with": made_with}))

    runs = {
        (label, seed): folder / "runs" / label / f"seed_{seed}"
        for label, spec in plan["models"].items()
        for seed in (plan["seeds"] if _is_random(spec) else plan["seeds"][:1])
    }
    left = [run for run, place in runs.items() if not (place / "scores.json").exists()]
    quiet = {} if progress else {"disable": True}
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc="compare", unit="model", **quiet) as bar:
        for label, seed in left:
            bar.set_postfix_str(f"{label}, seed {seed}")
            scores = _run(runs[label, seed], label, seed, content, train, held_out, key, device, progress)
            _write(runs[label, seed] / "scores.json", _json(scores | {"made_with": made_with}))
            bar.update()
    table = _table(runs, plan["same_patient"])
    if left or not (folder / "scores.csv").exists():
        _write(folder / "scores.csv", table.to_csv(index=False))
    logger.info("compared %d model(s) on %d section(s): %s.", len(plan["models"]), len(held_out), folder / "scores.csv")
    return table


# ---- what is to be compared ------------------------------------------------------------------------------------------


def _plan(
    models: Any,
    data: Mapping[str, Data],
    *,
    test: str | Sequence[str] | None,
    patients: Mapping[str, str] | None,
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
    _check_data(data, test)
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


def _check_data(data: Mapping[str, Data], names: Sequence[str], *, others: bool = True) -> None:
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
    train: list[str], test: list[str], patients: Mapping[str, str] | None, allowed: bool
) -> dict[str, bool | None]:
    """For each test section, whether its patient is trained on; ``None`` if that is not known. Refused unless allowed."""
    if patients is None:
        if allowed:
            return dict.fromkeys(test)
        entries = ", ".join(f"{name!r}: ..." for name in [*train, *test])
        raise ValueError(
            f"a fair test is on tissue of another patient: pass patients={{{entries}}}, or allow_same_patient=True if it is "
            "not known whose tissue it is."
        )
    missing = [name for name in [*train, *test] if name not in patients]
    if missing:
        raise KeyError(f"`patients` has no entry for {', '.join(map(repr, missing))}; each section needs one.")
    trained_on = {str(patients[name]): name for name in train}
    same = {name: str(patients[name]) in trained_on for name in test}
    if any(same.values()) and not allowed:
        name = next(name for name in test if same[name])
        patient = str(patients[name])
        raise ValueError(
            f"patient {patient!r} stands on both sides of the split: {trained_on[patient]!r} is trained on, {name!r} tested "
            "on. Test on another patient, or pass allow_same_patient=True, and the table will say so."
        )
    return same


def _specs(models: Any) -> dict[str, dict[str, Any]]:
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
    spec = {"model": None, "config": {}, "fit": {}} | ({"model": given} if isinstance(given, str) else dict(given))
    cls, names = KNOWN.get(spec["model"]), ", ".join(name for name, cls in KNOWN.items() if cls.takes == "locations")
    if cls is None:
        raise ValueError(f'model {label!r}: "model" must be one of {names}; found {spec["model"]!r}.')
    if cls.takes != "locations":
        raise ValueError(
            f"model {label!r}: {cls.__name__} makes maps, and models of locations are compared here: {names}. Fit it with "
            "stgen.tl.fit(model, data, map_key=...), and score its maps with stgen.tl.evaluate(..., truth_key=...)."
        )
    allowed = {"validation"} | (FIT_OPTIONS if issubclass(cls, SteppedModel) else set())
    unknown = [f'"{name}"' for name in set(spec) - {"model", "config", "fit"}]
    unknown += [f'"{name}" of "fit"' for name in set(spec["fit"]) - allowed]
    unknown += [f'"{name}" of "config"' for name in {"genes", "embedding_dim", "transform"} & set(spec["config"])]
    if unknown:
        raise ValueError(
            f'model {label!r} takes "model", "config" (without genes, embedding_dim and transform, which are the same for '
            f'all) and "fit" ({", ".join(sorted(allowed))}); found {", ".join(sorted(unknown))}.'
        )
    try:
        return json.loads(json.dumps(spec, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"model {label!r}: its configuration must be JSON values: {error}.") from error


def _is_random(spec: Mapping[str, Any]) -> bool:
    """Whether another seed gives another fit or other samples."""
    return KNOWN[spec["model"]].stochastic or issubclass(KNOWN[spec["model"]], SteppedModel)


def _construct(label: str, content: Mapping[str, Any], embedding_dim: int) -> Model:
    spec = content["models"][label]
    shared = {"embedding_dim": embedding_dim, "transform": content["transform"]}
    return KNOWN[spec["model"]](content["genes"], **shared, **spec["config"])


# ---- checks --------------------------------------------------------------------------------------------------------------


def _check_work(
    content: Mapping[str, Any], train: Mapping[str, AnnData], test: Mapping[str, AnnData], key: str
) -> None:
    """Refuse what would otherwise fail once some of the models were fitted, and test sections that are trained on."""
    seen = {content["data"][name]["counts"]: name for name in train}
    for name, table in {**train, **test}.items():
        with named(f"section {name!r}"):
            expression(table, content["genes"], content["transform"])
        same = seen.get(content["data"][name]["counts"], name)
        if name in test and same != name:
            raise ValueError(f"the test section {name!r} holds the same counts as {same!r}, which is trained on.")
    n_features = table.obsm[key].shape[1]
    mean = families.TrainingMean(content["genes"], embedding_dim=n_features, transform=content["transform"])
    sources = {name: Source(table, table, table.obsm["spatial"]) for name, table in train.items()}
    _, blocks, _ = gather(mean, sources, embedding_key=key, layer=None)
    for label, spec in content["models"].items():
        with named(f"model {label!r}"):
            _construct(label, content, n_features).check_sampling(content["steps"], content["solver"])
            hold_out(blocks, spec["fit"].get("validation", 0), np.random.default_rng(0))


# ---- one run, and the folder -----------------------------------------------------------------------------------------


def _run(
    place: Path,
    label: str,
    seed: int,
    content: Mapping[str, Any],
    train: Mapping[str, AnnData],
    test: Mapping[str, AnnData],
    key: str,
    device: str,
    progress: bool,
) -> dict[str, Any]:
    """Fit, predict and score one model with one seed, and keep it."""
    model = _construct(label, content, next(iter(train.values())).obsm[key].shape[1])
    stepped = isinstance(model, SteppedModel)
    common = {"embedding_key": key, "seed": seed, "device": device, "progress": progress and stepped}
    checkpoint = {"checkpoint": place / "checkpoint"} if stepped else {}
    sampler = {name: content[name] for name in ("n_samples", "steps", "solver")}
    start = time.perf_counter()
    fit(model, train, **common, **checkpoint, **content["models"][label]["fit"])
    fitted = time.perf_counter()
    for table in test.values():
        predict_expression(table, model=model, keep_samples=model.stochastic, overwrite=True, **sampler, **common)
    predicted = time.perf_counter()
    scores = {name: _as_json(evaluate(table, ranking=content["genes"])) for name, table in test.items()}
    model.save(place / "model")
    shutil.rmtree(place / "checkpoint", ignore_errors=True)
    timing = {"fit_s": fitted - start, "predict_s": predicted - fitted}
    return {"sections": scores, "weights_sha256": model.weights_sha256(), **timing}


def _as_json(scores: Scores) -> dict[str, dict[str, Any]]:
    """Summary, and the columns of the genes' table; ``None`` for NaN."""
    summary, genes = (x.astype(object).where(x.notna(), None) for x in (scores.summary, scores.genes.reset_index()))
    return {"summary": summary.to_dict(), "genes": genes.to_dict("list")}


def _table(runs: Mapping[tuple[str, int], Path], same_patient: Mapping[str, bool | None]) -> pd.DataFrame:
    """The scores of all runs, as they are in the folder."""
    rows = []
    for (label, seed), place in runs.items():
        sections = json.loads((place / "scores.json").read_text(encoding="utf-8"))["sections"]
        for name, scores in sections.items():
            first = {"model": label, "seed": seed, "section": name, "same_patient": same_patient[name]}
            rows.append(first | scores["summary"])
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    kinds = {name: float for name in columns if name not in first} | {"same_patient": "boolean"}
    return pd.DataFrame(rows, columns=list(columns)).astype(kinds)


def _holds_comparison(folder: Path) -> bool:
    """Whether a comparison was begun there; an error if something else is there."""
    if (folder / "comparison.json").is_file():
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and holds something else than a comparison; name a new folder.")
    return False


def _read(folder: Path) -> dict[str, Any]:
    """The content of ``comparison.json``."""
    file = folder / "comparison.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no comparison in {str(folder)!r} to repeat: it has no comparison.json. If {folder.name!r} is a model, "
            f"pass a list: [{folder.name!r}]."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    absent = {*PLAN, "embedding", "data", "made_with"} - content.keys()
    if absent:
        raise ValueError(f"{file} lacks {', '.join(sorted(absent))}: it was not written by stgen.tl.compare.")
    return content


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False)


def _write(file: Path, text: str) -> None:
    """Write a file as a whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def _made_with(device: str) -> dict[str, Any]:
    """Versions and machine, on which the last digits of the numbers depend."""
    packages = ("stgen", "torch", "numpy", "scipy", "scikit-learn", "diffusers", "accelerate")
    machine = f"{platform.system()} {platform.machine()}"
    return {
        "python": platform.python_version(), **{name: version(name) for name in packages}, "machine": machine,
        "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _check_same(content: dict[str, Any], made_with: dict[str, Any], other: dict[str, Any], place: Path) -> None:
    """Refuse another comparison than the one in ``place``; warn of other versions and another machine."""
    differing = _differences({name: other[name] for name in content}, content)
    if differing:
        raise ValueError(
            f"{place} holds another comparison: {'; '.join(differing[:8])}. Name a new folder, or pass what it was made with; "
            f"stgen.tl.compare({str(place)!r}, data, folder=...) repeats it."
        )
    differing = _differences(other["made_with"], made_with)
    if differing:
        logger.warning(
            "numbers may differ from those in %s, made with other versions: %s.", place, "; ".join(differing)
        )


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, and by what."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [line for k in keys for line in _differences(there.get(k), here.get(k), f"{name}.{k}".lstrip("."))]
    if there == here:
        return []
    texts = [text if len(text) <= 60 else f"{text[:57]}..." for text in map(repr, (there, here))]
    return [f"{name} was {texts[0]} and is {texts[1]}"]

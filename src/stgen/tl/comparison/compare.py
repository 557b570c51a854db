"""Several models on the same sections, genes, embedding and scores."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from tqdm.auto import tqdm

from stgen import models as families
from stgen._checks import check_types
from stgen._spatial.tables import embedding_record, expression
from stgen.tl.comparison.data import ELSEWHERE, choose_genes, hashes, named, own_tables
from stgen.tl.comparison.folder import (
    as_json,
    check_same,
    holds_comparison,
    read_comparison,
    versions_and_machine,
    write_text,
)
from stgen.tl.comparison.plan import PLAN, check_sections, construct, is_random, is_stepped, make_plan, specs_of
from stgen.tl.evaluation.evaluate import evaluate
from stgen.tl.evaluation.scores import Scores
from stgen.tl.fitting.fit import Data, Source, fit, gather, hold_out
from stgen.tl.prediction.predict import predict_expression
from stgen.train import check_device
from stgen.transforms import TransformName

__all__ = ["compare"]

logger = logging.getLogger("stgen")


@check_types
def compare(
    models: Sequence[str] | Mapping[str, str | Mapping[str, Any]] | str | Path,
    data: Mapping[str, Data],
    *,
    folder: str | Path,
    test: str | Sequence[str] | None = None,
    patients: Mapping[str, str | int] | None = None,
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
    (:func:`stgen.tl.predict_expression`) and is scored there (:func:`stgen.tl.evaluate`). Genes, scales and the number
    of training steps are decided on the training sections; of the test sections only the names of their genes are
    looked at before. Report the simple models beside the others: ``["Stem", "LinearProbe", "Retrieval",
    "TrainingMean"]``.

    The folder holds all that it takes to repeat the comparison. The same call continues one that was interrupted, also
    in the middle of a fit, and only reads one that is complete. A comparison is repeated from its folder by
    ``compare(folder, data, folder=another)``; with the same versions on the same CPU, every number is the same.

    Parameters
    ----------
    models
        Names of models of locations, such as ``"Stem"`` or ``"LinearProbe"``; or a mapping from labels to names or to
        ``{"model": "Stem", "config": {"width": 96}, "fit": {"steps": 3000}}``, JSON values all: ``"config"`` for the
        constructor (``genes``, ``embedding_dim`` and ``transform`` are the same for all and not part of it), ``"fit"``
        for :func:`stgen.tl.fit` (``validation``, and the options of :func:`stgen.train.fit` of models that train in
        steps). Or the folder of an earlier comparison, to repeat it: then everything but ``data``, where things are in
        it, ``folder``, ``device`` and ``progress`` is taken from there.
    data
        Sections by name, each with counts and the same histology embedding (:func:`stgen.pp.embed`). Those that are not
        in ``test`` are trained on. To repeat a comparison, save the embeddings with the sections: another machine may
        compute other last digits, and data that differ are refused.
    folder
        Where the results go; made if need be. It is new or empty, or holds this same comparison.
    test
        Name of the test section, or of several, each of which is scored by itself.
    patients
        Patient of each section. A model that has seen a patient's tissue is not tested on a new one.
    allow_same_patient
        Allow sections of one patient on both sides, or leave ``patients`` out; the table then says so.
    genes
        How many genes to choose by :func:`stgen.pp.select_genes` on the training sections, of those that the test
        sections measure too; or a list, best first, that was chosen on training tissue. Its order is what PCC-10 and
        PCC-50 "ranked" go by.
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
    One row per model, seed and test section. ``"model"`` (the label), ``"seed"``, ``"section"``, ``"same_patient"``
    (whether tissue of the section's patient was trained on, nullable boolean; missing without ``patients``), then a
    column for each score of the ``summary`` of :func:`stgen.tl.evaluate`, on the scale ``transform``; NaN for scores
    that a model does not have. ``table.groupby("model")["PCC"].agg(["mean", "std"])`` averages over seeds,
    ``table.melt(["model", "seed", "section"], ["PCC", "GSC"])`` makes the long form. Written to ``folder``, models as
    safetensors, all else as text:

    - ``comparison.json``: models and their configuration, split, patients, gene list, seeds, sampler, hashes of the
      data, versions and device
    - ``scores.csv``: the table
    - ``runs/<label>/seed_<seed>/scores.json``: for each test section ``"summary"`` and, gene by gene, ``"genes"``; the
      hash of the weights, seconds that fit and prediction took, versions and device
    - ``runs/<label>/seed_<seed>/model``: the fitted model, for :func:`stgen.models.load`; ``checkpoint`` beside it
      while it is fitted

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
    device, folder = str(check_device(device)), Path(folder)
    there = read_comparison(folder) if holds_comparison(folder) else None
    choices: dict[str, Any] = {
        "test": test, "patients": patients, "allow_same_patient": allow_same_patient, "genes": genes,
        "gene_options": gene_options, "transform": transform, "seeds": seeds, "n_samples": n_samples, "steps": steps,
        "solver": solver,
    }  # fmt: skip
    others = {} if there is None else {folder: there}
    if isinstance(models, str | Path):
        earlier = others[Path(models)] = read_comparison(Path(models))
        defaults = signature(compare).parameters
        given = [name for name, value in choices.items() if _differ(value, defaults[name].default)]
        if given:
            raise ValueError(f"the comparison in {models} is repeated as it was; leave {', '.join(given)} out.")
        check_sections(data, [*earlier["train"], *earlier["test"]], others=False)
        plan = {name: earlier[name] for name in PLAN}
    else:
        plan = make_plan(models, data, **choices)
    plan["models"] = specs_of(plan["models"])
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
    made_with = versions_and_machine(device)
    for place, other in others.items():
        check_same(content, made_with, other, place)
    if there is None:
        write_text(folder / "comparison.json", as_json(content | {"made_with": made_with}))

    runs = {
        (label, seed): folder / "runs" / label / f"seed_{seed}"
        for label, spec in plan["models"].items()
        for seed in (plan["seeds"] if is_random(spec) else plan["seeds"][:1])
    }
    left = [run for run, place in runs.items() if not (place / "scores.json").exists()]
    quiet = {} if progress else {"disable": True}
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc="compare", unit="model", **quiet) as bar:
        for label, seed in left:
            bar.set_postfix_str(f"{label}, seed {seed}")
            scores = _run(runs[label, seed], label, seed, content, train, held_out, key, device, progress)
            write_text(runs[label, seed] / "scores.json", as_json(scores | {"made_with": made_with}))
            bar.update()
    table = _table(runs, plan["same_patient"])
    if left or not (folder / "scores.csv").exists():
        write_text(folder / "scores.csv", table.to_csv(index=False))
    logger.info("compared %d model(s) on %d section(s): %s.", len(plan["models"]), len(held_out), folder / "scores.csv")
    return table


def _differ(value: Any, default: Any) -> bool:
    """Whether an option is not what it is by default, be it a number, a list or an array."""
    return bool(np.ravel(value).tolist() != np.ravel(default).tolist())


# ---- checks ----------------------------------------------------------------------------------------------------------


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
            construct(label, content, n_features).check_sampling(content["steps"], content["solver"])
            hold_out(blocks, spec["fit"].get("validation", 0), np.random.default_rng(0))


# ---- one run, and the table ------------------------------------------------------------------------------------------


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
    model = construct(label, content, next(iter(train.values())).obsm[key].shape[1])
    stepped = is_stepped(type(model))
    common: dict[str, Any] = {"embedding_key": key, "seed": seed, "device": device, "progress": progress and stepped}
    checkpoint: dict[str, Any] = {"checkpoint": place / "checkpoint"} if stepped else {}
    sampler: dict[str, Any] = {name: content[name] for name in ("n_samples", "steps", "solver")}
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

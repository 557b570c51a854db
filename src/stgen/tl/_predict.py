"""Predict expression from histology."""

from __future__ import annotations

import copy as copying
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stgen import models
from stgen._io import check_new_key, get_section, get_table, provenance, record, write_table
from stgen.data import group_folds
from stgen.models import Model
from stgen.pp import embed, select_genes, tile_grid
from stgen.tl._fit import Source, fit_arrays, gather, hold_out
from stgen.tl._inputs import embedding_key_of, embedding_record
from stgen.train import check_device
from stgen.transforms import unit

__all__ = ["predict_expression"]

logger = logging.getLogger("stgen")

Statistic = Literal["mean", "median", "mode"]


def predict_expression(
    data: SpatialData | AnnData,
    *,
    model: Model | str | Path | None = None,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    embedding_key: str | None = None,
    layer: str | None = None,
    genes: list[str] | None = None,
    n_samples: int = 20,
    statistic: Statistic = "mean",
    steps: int = 25,
    solver: Literal["dpm++", "ddim", "ddpm"] = "dpm++",
    folds: int = 4,
    key_added: str = "predicted",
    keep_samples: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    device: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
    progress: bool = True,
    **options: Any,
) -> SpatialData | AnnData | None:
    """Predict the expression of each location from its histology.

    Parameters
    ----------
    data
        An AnnData (scanpy/squidpy Visium convention, or one that carries an embedding in ``obsm``), or a SpatialData.
        A SpatialData without a table is an H&E slide: a grid of tiles over its tissue is made and predicted.
    model
        A fitted model, a folder that ``model.save`` wrote, or a Hugging Face Hub id. ``None``, or a model that is not
        fitted, **cross-fits on the section itself**: each of ``folds`` groups of spatial blocks is predicted by a model
        that never saw it, which answers "which genes can morphology predict here?".
    image_key, table_key, shapes_key
        Elements of ``data``; needed only where there are several.
    embedding_key
        Embedding in ``obsm``; by default the one the model was fitted on. If it is missing and there is an image, it is
        computed as :func:`stgen.pp.embed` did for the training tissue.
    layer
        Layer with the counts that cross-fitting trains on; by default ``X``.
    genes
        Which of the model's genes to predict; all by default. When cross-fitting with ``model=None``, the genes to
        model: 200 by ``pp.select_genes`` by default.
    n_samples
        Samples drawn for each location.
    statistic
        ``"mean"``, ``"median"`` or ``"mode"`` (the sample with the highest density) of the samples, per gene.
    steps, solver
        Sampler, see :meth:`stgen.diffusion.Diffusion.sample`.
    folds
        Number of folds when cross-fitting.
    key_added
        Name of the result.
    keep_samples
        Also keep the samples.
    seed
        Random seed. The samples of a location depend on it and on the location's row, not on ``batch_size``.
    batch_size
        Locations in a batch (times ``n_samples`` network inputs).
    device
        ``"cpu"``, ``"cuda"``, ...; by default the best there is.
    overwrite
        Replace results of the same name.
    copy
        Return a copy with the result and leave ``data`` alone.
    progress
        Show a progress bar.
    **options
        Training options when cross-fitting, see :func:`stgen.tl.fit`.

    Returns
    -------
    ``None``, or the copy. Written to the table:

    - ``layers[key_added]``: prediction, float32 ``(n, n_vars)``, on the model's ``transform``, never below zero counts;
      NaN for genes that the model does not predict, and ``var[key_added]`` says which it does
    - ``layers[f"{key_added}_std"]``: standard deviation of the samples (stochastic models only)
    - ``obsm[f"{key_added}_samples"]``: samples ``(n, n_samples, G)``, with ``keep_samples=True``
    - ``uns["stgen"][key_added]``: function, model, weights' hash, genes, unit, parameters, seed, version

    A table that lacks some of the genes is not widened: a new table named ``key_added`` is added to the SpatialData, with
    the prediction as ``X``.

    Raises
    ------
    KeyError
        If an image, table, embedding or gene is missing.
    ValueError
        If the embedding is of another kind than the model's, keys exist, or the device is unknown. Nothing is written
        then.

    Examples
    --------
    >>> from stgen import datasets, models, pp, tl
    >>> sdata = datasets.simulated_section()
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> probe = models.LinearProbe(pp.select_genes(adata, 10), embedding_dim=adata.obsm["X_texture"].shape[1])
    >>> tl.predict_expression(adata, model=probe, progress=False)  # not fitted: cross-fits
    >>> adata.layers["predicted"].shape == adata.shape
    True
    """
    if statistic not in STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(map(repr, STATISTICS))}, found {statistic!r}.")
    if n_samples < 1:
        raise ValueError(f"`n_samples` must be at least 1, found {n_samples}.")
    device = str(check_device(device))
    if isinstance(model, str | Path):
        model = models.load(model)
    if copy:
        data = copying.deepcopy(data)

    if model is not None and model.fitted and options:
        raise TypeError(f"the model is fitted already, so training options have no use: {', '.join(options)}.")

    target = _target(data, image_key=image_key, table_key=table_key, shapes_key=shapes_key, key_added=key_added)
    if model is None or not model.fitted:
        if target.user_table is None:
            raise ValueError("there are no counts to fit on; pass model=<a fitted model, its folder or a Hub id>.")
        embedding_key = _embedding(target, None, embedding_key, image_key=image_key, device=device)
        model = _unfitted(model, target, genes, embedding_key, layer)
        chosen = model.genes
    else:
        chosen = _chosen(model, genes)
    as_layers = _check_keys(data, target, chosen, key_added, overwrite)
    sampling = {
        "n_samples": n_samples, "steps": steps, "solver": solver, "seed": seed,
        "batch_size": batch_size, "device": device, "progress": progress,
    }  # fmt: skip
    if model.fitted:
        embedding_key = _embedding(target, model, embedding_key, image_key=image_key, device=device)
        h = np.asarray(target.table.obsm[embedding_key])
        samples = draw(model, h, np.arange(len(h)), **sampling)[:, :, [model.genes.index(gene) for gene in chosen]]
        fitted_on, weights = model.record.get("sections", []), model.weights_sha256()
    else:
        samples = _cross_fit(model, target, embedding_key, layer, folds, sampling, options)
        fitted_on, weights = f"this section, cross-fitted in {folds} folds", None
    entry = provenance(
        "tl.predict_expression", model=type(model).__name__, weights_sha256=weights, fitted_on=fitted_on, genes=chosen,
        transform=model.transform, unit=unit(model.transform), statistic=statistic, n_samples=samples.shape[1],
        steps=steps, solver=solver, seed=seed, embedding=embedding_key,
    )  # fmt: skip
    _write(data, target, samples, chosen, entry, key_added=key_added, as_layers=as_layers,
           embedding_key=embedding_key, keep_samples=keep_samples, overwrite=overwrite)  # fmt: skip
    return data if copy else None


# ---- samples -------------------------------------------------------------------------------------------------------


def draw(
    model: Model,
    h: np.ndarray,
    rows: np.ndarray,
    *,
    n_samples: int = 20,
    steps: int = 25,
    solver: str = "dpm++",
    seed: int = 0,
    batch_size: int = 32,
    device: str = "cpu",
    progress: bool = True,
) -> np.ndarray:
    """Samples for embeddings ``(n, D)``, float32 ``(n, n_samples, G)``, never below zero counts.

    The noise of a location follows from the seed and its number in ``rows``, whatever the batch.
    """
    model = model.to(device).eval()
    n_samples = n_samples if model.stochastic else 1
    samples = np.empty((len(h), n_samples, len(model.genes)), np.float32)
    name = f"predict with {type(model).__name__}"
    with tqdm(total=len(h), desc=name, unit="location", disable=not progress) as bar:
        for start in range(0, len(h), batch_size):
            batch = {"h": torch.as_tensor(np.asarray(h[start : start + batch_size], np.float32), device=device)}
            generators = [_generator(seed, int(row)) for row in rows[start : start + batch_size]]
            drawn = model.sample(batch, n_samples, steps, generators, solver)
            samples[start : start + batch_size] = drawn.clamp(min=0).cpu().numpy()
            bar.update(len(generators))
    return samples


def _generator(seed: int, row: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(state))


def _mode(samples: np.ndarray) -> np.ndarray:
    """Per location and gene, the sample where a kernel density estimate of the samples is highest."""
    mode = np.empty((len(samples), samples.shape[2]), np.float32)
    for i, x in enumerate(samples):  # (S, G)
        width = np.maximum(1.06 * x.std(0) * len(x) ** -0.2, 1e-6)
        density = np.exp(-0.5 * np.square((x[:, None] - x[None]) / width)).sum(1)
        mode[i] = np.take_along_axis(x, density.argmax(0)[None], 0)[0]
    return mode


STATISTICS = {
    "mean": lambda samples: samples.mean(1),
    "median": lambda samples: np.median(samples, 1),
    "mode": _mode,
}


# ---- cross-fitting -------------------------------------------------------------------------------------------------


def _unfitted(model: Model | None, target: _Target, genes: list[str] | None, key: str, layer: str | None) -> Model:
    """The model to cross-fit: the given one, or a default Stem on the genes."""
    if model is not None:
        if genes is not None and list(genes) != model.genes:
            raise ValueError("`genes` and the model's genes differ; construct the model with the genes to predict.")
        return model
    if genes is None:
        genes = select_genes(target.user_table, min(200, target.user_table.n_vars), layer=layer, key_added=None)
    return models.Stem(genes, embedding_dim=target.table.obsm[key].shape[1])


def _cross_fit(
    model: Model, target: _Target, key: str, layer: str | None, folds: int, sampling: dict, options: dict
) -> np.ndarray:
    """Samples for every location, each from a model that was fitted on other spatial blocks."""
    if folds < 2:
        raise ValueError(f"`folds` must be at least 2, found {folds}.")
    xy = get_section(target.work, table_key=target.table_key).xy_px
    source = Source(target.user_table, target.table, xy)
    data, blocks, info = gather(model, {"section": source}, embedding_key=key, layer=layer)
    fold = group_folds(blocks, folds)
    samples = None
    options = {"seed": sampling["seed"], "device": sampling["device"], "progress": sampling["progress"], **options}
    validation = options.pop("validation", 0.125)
    for k in np.unique(fold):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = copying.deepcopy(model)
        held_out = hold_out(blocks[inside], validation, np.random.default_rng(sampling["seed"]))
        fit_arrays(part, data.subset(inside), held_out, info, **options)
        drawn = draw(part, data.h[outside, 0].numpy(), outside, **sampling)
        if samples is None:
            samples = np.empty((len(data), *drawn.shape[1:]), np.float32)
        samples[outside] = drawn
    return samples


# ---- inputs and outputs --------------------------------------------------------------------------------------------


def _chosen(model: Model, genes: list[str] | None) -> list[str]:
    """The genes to predict, all known to the model."""
    if genes is None:
        return model.genes
    unknown = [gene for gene in genes if gene not in set(model.genes)]
    if unknown:
        raise KeyError(
            f"{len(unknown)} gene(s) unknown to the model: {', '.join(unknown[:5])}. It predicts {len(model.genes)} "
            f"genes, such as {', '.join(model.genes[:3])}; model.genes lists them."
        )
    return list(genes)


@dataclass
class _Target:
    """Where a prediction is made and where it goes, with everything new kept apart until it is complete."""

    work: SpatialData | AnnData  # shares images and shapes with the user's object; its table is our own
    table: AnnData  # the table of `work`: rows, coordinates, embeddings
    user_table: AnnData | None  # the user's table, if the locations have one
    table_key: str | None
    shapes_key: str | None  # of locations that have no table yet
    new_shapes: bool  # whether the locations themselves are new
    embedded: bool = False  # whether the embedding is new


def _target(
    data: SpatialData | AnnData,
    *,
    image_key: str | None,
    table_key: str | None,
    shapes_key: str | None,
    key_added: str,
) -> _Target:
    """Find the locations; make a grid of tiles over the tissue where there are none."""
    if isinstance(data, AnnData):
        light = _light(data)
        return _Target(light, light, data, None, None, False)
    if not isinstance(data, SpatialData):
        raise TypeError(f"Expected a SpatialData or AnnData object, found {type(data).__name__}.")
    work = SpatialData(images=dict(data.images), labels=dict(data.labels), shapes=dict(data.shapes))
    linked = shapes_key is None or any(shapes_key in _regions(table) for table in data.tables.values())
    if data.tables and linked:
        user_table = get_table(data, table_key=table_key, shapes_key=shapes_key)
        table_key = next(key for key, table in data.tables.items() if table is user_table)
        work.tables[table_key] = _light(user_table)
        return _Target(work, work.tables[table_key], user_table, table_key, shapes_key, False)
    new_shapes = shapes_key is None
    if new_shapes:
        shapes_key = f"{key_added}_tiles"
        tile_grid(work, image_key=image_key, key_added=shapes_key, table_key_added=key_added)
    elif shapes_key not in data.shapes:
        raise KeyError(f"there are no shapes {shapes_key!r}; found {', '.join(data.shapes) or 'none'}.")
    else:
        write_table(
            work, key_added, AnnData(obs=pd.DataFrame(index=data[shapes_key].index.astype(str))), region=shapes_key
        )
    return _Target(work, work.tables[key_added], None, key_added, shapes_key, new_shapes)


def _light(table: AnnData) -> AnnData:
    """Rows, coordinates and embeddings of a table, without its counts."""
    kept = {key: table.uns[key] for key in ("spatial", "spatialdata_attrs", "stgen") if key in table.uns}
    return AnnData(obs=table.obs.copy(), obsm=dict(table.obsm), uns=kept)


def _regions(table: AnnData) -> list[str]:
    regions = table.uns.get("spatialdata_attrs", {}).get("region", [])
    return [regions] if isinstance(regions, str) else list(regions)


def _check_keys(
    data: SpatialData | AnnData, target: _Target, genes: list[str], key_added: str, overwrite: bool
) -> bool:
    """Refuse keys that exist; say whether the result goes to layers of the user's table (or to a new table)."""
    table = target.user_table
    missing = [] if table is None else [gene for gene in genes if gene not in table.var_names]
    if missing and isinstance(data, AnnData):
        raise KeyError(
            f"{len(missing)} of the {len(genes)} genes to predict are not in the table: {', '.join(missing[:5])}. "
            "Pass genes=[...] with those that are, or a SpatialData, which gets a new table."
        )
    if table is not None and not missing:
        for container, what in ((table.layers, "layers"), (table.uns.get("stgen", {}), 'uns["stgen"]')):
            check_new_key(container, key_added, overwrite=overwrite, what=what)
        if key_added in table.obs or (key_added in table.var and key_added not in table.layers):
            raise ValueError(f"var[{key_added!r}] or obs[{key_added!r}] is in use already; pass another key_added=.")
        return True
    check_new_key(data.tables, key_added, overwrite=overwrite, what="sdata.tables")
    if target.new_shapes:
        check_new_key(data.shapes, target.shapes_key, overwrite=overwrite, what="sdata.shapes")
    return False


def _embedding(
    target: _Target, model: Model | None, embedding_key: str | None, *, image_key: str | None, device: str
) -> str:
    """Key of an embedding of the model's kind in the target's table, computed there if need be."""
    table = target.table
    trained = model.record["embedding"] if model is not None and model.fitted else None
    if trained is None:
        if embedding_key is not None or image_key is None:
            return embedding_key_of(table, embedding_key)
        trained = {"key": "X_texture", "model": "texture", "by_name": True}
    key = embedding_key or trained["key"]
    if key not in table.obsm:
        if embedding_key is not None or not trained.get("by_name", False):
            embedding_key_of(table, key)  # raises, and says what to call
        embed(
            target.work,
            image_key=image_key,
            table_key=target.table_key,
            key_added=key,
            device=device,
            **_recipe(trained),
        )
        target.embedded = True
    found = embedding_record(table, key)
    differing = [k for k in trained if k != "key" and found.get(k) != trained[k]]
    if differing:
        raise ValueError(
            f'obsm["{key}"] is not the embedding that the model was fitted on: '
            + "; ".join(f"{k} is {found.get(k)!r}, not {trained[k]!r}" for k in differing)
            + ". Name another embedding_key=, or remove it to have the right one computed from the image."
        )
    return key


def _recipe(trained: dict[str, Any]) -> dict[str, Any]:
    """What :func:`stgen.pp.embed` must be told to embed as it did for the training tissue."""
    recipe = {"model": trained["model"]}
    if "+" not in trained["model"] and "patch_um" in trained:  # several encoders have their own default patches
        recipe["patch_um"] = [float(side) for side in str(trained["patch_um"]).split(",")]
        recipe["patch_px"] = int(trained["patch_px"])
    return recipe


def _write(
    data: SpatialData | AnnData,
    target: _Target,
    samples: np.ndarray,
    genes: list[str],
    entry: dict[str, Any],
    *,
    key_added: str,
    as_layers: bool,
    embedding_key: str,
    keep_samples: bool,
    overwrite: bool,
) -> None:
    """Put the finished result into the user's object."""
    values = {key_added: STATISTICS[entry["statistic"]](samples).astype(np.float32)}
    if samples.shape[1] > 1:
        values[f"{key_added}_std"] = samples.std(1)  # of centered noise: the population form is unbiased
    table = target.user_table
    if not as_layers:
        table = AnnData(values.pop(key_added), obs=target.table.obs.copy(), var=pd.DataFrame(index=genes))
        table.layers.update(values)
        table.uns["spatialdata_attrs"] = target.table.uns["spatialdata_attrs"]
    else:
        for container, name in ((table.layers, f"{key_added}_std"), (table.obsm, f"{key_added}_samples")):
            container.pop(name, None)  # of an earlier result of the same name
    if as_layers and genes == list(table.var_names):
        table.layers.update(values)
        table.var[key_added] = True
    elif as_layers:
        columns = table.var_names.get_indexer(genes)
        for name, value in values.items():
            full = np.full(table.shape, np.nan, np.float32)
            full[:, columns] = value
            table.layers[name] = full
        table.var[key_added] = np.isin(np.arange(table.n_vars), columns)
    if keep_samples:
        table.obsm[f"{key_added}_samples"] = samples
        entry = {**entry, "sample_genes": "\n".join(genes)}
    if target.embedded or not as_layers:
        table.obsm[embedding_key] = target.table.obsm[embedding_key]
        record(table, embedding_key, target.table.uns.get("stgen", {}).get(embedding_key, {}))
    record(table, key_added, entry)
    where = f'layers["{key_added}"]' if as_layers else f'sdata.tables["{key_added}"]'
    if not as_layers:
        if target.new_shapes:
            data.shapes[target.shapes_key] = target.work.shapes[target.shapes_key]
        if overwrite and key_added in data.tables:
            del data.tables[key_added]
        data.tables[key_added] = table
    hint = "adata.write_zarr(path)" if isinstance(data, AnnData) else "sdata.write(path)"
    logger.info("predicted %d genes at %d locations into %s; %s saves it.", len(genes), len(samples), where, hint)

"""Predict expression from histology."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from anndata import AnnData
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stgen import models
from stgen._checks import check_choice, check_genes, check_seed, check_share, check_types, check_whole
from stgen._spatial.records import provenance
from stgen._spatial.section import get_section
from stgen._spatial.tables import expression
from stgen._training_options import check_options
from stgen.data import Batch, group_folds
from stgen.diffusion import Diffusion, Solver
from stgen.models import Model
from stgen.pp import select_genes
from stgen.tl.fitting.fit import Source, check_training, fit_in_place, gather, hold_out, split
from stgen.tl.prediction.looks import by_looks, check_looks
from stgen.tl.prediction.target import Prediction, Target
from stgen.train import check_device
from stgen.transforms import unit

__all__ = ["predict_expression"]

Statistic = Literal["mean", "median", "mode"]
N_GENES = 200  # to cross-fit when none are named


@check_types
def predict_expression(
    data: SpatialData | AnnData,
    *,
    model: Model | str | Path | None = None,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    embedding_key: str | None = None,
    mpp: float | None = None,
    layer: str | None = None,
    genes: list[str] | None = None,
    n_samples: int = 20,
    statistic: Statistic = "mean",
    steps: int = 25,
    solver: Literal["dpm++", "ddim", "ddpm"] = "dpm++",
    folds: int = 4,
    fit_options: Mapping[str, Any] | None = None,
    key_added: str = "predicted",
    keep_samples: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    device: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
    progress: bool = True,
) -> SpatialData | AnnData | None:
    """Predict the expression of each location from its histology.

    Parameters
    ----------
    data
        An AnnData (scanpy/squidpy Visium convention, or one that carries an embedding in ``obsm``), or a SpatialData.
        A SpatialData without a table is an H&E slide: a grid of tiles over its tissue is made and predicted.
    model
        A fitted model, a folder that ``model.save`` wrote, or a Hugging Face Hub id; a
        :class:`stgen.models.KernelRegression` reads the image itself and needs no embedding. ``None``, or another model
        that is not fitted, **cross-fits on the section itself**: each of ``folds`` groups of spatial blocks is
        predicted by a model that was not fitted on it, which answers "which genes can morphology predict here?". The
        answer is for tissue beside tissue that was measured: patches reach over the borders of blocks, and the default
        genes are chosen on the whole section.
    image_key, table_key, shapes_key
        Elements of ``data``; needed only where there are several.
    embedding_key
        Embedding in ``obsm``; by default the one the model was fitted on, or when cross-fitting the one that is there.
        If there is none, it is computed from the image: as :func:`stgen.pp.embed` did for the training tissue, or
        ``"texture"``.
    mpp
        µm per pixel, where an embedding is to be computed and the data do not say; see :func:`stgen.pp.embed`.
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
    fit_options
        Options of :func:`stgen.tl.fit` when cross-fitting, such as ``{"steps": 500}``.
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

    Returns
    -------
    ``None``, or the copy. Written to the table:

    - ``layers[key_added]``: prediction, float32 ``(n, n_vars)``, on the model's ``transform``, never below zero counts;
      NaN for genes that the model does not predict, and ``var[key_added]`` says which it does
    - ``layers[f"{key_added}_std"]``: standard deviation of the samples (stochastic models only)
    - ``obsm[f"{key_added}_samples"]``: samples ``(n, n_samples, G)``, with ``keep_samples=True``
    - ``obs[f"{key_added}_fold"]``, when cross-fitting: the fold of each location, from 0, categorical. Its counts, and
      those of all others in its fold, did not enter its prediction
    - ``uns["stgen"][key_added]``: function, model, weights' hash, genes, unit, parameters, seed, version

    A table that lacks some of the genes is not widened: a new table named ``key_added`` is added to the SpatialData,
    with the prediction as ``X``.

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
    >>> sdata = datasets.simulated_section(size_um=600)
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> probe = models.LinearProbe(pp.select_genes(adata, 10), embedding_dim=adata.obsm["X_texture"].shape[1])
    >>> tl.predict_expression(adata, model=probe, progress=False)  # not fitted: cross-fits
    >>> adata.layers["predicted"].shape == adata.shape
    True
    """
    check_choice("statistic", statistic, STATISTICS)
    n_samples, batch_size = check_whole("n_samples", n_samples), check_whole("batch_size", batch_size)
    folds, seed = check_whole("folds", folds, least=2), check_seed(seed)
    genes = None if genes is None else check_genes(genes)
    device = str(check_device(device))
    if isinstance(model, str | Path):
        model = models.load(model)
    if model is not None and model.fitted and fit_options:
        raise ValueError("the model is fitted already, so `fit_options` have no use; construct a new one to fit anew.")
    if model is None or not model.fitted:
        _check_fit_options(model, fit_options or {})
    if model is not None and model.takes == "maps":
        raise ValueError(f"{type(model).__name__} makes maps; call stgen.tl.superresolve(sdata, model=...).")
    (Diffusion() if model is None else model).check_sampling(steps, solver)
    if model is not None:
        model.check_weights()
    target = Target.find(data, table_key=table_key, shapes_key=shapes_key, key_added=key_added)
    if model is not None and (model.fitted or model.takes == "sections"):
        chosen = _chosen(model, genes)
    else:
        chosen = _to_model(model, target, genes, layer)
    as_layers = target.check_keys(chosen, overwrite=overwrite)
    sampling: dict[str, Any] = {
        "n_samples": n_samples, "steps": steps, "solver": solver, "seed": seed,
        "batch_size": batch_size, "device": device, "progress": progress,
    }  # fmt: skip
    how: dict[str, Any] = {"steps": steps, "solver": solver, "layer": layer}
    if isinstance(model, models.KernelRegression):
        check_looks(model, statistic=statistic, keep_samples=keep_samples, embedding_key=embedding_key, layer=layer)
        section = target.section(image_key, mpp)
        prediction, how = by_looks(model, section, chosen, n_samples=n_samples, seed=seed, progress=progress), {}
        n_drawn = n_samples if prediction.std is not None else 1
    else:
        embedding = model.record["embedding"] if model is not None and model.fitted else None
        embedding_key = target.embed(
            embedding, embedding_key, image_key=image_key, mpp=mpp, device=device, progress=progress
        )
        if model is None or not model.fitted:
            model = model or models.Stem(chosen, embedding_dim=target.rows.obsm[embedding_key].shape[1])
        samples, fold = _samples(model, target, embedding_key, chosen, layer, folds, sampling, fit_options or {})
        n_drawn = samples.shape[1]
        how |= {"embedding": embedding_key, "folds": None if fold is None else int(fold.max() + 1)}
        prediction = Prediction(
            STATISTICS[statistic](samples),
            samples.std(1) if n_drawn > 1 else None,  # of centered noise: the population form is unbiased
            samples if keep_samples else None,
            embedding_key,
            fold,
        )
    fitted_on = model.record.get("sections", []) if model.fitted else f"this section, cross-fitted in {folds} folds"
    entry = provenance(
        "tl.predict_expression", model=type(model).__name__,
        weights_sha256=model.weights_sha256() if model.fitted else None, fitted_on=fitted_on, genes=chosen,
        transform=model.transform, unit=unit(model.transform), statistic=statistic, n_samples=n_drawn, seed=seed, **how,
    )  # fmt: skip
    if copy:
        data = target.copy_data()
    target.write(prediction, chosen, entry, as_layers=as_layers)
    return data if copy else None


# ---- samples -------------------------------------------------------------------------------------------------------


def _samples(
    model: Model,
    target: Target,
    embedding_key: str,
    genes: list[str],
    layer: str | None,
    folds: int,
    sampling: dict[str, Any],
    fit_options: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples of some genes for every location; of a model that is not fitted, cross-fitted, and the fold of each."""
    if not model.fitted:
        return _cross_fit(model, target, embedding_key, layer, folds, sampling, fit_options)
    h = np.asarray(target.rows.obsm[embedding_key])
    position = np.array([model.genes.index(gene) for gene in genes], int)
    return draw(model, h, np.arange(len(h)), **sampling)[:, :, position], None


def draw(
    model: Model,
    h: np.ndarray,
    rows: np.ndarray,
    *,
    n_samples: int = 20,
    steps: int = 25,
    solver: Solver = "dpm++",
    seed: int = 0,
    batch_size: int = 32,
    device: str = "cpu",
    progress: bool = True,
) -> np.ndarray:
    """Samples for embeddings ``(n, D)``, float32 ``(n, n_samples, G)``, never below zero counts.

    The noise of a location follows from the seed and its number in ``rows``, whatever the batch.
    """
    home, model = model.device, model.to(device).eval()
    n_samples = n_samples if model.stochastic else 1
    samples = np.empty((len(h), n_samples, len(model.genes)), np.float32)
    name = f"predict with {type(model).__name__}"
    try:
        with tqdm(total=len(h), desc=name, unit="location", **({} if progress else {"disable": True})) as bar:
            for start in range(0, len(h), batch_size):
                batch: Batch = {
                    "h": torch.as_tensor(np.asarray(h[start : start + batch_size], np.float32), device=device)
                }
                generators = [_generator(seed, int(row)) for row in rows[start : start + batch_size]]
                drawn = model.sample(batch, n_samples, steps, generators, solver)
                samples[start : start + batch_size] = drawn.clamp(min=0).cpu().numpy()
                bar.update(len(generators))
    finally:
        model.to(home)
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


def _to_model(model: Model | None, target: Target, genes: list[str] | None, layer: str | None) -> list[str]:
    """The genes to cross-fit, once it is known that there are counts to fit them on."""
    table = target.user_table
    if table is None:
        raise ValueError("there are no counts to fit on; pass model=<a fitted model, its folder or a Hub id>.")
    if model is not None and genes is not None and list(genes) != model.genes:
        raise ValueError("`genes` and the model's genes differ; construct the model with the genes to predict.")
    if model is not None:
        genes = model.genes
    elif genes is None:
        genes = select_genes(table, N_GENES, layer=layer, key_added=None, at_most=True)
    check_training(expression(table, genes, "none" if model is None else model.transform, layer=layer), genes)
    return list(genes)


def _check_fit_options(model: Model | None, options: Mapping[str, Any]) -> None:
    """Refuse options that the fit of the model, by default a Stem, does not take."""
    of_model = {name: value for name, value in options.items() if name != "validation"}
    check_share("validation", options.get("validation", 0.0), "[0, 0.9)")
    if model is None:
        check_options("Stem", of_model)
    else:
        model.check_options(**of_model)


def _cross_fit(
    model: Model,
    target: Target,
    key: str,
    layer: str | None,
    folds: int,
    sampling: dict[str, Any],
    fit_options: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Samples for every location, each from a model that was fitted on other spatial blocks, and the fold of each."""
    xy = get_section(target.work, table_key=target.table_key).xy_px
    source = Source(target.user_table, target.rows, xy)
    data, blocks, info = gather(model, {"section": source}, embedding_key=key, layer=layer)
    fold = group_folds(blocks, folds)
    n_samples = sampling["n_samples"] if model.stochastic else 1
    samples = np.empty((len(data), n_samples, len(model.genes)), np.float32)
    options = {"seed": sampling["seed"], "device": sampling["device"], "progress": sampling["progress"], **fit_options}
    validation = options.pop("validation", 0.125)
    for k in np.unique(fold):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = copying.deepcopy(model)
        held_out = hold_out(blocks[inside], validation, np.random.default_rng(sampling["seed"]))
        fit_in_place(part, *split(data.subset(inside), held_out), info, **options)
        samples[outside] = draw(part, data.h[outside, 0].numpy(), outside, **sampling)
    return samples, np.unique(fold, return_inverse=True)[1]


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

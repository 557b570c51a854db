"""Fit any model on one section or several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from stgen._io import get_section, get_table, provenance
from stgen.data import SpotData
from stgen.models import Model
from stgen.tl._inputs import MIN_LOCATIONS, embedding_key_of, embedding_record, expression, spatial_blocks
from stgen.train import check_device

__all__ = ["Source", "check_training", "fit", "fit_arrays", "gather", "hold_out"]

logger = logging.getLogger("stgen")

Data = SpatialData | AnnData


def fit(
    model: Model,
    data: Data | Mapping[str, Data],
    *,
    embedding_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    validation: float = 0.125,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Fit a model on one section or several.

    Everything is taken from the tables: counts, and the histology embedding that :func:`stgen.pp.embed` left there.

    Parameters
    ----------
    model
        A model of :mod:`stgen.models`, fitted in place.
    data
        One section, or a mapping from names to sections. Sections of one patient belong together: hold out patients,
        not sections, if you want to know how a model does on a new one.
    embedding_key
        Embedding in ``obsm``; by default the one that :func:`stgen.pp.embed` recorded. If ``f"{embedding_key}_views"``
        is there too (dihedral views, ``(n, 8, D)``), models that train in steps draw a view at random each time.
    table_key
        Table of a SpatialData; needed only if there are several.
    layer
        Layer with the counts; by default ``X``. The model's ``transform`` brings them to its scale.
    validation
        Share of locations held out for early stopping, in whole spatial blocks. 0 for none.
    seed
        Random seed of the split and of the training.
    **options
        Options of :func:`stgen.train.fit` for models that train in steps, such as ``steps``, ``batch_size``, ``lr``,
        ``checkpoint``, ``device``, ``progress``.

    Returns
    -------
    The model, fitted. ``model.record`` holds what it was fitted on, and ``model.record["history"]`` the losses.

    Raises
    ------
    KeyError
        If an embedding, a table or a gene is missing.
    ValueError
        If counts are not counts, a gene is constant, locations are too few, embeddings of the sections differ, or the
        device is unknown. The model is then as it was.

    Examples
    --------
    >>> from stgen import datasets, models, pp, tl
    >>> sdata = datasets.simulated_section(size_um=600)
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> genes = pp.select_genes(adata, 10)
    >>> model = models.LinearProbe(genes, embedding_dim=adata.obsm["X_texture"].shape[1])
    >>> tl.fit(model, adata).fitted
    True
    """
    sections = dict(data) if isinstance(data, Mapping) else {"section": data}
    if "device" in options:
        check_device(options["device"])
    sources = {}
    for name, section in sections.items():
        table = get_table(section, table_key=table_key)
        sources[name] = Source(table, table, get_section(section, table_key=table_key).xy_px)
    everything, blocks, record = gather(model, sources, embedding_key=embedding_key, layer=layer)
    rng = np.random.default_rng(seed)
    held_out = hold_out(blocks, validation, rng)
    record |= {"validation": validation, "seed": seed, "layer": layer}
    fit_arrays(model, everything, held_out, record, seed=seed, **options)
    logger.info(
        "fitted %s on %d locations of %d section(s); model.save(folder) keeps it.",
        type(model).__name__, len(everything), len(sections),
    )  # fmt: skip
    return model


class Source(NamedTuple):
    """One section to fit on."""

    counts: AnnData  # table with the counts
    embedded: AnnData  # table with the embedding in obsm, row by row the same
    xy: np.ndarray  # (n, 2)


def gather(
    model: Model, sections: Mapping[str, Source], *, embedding_key: str | None, layer: str | None
) -> tuple[SpotData, np.ndarray, dict[str, Any]]:
    """All sections as one dataset, the spatial block of each row, and a record of what they are.

    Groups of the dataset, which cross-validation keeps whole, are sections if there are three or more, else blocks.
    """
    if not sections:
        raise ValueError("`data` is an empty mapping; give at least one section.")
    x, h, group, blocks, embedding = [], [], [], [], None
    for number, (name, (counts, table, xy)) in enumerate(sections.items()):
        key = embedding_key_of(table, embedding_key)
        found = embedding_record(table, key)
        if found["n_features"] != model.config["embedding_dim"]:
            raise ValueError(
                f'the model takes {model.config["embedding_dim"]} features and obsm["{key}"] of section {name!r} has '
                f"{found['n_features']}; construct it with embedding_dim={found['n_features']}."
            )
        embedding = embedding or found
        if any(found.get(k) != v for k, v in embedding.items() if k != "image_mpp"):
            raise ValueError(
                f"section {name!r} was embedded otherwise than those before it: {found} against {embedding}."
            )
        x.append(expression(counts, model.genes, model.transform, layer=layer))
        h.append(np.asarray(table.obsm.get(f"{key}_views", np.asarray(table.obsm[key])[:, None])))
        block = spatial_blocks(xy)
        blocks.append(block + 1000 * number)
        group.append(np.full(len(block), number) if len(sections) > 2 else blocks[-1])
    check_training(np.concatenate(x), model.genes)
    if len({v.shape[1] for v in h}) > 1:
        raise ValueError("some sections have dihedral views and others not; embed all with the same `views`.")
    record = {
        "embedding": embedding,
        "sections": list(sections),
        "n_locations": sum(map(len, x)),
        **{k: v for k, v in provenance("tl.fit").items() if k == "version"},
    }
    return SpotData(np.concatenate(x), np.concatenate(h), np.concatenate(group)), np.concatenate(blocks), record


def check_training(x: np.ndarray, genes: list[str]) -> None:
    """Enough locations, and no gene without anything to learn."""
    if len(x) < MIN_LOCATIONS:
        raise ValueError(f"too few locations to fit: {len(x)} found, at least {MIN_LOCATIONS} are needed.")
    constant = [gene for gene, same in zip(genes, np.ptp(x, 0) == 0, strict=True) if same]
    if constant:
        raise ValueError(
            f"{len(constant)} gene(s) are constant over the training locations: {', '.join(constant[:5])}. "
            "Leave them out; stgen.pp.select_genes(data, n) chooses none of them."
        )


def hold_out(blocks: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Boolean mask of about ``share`` of the rows, in whole blocks, the same number of blocks from each section."""
    if not 0 <= share < 0.9:
        raise ValueError(f"`validation` must be a share in [0, 0.9), found {share}.")
    chosen = []
    for section in np.unique(blocks // 1000):
        names = np.unique(blocks[blocks // 1000 == section])
        chosen.extend(rng.permutation(names)[: int(np.ceil(share * len(names)))] if share else [])
    return np.isin(blocks, chosen)


def fit_arrays(model: Model, data: SpotData, held_out: np.ndarray, record: Mapping[str, Any], **options: Any) -> None:
    """Fit on the rows that are not held out, validate on the others, and keep the record with the model."""
    validation = data.subset(np.flatnonzero(held_out)) if held_out.any() else None
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}, model.training
    try:
        history = model.fit(data.subset(np.flatnonzero(~held_out)), validation, **options)
    except BaseException:  # also an interrupt: what is not completely fitted stays as it was
        model.load_state_dict(before[0])
        model.train(before[1])
        raise
    kept = {k: v for k, v in options.items() if isinstance(v, int | float | str | bool | None)}
    model.record = {**record, "options": kept, "history": history}

"""Fit any model on one section or several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from stgen._checks import check_seed, check_share, check_types
from stgen._spatial.records import provenance
from stgen._spatial.section import get_section, get_table
from stgen._spatial.tables import MIN_LOCATIONS, embedding_key_of, embedding_record, expression, spatial_blocks
from stgen.data import MapData, SpotData
from stgen.models import MapMaker, MapModel, Model
from stgen.tl.fitting.maps import MapKeys, check_genes, cut_tiles, gather_maps, in_section, split_maps
from stgen.tl.fitting.sections import gather_sections

__all__ = ["Source", "check_training", "fit", "fit_in_place", "gather", "hold_out", "split"]

logger = logging.getLogger("stgen")

Data: TypeAlias = SpatialData | AnnData


@check_types
def fit(
    model: Model,
    data: Data | Mapping[str, Data],
    *,
    embedding_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    map_key: str | None = None,
    image_key: str | None = None,
    low_res: str | Mapping[str, str] | None = None,
    labels_key: str | None = None,
    prompt: str | Mapping[str, str] | None = None,
    tile: int | None = None,
    validation: float | Data | Mapping[str, Data] = 0.125,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Fit a model on one section or several.

    A model of sections (``"sections"``: :class:`stgen.models.KernelRegression`) is fitted on the spots of sections and
    the image around them. A model of locations (``model.takes == "locations"``) is fitted on tables: counts, and the
    histology embedding that :func:`stgen.pp.embed` left there. A model of maps (``"maps"``) is fitted on fine maps, as
    :func:`stgen.pp.rasterize` makes them, with the histology image and the low-resolution data on the same tissue.

    Parameters
    ----------
    model
        A model of :mod:`stgen.models`, fitted in place.
    data
        One section, or a mapping from names to sections. Sections of one patient belong together: hold out patients,
        not sections, if you want to know how a model does on a new one.
    embedding_key, table_key, layer
        For models of locations: the embedding in ``obsm``, by default the one that :func:`stgen.pp.embed` recorded; the
        table, needed only where there are several; the layer with the counts, by default ``X``. If
        ``f"{embedding_key}_views"`` is there too (dihedral views, ``(n, 8, D)``), models that train in steps draw a
        view at random each time. For models of maps, ``layer`` is that of the tables that ``low_res`` names.
    map_key
        For models of maps: the fine map in ``sdata.images``, counts per bin of the model's ``bin_um``. Bins that are
        NaN are not trained on.
    image_key
        For models of maps and of sections: the histology image; needed only where there are several.
    low_res
        For models of sections: the table of spots, needed only where there are several tables, or a map. For models of
        maps: the low-resolution data, a map in ``sdata.images`` or a table of spots in ``sdata.tables``. By default the
        fine map itself is summed over blocks of the model's ``factor``; what was measured apart from the truth, or by
        spots, is nearer to what the model will meet. A mapping names them section by section; sections that it leaves
        out have none, for models that can do without.
    labels_key
        For models that look at nuclei: their mask in ``sdata.labels``, as :func:`stgen.pp.segment_nuclei` makes it.
    prompt
        For models that take text: what the image shows, such as ``"H&E of invasive ductal carcinoma of the breast"``. A
        mapping gives one for each section.
    tile
        For models of maps: side of the training tiles in bins; the model's own by default. Tiles are cut at many
        offsets and turned and mirrored, map, low-resolution map and image together.
    validation
        Share of the tissue held out for early stopping, in whole spatial blocks; 0 for none. Or sections of their own,
        as ``data`` (models of maps).
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
    TypeError
        If the model's fit does not take an option.
    KeyError
        If an embedding, a table, a map, an image or a gene is missing.
    ValueError
        If counts are negative or not finite, a gene is constant, locations are too few, embeddings of the sections
        differ, map, image and low-resolution data do not fit the model or one another, or an option cannot work, or
        training diverges. The model is then as it was.

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
    seed = check_seed(seed)
    model.check_options(seed=seed, **options)
    if isinstance(validation, int | float):
        check_share("validation", validation, "[0, 0.9)")
    for_maps = {
        "map_key": map_key, "image_key": image_key, "low_res": low_res, "labels_key": labels_key, "prompt": prompt,
        "tile": tile,
    }  # fmt: skip
    for_locations = {"embedding_key": embedding_key, "table_key": table_key}
    of_spots = ("image_key", "low_res")
    not_used: dict[str, dict[str, Any]] = {
        "maps": for_locations,
        "locations": for_maps,
        "sections": for_locations | {k: v for k, v in for_maps.items() if k not in of_spots},
    }
    useless = [k for k, v in not_used[model.takes].items() if v is not None]
    if useless:
        raise ValueError(
            f"{type(model).__name__} is a model of {model.takes}, which has no use for {', '.join(useless)}."
        )
    rng = np.random.default_rng(seed)
    if isinstance(model, MapMaker) and model.takes == "sections":
        spots, record = gather_sections(model, sections, image_key=image_key, low_res=low_res, layer=layer)
        fit_in_place(model, spots, None, record, progress=options.get("progress", True))
        logger.info("%s", _fitted(model, f"{record['n_spots']} spots", len(sections)))
        return model
    train: SpotData | MapData
    held_out: SpotData | MapData | None
    if isinstance(model, MapModel):
        keys = MapKeys(map_key, image_key, low_res, labels_key, prompt, layer)
        train, held_out, record = _maps(model, sections, keys, tile, validation, rng)
        n = f"{record['n_bins']} bins"
    else:
        if not isinstance(validation, int | float):
            raise ValueError("`validation` must be a share of the locations for a model of locations.")
        sources = {}
        for name, section in sections.items():
            table = get_table(section, table_key=table_key)
            sources[name] = Source(table, table, get_section(section, table_key=table_key).xy_px)
        everything, blocks, record = gather(model, sources, embedding_key=embedding_key, layer=layer)
        train, held_out = split(everything, hold_out(blocks, validation, rng))
        record |= {"validation": validation, "layer": layer}
        n = f"{record['n_locations']} locations"
    fit_in_place(model, train, held_out, {**record, "seed": seed}, seed=seed, **options)
    logger.info("%s", _fitted(model, n, len(sections)))
    return model


def _fitted(model: Model, n: str, n_sections: int) -> str:
    """What was done, and what to do next."""
    return f"fitted {type(model).__name__} on {n} of {n_sections} section(s); model.save(folder) keeps it."


def _maps(
    model: MapModel,
    sections: Mapping[str, Data],
    keys: MapKeys,
    tile: int | None,
    validation: float | Data | Mapping[str, Data],
    rng: np.random.Generator,
) -> tuple[MapData, MapData | None, dict[str, Any]]:
    """Training and validation tiles of sections with maps, and a record of what they are."""
    tile = model.tile if tile is None else tile
    if isinstance(tile, bool) or not tile >= model.align or tile % model.align:
        raise ValueError(
            f"`tile` must be a multiple of {model.align} bins, which {type(model).__name__} needs to see; found "
            f"{tile!r}."
        )
    tile = int(tile)
    model.check_window(tile, tile)
    of_validation = {} if isinstance(validation, int | float) else validation
    named = dict(of_validation) if isinstance(of_validation, Mapping) else {"validation": of_validation}
    for argument, given in (("low_res", keys.low_res), ("prompt", keys.prompt)):
        unknown = set(given) - {*sections, *named} if isinstance(given, Mapping) else ()
        if unknown:
            raise ValueError(
                f"`{argument}` names data of {', '.join(map(repr, sorted(unknown)))}, which is none of the sections: "
                f"{', '.join(map(repr, [*sections, *named]))}."
            )
    gathered, record = gather_maps(model, sections, keys)
    if isinstance(validation, int | float):
        gathered, apart = split_maps(gathered, validation, tile, rng)
        record["validation"] = validation
    else:
        apart, of_validation = gather_maps(model, named, keys)
        record["validation"] = of_validation["sections"]
        record |= {"prompts": record["prompts"] | of_validation["prompts"]} if model.needs_text else {}
    check_genes(model.genes, gathered)
    train = cut_tiles(model, gathered, tile, "training")
    if not any(section.tissue.any() for section in apart):
        return train, None, record
    return train, cut_tiles(model, apart, tile, "validation", stride=tile, min_tissue=0.05), record


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
        with in_section(name, sections):
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
        with in_section(name, sections):
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
    check_share("validation", share, "[0, 0.9)")
    chosen: list[int] = []
    for section in np.unique(blocks // 1000):
        names = np.unique(blocks[blocks // 1000 == section])
        chosen.extend(rng.permutation(names)[: int(np.ceil(share * len(names)))] if share else [])
    return np.isin(blocks, chosen)


def split(data: SpotData, held_out: np.ndarray) -> tuple[SpotData, SpotData | None]:
    """The rows that are not held out, and those that are."""
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out)) if held_out.any() else None


def fit_in_place(
    model: Model[Any],
    train: Any,
    validation: Any,
    record: Mapping[str, Any],
    **options: Any,
) -> None:
    """Fit, and keep the record with the model; what goes wrong leaves the model as it was."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}, model.training
    try:
        history = model.fit(train, validation, **options)
    except BaseException:  # also an interrupt: what is not completely fitted stays as it was
        model.load_state_dict(before[0])
        model.train(before[1])
        raise
    kept = {k: v for k, v in options.items() if isinstance(v, int | float | str | bool | None)}
    model.record = {**record, "options": kept, "history": history}

"""Gene maps finer than what was measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData

from stgen import models
from stgen._checks import check_prompt
from stgen._spatial.grid import Grid, ImageWindow, get_map
from stgen._spatial.labels import labels_window
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import provenance, shallow_copy
from stgen._spatial.section import find_image, get_section
from stgen._spatial.tissue import tissue_bins
from stgen.measurement import Measurement
from stgen.models import Model
from stgen.tl.fitting.maps import check_uses
from stgen.tl.prediction.predict import _chosen
from stgen.tl.superresolution.one_section import superresolve_section
from stgen.tl.superresolution.result import MapResult, check_result_keys, check_store
from stgen.tl.superresolution.windows import Section, Tiling, sample_maps
from stgen.train import check_device

__all__ = ["superresolve"]

logger = logging.getLogger("stgen")


def superresolve(
    sdata: SpatialData,
    image_key: str | None = None,
    genes: Sequence[str] | None = None,
    *,
    model: Model | str | Path | None = None,
    low_res: str | None = None,
    layer: str | None = None,
    labels_key: str | None = None,
    prompt: str | None = None,
    bin_um: float | None = None,
    factor: int | None = None,
    like: str | None = None,
    n_samples: int = 4,
    steps: int = 25,
    solver: Literal["dpm++", "ddim", "ddpm"] = "dpm++",
    consistency: bool | None = None,
    key_added: str = "superresolved",
    keep_samples: bool = False,
    tile: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    store: str | Path | None = None,
    mpp: float | None = None,
    device: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
    progress: bool = True,
) -> SpatialData | None:
    """Make gene maps finer than what was measured, from histology and low-resolution expression, for a whole section.

    With a ``model`` that was fitted on high-resolution sections, at its resolution. The section is sampled window by window.
    All windows draw on one noise field and overlap by as much as the model needs to see, so that the result depends on
    neither ``tile`` nor ``batch_size`` beyond a small tolerance, and shows no seams.

    Without one, from this section alone: its own spots and its own image, and nothing else. What places look like and
    what was measured around them is weighed as predicts each spot best from the others (kriging with image features; see
    the page "One section and nothing else"). It takes minutes, on a CPU, for any number of genes; which genes can be
    predicted at all is measured, and stored beside the maps.

    Parameters
    ----------
    sdata
        Object with the image and the low-resolution data, which share a coordinate system.
    image_key
        Histology image; ``None`` if there is one, or the model takes none. Without a model, ``None`` means that no image is
        used.
    genes
        Which of the model's genes to write; without a model, which of those measured. All by default. Most models sample all
        of their genes all the same.
    model
        A fitted model for maps, a folder that ``model.save`` wrote, or a Hugging Face Hub id. ``None`` learns from this
        section alone.
    low_res
        The low-resolution data: a map in ``sdata.images`` whose bins are whole multiples of the result's
        (:func:`stgen.pp.degrade`), or a table in ``sdata.tables`` of counts in spots. Without a model, by default the only
        table; at least 30 spots, all genes of which make up the total that shares refer to.
    layer
        The layer of that table with the counts; ``X`` by default.
    labels_key
        For models that look at nuclei: their mask in ``sdata.labels``, as :func:`stgen.pp.segment_nuclei` makes it.
    prompt
        For models that take text: what the image shows; by default what the model was fitted (and validated) with, if that
        is one prompt.
    bin_um
        Side of the result's bins in µm, if you want it checked: it is the model's. Without a model, by default a fifth of
        the spots' diameter, rounded: 10 µm for Visium.
    factor
        How many times finer than the map ``low_res`` the result is, if you want it checked; without a model, 5 by default.
    like
        A map in ``sdata.images`` whose bins the result is to have, if not those that follow from ``low_res`` or the
        image. Without ``low_res``, also what is tissue is taken from there: where the map is not NaN.
    n_samples
        Samples drawn of every map. A deterministic model gives one; and where the expected map is a regression's, samples only
        matter for the spread and with ``keep_samples``.
    steps, solver
        Sampler, see :meth:`stgen.diffusion.Diffusion.sample`. Without a model there are no steps to choose.
    consistency
        Make samples and expected map sum to what was measured in each low-resolution bin or spot. Estimates are scaled toward
        it at every step of the sampler, and results at the end exactly. By default with a model; without one, spots are
        weighed against their noise instead, and ``True`` brings the result to their very counts.
    key_added
        Name of the result.
    keep_samples
        Also keep the samples.
    tile
        Side in bins of the squares in which the section is cut; by default the largest that takes a few GB of memory.
    batch_size
        Samples drawn at a time, with a model.
    seed
        Random seed.
    store
        Path of a new SpatialData store to which the result is streamed. With a model, memory then does not grow with the section;
        without one, the features of the whole image are held, about 600 bytes per bin.
    mpp
        µm per pixel of the image's finest level, where neither a micrometer coordinate system nor the 100 µm pitch of Visium
        spots tells.
    device
        ``"cpu"``, ``"cuda"``, ...; by default the best there is.
    overwrite
        Replace results of the same name, and the store.
    copy
        Return a copy with the result and leave ``sdata`` alone.
    progress
        Show a progress bar.

    Returns
    -------
    ``None``, or the copy. Written, float32 ``(c, y, x)`` in expected counts per bin, channels named after genes, NaN
    outside tissue (where nothing was measured nearby; without ``low_res``, off the tissue that the image shows):

    - ``sdata.images[key_added]``: the expected map, on the model's scale (log1p, say), brought back to counts: the
      regression of models that have one and diffuse what remains, else the mean of the samples
    - ``sdata.images[f"{key_added}_std"]``: standard deviation of the samples (``n_samples > 1``, stochastic models); without a
      model, of what kriging leaves open, which is not all that may be wrong: see ``"trusted"`` and ``"interval_90"``
    - ``sdata.images[f"{key_added}_samples"]``: samples, channels ``"<gene>:<number>"``, with ``keep_samples=True``
    - ``sdata.attrs["stgen"][key]`` for each: function, model, weights' hash, inputs, unit, ``"bin_um"``, parameters,
      seed, version

    Without a model, also:

    - ``sdata.images[f"{key_added}_total"]``: expected counts per bin over all genes, by which to normalize
    - ``sdata.tables[f"{key_added}_out_of_fold"]``: spots x genes; ``X`` are the counts that are predicted for each spot from all
      others. ``var``: ``"score"`` (their correlation with what was measured, on ``log1p(counts / total x median total)``),
      ``"trusted"`` (whether it is surely above 0.1: the lower end of its 95 % confidence interval), ``"from_image"`` and
      ``"from_neighbors"`` (the shares of the variance that look and surroundings predict), ``"interval_90"`` (90 % of spots lie
      within what is predicted of them from the others plus and minus this, on log1p(counts)) and ``"interval_90_norm"`` (on log1p(counts
      per 10,000)), ``"mean_counts"``
    - in ``sdata.attrs["stgen"][key_added]``: ``"kernels"``, ``"correlation_length_um"``, ``"from_image"``, ``"from_neighbors"``,
      ``"n_spots"``, ``"n_spots_left_out"`` (without counts or off the image), ``"n_trusted"``

    With ``store=``, these are in the store, and ``sdata`` refers to them there without loading them.

    Raises
    ------
    KeyError
        If an image, the low-resolution data, a layer, a mask or a gene is missing.
    TypeError
        If an element is of the wrong kind.
    ImportError, FileNotFoundError
        If the encoder of the prompt cannot be loaded.
    ValueError
        If the model is not a fitted model for maps, or image, low-resolution data and model do not fit together, keys
        or the store exist, or a parameter is impossible; without a model, if there are fewer than 30 spots, or two in one
        place, or the maps do not fit in memory. Nothing is written then.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.rasterize(sdata, genes=["EPCAM", "COL1A1"])
    >>> stgen.pp.degrade(sdata, map_key="counts", factor=5)
    >>> model = stgen.models.Interpolate(["EPCAM", "COL1A1"], factor=5)  # or any model fitted with stgen.tl.fit
    >>> stgen.tl.superresolve(sdata, model=model, low_res="counts_5x", progress=False)
    >>> sdata.images["superresolved"].shape == sdata.images["counts"].shape
    True

    From one section and nothing else:

    >>> genes = ["EPCAM", "COL1A1"]
    >>> stgen.tl.superresolve(sdata, "he", genes, low_res="spot_counts", key_added="own", progress=False)
    >>> sdata.tables["own_out_of_fold"].shape
    (37, 2)
    """
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Expected a SpatialData object, found {type(sdata).__name__}.")
    for name, value, least in (("n_samples", n_samples, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, found {value!r}.")
    if model is None:
        for name, value in (("labels_key", labels_key), ("prompt", prompt)):
            if value is not None:
                raise ValueError(
                    f"`{name}` is for models that take it, and there is none: leave it out, or pass model=."
                )
        inputs = [key for key in (image_key, low_res, like) if key is not None]
        check_result_keys(sdata, key_added, inputs, overwrite=overwrite)
        return superresolve_section(
            sdata, image_key, genes, low_res=low_res, layer=layer, bin_um=bin_um, factor=factor, like=like, n_samples=n_samples,
            consistency=bool(consistency), key_added=key_added, keep_samples=keep_samples, tile=tile, seed=seed,
            store=check_store(sdata, store, key_added, overwrite=overwrite, copy=copy), mpp=mpp, copy=copy, progress=progress,
        )  # fmt: skip
    device = str(check_device(device))
    model = _model_for_maps(model)
    model.check_sampling(steps, solver)
    genes = _genes(model, genes)
    check_uses(model, labels_key=labels_key, prompt=prompt, low_res=low_res, layer=layer)
    prompt, text = _text(model, prompt)
    inputs = [key for key in (image_key, low_res, like) if key is not None]
    check_result_keys(sdata, key_added, inputs, overwrite=overwrite)
    store = check_store(sdata, store, key_added, overwrite=overwrite, copy=copy)

    grid, image_key = _grid(sdata, model, image_key, low_res, bin_um=bin_um, factor=factor, like=like, mpp=mpp)
    image = _image(sdata, model, grid, image_key)
    measurement = None if low_res is None else measurement_of(sdata, low_res, grid, model.genes, layer=layer)
    _check_factor(model, low_res, measurement)
    labels = None
    if model.needs_labels:
        labels = labels_window(sdata, labels_key, grid, px_per_bin=model.config["px_per_bin"])
    tissue = tissue_bins(sdata, grid, image_key, measurement, like, mpp)
    section = Section(model, grid, image, measurement, tissue, labels, text)
    consistency = (consistency is None or bool(consistency)) and measurement is not None
    n_samples = n_samples if model.stochastic else 1
    tiling = Tiling.plan(section, tile, batch=min(batch_size, n_samples), consistency=consistency)

    target = shallow_copy(sdata) if copy else sdata
    entry = provenance(
        "tl.superresolve", model=type(model).__name__, weights_sha256=model.weights_sha256(),
        fitted_on=model.record.get("sections"), image=image_key, low_res=low_res, layer=layer, like=like, genes=genes, unit="counts per bin",
        bin_um=grid.bin_um, n_samples=n_samples, steps=steps if model.stochastic else None,
        solver=solver if model.stochastic else None, consistency=consistency, tile=tiling.tile, seed=seed,
        **({"labels": labels_key} if model.needs_labels else {}), **({"prompt": prompt} if model.needs_text else {}),
        **model.sampling_options, **({} if image is None else image.record()),
    )  # fmt: skip
    with MapResult(
        grid, genes, n_samples, key_added, keep_samples=keep_samples, store=store, tile=tiling.tile
    ) as result:
        sample_maps(
            section, tiling, result, n_samples=n_samples, batch_size=batch_size, steps=steps, solver=solver, seed=seed,
            device=device, progress=progress,
        )  # fmt: skip
        keys = result.hand_over(target, entry)
    logger.info(
        "superresolved %d genes in %d x %d bins of %.4g µm into %s; %s.",
        len(genes), grid.width, grid.height, grid.bin_um, " and ".join(f'sdata.images["{key}"]' for key in keys),
        "sdata.write(path) saves it" if store is None else f"it is stored in {store}, which spatialdata.read_zarr reads",
    )  # fmt: skip
    return target if copy else None


# ---- checks ----------------------------------------------------------------------------------------------------------


def _model_for_maps(model: Any) -> Model:
    """The model, loaded if need be; an error unless it is fitted and takes maps."""
    if isinstance(model, str | Path):
        model = models.load(model)
    if not isinstance(model, Model):
        raise TypeError(f"`model` must be a model, its folder or a Hub id, found {type(model).__name__}.")
    name = type(model).__name__
    if model.takes != "maps":
        raise ValueError(
            f"{name} predicts the expression of locations, not maps: call stgen.tl.predict_expression(sdata, model=...), "
            "or pass a model for maps, such as stgen.models.DiffST."
        )
    if not model.fitted:
        raise ValueError(f"this {name} has not been fitted; call stgen.tl.fit(model, sdata, map_key=...) first.")
    return model


def _genes(model: Model, genes: Sequence[str] | None) -> list[str]:
    """The genes to write, each once and known to the model."""
    genes = _chosen(model, [genes] if isinstance(genes, str) else genes)
    if not genes or len(set(genes)) < len(genes):
        raise ValueError(f"`genes` must name at least one gene, and each once; found {', '.join(genes) or 'none'}.")
    return genes


def _grid(
    sdata: SpatialData,
    model: Model,
    image_key: str | None,
    low_res: str | None,
    *,
    bin_um: float | None,
    factor: int | None,
    like: str | None,
    mpp: float | None,
) -> tuple[Grid, str | None]:
    """The bins of the result, and the key of the image if one is needed."""
    wanted = model.config["bin_um"]
    if bin_um is not None and not abs(bin_um / wanted - 1) <= 0.01:
        raise ValueError(
            f"the model was fitted for bins of {wanted:g} µm, found bin_um={bin_um!r}. Leave bin_um out, or fit a model "
            "on a map of that resolution: stgen.pp.rasterize(sdata, bin_um=...)."
        )
    if low_res is None and model.needs_low_res:
        raise ValueError(
            f"{type(model).__name__} was fitted with low-resolution expression and needs it: pass low_res=<a map in "
            f"sdata.images or a table of spots in sdata.tables>; found the images {_named(sdata.images)} and the tables "
            f"{_named(sdata.tables)}."
        )
    if low_res is not None and low_res not in sdata.images and low_res not in sdata.tables:
        raise KeyError(
            f"There is no low-resolution map or table {low_res!r}; found the images {_named(sdata.images)} and the "
            f"tables {_named(sdata.tables)}."
        )
    is_map = low_res is not None and low_res in sdata.images
    if image_key is not None or model.needs_image or not (is_map or like):
        image_key = find_image(sdata, image_key)
    if like is not None:
        return _grid_like(sdata, like, wanted, factor), image_key
    if not is_map:
        if factor is not None:
            raise ValueError(
                f"`factor` counts bins along the side of a low-resolution bin, and low_res={low_res!r} is not a map. "
                "Leave it out."
            )
        if low_res is not None and mpp is None:
            mpp = get_section(sdata, table_key=low_res, image_key=image_key).mpp
        return Grid.of_image(sdata, image_key, bin_um=bin_um or wanted, mpp=mpp), image_key
    low = Grid.of_map(sdata, low_res)
    found = max(1, round(low.bin_um / wanted))
    if abs(low.bin_um / found / wanted - 1) > 0.01:
        raise ValueError(
            f"the bins of {low_res!r} are {low.bin_um:.4g} µm, {low.bin_um / wanted:.4g} times the model's {wanted:g} µm; "
            "it must be a whole number of times. Make it with stgen.pp.degrade from a map of the model's bin_um."
        )
    if factor not in (None, found):
        raise ValueError(
            f"factor={factor!r} does not fit: the bins of {low_res!r} are {low.bin_um:.4g} µm, {found} times the model's "
            f"{wanted:g} µm. Leave factor out, or degrade the map by {factor!r}: stgen.pp.degrade(sdata, map_key=..., "
            f"factor={factor!r})."
        )
    grid = low.refined(found)
    entry = sdata.attrs.get("stgen", {}).get(low_res, {})
    if entry.get("factor") == found:  # of pp.degrade: the blocks at the lower and right edge may reach out of the map
        height, width = (
            min(n, entry.get(f"fine_{name}", n)) for name, n in (("height", grid.height), ("width", grid.width))
        )
        grid = replace(grid, height=int(height), width=int(width))
    return grid, image_key


def _grid_like(sdata: SpatialData, like: str, bin_um: float, factor: int | None) -> Grid:
    """The bins of a map that is there, which must be the model's."""
    get_map(sdata, like)
    if factor is not None:
        raise ValueError(f"the bins are those of like={like!r}; leave `factor` out.")
    grid = Grid.of_map(sdata, like)
    if abs(grid.bin_um / bin_um - 1) > 0.01:
        raise ValueError(
            f"the bins of {like!r} are {grid.bin_um:.4g} µm, and the model is for {bin_um:g} µm. Name a map of that "
            "resolution as like=: stgen.pp.rasterize(sdata, bin_um=...)."
        )
    return grid


def _text(model: Model, prompt: str | None) -> tuple[str | None, np.ndarray | None]:
    """The prompt, for models that take one, and what the model makes of it."""
    if not model.needs_text:
        return None, None
    known = model.record.get("prompts", {})
    if prompt is None and len(known) == 1:
        prompt = next(iter(known))
    if prompt is None:
        raise ValueError(
            f"this {type(model).__name__} takes a prompt and was fitted with {_named(known)}: pass prompt=<what the image "
            "shows>."
        )
    prompt = check_prompt(prompt)
    vector = known.get(prompt)
    return prompt, model.embed_prompt(prompt) if vector is None else np.asarray(vector, np.float32)


def _check_factor(model: Model, low_res: str | None, measurement: Measurement | None) -> None:
    """Refuse a map that is coarser or finer than those the model was fitted to sharpen."""
    if measurement is None or measurement.shape != "square" or not model.uses_low_res:
        return
    found = round(measurement.diameter)
    if found != model.config["factor"]:
        raise ValueError(
            f"the model was fitted to sharpen maps {model.config['factor']} times, and the bins of {low_res!r} are {found} "
            "times its own. Use a model fitted for this factor, or a map of that one: stgen.pp.degrade."
        )


def _image(sdata: SpatialData, model: Model, grid: Grid, image_key: str | None) -> ImageWindow | None:
    """A reader of the image on the grid, if the model takes one and it fits."""
    if not model.needs_image:
        return None
    image = grid.image_window(sdata, image_key, px_per_bin=model.config["px_per_bin"])
    expected = model.config["image_channels"]
    if image.n_channels != expected:
        raise ValueError(
            f"the model was fitted on images of {expected} channels, and {image_key!r} has {image.n_channels} "
            f"({_named(image.channels)}). Name another image_key=."
        )
    covered = grid.overlap(sdata, image_key)
    if covered <= 0:
        system = grid.shared_system(sdata, image_key)
        raise ValueError(
            f"the image {image_key!r} and the low-resolution map do not overlap in the coordinate system {system!r}. "
            "Correct the transformation of one of them: spatialdata.transformations.set_transformation."
        )
    if covered < 0.9:
        logger.warning(
            "the image %r covers %.0f %% of the map; beyond it, its edge is repeated.", image_key, 100 * covered
        )
    return image


def _named(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys)) or "none"

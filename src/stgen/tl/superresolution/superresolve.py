"""Gene maps finer than what was measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stgen import models
from stgen._checks import check_prompt, check_seed, check_types, check_whole, chosen_genes
from stgen._spatial.grid import Grid, get_map
from stgen._spatial.map_inputs import MapElements
from stgen._spatial.records import provenance, shallow_copy
from stgen._spatial.result_grid import result_grid
from stgen._spatial.section import find_image
from stgen.data import MapInputs
from stgen.measurement import Measurement
from stgen.models import KernelRegression, MapMaker, Model
from stgen.sampling import MapSampler, SamplingOptions, SpotReport
from stgen.tl.fitting.fit import fit_in_place
from stgen.tl.fitting.maps import check_uses
from stgen.tl.fitting.sections import spots_of
from stgen.tl.superresolution.result import FUNCTION, MapResult, check_result_keys, check_store, spot_table
from stgen.tl.superresolution.streaming import WorkFolder, signature_of
from stgen.train import check_device
from stgen.windows import bounds_of

__all__ = ["superresolve"]

logger = logging.getLogger("stgen")

MOST_BYTES = 8e9  # of a result in memory
FINEST_PX_UM = 2.0  # of the image, where a section is all that there is to learn from


@check_types
def superresolve(
    sdata: SpatialData,
    image_key: str | None = None,
    genes: str | Sequence[str] | None = None,
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

    With a ``model`` that was fitted on high-resolution sections, at its resolution. The section is sampled window by
    window. All windows draw on one noise field and overlap by as much as the model needs to see, so that the result
    depends on neither ``tile`` nor ``batch_size`` beyond a small tolerance, and shows no seams.

    Without one, from this section alone: its own spots and its own image, and nothing else. What places look like and
    what was measured around them is weighed as predicts each spot best from the others (kriging with image features;
    see the page "One section and nothing else"). It takes minutes, on a CPU, for any number of genes; which genes can
    be predicted at all is measured, and stored beside the maps.

    Parameters
    ----------
    sdata
        Object with the image and the low-resolution data, which share a coordinate system.
    image_key
        Histology image; ``None`` if there is one, or the model takes none. Without a model, ``None`` means that no
        image is used.
    genes
        Which of the model's genes to write; without a model, which of those measured. All by default. Most models
        sample all of their genes all the same.
    model
        A fitted model for maps, a folder that ``model.save`` wrote, or a Hugging Face Hub id. ``None`` learns from this
        section alone: a :class:`stgen.models.KernelRegression` is fitted to it and applied. Pass one that is not fitted
        to have it back fitted, to be saved or applied to other sections.
    low_res
        The low-resolution data: a map in ``sdata.images`` whose bins are whole multiples of the result's
        (:func:`stgen.pp.degrade`), or a table in ``sdata.tables`` of counts in spots. Without a model, by default the
        only table; at least 30 spots, all genes of which make up the total that shares refer to.
    layer
        The layer of that table with the counts; ``X`` by default.
    labels_key
        For models that look at nuclei: their mask in ``sdata.labels``, as :func:`stgen.pp.segment_nuclei` makes it.
    prompt
        For models that take text: what the image shows; by default what the model was fitted (and validated) with, if
        that is one prompt.
    bin_um
        Side of the result's bins in µm, if you want it checked: it is the model's. Without a model, by default a fifth
        of the spots' diameter, rounded: 10 µm for Visium.
    factor
        How many times finer than the map ``low_res`` the result is, if you want it checked; without a model, 5 by
        default.
    like
        A map in ``sdata.images`` whose bins the result is to have, if not those that follow from ``low_res`` or the
        image. Without ``low_res``, also what is tissue is taken from there: where the map is not NaN.
    n_samples
        Samples drawn of every map. A deterministic model gives one; and where the expected map is a regression's,
        samples only matter for the spread and with ``keep_samples``.
    steps, solver
        Sampler, see :meth:`stgen.diffusion.Diffusion.sample`. Without a model there are no steps to choose.
    consistency
        Make samples and expected map sum to what was measured in each low-resolution bin or spot. Estimates are scaled
        toward it at every step of the sampler, and results at the end exactly. By default with a model; without one,
        spots are weighed against their noise instead, and ``True`` brings the result to their very counts.
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
        Path of a new SpatialData store to which the result is streamed. With a model, memory then does not grow with
        the section; without one, the features of the whole image are held, about 600 bytes per bin. It is made in a
        folder beside it, ``.<name>.part``, and appears when it is whole. If the process is killed or interrupted, the
        same call goes on from the windows that are done, to the same bits; a call with anything else that matters
        starts anew. A second process that writes to the same store is refused.
    mpp
        µm per pixel of the image's finest level, where neither a micrometer coordinate system nor the 100 µm pitch of
        Visium spots tells.
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
    - ``sdata.images[f"{key_added}_std"]``: standard deviation of the samples (``n_samples > 1``, stochastic models);
      without a model, of what kriging leaves open, which is not all that may be wrong: see ``"trusted"`` and
      ``"interval_90"``
    - ``sdata.images[f"{key_added}_samples"]``: samples, channels ``"<gene>:<number>"``, with ``keep_samples=True``
    - ``sdata.attrs["stgen"][key]`` for each: function, model, weights' hash, inputs, unit, ``"bin_um"``, parameters,
      seed, version

    Without a model, also:

    - ``sdata.images[f"{key_added}_total"]``: expected counts per bin over all genes, by which to normalize
    - ``sdata.tables[f"{key_added}_out_of_fold"]``: spots x genes; ``X`` are the counts that are predicted for each spot
      from all others. ``var``: ``"score"`` (their correlation with what was measured, on ``log1p(counts / total x
      median total)``), ``"trusted"`` (whether it is surely above 0.1: the lower end of its 95 % confidence interval),
      ``"from_image"`` and ``"from_neighbors"`` (the shares of the variance that look and surroundings predict),
      ``"interval_90"`` (90 % of spots lie within what is predicted of them from the others plus and minus this, on
      log1p(counts)) and ``"interval_90_norm"`` (on log1p(counts per 10,000)), ``"mean_counts"``
    - in ``sdata.attrs["stgen"][key_added]``: ``"kernels"``, ``"correlation_length_um"``, ``"from_image"``,
      ``"from_neighbors"``, ``"n_spots"``, ``"n_spots_left_out"`` (without counts or off the image), ``"n_trusted"``

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
        or the store exist, another process writes to the store, or a parameter is impossible; without a model, if there
        are fewer than 30 spots, or two in one place, or the maps do not fit in memory. Nothing is written then.

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
    n_samples, batch_size = check_whole("n_samples", n_samples), check_whole("batch_size", batch_size)
    seed = check_seed(seed)
    device = str(check_device(device))
    given = None if model is None else map_maker(model)
    own = given is None or not given.fitted  # learns from this section alone
    check_uses(given, labels_key=labels_key, prompt=prompt, low_res=low_res, layer=layer)
    if given is not None:
        given.check_sampling(steps, solver)
        if given.fitted:
            given.check_weights()
    if own and tile is not None:
        check_whole("tile", tile)
    low_res = _low_res(sdata, low_res, given, own=own)
    genes = _genes(sdata, low_res, given, genes)
    prompt, text = (None, None) if given is None else _text(given, prompt)
    check_result_keys(
        sdata, key_added, [key for key in (image_key, low_res, like) if key is not None], overwrite=overwrite
    )
    store = check_store(sdata, store, key_added, overwrite=overwrite, copy=copy)

    image_key = _image_key(sdata, image_key, low_res, like, given)
    elements = MapElements.find(
        sdata, image_key=image_key, low_res=low_res, layer=layer, labels_key=labels_key, map_key=like, mpp=mpp
    )
    grid = result_grid(
        elements, bin_um=bin_um, factor=factor, fitted_um=None if given is None else given.config["bin_um"]
    )
    if store is None:
        _check_memory(grid, genes, 1 + (n_samples > 1) + keep_samples * n_samples)
    maker = _regression_for(elements, grid, genes, seed) if given is None else deepcopy(given) if own else given
    inputs = elements.inputs(grid, maker, text=text)
    if own:
        fit_in_place(maker, [inputs], None, {"sections": ["section"]}, progress=progress)
    _check_factor(maker, low_res, inputs.measurement)
    agreeing = maker.consistent if consistency is None else bool(consistency)
    options = SamplingOptions(
        n_samples=n_samples, steps=steps, solver=solver, batch_size=batch_size, tile=tile, seed=seed, device=device,
        consistency=agreeing and inputs.measurement is not None, keep_samples=keep_samples, progress=progress,
    )  # fmt: skip
    sampler = maker.sampler(inputs, genes, options)

    target, work = shallow_copy(sdata) if copy else sdata, None
    if store is not None:
        work = WorkFolder(store, signature_of(maker, inputs, sampler, options), overwrite=overwrite)
    with MapResult(
        grid, genes, sampler.n_samples, key_added, keep_samples=keep_samples, work=work, tile=sampler.tiling.tile,
        total=sampler.has_total,
    ) as result:  # fmt: skip
        _make(sampler, inputs, result, f"superresolve with {type(maker).__name__}", progress=progress)
        report = sampler.report()
        table = None if report is None else spot_table(elements, inputs, report)
        entry = provenance(
            FUNCTION, model=type(maker).__name__, weights_sha256=maker.weights_sha256(),
            fitted_on=None if own else maker.record.get("sections"), image=image_key, low_res=low_res, layer=layer, like=like,
            genes=genes, unit="counts per bin", bin_um=grid.bin_um, n_samples=n_samples if maker.stochastic else 1,
            consistency=options.consistency, tile=sampler.tiling.tile, seed=seed, labels=labels_key, prompt=prompt,
            **sampler.record(), **(elements.image_record if inputs.image is not None else {}),
        )  # fmt: skip
        keys = result.hand_over(target, entry, table)
    if own and given is not None:  # the fitted model is handed back
        given.load_state_dict(maker.state_dict())
        given.record = maker.record
    _say_what_was_found(genes, grid, keys, store, key_added, report)
    return target if copy else None


def _make(sampler: MapSampler, inputs: MapInputs, result: MapResult, name: str, *, progress: bool) -> None:
    """Make all windows of all genes that are not done and put them into the result: the one loop."""
    windows, tiling = sampler.tiling.windows(inputs.tissue), sampler.tiling
    bar = tqdm(
        total=len(sampler.parts) * len(windows), desc=name, unit="window", **({} if progress else {"disable": True})
    )
    with sampler.ready(), bar:
        for part in sampler.parts:
            for window in windows:
                if not result.is_done(part, window):
                    top, left, *_ = window.outer
                    (y, x), kept = bounds_of(tiling.kept(window) & inputs.tissue_in(window.outer))
                    maps, total = sampler.maps(window.outer, part)
                    result.put((values[:, y, x] for values in maps), kept, top + y.start, left + x.start, part)
                    if total is not None:
                        result.put_total(total[:, y, x], kept, top + y.start, left + x.start)
                    result.set_done(part, window)
                bar.update()


def _say_what_was_found(
    genes: list[str], grid: Grid, keys: list[str], store: Path | None, key_added: str, report: SpotReport | None
) -> None:
    """Where the result is, how to save it, and which genes can be trusted."""
    logger.info(
        "superresolved %d genes in %d x %d bins of %.4g µm%s into %s; %s.%s",
        len(genes), grid.width, grid.height, grid.bin_um,
        "" if report is None else f" from {len(report.rows)} spots",
        " and ".join(f'sdata.images["{key}"]' for key in keys),
        "sdata.write(path) saves it" if store is None else f"it is stored in {store}, which spatialdata.read_zarr reads",
        "" if report is None else f' {int(report.scores["trusted"].sum())} genes are predictable out of fold: see '
        f'sdata.tables["{key_added}_out_of_fold"].var.',
    )  # fmt: skip


# ---- checks ----------------------------------------------------------------------------------------------------------


def map_maker(model: Any) -> MapMaker[Any]:
    """The model, loaded if need be; an error unless it makes maps, and is fitted or can learn from one section."""
    if isinstance(model, str | Path):
        model = models.load(model)
    if not isinstance(model, Model):
        raise TypeError(f"`model` must be a model, its folder or a Hub id, found {type(model).__name__}.")
    name = type(model).__name__
    if not isinstance(model, MapMaker):
        raise ValueError(
            f"{name} predicts the expression of locations, not maps: call stgen.tl.predict_expression(sdata, "
            "model=...), or pass a model for maps, such as stgen.models.DiffST."
        )
    if model.takes == "maps" and not model.fitted:
        raise ValueError(f"this {name} has not been fitted; call stgen.tl.fit(model, sdata, map_key=...) first.")
    return model


def _regression_for(elements: MapElements, grid: Grid, genes: list[str], seed: int) -> KernelRegression:
    """What learns from a section alone, on these bins; its pixels are at most as fine as the image."""
    if elements.image_key is None:
        return KernelRegression(genes, bin_um=grid.bin_um, image_channels=None, seed=seed)
    image = elements.reader(grid, px_per_bin=1)
    finest = max(1, round(min(grid.bin_um / FINEST_PX_UM, image.finest_px_per_bin)))
    return KernelRegression(genes, bin_um=grid.bin_um, image_channels=image.n_channels, px_per_bin=finest, seed=seed)


def _low_res(sdata: SpatialData, low_res: str | None, maker: MapMaker[Any] | None, *, own: bool) -> str | None:
    """The low-resolution data: those named; where a section is all that there is to learn from, its only table."""
    if maker is not None and not own:
        if low_res is None and maker.needs_low_res:
            raise ValueError(
                f"{type(maker).__name__} was fitted with low-resolution expression and needs it: pass low_res=<a map "
                f"in sdata.images or a table of spots in sdata.tables>; found the images {_named(sdata.images)} and "
                f"the tables {_named(sdata.tables)}."
            )
        return low_res
    return spots_of(sdata, low_res)


def _genes(
    sdata: SpatialData, low_res: str | None, maker: MapMaker[Any] | None, genes: str | Sequence[str] | None
) -> list[str]:
    """The genes to write, each once and known to the model, or measured."""
    if maker is not None:
        return chosen_genes(genes, maker.genes, f"the {type(maker).__name__}")
    if low_res is not None and low_res in sdata.images:
        names = get_map(sdata, low_res).coords["c"].values
    else:
        names = sdata.tables[low_res].var_names
    return chosen_genes(genes, [str(name) for name in names], repr(low_res))


def _image_key(
    sdata: SpatialData, image_key: str | None, low_res: str | None, like: str | None, maker: MapMaker[Any] | None
) -> str | None:
    """The image, if one is named or needed."""
    if maker is None:
        return image_key
    of_bins = like is not None or (low_res is not None and low_res in sdata.images)
    return find_image(sdata, image_key) if image_key is not None or maker.needs_image or not of_bins else None


def _text(model: MapMaker[Any], prompt: str | None) -> tuple[str | None, np.ndarray | None]:
    """The prompt, for models that take one, and what the model makes of it."""
    if not model.needs_text:
        return None, None
    known = model.record.get("prompts", {})
    if prompt is None and len(known) == 1:
        prompt = next(iter(known))
    if prompt is None:
        raise ValueError(
            f"this {type(model).__name__} takes a prompt and was fitted with {_named(known)}: pass prompt=<what the "
            "image shows>."
        )
    prompt = check_prompt(prompt)
    vector = known.get(prompt)
    return prompt, model.embed_prompt(prompt) if vector is None else np.asarray(vector, np.float32)


def _check_factor(model: MapMaker[Any], low_res: str | None, measurement: Measurement | None) -> None:
    """Refuse a map that is coarser or finer than those the model was fitted to sharpen."""
    if measurement is None or measurement.footprints.shape != "square" or not model.uses_low_res:
        return
    found = round(measurement.footprints.diameter)
    if found != model.config["factor"]:
        raise ValueError(
            f"the model was fitted to sharpen maps {model.config['factor']} times, and the bins of {low_res!r} are "
            f"{found} times its own. Use a model fitted for this factor, or a map of that one: stgen.pp.degrade."
        )


def _check_memory(grid: Grid, genes: list[str], n_maps: int) -> None:
    """Refuse a result in memory that is too large, with ``n_maps`` maps of each gene."""
    n_bytes = 4.0 * len(genes) * grid.height * grid.width * n_maps
    if n_bytes > MOST_BYTES:
        raise ValueError(
            f"the maps of {len(genes)} genes in {grid.height} x {grid.width} bins take {n_bytes / 1e9:.0f} GB. Stream "
            "them to disk with store=<path of a new store>, name fewer genes, or pass a larger bin_um."
        )


def _named(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys)) or "none"

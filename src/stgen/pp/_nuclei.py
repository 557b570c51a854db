"""Nuclei of a histology image, one label each."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import torch
import zarr
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.filters import threshold_otsu
from skimage.measure import label
from skimage.segmentation import watershed
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel
from spatialdata.transformations import get_transformation
from tqdm.auto import tqdm

from stgen._checks import check_types, listed
from stgen._spatial.image import Histology, image_of
from stgen._spatial.records import check_free_key, made_by, provenance, record
from stgen._spatial.section import check_sdata, find_image
from stgen._spatial.tissue import tissue_mask
from stgen.train import check_device

__all__ = ["hematoxylin", "outline_nuclei", "segment_nuclei"]

logger = logging.getLogger("stgen")

_FINE_UM = 0.3  # standard deviation of the smoothing against noise
_AROUND_UM = 4.0  # that of a nucleus's surroundings: about the radius of a large nucleus
_COARSE_UM = 1.5  # that of a smoothing which leaves half of the contrast of nuclei, and a quarter of noise at most
_DEPTH_UM = 0.6  # that of the smoothing of the distance to the rim
_APART_UM = 1.5  # nuclei whose centers are closer than this along x and y are one
_CLUMP_UM, _CLUMP_APART_UM = 1.0, 3.0  # the same two in clumps that only their stain can split
_CONTEXT_UM = 48.0  # half of a long nucleus, and its surroundings
_SAMPLE_UM, _N_SAMPLES = 200.0, 16  # side and number of the windows from which the threshold is estimated
_CONTRAST = 0.1  # how far a nucleus stands out on average, as a share of the threshold
_LEAST_DENSITY = 0.15  # what hematoxylin absorbs least in a nucleus, where a section has none to learn from
_MODEL_MPP, _MODEL_PX = 0.5, 512  # how learned segmenters see the image, unless they say otherwise
_SLACK_PX = 2  # two tiles may differ this much about where the center of a nucleus lies
_CHUNK = 1024


@check_types
def segment_nuclei(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    method: str = "hematoxylin",
    channel: str | int | None = None,
    mpp: float | None = None,
    threshold: float | None = None,
    min_area_um2: float = 10.0,
    max_area_um2: float = 300.0,
    tile_px: int = 1024,
    device: str | torch.device | None = None,
    key_added: str = "nuclei",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Outline the nuclei of a whole section.

    Parameters
    ----------
    sdata
        Object with the image.
    image_key
        Image to read; None if there is one.
    method
        - ``"hematoxylin"``: color deconvolution of an H&E image, a threshold, and a watershed. Needs no download and no
          GPU.
        - the name of a segmenter of lazyslide-models that tells nuclei apart, such as ``"instanseg"``, ``"cellpose"``
          or ``"histoplus"`` (``pip install "stgen[encoders]"``). It sees H&E at 0.5 µm per pixel, or as it asks.
    channel
        Nuclear channel of a fluorescence image, such as ``"DAPI"``, by name or by number from 0. It takes the place of
        hematoxylin, and nothing is deconvolved.
    mpp
        µm per pixel of the image's finest level; None takes it from a micrometer coordinate system.
    threshold
        Least stain of a nucleus: optical density of hematoxylin (natural logarithm), or intensity of ``channel`` as a
        share of full scale. None estimates one for the whole section. Lower it if pale nuclei are
        missed.
    min_area_um2, max_area_um2
        What is smaller or larger (µm²) is no nucleus.
    tile_px
        Side in pixels of what is looked at in one go: memory grows with its square, the result does not depend on it. A
        learned segmenter has its own.
    device
        Where a learned segmenter runs; default a GPU if there is one.
    key_added
        Name of the labels.
    overwrite
        Whether existing labels may be replaced.
    progress
        Whether to show a progress bar.

    Returns
    -------
    None. Writes:

    - ``sdata.labels[key_added]``: int32 ``(y, x)``, pixel by pixel on the finest level of the image and with its
      transformations to all coordinate systems. 0 is no nucleus; nuclei are numbered from 1 in reading order. Held
      compressed in memory, and unpacked where it is looked at.
    - ``sdata.attrs["stgen"][key_added]``: ``"image_key"``, ``"method"``, ``"channel"``, ``"threshold"``,
      ``"min_area_um2"``, ``"max_area_um2"``, ``"image_mpp"`` (µm per pixel of the image), ``"n_nuclei"``,
      ``"function"``, ``"version"``; ``"image_full_scale"``, the value that was read as 1, where the type of the image
      does not say it, and ``"image_alpha"`` where it has opacity.

    Raises
    ------
    KeyError
        If there is no such image or channel.
    ValueError
        If the image is not H&E and no channel is named, the method is unknown or does not tell nuclei apart, the µm per
        pixel are not known or too coarse for nuclei, a number is out of its range, or the key exists.
    ImportError
        If a segmenter is named and lazyslide-models is not installed.

    Notes
    -----
    A pixel is nuclear if its stain is above the threshold and above its surroundings (their Gaussian mean, 4 µm). The
    threshold is Otsu's, once for the section, on windows spread over its tissue: of the light that hematoxylin lets
    through, or of the square root of an intensity, so that a few very dark or bright nuclei do not raise it. Touching
    nuclei are split along the watershed of the distance to the rim, and what is still too large for a nucleus where the
    stain is weaker. What stands out by less than a tenth of the threshold is dropped. Where tissue shows nothing but
    noise, there are no nuclei.

    Tiles overlap, and a nucleus is taken as a whole from the tile in which its center lies.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=300, mpp=0.5)
    >>> stgen.pp.segment_nuclei(sdata, progress=False)
    >>> sdata["nuclei"].shape == sdata["he"].shape[1:]
    True
    """
    check_sdata(sdata)
    check_free_key(sdata, "labels", key_added, overwrite=overwrite, ours=made_by(sdata, key_added, "pp.segment_nuclei"))
    image_key = find_image(sdata, image_key)
    image = image_of(sdata, image_key, mpp=mpp)
    area_px = _check_area(min_area_um2, max_area_um2, image.mpp)
    if threshold is not None and not (np.isfinite(threshold) and threshold > 0):
        raise ValueError(f"`threshold` must be None or a positive number, found {threshold!r}.")
    if isinstance(tile_px, bool) or int(tile_px) != tile_px or tile_px < 64:
        raise ValueError(f"`tile_px` must be a whole number of at least 64 pixels, found {tile_px!r}.")
    home = check_device(device)
    if channel is not None:
        image = _one_channel(image, image_key, channel)
    elif image.n_channels != 3:
        raise ValueError(
            f"method={method!r} reads H&E, which has three channels; the image {image_key!r} has {image.n_channels}: "
            f"{listed(image.channels)}. For fluorescence, name the nuclear one: channel=<one of them>."
        )
    if method == "hematoxylin":
        finder = _stained(image, threshold, int(tile_px), area_px)
    elif channel is None and threshold is None:
        finder = _learned(image, method, home)
    else:
        raise ValueError(f"{method!r} finds nuclei in H&E by itself; leave out channel= and threshold=.")

    labels, n_nuclei = _stitch(finder, image.height, image.width, area_px, progress=progress)
    sdata.labels[key_added] = Labels2DModel.parse(
        labels, dims=("y", "x"), transformations=get_transformation(sdata.images[image_key], get_all=True)
    )
    entry = provenance(
        "pp.segment_nuclei",
        image_key=image_key,
        method=method if channel is None else "channel",
        channel=channel,
        threshold=finder.threshold,
        min_area_um2=float(min_area_um2),
        max_area_um2=float(max_area_um2),
        image_mpp=image.mpp,
        **image.record(),
        n_nuclei=n_nuclei,
    )
    record(sdata, key_added, entry)
    if n_nuclei:
        logger.info("Outlined %d nuclei of %r: labels[%r].", n_nuclei, image_key, key_added)
    else:
        logger.warning("Found no nuclei in %r: labels[%r] is empty. Check the image and mpp.", image_key, key_added)


def _check_area(smallest_um2: float, largest_um2: float, mpp: float) -> tuple[float, float]:
    """Both areas in pixels."""
    if not 0 < smallest_um2 < largest_um2 < np.inf:
        raise ValueError(
            "`min_area_um2` and `max_area_um2` must be positive and in this order, found "
            f"{smallest_um2!r} and {largest_um2!r}."
        )
    if smallest_um2 < 4 * mpp**2:
        raise ValueError(
            f"At {mpp:.4g} µm per pixel, a nucleus of {smallest_um2:.4g} µm² covers less than four pixels and cannot "
            "be outlined. Use a finer image, correct mpp=, or raise min_area_um2."
        )
    return smallest_um2 / mpp**2, largest_um2 / mpp**2


def _one_channel(image: Histology, image_key: str, channel: str | int) -> Histology:
    """The image with one channel, by name or number."""
    by_number = isinstance(channel, int | np.integer) and not isinstance(channel, bool)
    if channel not in (range(image.n_channels) if by_number else image.channels):
        raise KeyError(
            f"The image {image_key!r} has no channel {channel!r}; found {listed(image.channels)}. Pass channel=<one of "
            "them, or its number from 0>."
        )
    i = int(channel) if by_number else image.channels.index(str(channel))
    return image.only(i)


@dataclass(frozen=True)
class _Finder:
    """What outlines nuclei in a window, and how it wants the windows cut."""

    outline: Callable[[int, int, int, int], np.ndarray]
    """Labels ``(y1 - y0, x1 - x0)`` of the window x0, y0, x1, y1, in pixels of the finest level, within the image."""
    tile_px: int
    """Side of a tile."""
    margin_px: int
    """What a window has around its tile, so that each nucleus with its center in the tile is whole."""
    threshold: float | None = None


# -- by a stain --------------------------------------------------------------------------------------------------------
def hematoxylin(rgb: np.ndarray) -> np.ndarray:
    """Optical density of hematoxylin ``(h, w)``, natural logarithm, of colors ``(3, h, w)`` in [0, 1].

    Deconvolved with the stain vectors of Ruifrok and Johnston (2001), as :func:`skimage.color.rgb2hed` does, but not
    cut off at zero, where eosin alone lies.
    """
    density = -np.log(np.clip(rgb, 1 / 255, 1))
    return np.tensordot(hed_from_rgb[:, 0].astype(np.float32), density.astype(np.float32), axes=1)


def outline_nuclei(
    stain: np.ndarray,
    *,
    mpp: float,
    threshold: float,
    contrast: float = 0.0,
    area_px: tuple[float, float] = (0.0, np.inf),
) -> np.ndarray:
    """Label what stands out in a stain.

    Parameters
    ----------
    stain
        Amount of a nuclear stain ``(h, w)``.
    mpp
        µm per pixel.
    threshold
        Least amount within a nucleus.
    contrast
        Least mean difference of a nucleus to its surroundings.
    area_px
        Smallest and largest nucleus in pixels: smaller holes are filled, larger clumps are split by their stain.

    Returns
    -------
    Labels ``(h, w)``; 0 is no nucleus. What a label is depends on its neighborhood only.
    """
    smooth = ndimage.gaussian_filter(stain, _FINE_UM / mpp)
    if not (smooth > threshold).any():
        return np.zeros(stain.shape, np.int32)
    above = smooth - ndimage.gaussian_filter(stain, _AROUND_UM / mpp, truncate=3)
    nuclear = (smooth > threshold) & (above > 0)
    holes = label(~nuclear, connectivity=1)
    nuclear |= (np.bincount(holes.ravel()) < area_px[0])[holes]

    depth = ndimage.distance_transform_edt(nuclear).astype(np.float32)
    labels = _hills(ndimage.gaussian_filter(depth, _DEPTH_UM / mpp), nuclear, _APART_UM / mpp)
    clump = (labels > 0) & (np.bincount(labels.ravel()) > area_px[1])[labels]
    if clump.any():  # nothing at its rim tells the nuclei apart
        darker = _hills(ndimage.gaussian_filter(stain, _CLUMP_UM / mpp), clump, _CLUMP_APART_UM / mpp)
        labels = np.where(clump, darker + labels.max(), labels)
    number = labels.ravel()
    mean = np.bincount(number, above.ravel()) / np.maximum(np.bincount(number), 1)
    return np.where((mean > contrast)[labels], labels, 0)


def _hills(height: np.ndarray, mask: np.ndarray, apart_px: float) -> np.ndarray:
    """Labels of the hills within a mask: one around each summit that is the highest within ``apart_px``."""
    height = np.where(mask, height, 0)
    summits = label(mask & (height == ndimage.maximum_filter(height, 2 * round(apart_px) + 1)))
    return watershed(-height, summits, mask=mask)


def _stained(image: Histology, threshold: float | None, tile_px: int, area_px: tuple[float, float]) -> _Finder:
    """Finds nuclei by hematoxylin in three channels, or by the one channel of a fluorescence image."""

    def read(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        pixels = image.read(x0, y0, x1 - x0, y1 - y0)
        return hematoxylin(pixels) if len(pixels) == 3 else pixels[0]

    threshold = float(_threshold(image, read) if threshold is None else threshold)

    def outline(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        return outline_nuclei(
            read(x0, y0, x1, y1), mpp=image.mpp, threshold=threshold, contrast=_CONTRAST * threshold, area_px=area_px
        )

    return _Finder(outline, tile_px, int(np.ceil(_CONTEXT_UM / image.mpp)), threshold if threshold < np.inf else None)


def _threshold(image: Histology, read: Callable[[int, int, int, int], np.ndarray]) -> float:
    """Otsu's threshold of the stain on tissue; infinite if there is no tissue, or nothing but noise on it."""
    fine, detail, coarse = [], [], []
    for window, tissue in _tissue_windows(image):
        stain = read(*window)
        above = stain - ndimage.gaussian_filter(stain, _AROUND_UM / image.mpp, truncate=3)
        fine.append(ndimage.gaussian_filter(stain, _FINE_UM / image.mpp)[tissue])
        detail.append(above[tissue])
        coarse.append(ndimage.gaussian_filter(above, _COARSE_UM / image.mpp)[tissue])
    if not fine or np.concatenate(coarse).std() < np.concatenate(detail).std() / 3:
        return np.inf
    amount = np.concatenate(fine)
    if image.n_channels == 3:
        return max(-np.log(threshold_otsu(np.exp(-amount))), _LEAST_DENSITY)
    return threshold_otsu(np.sqrt(np.maximum(amount, 0))) ** 2


def _tissue_windows(image: Histology) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray]]:
    """Windows x0, y0, x1, y1 spread over the tissue, and which of their pixels are tissue."""
    mask, pixel = tissue_mask(image)
    side = max(1, round(_SAMPLE_UM / image.mpp))

    def on_tissue(x0: int, y0: int, x1: int, y1: int, step: int = 1) -> np.ndarray:
        rows, columns = (((np.arange(*ends, step) + 0.5) / pixel).astype(int) for ends in ((y0, y1), (x0, x1)))
        return mask[np.ix_(np.minimum(rows, mask.shape[0] - 1), np.minimum(columns, mask.shape[1] - 1))]

    windows = [
        (x0, y0, min(x0 + side, image.width), min(y0 + side, image.height))
        for y0, x0 in product(range(0, image.height, side), range(0, image.width, side))
    ]
    amount = np.array([on_tissue(*window, step=max(1, side // 16)).sum() for window in windows])
    usable = np.flatnonzero(amount > amount.max() / 2)
    for i in usable[np.linspace(0, len(usable) - 1, min(len(usable), _N_SAMPLES)).astype(int)]:
        yield windows[i], on_tissue(*windows[i])


# -- by a learned model ------------------------------------------------------------------------------------------------
def _learned(image: Histology, name: str, device: torch.device) -> _Finder:
    """Finds nuclei by a registered segmenter of lazyslide-models, with its own preprocessing."""
    try:
        from lazyslide_models import MODEL_REGISTRY, list_models
    except ImportError as error:
        raise ImportError(
            f"The segmenter {name!r} comes with lazyslide-models, which could not be imported ({error}). Install it "
            'with: pip install "stgen[encoders]". method="hematoxylin" needs nothing.'
        ) from error
    known = sorted(list_models("segmentation"))
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=5, cutoff=0.5) or known
        raise ValueError(
            f'There is no segmenter {name!r}; there are "hematoxylin", which needs nothing, and of lazyslide-models '
            f"{', '.join(close)}. lazyslide_models.list_models('segmentation') lists all."
        )
    card = MODEL_REGISTRY[name]
    model = card().to(device)
    transform = model.get_transform()
    model_mpp = float(getattr(model, "mpp", None) or _MODEL_MPP)
    side = _model_side(getattr(card, "input_constraint", None))
    scale = model_mpp / image.mpp  # pixels of the finest level per pixel of the model

    def outline(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        pixels = image.read(x0, y0, side * scale, side * scale, mpp=model_mpp)
        # to 8 bit, as the models were trained on; their transforms scale integers themselves
        patch = torch.from_numpy(pixels).mul(255).round().clamp(0, 255).to(torch.uint8)
        patch = patch if transform is None else transform(patch)
        with torch.inference_mode():
            found = model.segment(patch[None].to(device)).instance_map
        if found is None:
            raise ValueError(f"{name!r} of lazyslide-models does not tell nuclei apart; use instanseg or cellpose.")
        found = torch.as_tensor(found).cpu().numpy()[0]
        rows, columns = (np.minimum((np.arange(n) + 0.5) / scale, side - 1).astype(int) for n in (y1 - y0, x1 - x0))
        return found[np.ix_(rows, columns)].astype(np.int32)

    margin = int(min(_CONTEXT_UM / 2 / image.mpp, side * scale / 5))
    return _Finder(outline, max(1, int(side * scale) - 2 * margin), margin)


def _model_side(constraint: object) -> int:
    """Side in pixels of the windows that a model is given."""
    least, most, divisor = (getattr(constraint, name, None) for name in ("min", "max", "divisible_by"))
    side = min(max(_MODEL_PX, least or 0), most or np.inf)
    return int(side - side % (divisor or 1))


# -- tile by tile ------------------------------------------------------------------------------------------------------
def _stitch(
    finder: _Finder, height: int, width: int, area_px: tuple[float, float], *, progress: bool
) -> tuple[da.Array, int]:
    """Labels of the whole image, numbered in reading order, and how many.

    Each tile contributes the nuclei whose center it holds, whole, unless another tile has drawn most of them before.
    """
    tile, margin = finder.tile_px, finder.margin_px
    store = zarr.create_array(
        zarr.storage.MemoryStore(), shape=(height, width), chunks=(_CHUNK, _CHUNK), dtype="int32", fill_value=0
    )
    firsts, n_nuclei = [np.empty(0, np.int64)], 0  # the first pixel of each nucleus in reading order
    tiles = list(product(range(0, height, tile), range(0, width, tile)))
    for top, left in tqdm(tiles, desc="nuclei", unit="tile", **({} if progress else {"disable": True})):
        y0, x0 = max(0, top - margin), max(0, left - margin)
        y1, x1 = min(height, top + tile + margin), min(width, left + tile + margin)
        labels = finder.outline(x0, y0, x1, y1)
        pixel = np.flatnonzero(labels)
        if not pixel.size:
            continue
        number = labels.ravel()[pixel]
        y, x = np.divmod(pixel, x1 - x0)
        drawn = np.asarray(store[y0:y1, x0:x1])

        area = np.bincount(number)
        inside = (area >= area_px[0]) & (area <= area_px[1])
        for at, start in ((y + y0, top), (x + x0, left)):
            center = np.bincount(number, at) / np.maximum(area, 1)
            inside &= np.abs(center + 0.5 - (start + tile / 2)) <= tile / 2 + _SLACK_PX
        inside &= np.bincount(number, drawn.ravel()[pixel] > 0) < area / 2
        if not inside.any():
            continue
        first = np.zeros(len(area), np.int64)
        first[number[::-1]] = ((y + y0) * width + x + x0)[::-1]  # of several writes the last one counts
        firsts.append(first[inside])
        renumbered = np.where(inside, n_nuclei + np.cumsum(inside), 0).astype(np.int32)
        store[y0:y1, x0:x1] = np.where(drawn > 0, drawn, renumbered[labels])
        n_nuclei += int(inside.sum())

    order = np.zeros(n_nuclei + 1, np.int32)
    order[1 + np.argsort(np.concatenate(firsts), kind="stable")] = np.arange(1, n_nuclei + 1)

    def block(block_info: dict[Any, Any]) -> np.ndarray:
        return order[np.asarray(store[tuple(slice(*ends) for ends in block_info[None]["array-location"])])]

    chunks = da.core.normalize_chunks(_CHUNK, (height, width))
    empty = np.empty((0, 0), np.int32)
    return da.map_blocks(block, chunks=chunks, dtype=np.int32, meta=empty, name=f"stgen-nuclei-{uuid4().hex}"), n_nuclei

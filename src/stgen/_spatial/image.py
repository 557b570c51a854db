"""Histology images, read lazily and at a stated resolution, and the scale of their coordinate systems."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation
from xarray import DataArray, DataTree

from stgen._spatial.kinds import check_histology
from stgen._spatial.pixels import PixelValues, check_pixel_type, doubts_about, judge_pixels

__all__ = [
    "Histology",
    "affine_to",
    "check_not_indexed",
    "element_of",
    "histology_of",
    "image_levels",
    "image_of",
    "is_micrometers",
    "micrometers_per_unit",
    "resample_matrix",
    "slide_mpp",
    "spatial_groups",
]

# spatialdata.concatenate adds a suffix: "um" becomes "um-A"
_MICROMETERS = re.compile(r"(um|µm|μm|microns?|micromet(er|re)s?)(-.+)?", re.IGNORECASE)

_KNOWN_PX = 2048  # along the longer side of the mask of what is not NaN
STATED = "image_full_scale"  # in sdata.attrs, full scales of images by their names

logger = logging.getLogger("stgen")


def resample_matrix(start: np.ndarray | Sequence[float], length: float, n_out: int, n_in: int) -> np.ndarray:
    """Rows of weights that read ``n_out`` pixels from ``n_in``, averaging when they are coarser.

    The kernel is a triangle as wide as two output pixels (or two input pixels when the output is finer), the filter of
    an antialiased bilinear resize. It is symmetric, so that reading a mirrored image gives the mirrored result.

    Parameters
    ----------
    start
        Where the window begins, in input pixels, one entry per window; pixel 0 covers [0, 1).
    length
        Length of the window in input pixels.
    n_out
        Number of output pixels in the window.
    n_in
        Number of input pixels; contributions from beyond them are left out and the rest is renormalised.

    Returns
    -------
    Float32 array of shape ``(len(start), n_out, n_in)`` whose rows sum to one.
    """
    step = length / n_out
    center = np.asarray(start, dtype=np.float64)[:, None] + (np.arange(n_out) + 0.5) * step
    distance = np.abs(center[:, :, None] - (np.arange(n_in) + 0.5)) / max(step, 1.0)
    weight = np.maximum(1.0 - distance, 0.0)
    return (weight / np.maximum(weight.sum(-1, keepdims=True), 1e-12)).astype(np.float32)


def spatial_groups(xy: np.ndarray, side: float) -> Iterator[np.ndarray]:
    """Row numbers of ``xy`` (n, 2), one square of ``side`` after the other, in serpentine order."""
    cell = np.floor(xy / side).astype(np.int64)
    column = np.where(cell[:, 1] % 2 == 0, cell[:, 0], -cell[:, 0])
    order = np.lexsort((xy[:, 1], xy[:, 0], column, cell[:, 1]))
    change = np.any(np.diff(cell[order], axis=0) != 0, axis=1)
    yield from np.split(order, np.flatnonzero(change) + 1)


class Histology:
    """A lazily read image.

    Nothing is loaded until :meth:`read`, :meth:`patches` or :meth:`thumbnail` asks for it, and then only the windows
    that are needed, from the coarsest level that is at least as fine as the resolution asked for. A level that is at
    least twice as fine is first averaged over 2 x 2, 4 x 4, ... pixels, as a pyramid would have been, so that an image
    reads the same with a pyramid as without.

    Coordinates are pixels of the finest level: x is the column, y the row, and pixel (0, 0) covers [0, 1) x [0, 1).

    What is read is a share of full scale, which is decided by content (:func:`stgen._spatial.pixels.judge_pixels`).
    Pixels that are NaN are outside the image. They, and transparent ones, show glass in transmitted light (three
    colors), and no light otherwise; in between, colors are laid over it.

    Parameters
    ----------
    levels
        Images ``(c, y, x)``, finest first; dask-backed arrays stay lazy.
    mpp
        µm per pixel of the finest level.
    name
        Of the image, for messages.
    full_scale
        The value that stands for 1, if the user states it.
    channel
        The number of the only color to read, as the intensity of a stain; None for all.
    """

    def __init__(
        self,
        levels: Sequence[DataArray],
        *,
        mpp: float,
        name: str | None = None,
        full_scale: float | None = None,
        channel: int | None = None,
    ) -> None:
        if not levels:
            raise ValueError("The image has no level to read.")
        if not (np.isfinite(mpp) and mpp > 0):
            raise ValueError(f"µm per pixel must be a positive number, found {mpp!r}; pass mpp=<µm per pixel>.")
        levels = [_to_cyx(level) for level in levels]
        self.mpp = float(mpp)
        finest = levels[0]
        self.height, self.width = int(finest.sizes["y"]), int(finest.sizes["x"])
        if min(self.height, self.width) == 0:
            raise ValueError(f"The image is empty: its shape (c, y, x) is {finest.shape}.")
        self.levels = [finest, *(level for level in levels[1:] if _fits(level, finest))]
        self._misfits = _misfits(name, len(levels) - len(self.levels))
        self._ratio = [(self.height / level.sizes["y"], self.width / level.sizes["x"]) for level in self.levels]
        self.scales = [float(np.sqrt(ry * rx)) for ry, rx in self._ratio]
        check_pixel_type(finest.dtype)
        self.name, self._stated, self._channel = name, full_scale, channel

    @cached_property
    def values(self) -> PixelValues:
        """How values are read: some pixels are looked at, once."""
        return judge_pixels(self.levels, name=self.name, full_scale=self._stated, channel=self._channel)

    @property
    def channels(self) -> list[str]:
        """Names of the channels, alpha left out."""
        names = self.levels[0].coords["c"].values
        return [str(names[i]) for i in self.values.colors]

    @property
    def may_be_unknown(self) -> bool:
        """Whether pixels can be NaN."""
        return bool(np.issubdtype(self.levels[0].dtype, np.floating))

    def only(self, channel: int) -> Histology:
        """One of the channels, as the intensity of a stain."""
        return Histology(self.levels, mpp=self.mpp, name=self.name, full_scale=self._stated, channel=channel)

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """What is to be said of the image before a result is believed, one message each."""
        return (*self._misfits, *doubts_about(self.levels, self.values, self.name))

    def record(self) -> dict[str, Any]:
        """What was decided about the values, for the record of a result; doubts are logged as warnings."""
        for doubt in self.doubts:
            logger.warning(doubt)
        return self.values.record()

    @property
    def n_channels(self) -> int:
        """Number of channels, alpha not counted."""
        return len(self.channels)

    def with_mpp(self, mpp: float) -> Histology:
        """The same image, taken to have other µm per pixel."""
        if not (np.isfinite(mpp) and mpp > 0):
            raise ValueError(f"µm per pixel must be a positive number, found {mpp!r}; pass mpp=<µm per pixel>.")
        other = copy(self)
        other.mpp = float(mpp)
        return other

    def __repr__(self) -> str:
        size = f"{self.width} x {self.height} px at {self.mpp:.4g} µm"
        return f"Histology({size}, {self.n_channels} channels, {len(self.levels)} levels)"

    def read(self, x0: float, y0: float, width: float, height: float, *, mpp: float | None = None) -> np.ndarray:
        """Read a window at a stated resolution.

        Parameters
        ----------
        x0, y0
            Left and upper edge in pixels of the finest level.
        width, height
            Size in pixels of the finest level.
        mpp
            µm per pixel of the result; default that of the finest level.

        Returns
        -------
        Float32 array ``(c, h, w)``, in [0, 1] in transmitted light. Beyond the pixels of the image, its edge is
        repeated.
        """
        mpp = self.mpp if mpp is None else mpp
        n_y, n_x = (max(1, round(length * self.mpp / mpp)) for length in (height, width))
        return next(self._windows(np.array([[x0 + width / 2, y0 + height / 2]]), width, height, n_x, n_y))[0]

    def patches(
        self, xy_px: np.ndarray, *, size_um: float, out_px: int, batch_size: int = 64
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read square patches centred on locations.

        The locations are visited square by square, so that each chunk of a lazy image is read about once.

        Parameters
        ----------
        xy_px
            Centres ``(n, 2)`` as x, y in pixels of the finest level.
        size_um
            Side of a patch in µm.
        out_px
            Side of a patch in pixels; ``size_um / out_px`` is the µm per pixel that is read.
        batch_size
            Largest number of patches per step.

        Yields
        ------
        ``(rows, patches)``: which locations, and float32 ``(len(rows), c, out_px, out_px)``.
        """
        xy_px = np.asarray(xy_px, dtype=np.float64)
        side = size_um / self.mpp
        for group in spatial_groups(xy_px, max(side, 2048 * self.scales[self._level(size_um / out_px)])):
            batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
            yield from zip(batches, self._windows(xy_px[group], side, side, out_px, out_px, batch_size), strict=True)

    def thumbnail(self, *, mpp: float) -> np.ndarray:
        """Read the whole image ``(c, h, w)`` at ``mpp`` µm per pixel; a sketch, from every few pixels of a fine image."""
        return self.sketch(mpp=mpp)[0]

    def sketch(self, *, mpp: float) -> tuple[np.ndarray, np.ndarray]:
        """The thumbnail, and which of its pixels ``(h, w)`` lie within the image: are known for the greater part."""
        level = self.levels[self._level(mpp)]
        n_y, n_x = (max(1, round(n * self.mpp / mpp)) for n in (self.height, self.width))
        stride = max(1, int(min(level.sizes["y"] / n_y, level.sizes["x"] / n_x) / 4))
        coarse = np.asarray(level.data[:, ::stride, ::stride])
        down = resample_matrix([0.0], coarse.shape[1], n_y, coarse.shape[1])[0]
        across = resample_matrix([0.0], coarse.shape[2], n_x, coarse.shape[2])[0]
        seen = down @ self.values.shown(coarse).astype(np.float32) @ across.T / self.values.full_scale
        missing = self.values.missing(coarse)
        if missing is None or not missing.any():
            return seen, np.ones((n_y, n_x), bool)
        return seen, down @ missing.astype(np.float32) @ across.T < 0.5

    def covers(self, xy_px: np.ndarray) -> np.ndarray:
        """Which locations ``(n, 2)``, as x, y in pixels of the finest level, lie within the image and are not NaN."""
        x, y = np.asarray(xy_px, dtype=np.float64).T
        inside = (x >= 0) & (y >= 0) & (x <= self.width) & (y <= self.height)
        if not self.may_be_unknown:
            return inside
        known = self.sketch(mpp=self.mpp * max(1.0, max(self.height, self.width) / _KNOWN_PX))[1]
        row, column = (
            np.clip(at / length * n, 0, n - 1).astype(int)
            for at, length, n in ((y, self.height, known.shape[0]), (x, self.width, known.shape[1]))
        )
        return inside & known[row, column]

    # -- reading ------------------------------------------------------------------------------------------------------
    def _level(self, mpp: float) -> int:
        """Coarsest level that is at least as fine as ``mpp``, the finest if none is."""
        fine_enough = [i for i, scale in enumerate(self.scales) if scale * self.mpp <= mpp * 1.01]
        return max(fine_enough, key=lambda i: self.scales[i], default=0)

    def _source(self, mpp: float) -> tuple[int, int]:
        """The level to read from, and over how many of its pixels to average along each axis, a power of two."""
        index = self._level(mpp)
        times = min(mpp * 1.01 / (self.scales[index] * self.mpp), *self.levels[index].shape[1:])
        return index, 2 ** int(np.log2(max(times, 1.0)))

    def _windows(
        self, centers: np.ndarray, width: float, height: float, n_x: int, n_y: int, batch_size: int = 64
    ) -> Iterator[np.ndarray]:
        """Windows of one size in batches (n, c, n_y, n_x), resampled at their exact, fractional position.

        The region that holds all of them is read once.
        """
        index, shrink = self._source(min(width / n_x, height / n_y) * self.mpp)
        ratio_y, ratio_x = (ratio * shrink for ratio in self._ratio[index])
        width, height = width / ratio_x, height / ratio_y
        left = centers[:, 0] / ratio_x - width / 2
        top = centers[:, 1] / ratio_y - height / 2
        margin_x, margin_y = (max(1, int(np.ceil(w / n))) for w, n in ((width, n_x), (height, n_y)))
        x0, y0 = np.floor(left).astype(int) - margin_x, np.floor(top).astype(int) - margin_y
        w, h = int(np.ceil(width)) + 2 * margin_x + 1, int(np.ceil(height)) + 2 * margin_y + 1
        region = self._region(index, shrink, x0.min(), y0.min(), x0.max() + w, y0.max() + h).transpose(1, 0, 2)
        across = resample_matrix(left - x0, width, n_x, w)
        down = resample_matrix(top - y0, height, n_y, h)
        x0, y0 = x0 - x0.min(), y0 - y0.min()
        for start in range(0, len(centers), batch_size):
            rows = range(start, min(start + batch_size, len(centers)))
            out = np.empty((len(rows), region.shape[1], n_y, n_x), dtype=np.float32)
            for k, i in enumerate(rows):
                piece = region[y0[i] : y0[i] + h, :, x0[i] : x0[i] + w].astype(np.float32)
                rows_done = sparse.csr_array(down[i]) @ piece.reshape(h, -1)
                done = (
                    sparse.csr_array(across[i]) @ rows_done.reshape(-1, w).T
                )  # (n_x, n_y c): sparse, for large windows
                out[k] = done.T.reshape(n_y, -1, n_x).transpose(1, 0, 2)
            yield out / self.values.full_scale

    def _region(self, index: int, shrink: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """A window of one level averaged over ``shrink`` x ``shrink`` pixels, its edge repeated outside the image."""
        level = self.levels[index]
        n_y, n_x = level.sizes["y"] // shrink, level.sizes["x"] // shrink
        (top, bottom), (left, right) = np.clip([y0, y1], 0, n_y), np.clip([x0, x1], 0, n_x)
        # a window that lies wholly outside still needs one pixel to repeat
        top, bottom = min(top, n_y - 1), max(bottom, 1)
        left, right = min(left, n_x - 1), max(right, 1)
        window = np.asarray(level[:, top * shrink : bottom * shrink, left * shrink : right * shrink].data)
        window = self.values.shown(window)
        if shrink > 1:
            blocks = window.reshape(-1, bottom - top, shrink, right - left, shrink)
            window = blocks.mean(4, dtype=np.float32).mean(2)
        rows = np.clip(np.arange(y0, y1), top, bottom - 1) - top
        columns = np.clip(np.arange(x0, x1), left, right - 1) - left
        if len(rows) == window.shape[1] and len(columns) == window.shape[2]:
            return window
        return window[:, rows][:, :, columns]


def image_levels(element: DataArray | DataTree) -> list[DataArray]:
    """Levels of a single- or multi-scale image or labels element, finest first.

    Raises
    ------
    ValueError
        If it was cropped by indexing.
    """
    if isinstance(element, DataArray):
        levels = [element]
    else:
        levels = [next(iter(level.data_vars.values())) for level in element.children.values()]
    check_not_indexed(levels[0])
    return levels


def check_not_indexed(image: DataArray) -> None:
    """Refuse pixels that xarray picked from a larger image: transformations do not know of it, and place them elsewhere."""
    for axis in ("x", "y"):
        if axis not in image.coords or not image.sizes[axis]:
            continue
        at, n = np.asarray(image.coords[axis].values), image.sizes[axis]
        if at.dtype.kind not in "uif":
            continue
        step = (at[-1] - at[0]) / (n - 1) if n > 1 else 1.0
        if abs(at[0] - 0.25) > 0.26 or abs(step - 1) * n > 0.5:
            raise ValueError(
                f"An image was cropped or thinned out by indexing: its {n} pixels along {axis} say that they lie at "
                f"{at[0]:g} to {at[-1]:g}, which its transformations do not know of. Crop it with "
                "spatialdata.bounding_box_query, or make it new with its own transformations: "
                "Image2DModel.parse(image.values, transformations=...)."
            )


def _fits(level: DataArray, finest: DataArray) -> bool:
    """Whether a coarse level shows the same area: by its shape, and by its own transformations, where it has some."""
    n_y, n_x = level.sizes["y"], level.sizes["x"]
    if min(n_y, n_x) == 0 or level.sizes["c"] != finest.sizes["c"]:
        return False
    ratio = np.array([finest.sizes["x"] / n_x, finest.sizes["y"] / n_y])
    rounding = 2 / n_x + 2 / n_y  # sizes are rounded, of a small level by much
    if abs(np.log(ratio[0] / ratio[1])) > rounding:
        return False
    own, whole = (
        get_transformation(part, get_all=True) if "transform" in part.attrs else {} for part in (level, finest)
    )
    system = next((name for name in own if name in whole), None)
    if system is None:
        return True
    to_system = [t[system].to_affine_matrix(("x", "y"), ("x", "y")) for t in (own, whole)]
    to_finest = np.linalg.solve(to_system[1], to_system[0])
    moved = np.abs(to_finest @ [n_x / 2, n_y / 2, 1] - [finest.sizes["x"] / 2, finest.sizes["y"] / 2, 1])[:2] / ratio
    return bool(
        (moved < 2 + 0.02 * np.array([n_x, n_y])).all()
        and np.allclose(np.diag(to_finest)[:2], ratio, rtol=rounding + 0.02)
    )


def _misfits(name: str | None, number: int) -> tuple[str, ...]:
    """What is said of levels that were left out."""
    if not number:
        return ()
    image = "The image" if name is None else f"The image {name!r}"
    return (
        f"{image} has {number} coarser level(s) that do not show the same area as the finest, and are not read: it was "
        "cropped, or they are other pictures. Make it new from the finest: Image2DModel.parse(..., scale_factors=[2, "
        "2]).",
    )


def _to_cyx(level: DataArray) -> DataArray:
    if set(level.dims) != {"c", "y", "x"}:
        raise ValueError(f"The image must have the dimensions c, y, x; found {tuple(level.dims)}.")
    level = level.transpose("c", "y", "x")
    if "c" not in level.coords:
        level = level.assign_coords(c=np.arange(level.sizes["c"]))
    return level


# -- coordinate systems -----------------------------------------------------------------------------------------------
def is_micrometers(system: str) -> bool:
    """Whether a coordinate system is in µm, by its name."""
    return _MICROMETERS.fullmatch(system) is not None


def affine_to(element: Any, system: str) -> tuple[np.ndarray, float]:
    """The 3 x 3 matrix from the element to ``system`` over x, y, and its mean scale."""
    matrix = get_transformation(element, system).to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"The transformation to {system!r} is singular: {matrix.tolist()}.")
    axes, most = np.linalg.norm(matrix[:2, :2], axis=0), np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if axes.max() > 1.05 * axes.min():
        raise ValueError(
            f"The transformation to {system!r} stretches x by {axes[0]:.4g} and y by {axes[1]:.4g}; pixels must be "
            "square."
        )
    if most[0] > 1.05 * most[1]:
        raise ValueError(
            f"The transformation to {system!r} stretches one direction by {most[0]:.4g} and the one across it by "
            f"{most[1]:.4g}; pixels must be square."
        )
    return matrix, scale


def micrometers_per_unit(element: Any, scale: float) -> float | None:
    """µm per unit of the system in use, from another coordinate system of the image that is in µm."""
    for name in get_transformation(element, get_all=True):
        if is_micrometers(name):
            return affine_to(element, name)[1] / scale
    return None


def element_of(sdata: SpatialData, key: str) -> Any:
    """An element by its name; ``sdata[key]`` does not find the image of a ``WSIData``."""
    return sdata.images[key] if key in sdata.images else sdata[key]


def slide_mpp(sdata: SpatialData, image_key: str) -> float | None:
    """µm per pixel that a whole slide knows of itself (``WSIData`` of wsidata and LazySlide); None for other objects and images."""
    slide = getattr(sdata, "properties", None)
    mpp, shape = getattr(slide, "mpp", None), getattr(slide, "shape", None)
    if not mpp or shape is None or not np.isfinite(mpp) or mpp <= 0:
        return None
    finest = image_levels(sdata.images[image_key])[0]
    return float(mpp) if tuple(finest.shape[-2:]) == tuple(shape) else None


def histology_of(sdata: SpatialData, image_key: str, *, mpp: float) -> Histology:
    """An image of ``sdata``, with the full scale that ``sdata.attrs["image_full_scale"]`` states, if it does."""
    check_histology(sdata, image_key)
    stated = sdata.attrs.get(STATED, {})
    if not isinstance(stated, Mapping):
        raise TypeError(
            f'sdata.attrs["{STATED}"] must say it for each image: {{{image_key!r}: <value of full scale>}}; found '
            f"{stated!r}."
        )
    levels = image_levels(sdata.images[image_key])
    return Histology(levels, mpp=mpp, name=image_key, full_scale=stated.get(image_key))


def image_of(
    sdata: SpatialData, image_key: str, *, mpp: float | None = None, coordinate_system: str | None = None
) -> Histology:
    """An image of ``sdata`` on its own; µm per pixel from ``mpp`` or from a micrometer coordinate system."""
    element = sdata.images[image_key]
    if mpp is None:
        systems = (
            [coordinate_system] if coordinate_system is not None else list(get_transformation(element, get_all=True))
        )
        mpp = next((affine_to(element, name)[1] for name in systems if is_micrometers(name)), None)
    if mpp is None and coordinate_system is None:
        mpp = slide_mpp(sdata, image_key)
    if mpp is None:
        raise ValueError(
            f"The µm per pixel of the image {image_key!r} are not known: none of its coordinate systems "
            f"({', '.join(systems)}) is in micrometers. Pass mpp=<µm per image pixel>, or add one: "
            "stgen.pp.name_micrometers(...)."
        )
    return histology_of(sdata, image_key, mpp=mpp)

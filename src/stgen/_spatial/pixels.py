"""What the values of an image mean: its full scale, its transparency, and where it shows nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import numpy as np
from xarray import DataArray

from stgen._checks import listed

__all__ = ["PixelValues", "check_pixel_type", "doubts_about", "judge_pixels"]

# Steps of full scales, the values of white: cameras have 8 to 16 bits, stitched or summed images more.
_WHITE = tuple(2.0**bits - 1 for bits in range(8, 33, 2))
# Those of stains, which no glass tells apart: what containers hold.
_BRIGHTEST = tuple(2.0**bits - 1 for bits in (8, 16, 24, 32))
_OVERSHOOT = 1.05  # by which interpolation may exceed full scale
_FLOATS_TO_ONE = 2.0  # what is at most this bright is a share of 1
_DARK = 0.4  # of full scale: glass is brighter
_HALF_DARK = 0.2  # of full scale: most of a slide is brighter
_DIM = 1 / 16  # of what the container holds: the camera may have had fewer bits
_UNDERSHOOT = 0.1  # of what is brightest, as far as interpolation goes below zero

_WHOLE_PX = 2**22  # levels up to this size are looked at as a whole
_SAMPLE_PX = 2**20
_LEAST_SIDE = 256  # of a level that stands for all
_LATTICE, _WINDOW = 8, 128  # else windows spread over the level: how many along each side, and their pixels


@dataclass(frozen=True)
class PixelValues:
    """How the values of an image are read. The same for all of its levels and all uses."""

    image: str
    """The image in words, for messages."""
    colors: tuple[int, ...]
    """Channels that are read, in this order."""
    full_scale: float
    """The value that stands for 1."""
    decided: bool = False
    """Whether the full scale follows from the content or is stated, not from the type."""
    stated: bool = False
    """Whether the user says it."""
    cut: bool = False
    """Whether values beyond the full scale can occur and are cut."""
    alpha: int | None = None
    """The channel of opacity."""
    alpha_scale: float = 1.0
    """The value of full opacity."""
    premultiplied: bool = False
    """Whether colors have been multiplied by opacity."""

    @property
    def transmitted(self) -> bool:
        """Whether it is an image in transmitted light: three colors, bright where there is nothing."""
        return len(self.colors) == 3

    @property
    def nothing(self) -> float:
        """What is read, in [0, 1], where the image shows nothing: glass, or no light."""
        return 1.0 if self.transmitted else 0.0

    def shown(self, window: np.ndarray) -> np.ndarray:
        """The colors ``(k, h, w)`` of a window ``(c, h, w)`` as stored, in stored units, with nothing where there is none.

        Raises
        ------
        ValueError
            If a value is infinite.
        """
        whole = self.colors == tuple(range(len(window)))
        colors = window if whole else window[slice(3) if self.colors == (0, 1, 2) else list(self.colors)]
        nothing = np.float32(self.nothing * self.full_scale)
        if self.alpha is not None:
            opacity = np.clip(np.nan_to_num(window[self.alpha].astype(np.float32)) / self.alpha_scale, 0, 1)
            if opacity.min(initial=1.0) < 1:
                colors = colors.astype(np.float32) * (1 if self.premultiplied else opacity) + (1 - opacity) * nothing
        if np.issubdtype(window.dtype, np.floating):
            if np.isinf(colors).any():
                raise ValueError(_infinite(self.image))
            missing = np.isnan(colors)
            if missing.any():
                colors = np.where(missing.any(0) if self.transmitted else missing, nothing, colors)
        return self._cut(colors) if self.cut else colors

    def _cut(self, colors: np.ndarray) -> np.ndarray:
        """Values brought into [0, full scale]."""
        if np.issubdtype(colors.dtype, np.floating):
            return np.clip(colors.astype(np.float32, copy=False), 0, np.float32(self.full_scale))
        most = np.iinfo(colors.dtype).max
        return np.clip(colors, 0, min(int(self.full_scale), most))

    def missing(self, window: np.ndarray) -> np.ndarray | None:
        """Which pixels ``(h, w)`` of a window as stored lie outside the image (NaN); None if none can."""
        if not np.issubdtype(window.dtype, np.floating):
            return None
        missing = np.isnan(window[list(self.colors)])
        return missing.any(0) if self.transmitted else missing.all(0)

    def record(self) -> dict[str, Any]:
        """What was decided, for the record of a result; nothing where the type of the image says all."""
        record: dict[str, Any] = {"image_full_scale": self.full_scale} if self.decided else {}
        if self.alpha is not None:
            record["image_alpha"] = "premultiplied" if self.premultiplied else "straight"
        return record


def check_pixel_type(dtype: np.dtype) -> None:
    """Refuse what is no image of numbers."""
    if dtype.kind not in "buif":
        raise TypeError(f"The image holds {dtype} values; it must hold integers or floats.")


def judge_pixels(
    levels: Sequence[DataArray],
    *,
    name: str | None = None,
    full_scale: float | None = None,
    channel: int | None = None,
) -> PixelValues:
    """Decide by their content how the values of an image are read.

    Images in transmitted light (three colors) are bright where there is glass: their full scale is the smallest of 1
    (of floats), 255, 1,023, 4,095, 16,383, 65,535, ... that their bright parts do not exceed, whatever type holds them.
    The intensities of stains have no such mark: their full scale is what the type holds (255, 65,535; 1 or one of these
    for floats). A fourth channel (or the second of two) is opacity if it is named "a" or "alpha", or unnamed and a mask
    by its values.

    Parameters
    ----------
    levels
        Images ``(c, y, x)``, finest first. Of a lazy image, some windows of a coarse level are read; of an 8-bit image
        without opacity, nothing.
    name
        Of the image, for messages.
    full_scale
        What the user states.
    channel
        The only color to read, as the intensity of a stain.

    Raises
    ------
    ValueError
        If there is nothing to read (NaN or transparent everywhere), values are infinite or, in transmitted light,
        negative, or ``full_scale`` is no positive number.
    """
    image = "The image" if name is None else f"The image {name!r}"
    if full_scale is not None and (
        not isinstance(full_scale, int | float | np.number)
        or isinstance(full_scale, bool)
        or not 0 < full_scale < np.inf
    ):
        raise ValueError(
            f"The full scale of an image must be a positive number, found {full_scale!r} for {image.lower()}."
        )
    dtype = levels[0].dtype
    names = [str(label) for label in levels[0].coords["c"].values]
    alpha, unnamed = _named_alpha(names), _unnamed(names)
    fixed = full_scale or {"uint8": 255.0, "bool": 1.0}.get(dtype.name)
    sample = None
    if not fixed or alpha is not None or unnamed or np.issubdtype(dtype, np.floating):
        sample = _sample(levels, image, alpha)
        if unnamed and _is_mask(sample[-1], sample[:-1]):
            alpha = len(names) - 1
    colors = _color_order(names, alpha)
    values = PixelValues(image, colors if channel is None else (colors[channel],), float(fixed or 0))
    values = replace(values, decided=full_scale is not None or not fixed, stated=full_scale is not None)
    if sample is None:
        return replace(values, cut=values.stated and values.transmitted)
    if alpha is not None:
        values = replace(values, alpha=alpha, alpha_scale=_first_at_least(sample[alpha].max(), (1.0, *_WHITE)))
    seen = _seen(sample, values, names)
    if not fixed:
        values = replace(values, full_scale=_full_scale(seen, dtype, values.transmitted))
    _check_not_negative(values, seen)
    if alpha is not None:
        opacity, light = sample[alpha] / values.alpha_scale, sample[list(values.colors)] / values.full_scale
        values = replace(values, premultiplied=_is_premultiplied(opacity, light))
    return replace(values, cut=values.transmitted and (values.stated or dtype.name not in ("uint8", "bool")))


def doubts_about(levels: Sequence[DataArray], values: PixelValues, name: str | None = None) -> tuple[str, ...]:
    """What the content of an image leaves open about its values, one message each, with what mends it."""
    dtype, names = levels[0].dtype, [str(label) for label in levels[0].coords["c"].values]
    sample = _sample(levels, values.image, values.alpha)
    doubts = []
    if values.alpha is None and _unnamed(names) and _may_be_mask(sample[-1]):
        doubts.append(
            f"{values.image} has {len(names)} channels without names, and the last looks partly like opacity; it is "
            "read as "
            'a stain. Name the channels: c_coords=["r", "g", "b", "a"] if it is opacity.'
        )
    if values.stated:
        return tuple(doubts)
    seen = _seen(sample, values, names)
    top, half = _top(seen, values.transmitted), float(np.median(seen.max(0)))
    full = f"{values.full_scale:.10g}"
    where = "" if name is None else f'sdata.attrs["image_full_scale"] = {{{name!r}: <value>}}, or '
    state = f"state the value of full scale: {where}divide the image by it, to floats in [0, 1]"
    if values.transmitted and (top < _DARK * values.full_scale or half < _HALF_DARK * values.full_scale):
        doubts.append(
            f"{values.image} is dark for one in transmitted light, as which three channels are read: half of its "
            f"{dtype} values are below {half:.4g} and few above {top:.4g}, and {full} is taken for white. If that is "
            f"wrong, {state}. What fills the place around a registered image must be NaN or white, and stains that "
            "glow are read one by one: image.sel(c=[...]) of one, two or more than three."
        )
    elif not values.transmitted and values.full_scale > 1 and top <= _DIM * values.full_scale and dtype != np.uint8:
        doubts.append(
            f"{values.image} has {dtype} values up to {top:.4g}, and is read as a share of {full}: it may be dark, or "
            f"of a camera of fewer bits. If so, {state}."
        )
    return tuple(doubts)


def _seen(sample: np.ndarray, values: PixelValues, names: Sequence[str]) -> np.ndarray:
    """Colors ``(k, n)`` of the pixels of a sample that show something, opaque ones if there are any.

    Raises
    ------
    ValueError
        If a color, or all, never does.
    """
    if values.alpha is not None:
        opaque = sample[values.alpha] >= 0.99 * values.alpha_scale
        sample = sample[:, opaque if opaque.any() else sample[values.alpha] > 0]
    sample = sample[list(values.colors)]
    missing = np.isnan(sample)
    empty = [names[i] for i, never in zip(values.colors, missing.all(1), strict=True) if never]
    if empty and len(empty) < len(sample):
        raise ValueError(
            f"{values.image} is NaN everywhere in {len(empty)} of its {len(sample)} channels: {listed(empty)}. Leave "
            "them out, or look where their values were lost."
        )
    seen = sample[:, ~(missing.any(0) if values.transmitted else missing.all(0))]
    if not seen.shape[1]:
        raise ValueError(_nothing(values.image))
    return np.nan_to_num(seen)


# -- full scale --------------------------------------------------------------------------------------------------------
def _top(seen: np.ndarray, transmitted: bool) -> float:
    """How bright the brightest parts are: hot pixels are few, and so may be the brightest cells of a stain."""
    bright = seen[seen > 0]
    return float(np.quantile(bright, 0.999 if transmitted else 0.9999)) if bright.size else 0.0


def _full_scale(seen: np.ndarray, dtype: np.dtype, transmitted: bool) -> float:
    """The full scale that the values show."""
    top = _top(seen, transmitted)
    if np.issubdtype(dtype, np.floating) and top <= _FLOATS_TO_ONE:
        return 1.0
    if dtype == np.uint16 and not transmitted:
        return 65535.0
    return _first_at_least(top / _OVERSHOOT, _WHITE if transmitted else _BRIGHTEST)


def _first_at_least(top: float, steps: Sequence[float]) -> float:
    """The smallest step that is not exceeded; beyond all of them the next power of two."""
    return next((step for step in steps if top <= step), 2.0 ** math.ceil(math.log2(max(top, 1.0))))


def _check_not_negative(values: PixelValues, seen: np.ndarray) -> None:
    """Refuse images in transmitted light with more negative values than interpolation makes."""
    if not values.transmitted or seen.min() >= 0:
        return
    if float(np.quantile(seen, 0.001)) < -_UNDERSHOOT * _top(seen, transmitted=True):
        raise ValueError(
            f"{values.image} has negative values (down to {seen.min():.4g}): three channels are light that came "
            "through the tissue, from 0 (none) to full scale. Undo a normalization, or set what is outside the image "
            "to NaN."
        )


# -- opacity -----------------------------------------------------------------------------------------------------------
def _named_alpha(names: Sequence[str]) -> int | None:
    """The channel that is opacity by its name."""
    names = [name.lower() for name in names]
    if "alpha" in names and len(names) > 1:
        return names.index("alpha")
    if sorted(names) == ["a", "b", "g", "r"]:
        return names.index("a")
    return len(names) - 1 if names[-1] == "a" and len(names) in (2, 4) else None


def _unnamed(names: Sequence[str]) -> bool:
    """Whether two or four channels have numbers only."""
    return len(names) in (2, 4) and all(name.isdigit() for name in names)


def _color_order(names: Sequence[str], alpha: int | None) -> tuple[int, ...]:
    """Channels other than opacity; red, green and blue in this order, if they are named so."""
    first = {
        name.lower()[:1] if name.lower() in ("red", "green", "blue") else name.lower(): i
        for i, name in enumerate(names)
    }
    if set(first) - {"a", "alpha"} == {"r", "g", "b"} and len(names) == 3 + (alpha is not None):
        return tuple(first[color] for color in "rgb")
    return tuple(i for i in range(len(names)) if i != alpha)


def _is_mask(last: np.ndarray, others: np.ndarray) -> bool:
    """Whether a channel without a name is opacity: full or none nearly everywhere, and mostly full or over one color."""
    top = last.max()
    if top not in (1.0, *_WHITE):
        return False
    clear, opaque = last == 0, last == top
    if (clear | opaque).mean() < 0.98:
        return False
    under = others[:, clear]
    return bool(opaque.mean() > 0.5 or (under == under[:, :1]).all())


def _may_be_mask(last: np.ndarray) -> bool:
    """Whether a channel that was not taken for opacity has more of its extremes than a stain would."""
    return bool(((last == 0) | (last == last.max())).mean() > 0.5)


def _is_premultiplied(opacity: np.ndarray, colors: np.ndarray) -> bool:
    """Whether colors are nowhere brighter than opacity lets them, by pixels that are partly transparent if there are some."""
    partly = (opacity > 0) & (opacity < 1)
    pixels = partly if partly.sum() >= 16 else opacity < 1
    if not pixels.any():
        return False
    return bool((colors[:, pixels].max(0) > opacity[pixels] + 2 / 255).mean() < 0.05)


# -- evidence ----------------------------------------------------------------------------------------------------------
def _sample(levels: Sequence[DataArray], image: str, alpha: int | None) -> np.ndarray:
    """Pixels ``(c, n)`` as float64 that stand for an image, none of them NaN in all channels.

    Raises
    ------
    ValueError
        If no level shows anything, or a value is infinite.
    """
    large = [level for level in levels if min(level.sizes["y"], level.sizes["x"]) >= _LEAST_SIDE]
    for level, whole in ((large or levels)[-1 if large else 0], False), (levels[0], True):
        values = _pixels(level, whole).astype(np.float64)
        if np.isinf(values).any():
            raise ValueError(_infinite(image))
        values = values[:, ~np.isnan(values).all(0)]
        if alpha is not None:
            values[alpha] = np.nan_to_num(values[alpha])
        if values.shape[1] and (alpha is None or values[alpha].max() > 0):
            return values
    if alpha is not None and values.shape[1]:
        raise ValueError(
            f"{image} is transparent everywhere: its channel {str(levels[0].coords['c'].values[alpha])!r} is 0. If it "
            "is not opacity, name it otherwise or leave it out: image.isel(c=slice(3))."
        )
    raise ValueError(_nothing(image))


def _pixels(level: DataArray, whole: bool) -> np.ndarray:
    """Pixels ``(c, n)`` of a level, at most about ``_SAMPLE_PX``; of a large one some windows, unless it is to be read whole."""
    n_y, n_x = level.sizes["y"], level.sizes["x"]
    step = math.ceil(math.sqrt(n_y * n_x / _SAMPLE_PX))
    if n_y * n_x <= _WHOLE_PX:
        values = np.asarray(level.data)
        if np.issubdtype(values.dtype, np.floating) and np.isinf(values).any():
            return values.reshape(len(values), -1)
        return values[:, ::step, ::step].reshape(len(values), -1)
    if whole:
        return np.asarray(level.data[:, ::step, ::step]).reshape(level.sizes["c"], -1)
    starts = [np.linspace(0, max(n - _WINDOW, 0), _LATTICE).astype(int) for n in (n_y, n_x)]
    windows = [level.data[:, y : y + _WINDOW, x : x + _WINDOW] for y in starts[0] for x in starts[1]]
    return np.concatenate([window.reshape(len(window), -1) for window in dask.compute(*windows)], axis=1)


def _nothing(image: str) -> str:
    return (
        f"{image} is NaN everywhere: it shows nothing. Pass another image_key=, or look where its values were lost; "
        "NaN means outside the image."
    )


def _infinite(image: str) -> str:
    return (
        f"{image} has infinite values; values must be finite, or NaN outside the image. Set them: "
        "image.where(np.isfinite(image))."
    )

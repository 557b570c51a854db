"""The bins of a result: those of a map that is there, or that follow from what was measured, or over the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stgen._checks import check_positive
from stgen._spatial.grid import Grid
from stgen._spatial.map_inputs import MapElements

__all__ = ["result_grid"]

BINS_PER_SPOT = 5  # along its diameter, unless other bins are asked for
CLOSE = 0.01  # relative difference of sides that are meant to be equal


def result_grid(elements: MapElements, *, bin_um: float | None, factor: int | None, fitted_um: float | None) -> Grid:
    """The bins of a result.

    Parameters
    ----------
    elements
        The section.
    bin_um, factor
        What was asked for, see :func:`stgen.tl.superresolve`.
    fitted_um
        Side of the bins that the model was fitted for; ``None`` for one that takes any.

    Raises
    ------
    ValueError
        If wishes, model and section do not go together.
    """
    if bin_um is not None:
        check_positive("bin_um", bin_um)
    if factor is not None and (isinstance(factor, bool) or factor != int(factor) or factor < 1):
        raise ValueError(f"`factor` must be a whole number of at least 1, found {factor!r}.")
    if fitted_um is not None and bin_um is not None and abs(bin_um / fitted_um - 1) > CLOSE:
        raise ValueError(
            f"the model was fitted for bins of {fitted_um:g} µm, found bin_um={bin_um!r}. Leave bin_um out, or fit a "
            "model on a map of that resolution: stgen.pp.rasterize(sdata, bin_um=...)."
        )
    if elements.map_key is not None:
        return _of_map(elements, elements.map_key, bin_um, factor, fitted_um)
    if elements.low_res is not None and elements.spots is None:
        low = Grid.of_map(elements.sdata, elements.low_res)
        return (
            _refined(elements, low, bin_um, factor) if fitted_um is None else _fitting(elements, low, factor, fitted_um)
        )
    if factor is not None:
        raise ValueError(
            f"`factor` is for maps, of which it counts bins along the side of one, and low_res={elements.low_res!r} is "
            "not a map. Leave it out, or pass bin_um=<µm> instead."
        )
    side = _of_spots(elements, bin_um) if fitted_um is None else bin_um or fitted_um
    return elements.grid_of_spots(side) if elements.image_key is None else elements.grid_of_image(side)


def _of_map(elements: MapElements, key: str, bin_um: float | None, factor: int | None, fitted_um: float | None) -> Grid:
    """The bins of a map that is there."""
    grid = Grid.of_map(elements.sdata, key)
    if factor is not None:
        raise ValueError(f"the bins are those of like={key!r}; leave `factor` out.")
    if fitted_um is not None and abs(grid.bin_um / fitted_um - 1) > CLOSE:
        raise ValueError(
            f"the bins of {key!r} are {grid.bin_um:.4g} µm, and the model is for {fitted_um:g} µm. Name a map of that "
            "resolution as like=: stgen.pp.rasterize(sdata, bin_um=...)."
        )
    if bin_um is not None and abs(bin_um / grid.bin_um - 1) > CLOSE:
        raise ValueError(
            f"the bins of {key!r} are {grid.bin_um:.4g} µm, found bin_um={bin_um!r}; leave one of both out."
        )
    return grid


def _fitting(elements: MapElements, low: Grid, factor: int | None, fitted_um: float) -> Grid:
    """The model's bins, of which a low-resolution one must be a whole block."""
    found = max(1, round(low.bin_um / fitted_um))
    if abs(low.bin_um / found / fitted_um - 1) > CLOSE:
        raise ValueError(
            f"the bins of {elements.low_res!r} are {low.bin_um:.4g} µm, {low.bin_um / fitted_um:.4g} times the model's "
            f"{fitted_um:g} µm; it must be a whole number of times. Make it with stgen.pp.degrade from a map of the "
            "model's bin_um."
        )
    if factor not in (None, found):
        raise ValueError(
            f"factor={factor!r} does not fit: the bins of {elements.low_res!r} are {low.bin_um:.4g} µm, {found} times "
            f"the model's {fitted_um:g} µm. Leave factor out, or degrade the map by {factor!r}: "
            f"stgen.pp.degrade(sdata, map_key=..., factor={factor!r})."
        )
    grid = low.refined(found)
    entry = elements.sdata.attrs.get("stgen", {}).get(elements.low_res, {})
    if entry.get("factor") != found:
        return grid
    # of pp.degrade: the blocks at the lower and right edge may reach out of the map
    height, width = (
        min(n, entry.get(f"fine_{name}", n)) for name, n in (("height", grid.height), ("width", grid.width))
    )
    return replace(grid, height=int(height), width=int(width))


def _refined(elements: MapElements, low: Grid, bin_um: float | None, factor: int | None) -> Grid:
    """Blocks of any number of bins."""
    if bin_um is None:
        return low.refined(int(factor or BINS_PER_SPOT))
    times = low.bin_um / bin_um
    if abs(times - round(times)) > CLOSE or round(times) < 1 or factor not in (None, round(times)):
        raise ValueError(
            f"the bins of {elements.low_res!r} are {low.bin_um:.4g} µm, {times:.4g} times bin_um={bin_um!r}, which "
            f"must be a whole number of times and, if it is given, factor (found {factor!r}); pass one of both."
        )
    return low.refined(round(times))


def _of_spots(elements: MapElements, bin_um: float | None) -> float:
    """Side of bins in µm: a fifth of the spots' diameter, rounded, or what is asked for."""
    diameter = elements.spot_um() or elements.spot_pitch_um()
    if bin_um is None:
        bin_um = _rounded(diameter / BINS_PER_SPOT)
    if not (np.isfinite(bin_um) and 0 < bin_um <= diameter):
        raise ValueError(
            f"`bin_um` must be positive and at most the diameter of the spots ({diameter:.4g} µm), found {bin_um!r}."
        )
    return bin_um


def _rounded(um: float) -> float:
    """A length rounded to one digit: 11 µm to 10, 20 to 20, 2.3 to 2."""
    unit = 10.0 ** np.floor(np.log10(um))
    return float(max(round(um / unit), 1) * unit)

"""Counts of a map as shares of the counts of all genes."""

from __future__ import annotations

from typing import Literal, overload

from spatialdata import SpatialData
from xarray import DataArray

from stgen._spatial.grid import Grid, get_map

__all__ = ["total_of"]


@overload
def total_of(sdata: SpatialData, map_key: str, *, needed: Literal[True]) -> DataArray: ...
@overload
def total_of(sdata: SpatialData, map_key: str, *, needed: bool) -> DataArray | None: ...
def total_of(sdata: SpatialData, map_key: str, *, needed: bool) -> DataArray | None:
    """The map ``(1, y, x)`` of the counts of all genes that belongs to a map, or None where there is none.

    Raises
    ------
    KeyError
        If it is needed and not there.
    ValueError
        If it is on other bins than the map.
    """
    key = f"{map_key}_total"
    if key not in sdata.images:
        if not needed:
            return None
        raise KeyError(
            f"the map {map_key!r} cannot be normalized: there is no sdata.images[{key!r}] with the counts of all "
            "genes. stgen.tl.superresolve writes it where no model is given; without it, leave out normalize=, or "
            "normalize the table by its own genes: scanpy.pp.normalize_total(table)."
        )
    total, grid, of_total = get_map(sdata, key), Grid.of_map(sdata, map_key), Grid.of_map(sdata, key)
    if total.sizes["c"] != 1 or (grid.height, grid.width) != (of_total.height, of_total.width):
        raise ValueError(
            f"sdata.images[{key!r}] has the shape {total.shape} (c, y, x); the counts of all genes of the map "
            f"{map_key!r} need (1, {grid.height}, {grid.width})."
        )
    return total

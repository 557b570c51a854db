"""Maps of lower resolution: what a coarser instrument would have counted."""

from __future__ import annotations

import logging

import dask.array as da
import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel

from stgen._checks import check_types
from stgen._spatial.grid import Grid, get_map, map_counts_checked, scaled
from stgen._spatial.records import check_free_key, made_by, provenance, record, write_image
from stgen._spatial.section import check_sdata

__all__ = ["degrade"]

logger = logging.getLogger("stgen")

_CHUNK = 512  # bins along a side of what is computed at once
_EMPTY = np.empty((0, 0, 0), np.float32)


@check_types
def degrade(
    sdata: SpatialData, *, map_key: str, factor: int, key_added: str | None = None, overwrite: bool = False
) -> None:
    """Sum blocks of ``factor`` x ``factor`` bins of a map: what a coarser instrument would have counted.

    Parameters
    ----------
    sdata
        Object with the map.
    map_key
        The map, such as :func:`stgen.pp.rasterize` writes it.
    factor
        Bins along the side of a block, 2 to 255.
    key_added
        Name of the result; default ``f"{map_key}_{factor}x"``.
    overwrite
        Whether existing elements may be replaced.

    Returns
    -------
    None. Writes:

    - ``sdata.images[key_added]``: counts per block, float32 ``(c, y, x)``. Blocks at the lower and right edge hold what
      there is of them. Bins that are NaN were not measured and add nothing; a block of nothing else is NaN.
    - ``sdata.labels[f"{key_added}_area"]``: how many bins of each block were measured, for all genes, uint16 ``(y,
      x)``.
    - ``sdata.attrs["stgen"][key_added]``: ``"map_key"``, ``"factor"``, ``"unit"``, ``"bin_um"`` (side of a block),
      ``"fine_height"``, ``"fine_width"`` (bins of the map), ``"function"``, ``"version"``.

    Raises
    ------
    KeyError
        If there is no such map.
    TypeError
        If the factor is not a whole number.
    ValueError
        If the factor does not fit the map, the µm per bin are not known, or a key exists. If counts are negative or
        infinite: when the blocks are computed, which is when they are looked at.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.rasterize(sdata, genes=["EPCAM"], mask_um=None)
    >>> stgen.pp.degrade(sdata, map_key="counts", factor=5)
    >>> float(sdata["counts_5x"].sum()) == float(sdata["counts"].sum())
    True
    """
    check_sdata(sdata)
    if isinstance(factor, bool) or not isinstance(factor, int | np.integer):
        raise TypeError(f"`factor` must be a whole number of bins, found {factor!r}.")
    fine = get_map(sdata, map_key)
    _, height, width = fine.shape
    if not 2 <= factor <= min(255, max(height, width)):
        raise ValueError(
            f"`factor` must lie between 2 and {min(255, max(height, width))} for the map {map_key!r} of {width} x "
            f"{height} bins, found {factor}."
        )
    key_added = f"{map_key}_{factor}x" if key_added is None else key_added
    if key_added == map_key:
        raise ValueError(f"key_added={key_added!r} is the map itself; pass another name.")
    for kind, key in (("images", key_added), ("labels", f"{key_added}_area")):
        check_free_key(sdata, kind, key, overwrite=overwrite, ours=made_by(sdata, key_added, "pp.degrade"))
    grid = Grid.of_map(sdata, map_key)

    factor = int(factor)
    side = factor * max(1, _CHUNK // factor)
    to_whole = [(0, -n % factor) for n in (height, width)]
    values = da.pad(da.asarray(fine.data).astype(np.float32), [(0, 0), *to_whole], constant_values=np.nan)
    values = values.rechunk((1, side, side))
    in_blocks = tuple(tuple(n // factor for n in sizes) for sizes in values.chunks[1:])
    where = f"The map {map_key!r}"
    summed = values.map_blocks(
        _summed, factor, where, chunks=(values.chunks[0], *in_blocks), dtype=np.float32, meta=_EMPTY
    )
    measured = (~da.isnan(values)).all(axis=0)
    area = da.coarsen(np.sum, measured, {0: factor, 1: factor}).astype(np.uint16)

    transformations = scaled(grid.transformations, factor)
    write_image(
        sdata,
        key_added,
        summed,
        channels=[str(name) for name in fine.coords["c"].values],
        transformations=transformations,
        overwrite=overwrite,
    )
    sdata.labels[f"{key_added}_area"] = Labels2DModel.parse(
        area, dims=("y", "x"), transformations=transformations, chunks=(_CHUNK, _CHUNK)
    )
    entry = provenance(
        "pp.degrade", map_key=map_key, factor=factor, unit="counts per bin", bin_um=grid.bin_um * factor,
        fine_height=height, fine_width=width,
    )  # fmt: skip
    record(sdata, key_added, entry)
    logger.info(
        "Summed blocks of %d x %d bins: images[%r], measured bins in labels[%r].",
        factor,
        factor,
        key_added,
        f"{key_added}_area",
    )


def _summed(values: np.ndarray, factor: int, where: str) -> np.ndarray:
    """Sums over blocks of ``(c, y, x)``; NaN where there is nothing else in one."""
    n, height, width = values.shape
    blocks = map_counts_checked(values, where).reshape(n, height // factor, factor, width // factor, factor)
    unknown = np.isnan(blocks).all((2, 4))
    return np.where(unknown, np.nan, np.nansum(blocks, (2, 4), dtype=np.float64)).astype(np.float32)

"""Maps as OME-TIFF pyramids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from spatialdata import SpatialData
from xarray import DataArray

from stgen._checks import check_types, genes_of
from stgen._spatial.files import checked_path, whole_file
from stgen._spatial.grid import Grid, get_map
from stgen._spatial.image import is_micrometers
from stgen._spatial.section import check_sdata

__all__ = ["write_ome_tiff"]

logger = logging.getLogger("stgen")

TILE = 256  # pixels along a side
SMALLEST = 512  # bins along the longer side of the coarsest level, at most
LARGE = 2**31  # bytes from which on the file is a BigTIFF


@check_types
def write_ome_tiff(
    sdata: SpatialData,
    map_key: str,
    path: str | os.PathLike,
    *,
    genes: Sequence[str] | None = None,
    fill: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a map as an OME-TIFF pyramid, a channel per gene, which QuPath, Fiji, napari and OMERO open.

    Parameters
    ----------
    sdata
        Object with the map.
    map_key
        Map ``(c, y, x)`` in ``sdata.images``, such as :func:`stgen.tl.superresolve` or :func:`stgen.pp.rasterize`
        makes.
    path
        File to write; its name ends in ``.ome.tif`` or ``.ome.tiff``.
    genes
        Genes to write, in this order; None for all of the map.
    fill
        What stands off the tissue. None: NaN, as in the map; 0 for programs that cannot show it.
    overwrite
        Whether a file of this name may be replaced.

    Returns
    -------
    The path. The file holds float32 ``(c, y, x)``, with

    - the genes as names of the channels
    - the side of a bin as physical size, in µm
    - where the upper left corner lies in the section's micrometer coordinate system, if it is not turned in there: the
      position of each plane, in µm
    - levels that are coarser by 2, 4, ...: means of what is known, in the unit of the finest level
    - the record of the map, as JSON, in the description of the image

    Raises
    ------
    KeyError
        If there is no such map or gene.
    ValueError
        If the name has another ending, the file exists, or the µm per bin are not known.
    FileNotFoundError
        If the folder does not exist.

    Notes
    -----
    Genes are read and written one after the other, so that a section of any size can be exported. The file takes its
    name when it is whole.

    Examples
    --------
    >>> import tifffile
    >>> from stgen import datasets, io, pp
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1"])
    >>> path = io.write_ome_tiff(sdata, "counts", "counts.ome.tif")
    >>> tifffile.imread(path).shape == sdata["counts"].shape
    True
    """
    check_sdata(sdata)
    genes = genes_of(genes, get_map(sdata, map_key).coords["c"].values, f"the map {map_key!r}")
    stack = get_map(sdata, map_key, genes)
    grid = Grid.of_map(sdata, map_key)
    path = checked_path(path, (".ome.tif", ".ome.tiff"), overwrite=overwrite)

    n_levels = 1
    while max(grid.height, grid.width) > SMALLEST * 2 ** (n_levels - 1):
        n_levels += 1
    with (
        whole_file(path) as part,
        tifffile.TiffWriter(part, ome=True, bigtiff=4 * stack.size > LARGE) as tiff,
    ):
        for level in range(n_levels):
            per_cm = 1e4 / (grid.bin_um * 2**level)
            height, width = (-(-n // 2**level) for n in (grid.height, grid.width))
            first: dict[str, Any] = {"subifds": n_levels - 1, "metadata": _metadata(sdata, map_key, genes, grid)}
            options: dict[str, Any] = {"subfiletype": 1} if level else first
            tiff.write(
                _tiles(stack, level, fill), shape=(len(genes), height, width), dtype="float32", tile=(TILE, TILE),
                compression="zlib", photometric="minisblack", resolution=(per_cm, per_cm), resolutionunit="CENTIMETER",
                **options,
            )  # fmt: skip
    logger.info("%d genes in %d x %d bins of %.4g µm: %s.", len(genes), grid.width, grid.height, grid.bin_um, path)
    return path


def _metadata(sdata: SpatialData, map_key: str, genes: list[str], grid: Grid) -> dict[str, Any]:
    """What the OME header says of the map."""
    metadata: dict[str, Any] = {
        "axes": "CYX",
        "Name": map_key,
        "Channel": {"Name": genes},
        "PhysicalSizeX": grid.bin_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": grid.bin_um,
        "PhysicalSizeYUnit": "µm",
    }
    entry = sdata.attrs.get("stgen", {}).get(map_key)
    if entry is not None:
        metadata["Description"] = json.dumps(entry, default=str)
    for system in filter(is_micrometers, grid.transformations):
        matrix = grid.to_system(system)
        if np.allclose(matrix[:2, :2], np.eye(2) * grid.bin_um, rtol=1e-6, atol=1e-9 * grid.bin_um):
            unit = ["µm"] * len(genes)
            metadata["Plane"] = {
                "PositionX": [float(matrix[0, 2])] * len(genes), "PositionXUnit": unit,
                "PositionY": [float(matrix[1, 2])] * len(genes), "PositionYUnit": unit,
            }  # fmt: skip
            break
    return metadata


def _tiles(stack: DataArray, level: int, fill: float | None) -> Iterator[np.ndarray]:
    """The tiles of a level: gene by gene, from left to right and from top to bottom, full at the borders."""
    for gene in range(stack.sizes["c"]):
        values = np.asarray(stack[gene].data, dtype=np.float32)
        for _ in range(level):
            values = _halved(values)
        if fill is not None:
            values = np.where(np.isnan(values), np.float32(fill), values)
        margins = [(0, -n % TILE) for n in values.shape]
        values = np.pad(values, margins, constant_values=np.nan if fill is None else fill)
        for y, x in product(*(range(0, n, TILE) for n in values.shape)):
            yield np.ascontiguousarray(values[y : y + TILE, x : x + TILE])


def _halved(values: np.ndarray) -> np.ndarray:
    """Means of what is known of 2 x 2 bins each."""
    height, width = values.shape
    padded = np.pad(values, [(0, height % 2), (0, width % 2)], constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2)
    known = np.isfinite(blocks).sum((1, 3))
    total = np.nansum(blocks, (1, 3))
    return np.divide(total, known, out=np.full(known.shape, np.nan, np.float32), where=known > 0)

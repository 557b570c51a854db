"""Which bins of a section get a result."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from spatialdata import SpatialData

from stgen._grid import Grid, get_map
from stgen._io import image_of
from stgen.measurement import Measurement
from stgen.pp._alignment import tissue_mask

__all__ = ["tissue_bins", "tissue_of_image"]

BLOCK = 512  # bins along a side of what is looked at at a time
TISSUE_UM = 50.0  # how far from what is dark (or bright) tissue reaches, as pp.rasterize has it for molecules


def tissue_bins(
    sdata: SpatialData,
    grid: Grid,
    image_key: str | None,
    measurement: Measurement | None,
    like: str | None,
    mpp: float | None,
) -> np.ndarray:
    """Which bins get a result, ``(height, width)``: where something was measured (nearby), or the image shows tissue."""
    tissue = np.zeros((grid.height, grid.width), bool)
    if measurement is None and like is not None:
        tissue[:] = np.isfinite(np.asarray(get_map(sdata, like).data[0]))
    elif measurement is None:
        tissue[:] = tissue_of_image(sdata, grid, image_key, mpp)
    elif measurement.blocks is not None:
        side = measurement.blocks
        for y, x in (measurement.centers // side).astype(int) * side:
            tissue[y : y + side, x : x + side] = True
    else:
        where = measurement.with_counts(np.empty((len(measurement), 0)))
        for y in range(0, grid.height, BLOCK):
            for x in range(0, grid.width, BLOCK):
                part = tissue[y : y + BLOCK, x : x + BLOCK]
                part[:] = where.interpolate(y, x, *part.shape)[1][0] > 0
    if not tissue.any():
        where = f"the image {image_key!r}" if measurement is None else "the low-resolution data"
        raise ValueError(
            f"there is no tissue: {where} is empty everywhere on the grid of {grid.width} x {grid.height} bins. Check "
            "that it is the right element and that its transformation is right."
        )
    return tissue


def tissue_of_image(sdata: SpatialData, grid: Grid, image_key: str, mpp: float | None) -> np.ndarray:
    """Bins within 50 µm of tissue; all, where the whole image looks alike."""
    image = image_of(sdata, image_key, mpp=mpp)
    mask, pixel = tissue_mask(image)
    if mask.mean() > 0.97:
        return np.ones((grid.height, grid.width), bool)
    if mask.any():
        mask = ndimage.distance_transform_edt(~mask) * pixel * image.mpp <= TISSUE_UM
    to_mask = grid.to_element(sdata, image_key) / pixel
    tissue = np.zeros((grid.height, grid.width), bool)
    for y in range(0, grid.height, BLOCK):
        rows, columns = np.mgrid[y : min(y + BLOCK, grid.height), : grid.width] + 0.5
        column, row = np.floor(to_mask[:2, :2] @ [columns.ravel(), rows.ravel()] + to_mask[:2, 2:]).astype(int)
        inside = (row >= 0) & (column >= 0) & (row <= mask.shape[0]) & (column <= mask.shape[1])
        row, column = np.clip(row, 0, mask.shape[0] - 1), np.clip(column, 0, mask.shape[1] - 1)
        tissue[y : y + BLOCK] = (mask[row, column] & inside).reshape(rows.shape)
    return tissue

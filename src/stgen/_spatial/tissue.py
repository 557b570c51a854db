"""Which bins of a section get a result."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from stgen._spatial.grid import Grid
from stgen._spatial.image import Histology
from stgen.measurement import Footprints

__all__ = ["check_some_tissue", "known_bins", "tissue_mask", "tissue_near", "tissue_of_image", "with_tissue_around"]

MASK_PX = 512
BLOCK = 512  # bins along a side of what is looked at at a time
KNOWN_PX = 4096  # along the longer side of the mask of what is not NaN
TISSUE_UM = 50.0  # how far from what is dark (or bright) tissue reaches, as pp.rasterize has it for molecules


def tissue_near(footprints: Footprints, grid: Grid) -> np.ndarray:
    """Bins that were measured, or lie within about a pitch of what was, shape ``(height, width)``."""
    tissue = np.zeros((grid.height, grid.width), bool)
    side = footprints.blocks
    if side is not None:
        for y, x in (footprints.centers // side).astype(int) * side:
            tissue[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)] = True
        return tissue
    for y in range(0, grid.height, BLOCK):
        for x in range(0, grid.width, BLOCK):
            part = tissue[y : y + BLOCK, x : x + BLOCK]
            part[:] = footprints.reached(y, x, *part.shape)
    return tissue


def with_tissue_around(tissue: np.ndarray, shown: np.ndarray, footprints: Footprints, reach: float) -> np.ndarray:
    """What was measured, and what is tissue in the image ``(shown)`` at most ``reach`` pitches from a footprint."""
    tissue, tree = tissue.copy(), cKDTree(footprints.centers)
    for y in range(len(tissue)):
        x = np.flatnonzero(shown[y] & ~tissue[y])
        places = np.column_stack([np.full(len(x), y + 0.5), x + 0.5])
        tissue[y, x] = np.isfinite(tree.query(places, distance_upper_bound=reach * footprints.pitch)[0])
    return tissue


def check_some_tissue(tissue: np.ndarray, where: str) -> None:
    """Refuse a section without any."""
    if not tissue.any():
        raise ValueError(
            f"there is no tissue: {where} is empty everywhere on the grid of {tissue.shape[1]} x {tissue.shape[0]} "
            "bins. Check that it is the right element and that its transformation is right."
        )


def tissue_of_image(image: Histology, to_pixels: np.ndarray, grid: Grid) -> np.ndarray:
    """Bins within 50 µm of tissue; all, where the whole image looks alike. ``to_pixels`` is the matrix from bins."""
    mask, pixel = tissue_mask(image)
    known = image.sketch(mpp=_mask_mpp(image))[1] if image.may_be_unknown else np.ones_like(mask)
    if mask.mean() > 0.97 * known.mean():
        return known_bins(image, to_pixels, grid)
    if mask.any():
        mask = known & (ndimage.distance_transform_edt(~mask) * pixel * image.mpp <= TISSUE_UM)
    return _on_grid(mask, to_pixels / pixel, grid)


def known_bins(image: Histology, to_pixels: np.ndarray, grid: Grid) -> np.ndarray:
    """Bins where an image is not NaN: all, unless its values are floats, also beyond it, where its edge is repeated."""
    image = image.with_mpp(grid.bin_um / float(np.sqrt(abs(np.linalg.det(to_pixels[:2, :2])))))
    if not image.may_be_unknown:
        return np.ones((grid.height, grid.width), bool)
    mpp = max(image.mpp, grid.bin_um / 2, image.mpp * max(image.height, image.width) / KNOWN_PX)
    known = image.sketch(mpp=mpp)[1]
    to_known = np.diag([known.shape[1] / image.width, known.shape[0] / image.height, 1.0]) @ to_pixels
    return _on_grid(known, to_known, grid, beyond=True)


def _on_grid(mask: np.ndarray, to_mask: np.ndarray, grid: Grid, *, beyond: bool = False) -> np.ndarray:
    """What a mask says of the center of each bin, ``(height, width)``; beyond the mask False, or what its edge says."""
    tissue = np.zeros((grid.height, grid.width), bool)
    for y in range(0, grid.height, BLOCK):
        rows, columns = np.mgrid[y : min(y + BLOCK, grid.height), : grid.width] + 0.5
        column, row = np.floor(to_mask[:2, :2] @ [columns.ravel(), rows.ravel()] + to_mask[:2, 2:]).astype(int)
        inside = (row >= 0) & (column >= 0) & (row <= mask.shape[0]) & (column <= mask.shape[1]) | beyond
        row, column = np.clip(row, 0, mask.shape[0] - 1), np.clip(column, 0, mask.shape[1] - 1)
        tissue[y : y + BLOCK] = (mask[row, column] & inside).reshape(rows.shape)
    return tissue


def tissue_mask(image: Histology, *, mpp: float | None = None) -> tuple[np.ndarray, float]:
    """A coarse mask of the tissue.

    Three channels are read as a transmitted-light image, where tissue is darker than the glass; other images as
    fluorescence, where it is brighter. The threshold is Otsu's, kept within what tissue can be. Where the image is NaN
    there is none.

    Returns
    -------
    Boolean mask ``(h, w)``, and its size in finest-level pixels per mask pixel.
    """
    from skimage.filters import threshold_otsu

    thumbnail, known = image.sketch(mpp=_mask_mpp(image) if mpp is None else mpp)
    if image.n_channels == 3:
        # the darkest channel: pale eosin absorbs green only
        signal = -np.log(np.clip(thumbnail.min(0), 1 / 255, 1))
        low, high = 0.08, 0.35
    else:
        signal = thumbnail.mean(0)
        signal = signal / max(float(np.quantile(signal[known], 0.995)), 1e-6) if known.any() else signal
        low, high = 0.05, 0.2
    signal = ndimage.gaussian_filter(signal, 1.0)
    threshold = threshold_otsu(signal) if np.ptp(signal) > 1e-6 else low
    mask = known & (signal > np.clip(threshold, low, high))
    return mask, max(image.height, image.width) / max(mask.shape)


def _mask_mpp(image: Histology) -> float:
    """µm per pixel of the mask, unless another is asked for."""
    return max(image.mpp, image.mpp * max(image.height, image.width) / MASK_PX)

"""Histology as stain statistics, multi-scale texture and nuclei, without a download."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stgen.features import FLOOR, NUCLEUS_CONTRAST, NUCLEUS_UM, STAINS

__all__ = ["NUCLEI_UP_TO_UM", "TEXTURE_PX", "TEXTURE_UM", "texture_features"]

TEXTURE_UM = (128.0, 256.0, 512.0, 1024.0)
"""Sides of the concentric patches in µm."""
TEXTURE_PX = 128
"""Side of every patch in pixels, so that a patch twice as wide is read at half the resolution."""
NUCLEI_UP_TO_UM = 256.0
"""Nuclei are looked for in patches up to this wide: 2 µm per pixel, a few pixels per nucleus."""

_SIGMAS = (0.7, 1.4)  # pixels; the next octave is that of the next patch


def texture_features(patches: Tensor, *, mpp: float) -> Tensor:
    """Describe the disc inscribed in each patch.

    Three channels are read as red, green and blue of a transmitted-light image: optical densities (Beer-Lambert), and
    from them hematoxylin and eosin by fixed stain vectors. Any other number of channels is taken as it is.

    Every feature is an average over the disc of a quantity that turns with the image (gradient magnitude, structure
    tensor coherence, response of a round filter), so that the eight rotations and reflections of a patch share one
    embedding. Spreads and energies are given as logarithms.

    Parameters
    ----------
    patches
        Images ``(n, c, s, s)`` in [0, 1].
    mpp
        µm per pixel.

    Returns
    -------
    Float32 features ``(n, d)``; d depends on the number of channels and on ``mpp`` only.
    """
    brightfield = patches.shape[1] == 3
    color = -torch.log(patches.clamp(1 / 255, 1)) if brightfield else patches
    planes = color
    if brightfield:
        unmix = torch.as_tensor(np.linalg.inv(STAINS)[:, :2], dtype=color.dtype, device=color.device)
        stains = torch.einsum("nchw,cs->nshw", color, unmix)
        planes = torch.cat([stains, color.mean(1, keepdim=True)], dim=1)
    weight = _disc(patches.shape[-1]).to(patches)
    features = [*_color(color, weight)]
    for sigma in _SIGMAS:
        features += _texture(planes, sigma, weight)
    if brightfield and mpp * patches.shape[-1] <= NUCLEI_UP_TO_UM:
        features += _nuclei(planes[:, :1], mpp, weight)
    return torch.cat(features, dim=1)


def _color(color: Tensor, weight: Tensor) -> list[Tensor]:
    """Mean, spread and covariance of the channels."""
    mean = _average(color, weight)
    centered = color - mean[..., None, None]
    covariance = torch.einsum("nahw,nbhw,hw->nab", centered, centered, weight)
    row, column = torch.triu_indices(color.shape[1], color.shape[1], offset=1)
    spread = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    return [mean, torch.log(spread + FLOOR), covariance[:, row, column]]


def _texture(planes: Tensor, sigma: float, weight: Tensor) -> list[Tensor]:
    """Gradient energy, coherence of its direction, and asymmetry of the band-pass, at one scale."""
    size = planes.shape[-1]
    smooth, slope = _filters(size, sigma)
    smooth, slope = smooth.to(planes), slope.to(planes)
    rows = smooth @ planes
    blurred, d_x, d_y = rows @ smooth.mT, rows @ slope.mT, slope @ planes @ smooth.mT
    magnitude = (d_x**2 + d_y**2).sqrt() * sigma
    mean, spread = _average_and_spread(magnitude, weight)

    near = _filters(size, 2 * sigma)[0].to(planes)
    j_xx, j_yy, j_xy = (near @ product @ near.mT for product in (d_x**2, d_y**2, d_x * d_y))
    coherence = ((j_xx - j_yy) ** 2 + 4 * j_xy**2).sqrt() / (j_xx + j_yy + 1e-6)

    wide = _filters(size, 1.6 * sigma)[0].to(planes)
    band = blurred - wide @ blurred @ wide.mT
    center, width = _average_and_spread(band, weight)
    skewness = _average((band - center[..., None, None]) ** 3, weight) / width.clamp_min(1e-4) ** 3
    return [
        torch.log(mean + FLOOR),
        torch.log(spread + FLOOR),
        torch.log(_average(coherence, weight) + FLOOR),
        skewness,
    ]


def _nuclei(hematoxylin: Tensor, mpp: float, weight: Tensor) -> list[Tensor]:
    """Density, share of the area, size, stain and elongation of dark blobs as large as nuclei."""
    size = hematoxylin.shape[-1]
    sigma = max(NUCLEUS_UM / mpp, 0.7)
    inner, outer = _filters(size, sigma)[0].to(hematoxylin), _filters(size, 2 * sigma)[0].to(hematoxylin)
    blurred = inner @ hematoxylin @ inner.mT
    blob = blurred - outer @ hematoxylin @ outer.mT
    nucleus = (blob > NUCLEUS_CONTRAST).to(blob)
    peak = nucleus * (blob == F.max_pool2d(blob, 3, stride=1, padding=1))
    area = _average(nucleus, weight)
    density = _average(peak, weight) / mpp**2 * 1e4  # per 100 x 100 µm
    stain = _average(hematoxylin * nucleus, weight) / area.clamp_min(1e-3)
    smooth, slope = _filters(size, sigma)
    smooth, slope = smooth.to(blob), slope.to(blob)
    d_x, d_y = hematoxylin @ slope.mT, slope @ hematoxylin
    h_xx, h_yy = smooth @ d_x @ slope.mT, slope @ d_y @ smooth.mT
    h_xy = slope @ d_x
    elongation = ((h_xx - h_yy) ** 2 + 4 * h_xy**2).sqrt() / ((h_xx + h_yy).abs() + 1e-3)
    elongation = _average(elongation.clamp_max(2.0) * peak, weight) / _average(peak, weight).clamp_min(1e-4)
    um2 = area * 1e4 / (density + 1.0)
    return [torch.log(density + 1.0), area, torch.log(um2 + 1.0), stain, elongation]


# -- averages over the disc, and separable filters as matrices --------------------------------------------------------
def _average(values: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,hw->nc", values, weight)


def _average_and_spread(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    mean = _average(values, weight)
    return mean, _average((values - mean[..., None, None]) ** 2, weight).clamp_min(0).sqrt()


@lru_cache(maxsize=8)
def _disc(size: int) -> Tensor:
    """Weights of the pixels whose centers lie in the inscribed disc, summing to one."""
    position = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    inside = (position[:, None] ** 2 + position**2 <= (size / 2) ** 2).double()
    return (inside / inside.sum()).float()


@lru_cache(maxsize=32)
def _filters(size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Gaussian smoothing along an axis, and its derivative, as matrices; the patch is mirrored at its border."""
    radius = min(max(1, int(3 * sigma + 0.5)), size - 1)
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offset / sigma) ** 2)
    kernel /= kernel.sum()
    smooth, slope = np.zeros((size, size)), np.zeros((size, size))
    for k, weight in zip(offset, kernel, strict=True):
        column = np.abs(np.arange(size) + k)
        column = np.where(column >= size, 2 * (size - 1) - column, column)
        np.add.at(smooth, (np.arange(size), column), weight)
        np.add.at(slope, (np.arange(size), column), weight * k / sigma**2)
    return torch.from_numpy(smooth).float(), torch.from_numpy(slope).float()

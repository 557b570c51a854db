"""What histology looks like around every bin of a section, at several scales, without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["FEATURE_UM", "bin_features", "pixel_quantities"]

FLOOR = 0.01  # added before a logarithm is taken
NUCLEUS_UM = 2.0  # standard deviation of a Gaussian that fits a nucleus
NUCLEUS_CONTRAST = 0.04  # difference-of-Gaussians response, in optical density, that counts as a nucleus
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of hematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston, 2001)."""

FEATURE_UM = (0.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
"""Standard deviations of the averages in µm; 0 is the bin itself."""
EDGE_UM = (2.0, 4.0)  # scales at which edges are looked at
MARGIN_UM, MARGIN_PX = 20.0, 4  # beyond what is kept, so that edges there are seen whole, of coarse pixels too
AT_A_TIME = 4_000_000  # pixels
NUCLEI_UP_TO_MPP = 2.5  # coarser pixels show none


def bin_features(
    read: Callable[[int, int, int, int], np.ndarray],
    height: int,
    width: int,
    *,
    bin_um: float,
    px_per_bin: int,
    scales_um: Sequence[float] = FEATURE_UM,
    progress: bool = False,
) -> np.ndarray:
    """Features of each bin: quantities of pixels, averaged around the bin at every scale.

    Averages are of what turns with the image, so that features do. Those of spreads and edges are given as logarithms.

    Parameters
    ----------
    read
        The image, as ``read(y, x, height, width)`` in bins: ``(c, height * px_per_bin, width * px_per_bin)`` in [0, 1].
        Three channels are read as red, green and blue of a transmitted-light image, others as they are.
    height, width
        Number of bins.
    bin_um
        Side of a bin in µm.
    px_per_bin
        Pixels along a bin.
    scales_um
        Standard deviations of the Gaussians with which quantities are averaged; 0 for the bin alone.
    progress
        Show a progress bar.

    Returns
    -------
    float32, shape ``(D, height, width)``; for brightfield images 18 features a scale, 21 with nuclei; else 6 for each
    channel.
    """
    mpp = bin_um / px_per_bin
    margin = int(np.ceil(max(MARGIN_UM, MARGIN_PX * mpp) / bin_um))
    rows = max(1, AT_A_TIME // (width * px_per_bin**2))
    parts = []
    for y in tqdm(range(0, height, rows), desc="histology", unit="strip", disable=not progress):
        first, last = max(y - margin, 0), min(y + rows + margin, height)
        of_pixels = pixel_quantities(torch.as_tensor(read(first, 0, last - first, width)), mpp)
        kept = slice(y - first, min(y + rows, height) - first)
        parts.append({name: F.avg_pool2d(value, px_per_bin)[:, kept].numpy() for name, value in of_pixels.items()})
    quantities = {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}
    return np.concatenate(
        [
            _features({name: _averaged(value, scale / bin_um) for name, value in quantities.items()})
            for scale in scales_um
        ]
    )


def pixel_quantities(image: Tensor, mpp: float) -> dict[str, Tensor]:
    """Quantities of pixels whose averages say what a place looks like.

    Parameters
    ----------
    image
        Shape ``(c, y, x)``, in [0, 1].
    mpp
        µm per pixel.

    Returns
    -------
    ``(k, y, x)`` each: ``"color"`` (optical densities for brightfield) and ``"square"`` of it; ``"structure"``, the
    structure tensor's three parts of each stain (or channel) at each of two scales; and ``"nuclei"`` for brightfield:
    dark blobs as large as nuclei, their area and their stain.

    Raises
    ------
    ValueError
        If a value is NaN or infinite.
    """
    image = image.float()
    if not torch.isfinite(image).all():
        raise ValueError(
            "The image has NaN or infinite values: fill what is outside it, with 1 (glass) in transmitted light."
        )
    brightfield = len(image) == 3
    color = -torch.log(image.clamp(1 / 255, 1)) if brightfield else image
    planes = color
    if brightfield:
        unmix = torch.as_tensor(np.linalg.inv(STAINS)[:, :2], dtype=color.dtype)
        planes = torch.cat([torch.einsum("chw,cs->shw", color, unmix), color.mean(0, keepdim=True)])
    structure = []
    for sigma in EDGE_UM:
        blurred = gaussian_blur(planes, max(sigma / mpp, 0.5))
        d_y, d_x = (slope * sigma / mpp for slope in torch.gradient(blurred, dim=(1, 2)))
        structure += [d_x**2 + d_y**2, d_x**2 - d_y**2, 2 * d_x * d_y]
    exact = color.double()  # spreads are small differences of averages
    out = {"color": exact, "square": exact**2, "structure": torch.cat(structure)}
    if brightfield and mpp <= NUCLEI_UP_TO_MPP:
        hematoxylin, sigma = planes[:1], max(NUCLEUS_UM / mpp, 0.7)
        blob = gaussian_blur(hematoxylin, sigma) - gaussian_blur(hematoxylin, 2 * sigma)
        inside = (blob > NUCLEUS_CONTRAST).float()
        peak = inside * (blob == F.max_pool2d(blob, 3, stride=1, padding=1))
        out["nuclei"] = torch.cat([peak * (10 / mpp) ** 2, inside, hematoxylin * inside])  # per 10 x 10 µm
    return out


def _features(average: dict[str, np.ndarray]) -> np.ndarray:
    """Features from averages of the quantities, ``(k, height, width)`` each."""
    color, square = average["color"], average["square"]
    energy, along, across = (
        part.reshape(-1, *color.shape[1:])
        for part in average["structure"].reshape(2, 3, -1, *color.shape[1:]).swapaxes(0, 1)
    )
    spread = np.sqrt(np.maximum(square - color**2, 0))
    coherence = np.sqrt(along**2 + across**2) / (energy + 1e-6)
    edges = np.log(np.sqrt(np.maximum(energy, 0)) + FLOOR)
    parts = [color, np.log(spread + FLOOR), edges, np.log(coherence + 0.1)]
    if "nuclei" in average:
        number, area, stain = average["nuclei"]
        parts.append(np.stack([np.log(number + 0.1), area, stain / np.maximum(area, 1e-3)]))
    return np.concatenate(parts).astype(np.float32)


def _averaged(values: np.ndarray, sigma: float) -> np.ndarray:
    """Average maps with a Gaussian of ``sigma`` bins; wide ones at a lower resolution."""
    if sigma <= 0:
        return values
    side = max(1, int(sigma // 2))
    side -= 1 - side % 2  # odd, so that whole blocks can be made of any map by the same margin on both ends
    size = values.shape[1:]
    margin = [(-n % side + side * (-n % side % 2)) // 2 for n in size]
    small = F.avg_pool2d(torch.as_tensor(np.pad(values, ((0, 0), *((n, n) for n in margin)), mode="edge")), side)
    left = np.sqrt(max(sigma**2 - (side**2 - 1) / 6, 0.25)) / side  # averaging and interpolating have blurred already
    small = gaussian_blur(small, left)
    if side == 1:
        return small.numpy()
    wide = F.interpolate(small[None], scale_factor=side, mode="bilinear", align_corners=False)[0]
    return wide[:, margin[0] : margin[0] + size[0], margin[1] : margin[1] + size[1]].numpy()


def gaussian_blur(x: Tensor, sigma: float, *, radius: int | None = None, repeat_edge: bool = True) -> Tensor:
    """Average maps ``(..., y, x)`` with a Gaussian, cut off at ``radius``: by default at three standard deviations.

    Beyond the border is what is at the border; without ``repeat_edge`` there is nothing, and the average is over the
    rest.
    """
    mode = "nearest" if repeat_edge else "constant"

    def blur(x: Tensor) -> Tensor:
        values = x.cpu().numpy()
        values = ndimage.gaussian_filter(values, sigma, mode=mode, truncate=3.0, radius=radius, axes=(-2, -1))
        return torch.as_tensor(values, device=x.device)

    return blur(x) if repeat_edge else blur(x) / blur(torch.ones_like(x))

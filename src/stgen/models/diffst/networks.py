"""What the condition of Diff-ST is made of: cells of the histology, modulation by the other modality, disentangling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.models._layers import ChannelNorm, zero_module

__all__ = [
    "CellHierarchy",
    "CrossModalModulation",
    "Disentangling",
    "disentangling_loss",
    "from_regions",
    "modulate",
    "patch_entropy",
    "regions",
]


class CellHierarchy(nn.Module):
    """Cell-level patches, selected by their entropy, to which tissue-level features attend. Diff-ST, Section 2.2 (2).

    Parameters
    ----------
    channels
        Channels of the image.
    width
        Features ``d_c`` of a patch, ``d_t`` of the tissue, and ``d`` of the attention.
    patch
        Side of a patch in bins; the tissue is queried twice as finely.
    px_per_bin
        Image pixels along a bin.
    reach
        Patches up to this many away are attended to; ``None`` for all.
    """

    entropies: Tensor

    def __init__(self, channels: int, width: int, patch: int, px_per_bin: int, reach: int | None) -> None:
        super().__init__()
        self.patch, self.px, self.reach = patch, patch * px_per_bin, reach
        n_stages = max(1, int(math.log2(max(self.px // 4, 2))))
        widths = [channels, *(max(8, width >> (n_stages - 1 - i)) for i in range(n_stages))]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), ChannelNorm(b), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(width, width, 1))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.nothing = zero_module(nn.Linear(1, 2 * width, bias=False))  # key and value where no patch passes
        zero_module(self.value)
        self.register_buffer("entropies", torch.tensor([0.0, 0.0]))

    def fit(self, images: Sequence[Tensor]) -> None:
        """Take the range of the threshold, the minimum and the median entropy, from standardized training images."""
        entropies = torch.cat([patch_entropy(self.patches(h).flatten(0, 1)) for h in images])
        self.entropies.copy_(torch.stack([entropies.min(), entropies.median()]))

    def gamma(self, progress: float) -> Tensor:
        """Entropy that a patch must exceed: from the minimum to the median, linearly over half the training."""
        low, high = self.entropies
        return low + (high - low) * min(1.0, 2 * progress)

    def patches(self, h: Tensor) -> Tensor:
        """Image ``(B, C, s H, s W)`` cut into patches ``(B, M, C, px, px)``, row by row."""
        tiles = h.unfold(2, self.px, self.px).unfold(3, self.px, self.px)  # (B, C, rows, columns, px, px)
        return tiles.flatten(2, 3).transpose(1, 2)

    def forward(self, f_tissue: Tensor, h: Tensor, progress: float) -> Tensor:
        """Cross-attention with ``Q = f(F_tissue) W_Q, K = f(F_cell) W_K, V = f(F_cell) W_V``. Diff-ST, Section 2.2 (2).

        Parameters
        ----------
        f_tissue
            Tissue features, shape ``(B, d_t, H, W)``.
        h
            Standardized image, shape ``(B, C, s H, s W)``.
        progress
            Share of the training that is done.

        Returns
        -------
        What the cells add to the tissue features, shape ``(B, d_t, H, W)``.
        """
        patches = self.patches(h)
        kept = patch_entropy(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]) > self.gamma(progress)  # (B, M)
        f_cell = self.encoder(patches.flatten(0, 1)).mean((2, 3)).unflatten(0, patches.shape[:2])
        stride = max(1, self.patch // 2)
        pooled = F.avg_pool2d(f_tissue, stride)  # (B, d, rows, columns)
        nothing = self.nothing(f_cell.new_ones(len(f_cell), 1, 1)).chunk(2, -1)
        q = self.query(pooled.flatten(2).transpose(1, 2))
        k = torch.cat([self.key(f_cell), nothing[0]], 1)
        v = torch.cat([self.value(f_cell), nothing[1]], 1)
        seen = kept[:, None] & self._near(pooled.shape[2:], stride).to(kept.device)
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], 1)], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        attended = attended.transpose(1, 2).unflatten(2, pooled.shape[2:])
        return F.interpolate(attended, size=f_tissue.shape[2:], mode="bilinear")

    def _near(self, shape: Sequence[int], stride: int) -> Tensor:
        """Which patches are within reach of which tissue location, shape ``(locations, M)``."""
        per_patch = self.patch // stride
        row, column = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        own = torch.stack([row, column], -1).flatten(0, 1) // per_patch  # (locations, 2): patch of each location
        grid = torch.meshgrid(*(torch.arange(n // per_patch) for n in shape), indexing="ij")
        distance = (own[:, None] - torch.stack(grid, -1).flatten(0, 1)[None]).abs().amax(-1)
        return distance <= (distance.max() if self.reach is None else self.reach)


def patch_entropy(patches: Tensor) -> Tensor:
    """Shannon entropy in bits of each patch's gray values, in 256 bins: the complexity E of Diff-ST, Section 2.2 (2).

    Parameters
    ----------
    patches
        Standardized patches, shape ``(n, C, px, px)``; gray is the mean of the channels, cut at 3 standard deviations.

    Returns
    -------
    Shape ``(n,)``, from 0 to 8.
    """
    gray = patches.mean(1).flatten(1).clamp(-3, 3)
    level = ((gray + 3) / 6 * 255).round().long()
    counts = torch.zeros(len(level), 256, device=level.device).scatter_add_(1, level, torch.ones_like(gray))
    p = counts / level.shape[1]
    return -(p * p.clamp(min=1e-12).log2()).sum(1)


class CrossModalModulation(nn.Module):
    """Cross-modal adaptive modulation, in both directions. Diff-ST, Section 2.2 (3).

    Parameters
    ----------
    width
        Channels ``c`` of both modalities.
    region
        Side ``a`` of the regions, which tile the map without overlap.
    """

    def __init__(self, width: int, region: int) -> None:
        super().__init__()
        self.region = region
        self.norm_y, self.norm_h = ChannelNorm(width), ChannelNorm(width)
        self.h2y, self.y2h = zero_module(nn.Linear(width, width)), zero_module(nn.Linear(width, width))

    def forward(self, f_y: Tensor, f_h: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality ``(B, c, H, W)``, filtered region by region with what it has in common with the other."""
        a_y, a_h = regions(self.norm_y(f_y), self.region), regions(self.norm_h(f_h), self.region)
        to_y, to_h = modulate(a_y, a_h, self.h2y), modulate(a_h, a_y, self.y2h)
        shape = f_y.shape[2:]
        return f_y + from_regions(to_y, self.region, shape), f_h + from_regions(to_h, self.region, shape)


def modulate(a: Tensor, other: Tensor, fc: nn.Module) -> Tensor:
    """``A w`` with ``w = FC(A^T A_other)``, the product a mean over the region's pixels. Diff-ST, Eq. 3.

    Parameters
    ----------
    a, other
        The regions of two modalities, shape ``(..., pixels, c)``.
    fc
        The fully connected layer, on rows of length ``c``.

    Returns
    -------
    Shape of ``a``.
    """
    return a @ fc(a.transpose(-1, -2) @ other / a.shape[-2])


def regions(x: Tensor, side: int) -> Tensor:
    """Map ``(B, c, H, W)`` as square regions ``(B, rows, columns, side * side, c)``."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, c, rows, side, columns, side)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def from_regions(x: Tensor, side: int, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`regions`."""
    x = x.unflatten(3, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(*x.shape[:2], *shape)


class Disentangling(nn.Module):
    """Features that a modality shares with the other, and features that only it has. Diff-ST, Section 2.2 (3).

    The two convolutions are the same for both modalities.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(width, width // 2, 3, padding=1)
        self.unique = nn.Conv2d(width, width // 2, 3, padding=1)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """``S`` and ``U``, each ``(B, c / 2, H, W)``."""
        return F.silu(self.shared(f)), F.silu(self.unique(f))


def disentangling_loss(s_y: Tensor, s_h: Tensor, u_y: Tensor, u_h: Tensor) -> Tensor:
    """``L_cm-dis = |S_y - S_h|_2 / |U_y - U_h|_2``, of features of unit length. Diff-ST, Section 2.2 (3)."""
    shared = (F.normalize(s_y, dim=1) - F.normalize(s_h, dim=1)).square().mean()
    unique = (F.normalize(u_y, dim=1) - F.normalize(u_h, dim=1)).square().mean()
    return ((shared + 1e-8) / (unique + 1e-3)).sqrt()

"""Building blocks that two model families or more use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Standardize", "timestep_embedding"]


class Standardize(nn.Module):
    """Invertible standardization per feature, fitted on training data and kept as buffers with the weights.

    Parameters
    ----------
    n_features
        Size of the last dimension.
    clamp
        Standardized values are clamped to ``[-clamp, clamp]``, which keeps a model off the far extrapolation that a
        section with another stain would ask of it. The inverse is then exact only inside.
    """

    def __init__(self, n_features: int, clamp: float | None = None) -> None:
        super().__init__()
        self.clamp = clamp
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def fit(self, x: Tensor) -> Standardize:
        """Take mean and standard deviation from ``x``, shape ``(n, n_features)``; constant features keep scale 1."""
        mean, scale = x.mean(0), x.std(0, correction=0)  # where x is: the buffers may be on another device
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.ones_like(scale)))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Standardize."""
        z = (x - self.mean) / self.scale
        return z if self.clamp is None else z.clamp(-self.clamp, self.clamp)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo the standardization."""
        return z * self.scale + self.mean


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Sinusoidal features of the noise level, ``cos`` then ``sin``: Stem, Appendix C (after Vaswani et al., 2017).

    Parameters
    ----------
    t
        Noise levels, shape ``(B,)``.
    dim
        Even number of features.

    Returns
    -------
    Shape ``(B, dim)``.
    """
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)

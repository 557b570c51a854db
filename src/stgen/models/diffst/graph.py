"""The graph of co-expressed genes of Diff-ST."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.data import MapData
from stgen.models._maps import training_tiles

__all__ = ["CoExpressionGraph", "co_expression_intensity", "graph_update"]


class CoExpressionGraph(nn.Module):
    """Graph network over genes whose edges are their co-expression on the training tissue. Diff-ST, Section 2.3.

    Parameters
    ----------
    n_genes
        Number of genes ``N``.
    node
        Bins along the side of the squares over which a gene's map is averaged: its averages are the node's features.
    alpha
        Balance of the graph.
    nodes
        With a number: ``W_g`` is a full matrix over all ``C = nodes ** 2`` features, which ties it to one size of tile.
        Without: ``W_g`` is a 3 x 3 convolution of the grid of features, for maps of any size.
    """

    intensity: Tensor

    def __init__(self, n_genes: int, node: int, alpha: float, nodes: int | None = None) -> None:
        super().__init__()
        self.node, self.alpha = node, alpha
        self.weight: nn.Module = (
            nn.Conv2d(1, 1, 3, padding=1, bias=False) if nodes is None else nn.Linear(nodes**2, nodes**2, bias=False)
        )
        self.register_buffer("intensity", torch.eye(n_genes))

    def fit(self, data: MapData) -> None:
        """Take the intensities from the low-resolution maps of training tiles."""
        y = torch.cat([F.avg_pool2d(batch["y"], self.node).flatten(2)[0] for batch in training_tiles(data)], 1)
        self.intensity.copy_(co_expression_intensity(y))

    def forward(self, x_t: Tensor) -> Tensor:
        """What the graph makes of noised maps ``(B, N, H, W)``; the same shape."""
        f_x = F.avg_pool2d(x_t, self.node, ceil_mode=True)
        if isinstance(self.weight, nn.Linear):
            weighted = self.weight(f_x.flatten(2)).unflatten(2, f_x.shape[2:])
        else:
            weighted = self.weight(f_x.flatten(0, 1)[:, None]).reshape(f_x.shape)
        f_out = graph_update(f_x.flatten(2), weighted.flatten(2), self.intensity, self.alpha).unflatten(
            2, f_x.shape[2:]
        )
        return F.interpolate(f_out, scale_factor=self.node)[:, :, : x_t.shape[2], : x_t.shape[3]]


def co_expression_intensity(y: Tensor) -> Tensor:
    """``I_ij = (p(i|j) + p(j|i)) / 2`` with ``p(i|j) = sum_s min(y_i, y_j) / sum_s y_j``, rows summing to 1.

    The relative expression intensity ``p`` is not defined in the paper. Diff-ST, Section 2.3.

    Parameters
    ----------
    y
        Expression at places ``s``, shape ``(N, places)``, not negative.

    Returns
    -------
    Shape ``(N, N)``.
    """
    y = y / y.amax(1, keepdim=True).clamp(min=1e-12)
    total = y.sum(1)
    together = torch.stack([torch.minimum(row, y).sum(1) for row in y])
    intensity = (together / total.clamp(min=1e-12)[None] + together / total.clamp(min=1e-12)[:, None]) / 2
    intensity = torch.where(torch.eye(len(y), dtype=torch.bool), 1.0, intensity)
    return intensity / intensity.sum(1, keepdim=True)


def graph_update(f_x: Tensor, weighted: Tensor, intensity: Tensor, alpha: float) -> Tensor:
    """``F_out = alpha delta(I F_x W_g) + (1 - alpha) F_x``, ``delta`` a leaky ReLU. Diff-ST, Eq. 4.

    Parameters
    ----------
    f_x, weighted
        Features ``F_x`` and ``F_x W_g`` of the genes, shape ``(B, N, C)``.
    intensity
        ``I``, shape ``(N, N)``.
    """
    return alpha * F.leaky_relu(intensity @ weighted, 0.2) + (1 - alpha) * f_x

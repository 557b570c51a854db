"""The discriminator of HaDM-ST, which judges each gene's map and knows the graph of co-expressed genes (GDAL)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stgen.data import MapData
from stgen.models._maps import training_tiles

__all__ = ["DiscriminatorOutput", "GeneDiscriminator", "frozen", "gene_graph", "graph_convolution"]

NEIGHBORS = 8  # of a gene in the graph
NODE = 32  # features of a gene in the graph
FEWEST_LOCATIONS = 30


class DiscriminatorOutput(NamedTuple):
    """What the discriminator thinks of maps: positive is real."""

    genes: Tensor
    """Of each gene, ``(B, G)``."""
    overall: Tensor
    """Of all together, ``(B,)``."""


class GeneDiscriminator(nn.Module):
    """Judges each gene's map by itself and by the genes that it is expressed with. HaDM-ST, GDAL.

    All genes' maps go through the same convolutions and become nodes of a graph, whose edges are co-expression on the
    training tissue. Spectral normalization keeps the judge smooth.

    Parameters
    ----------
    n_genes
        Number of genes.
    """

    edges: Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        widths = [2, 8, 16, NODE]
        self.maps = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.name = nn.Embedding(n_genes, NODE)
        self.graph = nn.ModuleList(spectral_norm(nn.Linear(NODE, NODE)) for _ in range(2))
        self.gene, self.overall = (spectral_norm(nn.Linear(NODE, 1)) for _ in range(2))
        self.register_buffer("edges", torch.eye(n_genes))

    def draw(self) -> None:
        """Draw new weights. What a spectrally normalized layer is made of, only its constructor draws."""
        new = GeneDiscriminator(len(self.edges))
        self.load_state_dict({**new.state_dict(), "edges": self.edges})

    def fit(self, data: MapData, factor: int) -> None:
        """Take the graph from the maps of training tiles, averaged over ``factor`` bins.

        Raises
        ------
        ValueError
            If the tissue has fewer than 30 such locations.
        """
        n = sum(int(section.tissue.sum()) for section in data.sections) // factor**2
        if n < FEWEST_LOCATIONS:
            raise ValueError(
                f"the graph of co-expressed genes needs at least {FEWEST_LOCATIONS} locations of {factor} x {factor} "
                f"bins, "
                f"and the training tissue has {n}. Train on more, or construct the model with adversarial_weight=0."
            )
        pooled = []
        for batch in training_tiles(data):
            share = F.avg_pool2d(batch["tissue"], factor, ceil_mode=True)[0, 0]
            mean = F.avg_pool2d(batch["x"] * batch["tissue"], factor, ceil_mode=True)[0]
            pooled.append((mean / share.clamp(min=1e-6))[:, share > 0.5])
        self.edges.copy_(gene_graph(torch.cat(pooled, 1)))

    def forward(self, x: Tensor, y: Tensor) -> DiscriminatorOutput:
        """Maps ``x`` and what was measured, zero where nothing was, each ``(B, G, H, W)`` on the network's scale."""
        size, n_genes = x.shape[:2]
        f = torch.stack([x, y], 2).flatten(0, 1)
        for layer in self.maps:
            f = F.leaky_relu(layer(f), 0.2)
        nodes = f.mean((2, 3)).unflatten(0, (size, n_genes)) + self.name.weight
        for layer in self.graph:
            nodes = nodes + F.leaky_relu(graph_convolution(nodes, self.edges, layer), 0.2)
        return DiscriminatorOutput(self.gene(nodes)[..., 0], self.overall(nodes.mean(1))[..., 0])


def gene_graph(y: Tensor, neighbors: int = NEIGHBORS) -> Tensor:
    """``D^-1/2 (A + I) D^-1/2``, of ``A`` the absolute correlations of each gene with its nearest. HaDM-ST, GDAL.

    An edge is there if either gene is among the nearest of the other.

    Parameters
    ----------
    y
        Expression at locations, shape ``(G, n)``.
    neighbors
        Nearest genes of each.

    Returns
    -------
    Shape ``(G, G)``.
    """
    z = y.double() - y.double().mean(1, keepdim=True)
    z = F.normalize(z, dim=1)
    correlation = (z @ z.T).abs().fill_diagonal_(0)
    nearest = correlation.topk(min(neighbors, len(y) - 1), 1).indices
    edge = torch.zeros_like(correlation, dtype=torch.bool).scatter_(1, nearest, True)
    with_itself = torch.where(edge | edge.T, correlation, 0) + torch.eye(len(y), dtype=correlation.dtype)
    degree = with_itself.sum(1).rsqrt()
    return (degree[:, None] * with_itself * degree).float()


def graph_convolution(nodes: Tensor, edges: Tensor, layer: nn.Module) -> Tensor:
    """``A F W``: nodes ``(B, G, c)`` along the edges ``(G, G)`` of their graph. Kipf & Welling (2017), Eq. 2."""
    return layer(edges @ nodes)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients through a module but not into it."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.requires_grad_(True)

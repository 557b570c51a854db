"""What the networks of C3-Diff are made of: codes of genes, and the way of the control branch into the denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stgen.data import MapData
from stgen.models._layers import Standardize, zero_module
from stgen.models._maps import training_tiles

__all__ = ["GeneCode", "ZeroControl", "embedding_table"]


class GeneCode(nn.Module):
    """A code for each gene: what is learned of it, and statistics of its expression on the training tissue.

    Parameters
    ----------
    n_genes
        Number of genes.
    width
        Size of a code.
    columns
        Columns of a table of gene embeddings, from which codes are then made; ``None`` to learn one for each gene.
    """

    statistics: Tensor
    table: Tensor
    regression: Tensor

    def __init__(self, n_genes: int, width: int, columns: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_genes, width) if columns is None else None
        self.describe = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("statistics", torch.zeros(n_genes, 3))
        if columns is not None:
            self.standardize = Standardize(columns)
            self.project = nn.Linear(columns, width)
            self.register_buffer("table", torch.zeros(n_genes, columns))
            self.register_buffer("regression", torch.zeros(columns + 1, 4))

    def fit(self, data: MapData, scale: Tensor) -> None:
        """Take mean, share of bins with a count and log scale from training tiles, standardized over the genes."""
        total, some = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        n = 0
        for batch in training_tiles(data):
            x = batch["x"][0][:, batch["tissue"][0, 0] > 0].double()
            total, some, n = total + x.sum(1), some + (x > 0).sum(1), n + x.shape[1]
        raw = torch.stack([(total / n).clamp(min=1e-6).log(), some / n, scale.double().cpu().log()], 1)
        spread = raw.std(0, correction=0)
        self.statistics.copy_((raw - raw.mean(0)) / torch.where(spread > 1e-6, spread, 1.0))
        if self.embedding is None:
            self.standardize.fit(self.table)
            self.regression.copy_(
                _ridge(self.standardize(self.table), torch.cat([self.statistics, scale.log()[:, None]], 1))
            )

    def predict(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics ``(n, 3)`` and scale ``(n,)`` that genes with these embeddings should have."""
        z = self.standardize(table)
        predicted = torch.cat([z, z.new_ones(len(z), 1)], 1) @ self.regression
        return predicted[:, :3], predicted[:, 3].exp()

    def forward(self) -> Tensor:
        """Codes of all genes, shape ``(G, width)``."""
        own = self.project(self.standardize(self.table)) if self.embedding is None else self.embedding.weight
        return own + self.describe(self.statistics)


class ZeroControl(nn.Module):
    """A zero-initialized 1 x 1 convolution through which control features enter the denoiser, modulated by gene.

    Parameters
    ----------
    inputs, outputs
        Channels of the control features, and of the denoiser at this resolution.
    code
        Size of a gene code.
    """

    def __init__(self, inputs: int, outputs: int, code: int) -> None:
        super().__init__()
        self.weight = zero_module(nn.Linear(inputs, outputs, bias=False))
        self.gate = nn.Linear(code, inputs)

    def forward(self, control: Tensor, code: Tensor) -> Tensor:
        """Control ``(B, inputs, H, W)`` and codes ``(B, G, code)`` to what is added, ``(B * G, outputs, H, W)``."""
        weight = self.weight.weight * (1 + self.gate(code))[:, :, None]  # (B, G, outputs, inputs)
        return torch.einsum("bchw,bgoc->bgohw", control, weight).flatten(0, 1)


def _ridge(z: Tensor, target: Tensor) -> Tensor:
    """Coefficients and, last, intercepts of ridge regression, its penalty by generalized cross-validation."""
    from sklearn.linear_model import RidgeCV

    ridge = RidgeCV(np.logspace(-2, 5, 15)).fit(z.cpu().numpy(), target.cpu().numpy())
    return torch.as_tensor(np.vstack([ridge.coef_.T, ridge.intercept_]), dtype=torch.float32)


def embedding_table(table: pd.DataFrame, genes: Sequence[str]) -> np.ndarray:
    """Rows of a table of gene embeddings, checked."""
    missing = [gene for gene in genes if gene not in table.index]
    if missing:
        raise KeyError(
            f"`gene_embedding` lacks {len(missing)} of {len(genes)} genes: {', '.join(missing[:5])}. Its index must "
            f"hold "
            "the names of the genes."
        )
    values = table.loc[list(genes)].to_numpy(np.float32)
    if len(values) != len(genes) or not np.isfinite(values).all():
        raise ValueError("`gene_embedding` must have one row for each gene, without missing values.")
    return values

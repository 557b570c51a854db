"""Stem: spot expression from histology with a diffusion transformer over gene tokens (Zhu et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen._checks import check_whole
from stgen.data import Batch, SpotData
from stgen.models._base import DiffusionModel
from stgen.models._baselines import LinearProbe, joined
from stgen.models._layers import Standardize, timestep_embedding
from stgen.models._options import choose
from stgen.models.stem.networks import TransformerBlock, mlp, modulate
from stgen.models.stem.options import PRESETS
from stgen.train import History

__all__ = ["Stem"]


class Stem(DiffusionModel[SpotData]):
    """Diffusion transformer over gene tokens, conditioned on a histology embedding.

    Every gene is a token, its value and its identity embedded and summed; time and histology enter each transformer
    block through adaLN-Zero. With ``mean="probe"`` (the small preset) a linear probe predicts the conditional mean and
    the transformer generates what remains, given the probe's prediction of each gene.

    Parameters
    ----------
    genes
        Names of the genes, ``G`` tokens.
    embedding_dim
        Features ``D`` of the histology embedding.
    preset
        ``"small"`` trains on a CPU in minutes; ``"paper"`` is the published configuration.
    **options
        Fields of :class:`stgen.models.StemOptions`, each in place of the preset's.

    Examples
    --------
    >>> from stgen import models
    >>> model = models.Stem(["EPCAM", "COL1A1"], embedding_dim=8, width=16, depth=1, heads=2)
    >>> sum(p.numel() for p in models.Stem(["EPCAM"], preset="paper").parameters()) > 3e7
    True
    """

    presets = PRESETS

    def __init__(
        self,
        genes: Sequence[str],
        *,
        embedding_dim: int = 1536,
        preset: Literal["small", "paper"] = "small",
        **options: Any,
    ) -> None:
        chosen = choose(PRESETS, preset, options, "Stem")
        super().__init__(
            genes=genes, embedding_dim=check_whole("embedding_dim", embedding_dim), preset=preset,
            **chosen.options.to_config(),
        )  # fmt: skip
        self.options = o = chosen.options
        self.diffusion = replace(chosen.diffusion, prediction=o.prediction, learned_variance=o.learned_variance)
        n_genes, width = len(self.genes), o.width

        self.probe = LinearProbe(self.genes, embedding_dim=embedding_dim) if o.mean == "probe" else None
        self.scale = Standardize(n_genes)  # of the expression, or of its residual
        self.image_scale = Standardize(embedding_dim, clamp=4.0 if o.standardize else None)

        per_token = o.genes_per_token
        self.gene_value = mlp(per_token, width, width)
        self.gene_type = nn.Parameter(torch.empty(-(-n_genes // per_token), width))
        self.gene_mean = nn.Linear(per_token, width) if self.probe else None
        self.time = mlp(256, width, width)
        self.image = mlp(embedding_dim, o.image_hidden or embedding_dim, width)
        self.image_dropout = nn.Dropout(o.image_dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, o.heads, o.mlp_ratio, o.activation) for _ in range(o.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, (2 if o.learned_variance else 1) * per_token)
        self.initialize()

    def initialize(self) -> None:
        """Xavier everywhere, small embeddings, zero where adaLN-Zero starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.gene_type, a=5**0.5)
        for layer in (*self.time, *self.image):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        modulations = [block.modulation for block in self.blocks if isinstance(block, TransformerBlock)]
        for layer in (self.final_modulation, self.final, *modulations):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit(self, train: SpotData, validation: SpotData | None = None, **options: Any) -> History:
        """Fit probe and scales on the training data, then train with :func:`stgen.train.fit` and its options.

        Options not given are those of the preset. With a probe, the transformer sees each training location with the
        prediction of a probe that was not fitted on it: only then are residuals, and their spread, those of new tissue.
        """
        self.check_options(**options)  # before any work
        if self.options.standardize:
            self.image_scale.fit(train.h.flatten(0, 1))
        everything = joined(train, validation)
        if self.probe is not None:
            mean = self.probe.cross_fit(everything)
            train = replace(train, mean=mean[: len(train)])
            validation = None if validation is None else replace(validation, mean=mean[len(train) :])
            if self.options.standardize:
                self.scale.fit(everything.x - mean).mean.zero_()
        elif self.options.standardize:
            self.scale.fit(everything.x)
        return super().fit(train, validation, **options)

    # ---- the model ---------------------------------------------------------------------------------------------

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Standardized embedding and, with a probe, its prediction (the cross-fitted one, where the batch has it)."""
        cond = {"h": self.image_scale(batch["h"])}
        if self.probe is not None:
            cond["mean"] = batch["mean"] if "mean" in batch else self.probe.predict(batch["h"])
        return cond

    def to_network(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Subtract the probe's prediction, then standardize per gene."""
        return self.scale(x - cond["mean"] if "mean" in cond else x)

    def from_network(self, x_0: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Undo :meth:`to_network`."""
        x = self.scale.inverse(x_0)
        return x + cond["mean"] if "mean" in cond else x

    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Diffusion transformer over gene tokens: Stem, Figure 2 and Appendix C.

        Parameters
        ----------
        x_t
            Noised values, shape ``(B, G)``.
        t
            Noise levels, shape ``(B,)``.
        cond
            From :meth:`condition`.

        Returns
        -------
        Shape ``(B, G)``, or ``(B, 2, G)`` with a learned variance.
        """
        tokens = self.tokens(x_t, cond)
        c = self.time(timestep_embedding(t, 256).to(x_t)) + self.image(self.image_dropout(cond["h"]))
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_modulation(F.silu(c)).chunk(2, -1)
        output = self.final(modulate(tokens, shift, scale))
        if self.options.learned_variance:
            return output.unflatten(-1, (2, -1)).transpose(1, 2).flatten(2)[..., : len(self.genes)]
        return output.flatten(1)[:, : len(self.genes)]

    def _grouped(self, x: Tensor) -> Tensor:
        """Genes in the groups that share a token, ``(B, G)`` to ``(B, tokens, genes_per_token)``, padded with zeros."""
        per_token = self.options.genes_per_token
        return F.pad(x, (0, -x.shape[-1] % per_token)).unflatten(-1, (-1, per_token))

    def tokens(self, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """One token per gene: its value plus its identity, ``h_i = MLP(x_i) + E_i``. Stem, Section 4 (h_i).

        With a probe, plus its standardized prediction for the gene: spread depends on the mean.
        """
        tokens = self.gene_value(self._grouped(x_t)) + self.gene_type
        if self.gene_mean is not None:
            tokens = tokens + self.gene_mean(self._grouped(cond["mean"] / self.scale.scale))
        return tokens

    def sample_shape(self, batch: Batch) -> tuple[int, ...]:
        """``(G,)``."""
        return (len(self.genes),)

"""Stem: spot expression from histology with a diffusion transformer over gene tokens (Zhu et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.data import Batch, SpotData
from stgen.diffusion import Diffusion
from stgen.models._base import DiffusionModel
from stgen.models._baselines import LinearProbe, joined
from stgen.models._layers import Standardize, timestep_embedding
from stgen.transforms import TransformName

__all__ = ["Stem"]

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2, "genes_per_token": 6, "image_hidden": 128,
        "image_dropout": 0.5, "mean": "probe", "standardize": True, "transform": "log1p_norm", "prediction": "v",
        "activation": "gelu",
        "training": {
            "steps": 1500, "batch_size": 32, "lr": 1e-3, "ema_decay": 0.995, "evaluate_every": 50, "patience": 6,
        },
    },
    "paper": {
        "width": 384, "depth": 12, "heads": 6, "mlp_ratio": 4, "genes_per_token": 1, "image_hidden": None,
        "image_dropout": 0.0, "mean": "none", "standardize": False, "transform": "log2p1_raw", "prediction": "epsilon", "activation": "gelu",
        "training": {
            "steps": 250_000, "batch_size": 256, "lr": 1e-4, "ema_decay": 0.9999, "evaluate_every": 1000,
            "patience": None, "max_grad_norm": None,
        },
    },
}  # fmt: skip


class Stem(DiffusionModel):
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
        ``"small"`` trains on a CPU in minutes; ``"paper"`` is the published configuration. Arguments below override it.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    standardize
        Diffuse per-gene standardized values (of the residual, with a probe), given a standardized embedding. The paper
        takes log counts and embeddings as they are.
    mean
        ``"probe"``: diffuse the residual of a :class:`LinearProbe` that is fitted first, by cross-fitting, so that
        residuals are those of unseen tissue. ``"none"``: diffuse expression itself.
    width, depth, heads, mlp_ratio
        Size of the transformer.
    genes_per_token
        1 as published; the cost of attention falls with its square and that of all else in proportion.
    image_hidden
        Hidden width of the MLP on the embedding; the paper's preset takes ``embedding_dim``.
    image_dropout
        Dropout on the embedding where it enters the transformer.
    activation
        ``"gelu"`` (tanh approximation, as released) or ``"silu"`` (as the paper says) in the blocks' MLPs.
    prediction
        Parameterization, see :class:`stgen.diffusion.Diffusion`.
    learned_variance
        Learn the reverse variance too, as the released code does; the paper fixes it.

    Examples
    --------
    >>> from stgen import models
    >>> model = models.Stem(["EPCAM", "COL1A1"], embedding_dim=8, width=16, depth=1, heads=2)
    >>> sum(p.numel() for p in models.Stem(["EPCAM"], preset="paper").parameters()) > 3e7
    True
    """

    def __init__(
        self,
        genes: Sequence[str],
        *,
        embedding_dim: int = 1536,
        preset: Literal["small", "paper"] = "small",
        transform: TransformName | None = None,
        standardize: bool | None = None,
        mean: Literal["probe", "none"] | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: int | None = None,
        genes_per_token: int | None = None,
        image_hidden: int | None = None,
        image_dropout: float | None = None,
        activation: Literal["gelu", "silu"] | None = None,
        prediction: Literal["epsilon", "x_0", "v"] | None = None,
        learned_variance: bool = False,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, found {preset!r}.")
        given = {
            "transform": transform, "standardize": standardize, "mean": mean, "width": width, "depth": depth,
            "heads": heads, "mlp_ratio": mlp_ratio, "genes_per_token": genes_per_token, "image_hidden": image_hidden, "image_dropout": image_dropout,
            "activation": activation, "prediction": prediction,
        }  # fmt: skip
        chosen = {k: v for k, v in PRESETS[preset].items() if k != "training"}
        chosen |= {k: v for k, v in given.items() if v is not None}
        super().__init__(
            genes=list(genes), embedding_dim=embedding_dim, preset=preset, learned_variance=learned_variance, **chosen
        )
        n_genes, width = len(self.genes), chosen["width"]
        self.diffusion = Diffusion(prediction=chosen["prediction"], learned_variance=learned_variance)

        self.probe = LinearProbe(genes, embedding_dim=embedding_dim) if chosen["mean"] == "probe" else None
        self.scale = Standardize(n_genes)  # of the expression, or of its residual
        self.image_scale = Standardize(embedding_dim, clamp=4.0 if chosen["standardize"] else None)

        per_token = chosen["genes_per_token"]
        self.gene_value = _mlp(per_token, width, width)
        self.gene_type = nn.Parameter(torch.empty(-(-n_genes // per_token), width))
        self.gene_mean = nn.Linear(per_token, width) if self.probe else None
        self.time = _mlp(256, width, width)
        self.image = _mlp(embedding_dim, chosen["image_hidden"] or embedding_dim, width)
        self.image_dropout = nn.Dropout(chosen["image_dropout"])
        self.blocks = nn.ModuleList(
            _Block(width, chosen["heads"], chosen["mlp_ratio"], chosen["activation"]) for _ in range(chosen["depth"])
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, (2 if learned_variance else 1) * per_token)
        self.initialize()

    def initialize(self) -> None:
        """Xavier everywhere, small embeddings, zero where adaLN-Zero starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.gene_type, a=5**0.5)
        for layer in (self.time[0], self.time[2], self.image[0], self.image[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.final_modulation, self.final, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit(self, train: SpotData, validation: SpotData | None = None, **options: Any) -> dict[str, list[float]]:
        """Fit probe and scales on the training data, then train with :func:`stgen.train.fit` and its options.

        Options not given are those of the preset. With a probe, the transformer sees each training location with the
        prediction of a probe that was not fitted on it: only then are residuals, and their spread, those of new tissue.
        """
        from stgen.train import check_device

        check_device(options.get("device"))  # before any work
        if self.config["standardize"]:
            self.image_scale.fit(train.h.flatten(0, 1))
        everything = joined(train, validation)
        if self.probe is not None:
            mean = self.probe.cross_fit(everything)
            train = replace(train, mean=mean[: len(train)])
            validation = None if validation is None else replace(validation, mean=mean[len(train) :])
            if self.config["standardize"]:
                self.scale.fit(everything.x - mean).mean.zero_()
        elif self.config["standardize"]:
            self.scale.fit(everything.x)
        return super().fit(train, validation, **{**PRESETS[self.config["preset"]]["training"], **options})

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
        output = self.final(_modulate(tokens, shift, scale))
        if self.config["learned_variance"]:
            return output.unflatten(-1, (2, -1)).transpose(1, 2).flatten(2)[..., : len(self.genes)]
        return output.flatten(1)[:, : len(self.genes)]

    def _grouped(self, x: Tensor) -> Tensor:
        """Genes in the groups that share a token, ``(B, G)`` to ``(B, tokens, genes_per_token)``, padded with zeros."""
        per_token = self.config["genes_per_token"]
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


class _Block(nn.Module):
    """Transformer block with adaLN-Zero: Peebles & Xie (2023), Figure 3; Stem, Appendix C."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh") if activation == "gelu" else nn.SiLU(),
            nn.Linear(mlp_ratio * width, width),
        )

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, -1)
        q, k, v = (
            self.qkv(_modulate(tokens, shift_a, scale_a)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + gate_a[:, None] * self.out(attended)
        return tokens + gate_m[:, None] * self.mlp(_modulate(tokens, shift_m, scale_m))


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm whose shift and scale come from the condition (adaLN)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two-layer MLP with SiLU."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))

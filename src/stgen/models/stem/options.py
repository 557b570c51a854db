"""Options and presets of Stem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stgen.diffusion import Prediction
from stgen.models._options import Count, Options, Preset, Share, Transform

__all__ = ["PRESETS", "StemOptions"]


@dataclass(frozen=True, kw_only=True)
class StemOptions(Options):
    """Options of :class:`stgen.models.Stem`; values are those of the small preset.

    Examples
    --------
    >>> from stgen import models
    >>> models.StemOptions(width=96).depth
    2
    """

    transform: Transform = "log1p_norm"
    """Scale of expression, see :func:`stgen.transforms.transform_counts`."""
    standardize: bool = True
    """Diffuse per-gene standardized values (of the residual, with a probe), given a standardized embedding. The paper
    takes log counts and embeddings as they are."""
    mean: Literal["probe", "none"] = "probe"
    """``"probe"``: diffuse the residual of a :class:`stgen.models.LinearProbe` that is fitted first, by cross-fitting,
    so that residuals are those of unseen tissue. ``"none"``: diffuse expression itself."""
    width: Count = 64
    """Size of a token."""
    depth: Count = 2
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads of each; they divide ``width``."""
    mlp_ratio: Count = 2
    """Hidden width of the blocks' MLPs, in token sizes."""
    genes_per_token: Count = 6
    """1 as published; the cost of attention falls with its square and that of all else in proportion."""
    image_hidden: Count | None = 128
    """Hidden width of the MLP on the embedding; the paper's preset takes ``embedding_dim``."""
    image_dropout: Share = 0.5
    """Dropout on the embedding where it enters the transformer."""
    activation: Literal["gelu", "silu"] = "gelu"
    """``"gelu"`` (tanh approximation, as released) or ``"silu"`` (as the paper says) in the blocks' MLPs."""
    prediction: Prediction = "v"
    """Parameterization, see :class:`stgen.diffusion.Diffusion`."""
    learned_variance: bool = False
    """Learn the reverse variance too, as the released code does; the paper fixes it."""

    def check(self) -> None:
        """Refuse options that do not go together."""
        if self.width % self.heads:
            raise ValueError(f"`heads` must divide `width`, found {self.heads} and {self.width}.")


PRESETS = {
    "small": Preset(
        options=StemOptions(),
        training={
            "steps": 1500, "batch_size": 32, "lr": 1e-3, "ema_decay": 0.995, "evaluate_every": 50, "patience": 6,
        },
    ),
    "paper": Preset(
        options=StemOptions(
            transform="log2p1_raw", standardize=False, mean="none", width=384, depth=12, heads=6, mlp_ratio=4,
            genes_per_token=1, image_hidden=None, image_dropout=0.0, prediction="epsilon",
        ),
        training={
            "steps": 250_000, "batch_size": 256, "lr": 1e-4, "ema_decay": 0.9999, "evaluate_every": 1000,
            "patience": None, "max_grad_norm": None,
        },
    ),
}  # fmt: skip

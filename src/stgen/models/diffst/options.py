"""Options and presets of Diff-ST."""

from __future__ import annotations

from dataclasses import dataclass

from stgen.models._map_diffusion import MapOptions
from stgen.models._options import Count, Fraction, Index, Preset, Weight, Widths

__all__ = ["PRESETS", "DiffSTOptions"]


@dataclass(frozen=True, kw_only=True)
class DiffSTOptions(MapOptions):
    """Options of :class:`stgen.models.DiffST`; values are those of the default preset.

    Examples
    --------
    >>> from stgen import models
    >>> models.DiffSTOptions(graph=False).region
    16
    """

    modulation: bool = True
    """Cross-modal adaptive modulation (Eq. 3); without it the two modalities are only concatenated."""
    graph: bool = True
    """The graph of co-expressed genes (Eq. 4)."""
    hierarchy: bool = True
    """Cell-level patches besides the tissue-level image."""
    disentangle: bool = True
    """Split features into shared and unique ones, with their loss."""
    curriculum: bool = True
    """Raise the entropy that a patch must have while training proceeds."""
    alpha: Fraction = 0.2
    """Balance of the graph (Eq. 4)."""
    disentangling_weight: Weight = 0.01
    """Weight of the disentangling loss, which the paper does not state."""
    learned_variance: bool = False
    """Learn the variance of the reverse process (Eq. 2: "can be learned")."""
    region: Count = 16
    """Side ``a`` of a modulated region, in bins."""
    reach: Index | None = 1
    """A tissue location attends to cell patches up to this many patches away; ``None`` (the paper's) for all in the
    tile."""
    mean_widths: Widths | None = (32, 64, 96)
    """The U-Net of the mean: channels at each resolution; with ``None`` those of ``widths``."""

    def check(self) -> None:
        """Refuse options that do not go together."""
        if self.disentangle and self.width < 2:
            raise ValueError(f"`width` must be 2 or more for features to be split in two, found {self.width}.")


PRESETS = {
    "default": Preset(
        options=DiffSTOptions(),
        training={
            "steps": 600, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-4, "ema_decay": 0.99, "evaluate_every": 50,
        },
    ),
    "paper": Preset(  # Table 3; network widths of the code that the paper builds on, see the methods page
        options=DiffSTOptions(
            scale="map", residual=False, prediction="epsilon", width=128, region=32, reach=None,
            widths=(96, 96, 192, 192, 384, 384), mean_widths=None, blocks=2, attention=(3, 4, 5),
        ),
        training={
            "steps": 5000, "batch_size": 4, "lr": 1e-4, "weight_decay": 1e-5, "ema_decay": 0.9999,
            "max_grad_norm": None, "patience": None,
        },
        px_um=2.0,
        tile_um=2560.0,
    ),
}  # fmt: skip

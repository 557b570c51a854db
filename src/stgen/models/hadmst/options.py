"""Options and presets of HaDM-ST."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stgen.models._map_diffusion import MapOptions
from stgen.models._options import Count, Index, Preset, Share, Text, Weight, Widths
from stgen.models._text import HASHED_DIM

__all__ = ["PRESETS", "HaDMSTOptions"]

BERT_DIM = 768


@dataclass(frozen=True, kw_only=True)
class HaDMSTOptions(MapOptions):
    """Options of :class:`stgen.models.HaDMST`; values are those of the default preset.

    Examples
    --------
    >>> from stgen import models
    >>> models.HaDMSTOptions(adversarial_weight=0).heads
    4
    """

    semantic: bool = True
    """Semantic distillation (HSD); without it, the image is only convolved, and there is no prompt."""
    segmentation: bool = True
    """Look at a mask of nuclei besides the image: ``labels_key`` of :func:`stgen.tl.fit`."""
    text_encoder: Text = "none"
    """What makes a vector of a prompt: ``"hashed"`` needs no download and only tells prompts apart; or the folder or
    Hugging Face Hub id of a BERT-type encoder, such as ``"bert-base-uncased"``; or ``"none"``, for no prompt (the
    paper's preset has ``"hashed"``): a prompt says nothing unless sections have different ones."""
    text_dim: Count | None = None
    """Size of that vector; by default 256 for ``"hashed"``, else BERT's 768."""
    semantic_weight: Weight = 0.1
    """Weight of the distillation loss."""
    alignment_weight: Weight = 0.0
    """Weight of the alignment of both modalities (CMSA); 0 leaves it out, because it did not help on real tissue (0.05
    in the paper's preset)."""
    euclidean_weight: Weight = 0.1
    """``lambda_1`` of the alignment loss."""
    info_nce_weight: Weight = 1.0
    """``lambda_2`` of the alignment loss."""
    adversarial_weight: Weight = 0.01
    """Weight of the adversarial loss (GDAL); 0 leaves the discriminator out."""
    p_missing: Share = 0.3
    """Share of the training tiles whose low-resolution map is hidden; 0 gives a model that cannot do without one."""
    semantic_width: Count = 64
    """Width of the transformer."""
    token: Count = 4
    """Side of one of its tokens, in bins."""
    window: Count | None = 4
    """Side in tokens of the windows in which they attend to one another; ``None`` (the paper's) for all of a tile."""
    layers: Count = 2
    """Its layers."""
    heads: Count = 4
    """Attention heads of each; they divide ``semantic_width``."""
    region: Count = 8
    """Side in bins of the regions that are aligned."""
    mean_widths: Widths | None = (32, 64, 96)
    """The U-Net of the mean: channels at each resolution; with ``None`` those of ``widths``."""
    gene_width: Index = 24
    """Channels of the network that goes over each gene's map by itself after the U-Net; 0 for none."""

    def check(self) -> None:
        """Refuse options that do not go together."""
        if self.semantic_width % self.heads:
            raise ValueError(f"`heads` must divide `semantic_width`, found {self.heads} and {self.semantic_width}.")
        resolutions = [2**i for i in range(len(self.widths))]
        if self.token not in resolutions:
            raise ValueError(
                f"`token` must be a number of bins that one resolution of the U-Net has, one of "
                f"{', '.join(map(str, resolutions))}; found {self.token!r}."
            )

    def with_text_dim(self) -> HaDMSTOptions:
        """The same, the size of a prompt's vector filled in."""
        size = HASHED_DIM if self.text_encoder in ("hashed", "none") else BERT_DIM
        return replace(self, text_dim=self.text_dim or size)


PRESETS = {
    "default": Preset(
        options=HaDMSTOptions(),
        training={
            "steps": 800, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-4, "ema_decay": 0.99, "evaluate_every": 50,
        },
    ),
    "paper": Preset(  # the poster states no numbers: see the methods page
        options=HaDMSTOptions(
            scale="quantile", residual=False, prediction="epsilon", width=64, semantic_width=128, token=8, window=None,
            layers=4, region=16, widths=(128, 256, 384, 512), mean_widths=None, gene_width=0, blocks=2,
            attention=(2, 3), text_encoder="hashed", alignment_weight=0.05,
        ),
        training={
            "steps": 100_000, "batch_size": 8, "lr": 1e-4, "weight_decay": 1e-4, "ema_decay": 0.9999, "patience": None,
        },
        px_um=5.0,
        tile_um=2560.0,
    ),
}  # fmt: skip

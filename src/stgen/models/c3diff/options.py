"""Options and presets of C3-Diff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stgen.diffusion import Diffusion
from stgen.models._map_diffusion import MapOptions
from stgen.models._options import Count, Preset, Share, Weight, Widths

__all__ = ["PRESETS", "C3DiffOptions"]

Imputation = Literal["similarity", "mean", "zero", "drop"]


@dataclass(frozen=True, kw_only=True)
class C3DiffOptions(MapOptions):
    """Options of :class:`stgen.models.C3Diff`; values are those of the default preset.

    Examples
    --------
    >>> from stgen import models
    >>> models.C3DiffOptions(imputation="mean").code
    64
    """

    p_missing: Share = 0.5
    """Share of the training tiles whose low-resolution map is hidden; 0 gives a model that cannot do without one."""
    p_unconditional: Share = 0.1
    """Share of the training tiles denoised without any condition, for guidance."""
    guidance: Weight = 1.0
    """Weight ω of classifier-free guidance when sampling, at first: see :attr:`stgen.models.C3Diff.guidance`. It moves
    samples, and not the regression."""
    augmentation: bool = True
    """Noise on the features of low-resolution maps in training (Eq. 1)."""
    sigma: Weight = 0.03
    """Its standard deviation, which the paper does not state."""
    modal_weight: Weight = 0.005
    """Weight of the cross-modal loss; 0 leaves it out. The paper states none of the three: its preset has those that
    the released code evidently means, the default a tenth of that."""
    content_weight: Weight = 0.005
    """Weight of the cross-content loss; 0 leaves it out."""
    inter_sphere_weight: Weight = 0.003
    """Weight of the inter-sphere loss; 0 leaves it out."""
    imputation: Imputation = "similarity"
    """What stands for the features of a missing low-resolution map in training, until half of it is done: those of
    tiles with ``"similarity"`` in histology (the paper's), the ``"mean"`` of all, or ``"zero"``. ``"drop"`` leaves such
    tiles out."""
    code: Count = 64
    """Size of a gene code."""
    widths: Widths = (16, 32, 48)
    """The denoising U-Net: channels at each resolution, finest first."""
    control_widths: Widths = (32, 64, 96)
    """The control branch: channels at each resolution. It has as many as the U-Net, and its ``blocks`` and
    ``attention``."""
    patch: Count = 2
    """Bins along the side of the squares that the denoising U-Net takes as one pixel each."""
    control_patch: Count = 1
    """The same of the control branch; it divides ``patch``."""
    genes_per_tile: Count = 8
    """Genes that a training tile is denoised for."""

    def check(self) -> None:
        """Refuse options that do not go together."""
        if len(self.widths) != len(self.control_widths):
            raise ValueError(
                f"`widths` and `control_widths` must be of the same length, found {list(self.widths)} and "
                f"{list(self.control_widths)}."
            )
        if self.patch % self.control_patch:
            raise ValueError(
                f"`patch` must be a multiple of `control_patch`, found {self.patch} and {self.control_patch}."
            )


PRESETS = {
    "default": Preset(
        options=C3DiffOptions(),
        training={
            "steps": 1000, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-4, "ema_decay": 0.99, "evaluate_every": 50,
        },
    ),
    "paper": Preset(  # the paper's supplement is not public: sizes of the released code, see the methods page
        options=C3DiffOptions(
            scale="map", residual=False, prediction="epsilon", width=55, code=224, widths=(224, 448, 672, 896),
            control_widths=(224, 448, 672, 896), blocks=2, attention=(1, 2, 3), patch=4, control_patch=4,
            genes_per_tile=1, modal_weight=0.05, content_weight=0.05, inter_sphere_weight=0.03,
        ),
        training={
            "steps": 100_000, "batch_size": 8, "lr": 1e-4, "weight_decay": 1e-2, "ema_decay": 0.9999,
            "max_grad_norm": None, "patience": None,
        },
        px_um=10.0,
        tile_um=2560.0,
        diffusion=Diffusion(schedule="scaled_linear", beta_min=0.00085, beta_max=0.012),
    ),
}  # fmt: skip

"""What the families of diffusion models of gene maps have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stgen.data import Batch, MapData
from stgen.diffusion import DiffusionLoss, Prediction, weighted_mean
from stgen.models._base import DiffusionModel
from stgen.models._maps import GeneScaleKind, SteppedMapModel
from stgen.models._options import Count, Levels, Options, Widths

__all__ = ["MapDiffusionModel", "MapOptions", "conditioning_dropout"]


@dataclass(frozen=True, kw_only=True)
class MapOptions(Options):
    """Options of all diffusion models of maps; values are those of the default preset."""

    residual: bool = True
    """Let a regression network predict the mean, and diffuse what remains. Not in the papers."""
    scale: GeneScaleKind = "std"
    """Scale of the maps: divided per gene by the ``"std"`` or the 99.5 % ``"quantile"`` of the training tissue, or by
    the range of each low-resolution ``"map"``."""
    prediction: Prediction = "v"
    """What the network predicts, see :class:`stgen.diffusion.Diffusion`."""
    width: Count = 32
    """Channels of the features of histology and low-resolution map."""
    widths: Widths = (24, 48, 72)
    """The denoising U-Net: channels at each resolution, finest first."""
    blocks: Count = 1
    """Residual blocks at each resolution."""
    attention: Levels = ()
    """Resolutions (numbers of ``widths``) with self-attention, which sees whole tiles."""


class MapDiffusionModel(SteppedMapModel, DiffusionModel[MapData]):
    """A map model that diffuses; its condition has each gene's ``scale`` and, for a residual, a ``mean``."""

    def expect(self, batch: Batch) -> Tensor | None:
        """What the regression predicts, of a model that diffuses only what remains; samples scatter around it."""
        cond = self.condition(batch)
        return self.from_network(torch.zeros_like(cond["mean"]), cond) if "mean" in cond else None

    def denoising_loss(
        self,
        x: Tensor,
        cond: dict[str, Tensor],
        known: Tensor | None,
        denoise: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor] | None = None,
    ) -> DiffusionLoss:
        """Loss of the diffusion. A predicted mean is as it is: what remains is to be modeled, not to be made small.

        Parameters
        ----------
        x
            Expression on the scale ``transform``, shape ``(B, G, H, W)``.
        cond
            Its condition.
        known
            Which bins are known, shape ``(B, 1, H, W)``; all by default.
        denoise
            The network, :meth:`denoise` by default.
        """
        network = denoise or self.denoise
        given = {name: value.detach() if name == "mean" else value for name, value in cond.items()}
        return self.diffusion.loss(lambda x_t, t: network(x_t, t, given), self.to_network(x, given), known)

    def add_regression(
        self, losses: dict[str, Tensor], x: Tensor, cond: dict[str, Tensor], known: Tensor | None
    ) -> None:
        """Add ``"mean"``, the squared error of a condition's mean on the network's scale, if it has one."""
        if "mean" in cond:
            losses["mean"] = weighted_mean((x / cond["scale"] - cond["mean"]).square(), known)
            losses["loss"] = losses["loss"] + losses["mean"]

    def to_network(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Divide by the scale and subtract the predicted mean, if there is one."""
        return x / cond["scale"] - cond["mean"] if "mean" in cond else x / cond["scale"]

    def from_network(self, x_0: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Undo :meth:`to_network`."""
        return (x_0 + cond["mean"] if "mean" in cond else x_0) * cond["scale"]

    def sample_shape(self, batch: Batch) -> tuple[int, ...]:
        """``(G, H, W)``."""
        height, width = (n // self.config["px_per_bin"] for n in batch["h"].shape[-2:])
        return (len(self.genes), height, width)

    # ---- of models that may do without a low-resolution map ------------------------------------------------------

    def with_low_res(self, batch: Batch) -> Batch:
        """The batch with a low-resolution map: of zeros, and valid nowhere, if it has none."""
        if "y" in batch:
            return batch
        size, (_, *shape) = len(batch["h"]), self.sample_shape(batch)
        zeros = batch["h"].new_zeros
        return {**batch, "y": zeros(size, len(self.genes), *shape), "valid": zeros(size, 1, *shape)}

    def with_measurement(self, batch: Batch, p_missing: float = 0.0) -> Tensor:
        """Which items have a low-resolution map that may be seen, shape ``(B,)``; in training, some are hidden."""
        present = batch["valid"].flatten(1).any(1)
        return present & conditioning_dropout(present, p_missing) if self.training else present


def conditioning_dropout(present: Tensor, p: float) -> Tensor:
    """Which samples are shown, shape ``(B,)``: each is hidden with probability ``p``, but never all that are present."""
    chance = torch.rand(len(present), device=present.device)
    shown = chance >= p
    shown[torch.where(present, chance, -1.0).argmax()] = True
    return shown

"""HaDM-ST: histology-assisted differential modelling of super-resolved gene maps (Liu et al., CMMCA at MICCAI 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.data import Batch, MapData
from stgen.diffusion import DiffusionLoss
from stgen.models._layers import ImageStem, ResBlock, UNet, timestep_embedding, zero_conv
from stgen.models._map_diffusion import MapDiffusionModel
from stgen.models._maps import GeneScale, ImageScale
from stgen.models._options import choose
from stgen.models._text import embed_text
from stgen.models.hadmst.discriminator import GeneDiscriminator, frozen
from stgen.models.hadmst.losses import (
    adversarial_loss,
    alignment_loss,
    distillation_loss,
    hinge_loss,
    low_noise_mask,
)
from stgen.models.hadmst.networks import Alignment, GeneHead, SemanticTransformer
from stgen.models.hadmst.options import PRESETS
from stgen.transforms import TransformName

__all__ = ["HaDMST"]

FEWEST_BINS = 8  # along a side of what the discriminator judges
BEGIN, FULL = 0.2, 0.4  # share of the training at which the adversary begins to count, and counts fully
TILE_UM = 640.0  # side of the tiles of a small model that sees whole tiles


class Features(NamedTuple):
    """What is known of a tile before it is denoised."""

    histology: Tensor
    """``(B, d, H, W)``."""
    low_res: Tensor
    """``(B, d, H, W)``."""
    semantic: Tensor | None
    """``(B, w, H / token, W / token)``."""
    joint: Tensor
    """``(B, d, H, W)``."""
    y: Tensor
    """The low-resolution map on the network's scale, the learned null map where there is none, ``(B, G, H, W)``."""


class HaDMST(MapDiffusionModel):
    """HaDM-ST: sharpens gene maps with histology, its nuclei and a prompt, with or without a low-resolution map.

    A transformer distils from image, nuclei and prompt what they say about expression; contrastive losses align it,
    region by region, with the low-resolution map; a U-Net denoises all genes jointly under both; and a discriminator,
    which knows the graph of co-expressed genes, judges each gene's map in training.

    Parameters
    ----------
    genes
        Names of the genes, two to several hundred (one, without the discriminator).
    factor
        Bins along the side of a low-resolution one: 10 (100 µm to 10 µm) or 5 (to 20 µm), or any other.
    bin_um
        Side of a bin, in µm.
    image_channels
        Channels of the histology image: 3 for H&E, any number for stains or for an embedding map.
    px_per_bin
        Pixels along a bin at which image and nuclei are read; by default such that they are 2.5 µm.
    preset
        ``"default"`` is small and fits on a CPU in minutes; ``"paper"`` is of the size of comparable published models
        and wants a GPU.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    **options
        Fields of :class:`stgen.models.HaDMSTOptions`, each in place of the preset's.

    Notes
    -----
    No code and no full text of HaDM-ST are public; what its poster leaves open is decided here, see the page on the
    method.

    Examples
    --------
    >>> import torch
    >>> from stgen import models
    >>> model = models.HaDMST(["A", "B"], segmentation=False, width=8, widths=[8, 8, 8], mean_widths=[8, 8])
    >>> batch = {"h": torch.rand(1, 3, 64, 64), "y": torch.rand(1, 2, 16, 16), "valid": torch.ones(1, 1, 16, 16)}
    >>> model.sample(batch, n_samples=3, steps=2).shape
    torch.Size([1, 3, 2, 16, 16])
    >>> model.sample({"h": batch["h"]}, steps=2).shape  # without a low-resolution map
    torch.Size([1, 1, 2, 16, 16])
    """

    presets = PRESETS

    def __init__(
        self,
        genes: Sequence[str],
        *,
        factor: int = 10,
        bin_um: float = 10.0,
        image_channels: int = 3,
        px_per_bin: int | None = None,
        preset: Literal["default", "paper"] = "default",
        transform: TransformName = "log1p_raw",
        **options: Any,
    ) -> None:
        chosen = choose(PRESETS, preset, options, "HaDMST")
        o = chosen.options.with_text_dim()
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            px_um=chosen.px_um, transform=transform, preset=preset, **o.to_config(),
        )  # fmt: skip
        self.options = o
        if o.adversarial_weight and len(self.genes) == 1:
            raise ValueError(
                "the discriminator judges genes by one another and there is only one; construct the model with "
                "adversarial_weight=0, or with more genes."
            )
        align = math.lcm(2 ** (len(o.widths) - 1), o.token * (o.window or 1), 2 if o.gene_width else 1)
        whole = o.window is None or bool(o.attention)  # of a tile is seen at once
        self.place_windows(align, (chosen.tile_um or TILE_UM) if whole else None)
        self.needs_low_res, self.needs_labels = o.p_missing == 0, o.segmentation
        self.needs_text = o.semantic and o.text_encoder != "none"
        self.diffusion = replace(chosen.diffusion, prediction=o.prediction)
        self.image_scale = ImageScale(self.config["image_channels"])
        self.gene_scale = GeneScale(len(self.genes), o.scale)
        self._make_condition()
        self._make_denoiser()
        self.alignment = Alignment(o.width, o.region) if o.alignment_weight else None
        self.discriminator = GeneDiscriminator(len(self.genes)) if o.adversarial_weight else None
        self.initialize()

    def _make_condition(self) -> None:
        """What reads histology, nuclei, prompt and low-resolution map."""
        o, d, n_genes = self.options, self.options.width, len(self.genes)
        inputs = self.config["image_channels"] + o.segmentation
        self.histology = nn.Sequential(ImageStem(inputs, d, self.config["px_per_bin"]), ResBlock(d, d))
        self.semantic: SemanticTransformer | None = None
        self.told: nn.Conv2d | None = None
        if o.semantic:
            self.semantic = SemanticTransformer(
                d, o.semantic_width, n_genes, token=o.token, window=o.window, layers=o.layers,
                heads=o.heads, text_dim=o.text_dim if self.needs_text else None,
            )  # fmt: skip
            self.told = zero_conv(o.semantic_width, d)
        self.null = nn.Parameter(torch.zeros(n_genes, 1, 1))
        self.spots = nn.Sequential(nn.Conv2d(n_genes + 1, d, 3, padding=1), ResBlock(d, d))
        self.fuse = nn.Conv2d(2 * d, d, 1)

    def _make_denoiser(self) -> None:
        """The network of the mean, with ``residual``, and the denoising U-Net."""
        o, d, n_genes = self.options, self.options.width, len(self.genes)
        self.level = int(math.log2(o.token))  # resolution of the U-Net at which semantic features enter
        self.mean = UNet(d + n_genes + 1, n_genes, o.mean_widths or o.widths) if o.residual else None
        self.time = nn.Sequential(nn.Linear(128, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d), nn.SiLU())
        self.unet = UNet(d + n_genes * (1 + bool(o.residual)), n_genes, o.widths, 4 * d, o.blocks, o.attention)
        self.inject = zero_conv(o.semantic_width, o.widths[self.level]) if o.semantic else None
        self.single = GeneHead(n_genes, 2 + bool(o.residual), o.gene_width, 4 * d) if o.gene_width else None

    @property
    def adversary(self) -> nn.Module | None:
        """The discriminator."""
        return self.discriminator

    def initialize(self) -> None:
        """Draw initial weights from torch's global generator."""
        super().initialize()
        nn.init.zeros_(self.null)
        if self.discriminator is not None:
            self.discriminator.draw()

    def embed_prompt(self, prompt: str) -> np.ndarray:
        """What the model is told by a prompt, shape ``(text_dim,)``; see :func:`stgen.tl.fit`."""
        return embed_text(prompt, self.options.text_encoder, self.config["text_dim"], fetch=self.fetches)

    # ---- fitting -----------------------------------------------------------------------------------------------

    def check_training(self, train: MapData, options: Mapping[str, Any]) -> None:
        """Refuse tiles that are too small."""
        least = max(self.options.region * bool(self.alignment), FEWEST_BINS * bool(self.discriminator))
        if train.tile < least:
            raise ValueError(
                f"training tiles of {train.tile} bins are too small: this model needs {least}, for the regions that "
                f"it aligns or "
                f"for the discriminator. Pass a larger tile=, or construct the model with a smaller `region`."
            )

    def fit_constants(self, train: MapData) -> None:
        """Take the gene graph, which may find too little tissue, and the scales from the training tiles."""
        if self.discriminator is not None:
            self.discriminator.fit(train, self.config["factor"])
        super().fit_constants(train)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Denoising, regression of the mean (with ``residual``) and, in training, HSD's, CMSA's and GDAL's; by name."""
        o, batch = self.options, self._complete(batch)
        if self.training:
            shown = self.with_measurement(batch, o.p_missing)[:, None, None, None]
            batch = {**batch, "y": batch["y"] * shown, "valid": batch["valid"] * shown}
        known, features = batch["tissue"], self.encode(batch)
        cond = self._condition(batch, features)
        step = self.denoising_loss(batch["x"], cond, known)
        losses = step.losses
        self.add_regression(losses, batch["x"], cond, known)
        if not self.training:
            return losses
        x = batch["x"] / cond["scale"]
        for name, (value, weight) in self._of_features(features, x, batch).items():
            losses[name] = value
            losses["loss"] = losses["loss"] + weight * value
        if self.discriminator is not None:
            maps = x * known, self._estimate(step, cond) * known, (features.y * batch["valid"]).detach()
            judged = low_noise_mask(step.t, self.diffusion.timesteps)
            adversarial, losses["discriminator"] = self._opposed(self.discriminator, *(value[judged] for value in maps))
            strength = min(max((self.progress - BEGIN) / (FULL - BEGIN), 0.0), 1.0)
            losses["adversarial"] = adversarial.detach()
            losses["loss"] = losses["loss"] + strength * o.adversarial_weight * adversarial
        return losses

    def _estimate(self, step: DiffusionLoss, cond: dict[str, Tensor]) -> Tensor:
        """The maps that a prediction implies, on the network's scale, with the mean as it is."""
        x_0 = self.diffusion.to_x_0(step.prediction, step.x_t, step.t)
        return x_0 + cond["mean"].detach() if "mean" in cond else x_0

    def _of_features(self, features: Features, x: Tensor, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """The losses of HSD and CMSA, which are of the features and not of what is denoised, with their weights."""
        o = self.options
        losses: dict[str, tuple[Tensor, float]] = {}
        if self.semantic is not None:
            predicted = self.semantic.predict(features.semantic)
            losses["semantic"] = distillation_loss(predicted, x, batch["tissue"], o.token), o.semantic_weight
        if self.alignment is not None:
            z_h, z_y, seen = self.alignment(features.histology, features.low_res, batch["valid"])
            near = self.alignment.near(seen)
            loss = alignment_loss(z_h, z_y, seen, near, o.euclidean_weight, o.info_nce_weight)
            losses["alignment"] = loss, o.alignment_weight
        return losses

    def _opposed(self, judge: GeneDiscriminator, real: Tensor, fake: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial loss, which moves the generator only, and the discriminator's, which moves it only."""
        with frozen(judge):
            adversarial = adversarial_loss(judge(fake, y))
        return adversarial, hinge_loss(judge(real, y), judge(fake.detach(), y))

    # ---- conditions --------------------------------------------------------------------------------------------

    def _complete(self, batch: Batch) -> Batch:
        """The batch with a low-resolution map, zero where it is not valid; an error if it lacks what else is needed."""
        for name, needed, what in (
            ("s", self.needs_labels, "a mask of nuclei"), ("text", self.needs_text, "the vector of a prompt")
        ):  # fmt: skip
            if needed and name not in batch:
                raise ValueError(f"this HaDMST needs {what}, batch[{name!r}]; the batch has {', '.join(batch)}.")
        batch = self.with_low_res(batch)
        return {**batch, "y": batch["y"] * (batch["valid"] > 0)}

    def encode(self, batch: Batch) -> Features:
        """Features of histology (with nuclei and prompt) and of low-resolution maps. HaDM-ST, Fig. 1."""
        h = self.image_scale(batch["h"])
        if self.needs_labels:
            h = torch.cat([h, 2 * batch["s"]], 1)
        f_h, semantic = self.histology(h), None
        self.check_window(*f_h.shape[2:])
        if self.semantic is not None and self.told is not None:
            semantic = self.semantic(f_h, batch.get("text") if self.needs_text else None)
            f_h = f_h + self.told(F.interpolate(semantic, scale_factor=self.options.token, mode="bilinear"))
        y = torch.where(batch["valid"] > 0, batch["y"] / self.gene_scale.of(batch["y"]), self.null)
        f_y = self.spots(torch.cat([y, batch["valid"]], 1))
        return Features(f_h, f_y, semantic, f_h + self.fuse(torch.cat([f_h, f_y], 1)), y)

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Joint and semantic features, scale and, with ``residual``, the predicted mean on the network's scale."""
        batch = self._complete(batch)
        return self._condition(batch, self.encode(batch))

    def _condition(self, batch: Batch, features: Features) -> dict[str, Tensor]:
        scale = self.gene_scale.of(batch["y"]).expand(len(features.y), -1, -1, -1)
        cond = {"features": features.joint, "scale": scale}
        if features.semantic is not None:
            cond["semantic"] = features.semantic
        if self.mean is not None:
            cond["mean"] = self.mean(torch.cat([features.joint, features.y, batch["valid"]], 1))
        return cond

    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The conditional denoising U-Net over all genes jointly, which semantic features enter at their resolution.

        Parameters
        ----------
        x_t
            Noised maps, shape ``(B, G, H, W)``.
        t
            Noise levels, shape ``(B,)``.
        cond
            From :meth:`condition`.

        Returns
        -------
        Shape ``(B, G, H, W)``.
        """
        time = self.time(timestep_embedding(t, 128).to(x_t))
        inputs = [x_t, cond["features"], *([cond["mean"]] if "mean" in cond else [])]
        levels = self.unet.encode(torch.cat(inputs, 1), time)
        if self.inject is not None:
            levels[self.level] = levels[self.level] + self.inject(cond["semantic"])
        output = self.unet.finish(self.unet.decode(levels, time)[0])
        if self.single is None:
            return output
        seen = [output, x_t, *([cond["mean"]] if "mean" in cond else [])]
        return output + self.single(torch.stack(seen, 2), time)

"""HaDM-ST: histology-assisted differential modelling of super-resolved gene maps (Liu et al., CMMCA at MICCAI 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stgen.data import Batch, MapData
from stgen.diffusion import Diffusion, weighted_mean
from stgen.models._layers import ImageStem, ResBlock, UNet, timestep_embedding
from stgen.models._maps import (
    N_TILES,
    GeneScale,
    GeneScaleKind,
    ImageScale,
    MapDiffusionModel,
    check_not_negative,
    check_shares,
    from_preset,
    hidden_apart,
)
from stgen.models._text import HASHED_DIM, embed_text
from stgen.transforms import TransformName

__all__ = ["HaDMST"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "scale": "std", "residual": True, "prediction": "v", "width": 32, "semantic_width": 64, "token": 4, "window": 4,
        "layers": 2, "heads": 4, "region": 8, "widths": [24, 48, 72], "mean_widths": [32, 64, 96], "gene_width": 24, "blocks": 1,
        "attention": [], "text_encoder": "none", "alignment_weight": 0.0, "px_um": None, "tile_um": None,
        "training": {
            "steps": 800, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-4, "ema_decay": 0.99, "evaluate_every": 50,
        },
    },
    "paper": {  # the poster states no numbers: see the methods page
        "scale": "quantile", "residual": False, "prediction": "epsilon", "width": 64, "semantic_width": 128, "token": 8,
        "window": None, "layers": 4, "heads": 4, "region": 16, "widths": [128, 256, 384, 512], "mean_widths": None, "gene_width": 0,
        "blocks": 2, "attention": [2, 3], "text_encoder": "hashed", "alignment_weight": 0.05, "px_um": 5.0, "tile_um": 2560.0,
        "training": {
            "steps": 100_000, "batch_size": 8, "lr": 1e-4, "weight_decay": 1e-4, "ema_decay": 0.9999, "patience": None,
        },
    },
}  # fmt: skip

EMBEDDING = 128  # of a region, for its alignment
TAU = 0.07
PAIRS = 0.3  # share of the pairs of regions that are positives, and negatives
NEIGHBORS = 8  # of a gene in the graph
NODE = 32  # features of a gene in the graph
FEWEST_LOCATIONS = 30
FEWEST_BINS = 8  # along a side of what the discriminator judges
MOST_VALUES = 2**20  # of one channel that the network over each gene works on at a time: more is slower on a CPU
BEGIN, FULL = 0.2, 0.4  # share of the training at which the adversary begins to count, and counts fully


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

    A transformer distils from image, nuclei and prompt what they say about expression; contrastive losses align it, region
    by region, with the low-resolution map; a U-Net denoises all genes jointly under both; and a discriminator, which knows
    the graph of co-expressed genes, judges each gene's map in training.

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
        ``"default"`` is small and fits on a CPU in minutes; ``"paper"`` is of the size of comparable published models and
        wants a GPU.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    semantic
        Semantic distillation (HSD); without it, the image is only convolved, and there is no prompt.
    segmentation
        Look at a mask of nuclei besides the image: ``labels_key`` of :func:`stgen.tl.fit`.
    text_encoder
        What makes a vector of a prompt: ``"hashed"`` needs no download and only tells prompts apart; or the folder or
        Hugging Face Hub id of a BERT-type encoder, such as ``"bert-base-uncased"``; or ``"none"``, for no prompt. By default
        ``"none"``, and ``"hashed"`` in the paper's preset: a prompt says nothing unless sections have different ones.
    text_dim
        Size of that vector; by default 256 for ``"hashed"``, else BERT's 768.
    semantic_weight
        Weight of the distillation loss.
    alignment_weight
        Weight of the alignment of both modalities (CMSA); 0 leaves it out. By default 0, because it did not
        help on real tissue, and 0.05 in the paper's preset.
    euclidean_weight, info_nce_weight
        ``lambda_1`` and ``lambda_2`` of the alignment loss.
    adversarial_weight
        Weight of the adversarial loss (GDAL); 0 leaves the discriminator out.
    p_missing
        Share of the training tiles whose low-resolution map is hidden; 0 gives a model that cannot do without one.
    residual
        Let a regression network predict the mean, and diffuse what remains. Not in the paper.
    scale
        Scale of the maps: divided per gene by the ``"std"`` or the 99.5 % ``"quantile"`` of the training tissue, or by the
        range of each low-resolution ``"map"``.
    prediction
        What the network predicts, see :class:`stgen.diffusion.Diffusion`.
    width
        Channels of histology and low-resolution features.
    semantic_width, token, window, layers, heads
        The transformer: its width; the side of a token in bins; the side in tokens of the windows in which tokens attend to
        one another (in the paper's preset, all of a tile); its layers and heads.
    region
        Side in bins of the regions that are aligned.
    widths, blocks, attention
        The denoising U-Net: channels at each resolution; residual blocks; resolutions with self-attention, which sees
        whole tiles.
    mean_widths
        Channels of the U-Net of the mean; those of ``widths`` by default.
    gene_width
        Channels of the network that goes over each gene's map by itself after the U-Net; 0 for none.

    Notes
    -----
    No code and no full text of HaDM-ST are public; what its poster leaves open is decided here, see the page on the method.

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
        semantic: bool = True,
        segmentation: bool = True,
        text_encoder: str | None = None,
        text_dim: int | None = None,
        semantic_weight: float = 0.1,
        alignment_weight: float | None = None,
        euclidean_weight: float = 0.1,
        info_nce_weight: float = 1.0,
        adversarial_weight: float = 0.01,
        p_missing: float = 0.3,
        residual: bool | None = None,
        scale: GeneScaleKind | None = None,
        prediction: Literal["epsilon", "x_0", "v"] | None = None,
        width: int | None = None,
        semantic_width: int | None = None,
        token: int | None = None,
        window: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        region: int | None = None,
        widths: Sequence[int] | None = None,
        mean_widths: Sequence[int] | None = None,
        blocks: int | None = None,
        attention: Sequence[int] | None = None,
        gene_width: int | None = None,
    ) -> None:
        weights = {
            "semantic_weight": semantic_weight, "euclidean_weight": euclidean_weight, "info_nce_weight": info_nce_weight,
            "adversarial_weight": adversarial_weight,
        }  # fmt: skip
        check_not_negative(**weights, alignment_weight=alignment_weight or 0.0)
        check_shares(p_missing=p_missing)
        if adversarial_weight and len(genes) == 1:
            raise ValueError(
                "the discriminator judges genes by one another and there is only one; construct the model with "
                "adversarial_weight=0, or with more genes."
            )
        given = {
            "residual": residual, "scale": scale, "prediction": prediction, "width": width,
            "semantic_width": semantic_width, "token": token, "window": window, "layers": layers, "heads": heads,
            "region": region, "widths": widths, "mean_widths": mean_widths, "blocks": blocks, "attention": attention,
            "gene_width": gene_width, "text_encoder": text_encoder, "alignment_weight": alignment_weight,
        }  # fmt: skip
        chosen = from_preset(PRESETS, preset, given, bin_um=bin_um, px_per_bin=px_per_bin)
        for name in ("window", "region", "heads", "text_dim"):
            value = text_dim if name == "text_dim" else chosen[name]
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"`{name}` must be a positive whole number, found {value!r}.")
        if chosen["semantic_width"] % chosen["heads"]:
            raise ValueError(
                f"`heads` must divide `semantic_width`, found {chosen['heads']} and {chosen['semantic_width']}."
            )
        if chosen["token"] not in [2**i for i in range(len(chosen["widths"]))]:
            raise ValueError(
                f"`token` must be a number of bins that one resolution of the U-Net has, one of "
                f"{', '.join(str(2**i) for i in range(len(chosen['widths'])))}; found {chosen['token']!r}."
            )
        text_dim = text_dim or (HASHED_DIM if chosen["text_encoder"] in ("hashed", "none") else 768)
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=chosen["px_per_bin"],
            transform=transform, preset=preset, semantic=semantic, segmentation=segmentation, text_dim=text_dim,
            **weights, p_missing=p_missing, **{k: chosen[k] for k in given},
        )  # fmt: skip
        c = self.config
        self.align = math.lcm(2 ** (len(c["widths"]) - 1), c["token"] * (c["window"] or 1), 2 if c["gene_width"] else 1)
        self.fixed_tile = c["window"] is None or bool(c["attention"])
        if self.fixed_tile:
            self.align *= max(1, round((chosen["tile_um"] or 640.0) / bin_um / self.align))
        self.halo = 0 if self.fixed_tile else -(-32 // self.align) * self.align
        self.needs_low_res, self.needs_labels = p_missing == 0, segmentation
        self.needs_text = semantic and c["text_encoder"] != "none"
        self.diffusion = Diffusion(prediction=c["prediction"])
        self.image_scale, self.gene_scale = ImageScale(image_channels), GeneScale(len(self.genes), c["scale"])
        self._make_condition()
        self._make_denoiser()
        self.alignment = Alignment(c["width"], c["region"]) if c["alignment_weight"] else None
        self.discriminator = GeneDiscriminator(len(self.genes)) if adversarial_weight else None
        self.initialize()

    def _make_condition(self) -> None:
        """What reads histology, nuclei, prompt and low-resolution map."""
        c, d, n_genes = self.config, self.config["width"], len(self.genes)
        inputs = c["image_channels"] + c["segmentation"]
        self.histology = nn.Sequential(ImageStem(inputs, d, c["px_per_bin"]), ResBlock(d, d))
        self.semantic = self.told = None
        if c["semantic"]:
            self.semantic = SemanticTransformer(
                d, c["semantic_width"], n_genes, token=c["token"], window=c["window"], layers=c["layers"],
                heads=c["heads"], text_dim=c["text_dim"] if self.needs_text else None,
            )  # fmt: skip
            self.told = _opening(c["semantic_width"], d)
        self.null = nn.Parameter(torch.zeros(n_genes, 1, 1))
        self.spots = nn.Sequential(nn.Conv2d(n_genes + 1, d, 3, padding=1), ResBlock(d, d))
        self.fuse = nn.Conv2d(2 * d, d, 1)

    def _make_denoiser(self) -> None:
        """The network of the mean, with ``residual``, and the denoising U-Net."""
        c, d, n_genes = self.config, self.config["width"], len(self.genes)
        self.level = int(math.log2(c["token"]))  # resolution of the U-Net at which semantic features enter
        self.mean = UNet(d + n_genes + 1, n_genes, c["mean_widths"] or c["widths"]) if c["residual"] else None
        self.time = nn.Sequential(nn.Linear(128, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d), nn.SiLU())
        self.unet = UNet(
            d + n_genes * (1 + bool(c["residual"])), n_genes, c["widths"], 4 * d, c["blocks"], c["attention"]
        )
        self.inject = _opening(c["semantic_width"], c["widths"][self.level]) if c["semantic"] else None
        self.single = GeneHead(n_genes, 2 + bool(c["residual"]), c["gene_width"], 4 * d) if c["gene_width"] else None

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
        return embed_text(prompt, self.config["text_encoder"], self.config["text_dim"])

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit(self, train: MapData, validation: MapData | None = None, **options: Any) -> dict[str, list[float]]:
        """Fit the scales and the gene graph on the training tiles, then train.

        Options are those of :func:`stgen.train.fit`; those not given are the preset's.

        Raises
        ------
        ValueError
            If tiles are too small, or there is too little tissue for the gene graph.
        """
        least = max(self.config["region"] * bool(self.alignment), FEWEST_BINS * bool(self.discriminator))
        if train.tile < least:
            raise ValueError(
                f"training tiles of {train.tile} bins are too small: this model needs {least}, for the regions that it aligns or "
                f"for the discriminator. Pass a larger tile=, or construct the model with a smaller `region`."
            )
        if self.discriminator is not None:
            self.discriminator.fit(train, self.config["factor"])
        self.image_scale.fit(train)
        self.gene_scale.fit(train)
        return super().fit(train, validation, **{**PRESETS[self.config["preset"]]["training"], **options})

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Denoising, regression of the mean (with ``residual``) and, in training, HSD's, CMSA's and GDAL's; by name."""
        c, batch = self.config, self._complete(batch)
        if self.training:
            shown = hidden_apart(batch["valid"].flatten(1).any(1), c["p_missing"])[:, None, None, None]
            batch = {**batch, "y": batch["y"] * shown, "valid": batch["valid"] * shown}
        known, features = batch["tissue"], self.encode(batch)
        cond = self._condition(batch, features)
        mean = cond.get("mean")
        if mean is not None:
            cond["mean"] = mean.detach()  # what remains is for the diffusion to model, not to make small
        x_0, noised = self.to_network(batch["x"], cond), {}

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            noised.update(x_t=x_t, t=t, prediction=self.denoise(x_t, t, cond))
            return noised["prediction"]

        losses = self.diffusion.loss(denoise, x_0, known)
        x = batch["x"] / cond["scale"]
        self.add_regression(losses, x, mean, known)
        if not self.training:
            return losses
        for name, value in self._of_features(features, x, batch).items():
            losses[name] = value
            losses["loss"] = losses["loss"] + c[f"{name}_weight"] * value
        if self.discriminator is not None:
            estimate = self.diffusion.to_x_0(noised["prediction"], noised["x_t"], noised["t"])
            estimate = estimate + cond.get("mean", 0.0)
            strength = min(max((self.progress - BEGIN) / (FULL - BEGIN), 0.0), 1.0)
            judged = little_noised(noised["t"], self.diffusion.timesteps)
            maps = (x * known, estimate * known, (features.y * batch["valid"]).detach())
            adversarial, losses["discriminator"] = self._opposed(*(value[judged] for value in maps))
            losses["adversarial"] = adversarial.detach()
            losses["loss"] = losses["loss"] + strength * c["adversarial_weight"] * adversarial
        return losses

    def _of_features(self, features: Features, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The losses of HSD and CMSA, which are of the features and not of what is denoised."""
        c, losses = self.config, {}
        if self.semantic is not None:
            predicted = self.semantic.predict(features.semantic)
            losses["semantic"] = distillation_loss(predicted, x, batch["tissue"], c["token"])
        if self.alignment is not None:
            z_h, z_y, seen = self.alignment(features.histology, features.low_res, batch["valid"])
            near = self.alignment.near(seen)
            losses["alignment"] = alignment_loss(z_h, z_y, seen, near, c["euclidean_weight"], c["info_nce_weight"])
        return losses

    def _opposed(self, real: Tensor, fake: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial loss, which moves the generator only, and the discriminator's, which moves it only."""
        judge = self.discriminator
        with _frozen(judge):
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
        if "y" in batch:
            return {**batch, "y": batch["y"] * (batch["valid"] > 0)}
        size, (n_genes, *shape) = len(batch["h"]), self.sample_shape(batch)
        zeros = batch["h"].new_zeros
        return {**batch, "y": zeros(size, n_genes, *shape), "valid": zeros(size, 1, *shape)}

    def encode(self, batch: Batch) -> Features:
        """Features of histology (with nuclei and prompt) and of low-resolution maps. HaDM-ST, Fig. 1."""
        h = self.image_scale(batch["h"])
        if self.needs_labels:
            h = torch.cat([h, 2 * batch["s"]], 1)
        f_h, semantic = self.histology(h), None
        self.check_window(*f_h.shape[2:])
        if self.semantic is not None:
            semantic = self.semantic(f_h, batch.get("text") if self.needs_text else None)
            f_h = f_h + self.told(F.interpolate(semantic, scale_factor=self.config["token"], mode="bilinear"))
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
        """The conditional denoising U-Net over all genes jointly, into which semantic features are let at their resolution.

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


class GeneHead(nn.Module):
    """Goes over each gene's map by itself, 2 x 2 bins at a time, with a small network that all genes share.

    The U-Net has fewer channels than there are genes and cannot pass on the noise in each gene's map, nor see that counts
    are whole numbers.

    Parameters
    ----------
    n_genes
        Number of genes.
    inputs
        Maps of each gene that it sees.
    width
        Channels.
    time_dim
        Size of the noise level's embedding.
    """

    def __init__(self, n_genes: int, inputs: int, width: int, time_dim: int) -> None:
        super().__init__()
        self.enter, self.hidden = nn.Conv2d(4 * inputs, width, 1), nn.Conv2d(width, width, 1)
        self.time = nn.Linear(time_dim, 2 * width)
        self.gene = nn.Parameter(torch.zeros(n_genes, 2 * width))
        self.leave = nn.Conv2d(width, 4, 1)
        self.leave.starts_at_zero = True

    def reset_parameters(self) -> None:
        """No gene differs from the others."""
        nn.init.zeros_(self.gene)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` is ``(B, G, inputs, H, W)``, ``time`` ``(B, time_dim)``; the result ``(B, G, H, W)``."""
        modulation = self.time(time)[:, None] + self.gene
        chunk = max(1, MOST_VALUES // (len(x) * x.shape[3] * x.shape[4]))
        parts = [slice(i, i + chunk) for i in range(0, x.shape[1], chunk)]
        return torch.cat([self._part(x[:, genes], modulation[:, genes]) for genes in parts], 1)

    def _part(self, x: Tensor, modulation: Tensor) -> Tensor:
        gain, shift = modulation.flatten(0, 1)[:, :, None, None].chunk(2, 1)
        hidden = F.silu(self.enter(F.pixel_unshuffle(x.flatten(0, 1), 2)) * (1 + gain) + shift)
        return F.pixel_shuffle(self.leave(F.silu(self.hidden(hidden))), 2).reshape(len(x), -1, *x.shape[3:])


# ---- semantic distillation (HSD) -----------------------------------------------------------------------------------


class SemanticTransformer(nn.Module):
    """What an image, its nuclei and a prompt say about expression, token by token. HaDM-ST, HSD.

    Tokens attend to the others of their window and to the prompt. Every second layer's windows lie half a window further,
    so that what tokens know spreads. Where a token is, a depthwise convolution tells it.

    Parameters
    ----------
    inputs
        Channels of the histology features.
    width
        Of the transformer.
    n_genes
        Genes that the features are to predict.
    token
        Side of a token in bins.
    window
        Side of a window in tokens; ``None`` for a single one.
    layers, heads
        Layers, and heads of each.
    text_dim
        Size of a prompt's vector; ``None`` for none.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        n_genes: int,
        *,
        token: int,
        window: int | None,
        layers: int,
        heads: int,
        text_dim: int | None,
    ) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, token, stride=token)
        self.text = None if text_dim is None else nn.Sequential(nn.Linear(text_dim, width), nn.LayerNorm(width))
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, window, shift=(window or 0) // 2 * (i % 2)) for i in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Conv2d(width, n_genes, 1)

    def forward(self, f: Tensor, text: Tensor | None) -> Tensor:
        """``f`` is ``(B, inputs, H, W)``, ``text`` ``(B, text_dim)``; the result ``(B, width, H / token, W / token)``."""
        x = self.enter(f)
        told = None if self.text is None else self.text(text)
        for layer in self.layers:
            x = layer(x, told)
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class TransformerLayer(nn.Module):
    """Attention within windows, to which a prompt is added as one more token, and a perceptron; both start closed."""

    def __init__(self, width: int, heads: int, window: int | None, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.place.starts_at_zero = self.out.starts_at_zero = self.mlp[2].starts_at_zero = True

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """``x`` is ``(B, width, H, W)`` tokens, ``text`` ``(B, width)``."""
        x = (x + self.place(x)).movedim(1, -1)  # (B, H, W, width)
        x = x + self.attend(self.norm_attention(x), text)
        return (x + self.mlp(self.norm_mlp(x))).movedim(-1, 1)

    def attend(self, x: Tensor, text: Tensor | None) -> Tensor:
        """Attention of tokens ``(B, H, W, width)`` within their windows."""
        size, height, width, _ = x.shape
        rows, columns = (height, width) if self.window is None else (self.window, self.window)
        pad = (0, 0, self.shift, -(width + self.shift) % columns, self.shift, -(height + self.shift) % rows)
        inside = F.pad(x.new_ones(1, height, width, 1), pad)
        tokens, inside = (
            _windows(value, rows, columns) for value in (F.pad(x, pad), inside)
        )  # (B, windows, tokens, ...)
        seen = inside[..., 0] > 0
        others = tokens
        if text is not None:
            others = torch.cat([tokens, text[:, None, None].expand(-1, tokens.shape[1], -1, -1)], 2)
            seen = F.pad(seen, (0, 1), value=True)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in (self.query(tokens), *self.key_value(others).chunk(2, -1))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, :, None, None])
        attended = self.out(attended.transpose(2, 3).flatten(3))
        shape = (pad[4] + height + pad[5]) // rows, (pad[2] + width + pad[3]) // columns
        whole = attended.reshape(size, *shape, rows, columns, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return whole[:, self.shift : self.shift + height, self.shift : self.shift + width]


def _windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens ``(B, H, W, c)`` by window, ``(B, windows, rows * columns, c)``."""
    size, height, width, channels = x.shape
    x = x.reshape(size, height // rows, rows, width // columns, columns, channels)
    return x.transpose(2, 3).reshape(size, -1, rows * columns, channels)


def distillation_loss(predicted: Tensor, x: Tensor, known: Tensor, token: int) -> Tensor:
    """Mean absolute error of what semantic features predict, against expression averaged over each token. HaDM-ST, HSD.

    Parameters
    ----------
    predicted
        Shape ``(B, G, H / token, W / token)``.
    x
        Expression on the network's scale, shape ``(B, G, H, W)``.
    known
        Which bins are known, shape ``(B, 1, H, W)``; a token counts by how much of it is.
    """
    share = F.avg_pool2d(known, token)
    target = F.avg_pool2d(x * known, token) / share.clamp(min=1e-6)
    return weighted_mean((predicted - target).abs(), share)


# ---- cross-modal alignment (CMSA) ----------------------------------------------------------------------------------


class Alignment(nn.Module):
    """Embeddings of regions of histology and of the low-resolution map, on the unit hypersphere. HaDM-ST, CMSA."""

    def __init__(self, width: int, region: int) -> None:
        super().__init__()
        self.region = region
        self.of_h, self.of_y = nn.Linear(width, EMBEDDING), nn.Linear(width, EMBEDDING)

    def forward(self, f_h: Tensor, f_y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``z_h`` and ``z_y``, each ``(B, rows, columns, 128)``, and where something was measured, ``(B, rows, columns)``."""
        z_h, z_y = (
            F.normalize(project(F.avg_pool2d(f, self.region).movedim(1, -1)), dim=-1)
            for project, f in ((self.of_h, f_h), (self.of_y, f_y))
        )
        return z_h, z_y, F.avg_pool2d(valid, self.region)[:, 0] > 0.5

    def near(self, seen: Tensor) -> Tensor:
        """Which two regions are the same or touch, ``(R, R)``, for a grid of regions ``(B, rows, columns)``."""
        y, x = (i.flatten() for i in torch.meshgrid(*(torch.arange(n) for n in seen.shape[1:]), indexing="ij"))
        apart = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
        return (apart <= 1).to(seen.device)


def alignment_loss(
    z_h: Tensor, z_y: Tensor, seen: Tensor, near: Tensor, euclidean_weight: float, info_nce_weight: float
) -> Tensor:
    """``L_contrast = L_cosine + lambda_1 L_euclidean + lambda_2 L_InfoNCE``. HaDM-ST, CMSA.

    Parameters
    ----------
    z_h, z_y
        Embeddings of the regions of both modalities, unit length, shape ``(B, rows, columns, d)``.
    seen
        Where something was measured, shape ``(B, rows, columns)``; other regions take no part.
    near
        Which two regions may be a positive pair, shape ``(R, R)``.
    euclidean_weight, info_nce_weight
        ``lambda_1`` and ``lambda_2``.

    Returns
    -------
    A scalar; zero if nothing was measured.
    """
    z_h, z_y, seen = z_h.flatten(1, 2), z_y.flatten(1, 2), seen.flatten(1)
    with torch.autocast(z_h.device.type, enabled=False):  # a distance of half precision has no gradient near zero
        z_h, z_y = (z if z.dtype == torch.float64 else z.float() for z in (z_h, z_y))
        similarity = z_h @ z_y.transpose(1, 2)
        positive, negative = region_pairs(similarity.detach(), seen, near)
        return (
            cosine_loss(similarity, positive, negative)
            + euclidean_weight * euclidean_loss(z_h, z_y, positive, negative)
            + info_nce_weight * info_nce_loss(similarity, seen)
        )


def region_pairs(similarity: Tensor, seen: Tensor, near: Tensor, share: float = PAIRS) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs of regions of each sample: the top and the bottom 30 % by similarity. HaDM-ST, CMSA.

    On the unit hypersphere cosine similarity and Euclidean distance rank pairs alike. Positives are sought among regions
    that lie together, negatives among all; a positive is never a negative.

    Parameters
    ----------
    similarity
        Of each region in the image to each in the low-resolution map, shape ``(B, R, R)``.
    seen
        Where something was measured, shape ``(B, R)``.
    near
        Which two regions lie together, shape ``(R, R)``.
    share
        The 30 %.

    Returns
    -------
    Boolean, each of shape ``(B, R, R)``.
    """
    both = seen[:, :, None] & seen[:, None, :]
    positive = _top(similarity, both & near, share)
    return positive, _top(-similarity, both & ~positive, share, both)


def _top(value: Tensor, candidates: Tensor, share: float, of: Tensor | None = None) -> Tensor:
    """The candidates with the largest values in each sample, as many as are ``share`` of ``of`` (of the candidates)."""
    count = ((candidates if of is None else of).flatten(1).sum(1) * share).ceil()
    order = value.masked_fill(~candidates, -torch.inf).flatten(1).argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]).unflatten(1, value.shape[1:]) & candidates


def cosine_loss(similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """``1 - s`` of positive and ``max(0, s)`` of negative pairs, the mean of each. HaDM-ST, ``L_cosine``."""
    return weighted_mean(1 - similarity, positive.to(similarity)) + weighted_mean(
        similarity.clamp(min=0), negative.to(similarity)
    )


def euclidean_loss(z_h: Tensor, z_y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """``d^2`` of positive and ``max(0, 1 - d)^2`` of negative pairs, the mean of each. HaDM-ST, ``L_euclidean``."""
    squared = (2 - 2 * z_h @ z_y.transpose(1, 2)).clamp(min=1e-12)  # of unit vectors
    far = (1 - squared.sqrt()).clamp(min=0).square()
    return weighted_mean(squared, positive.to(squared)) + weighted_mean(far, negative.to(squared))


def info_nce_loss(similarity: Tensor, seen: Tensor, tau: float = TAU) -> Tensor:
    """``-log softmax_k(s_jk / tau)`` at ``k = j``, and with both modalities exchanged; the mean of both. HaDM-ST, ``L_InfoNCE``.

    A region's positive is the same region in the other modality, its negatives are the sample's other regions.
    """
    both = seen[:, :, None] & seen[:, None, :]
    own = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
    logits = (similarity / tau).masked_fill(~(both | own), -torch.inf)  # never a row without any
    terms = [-logits.log_softmax(dim).diagonal(dim1=1, dim2=2) for dim in (1, 2)]
    return weighted_mean((terms[0] + terms[1]) / 2, seen.to(similarity))


# ---- gene-wise differential adversarial learning (GDAL) -------------------------------------------------------------


class Verdict(NamedTuple):
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
                f"the graph of co-expressed genes needs at least {FEWEST_LOCATIONS} locations of {factor} x {factor} bins, "
                f"and the training tissue has {n}. Train on more, or construct the model with adversarial_weight=0."
            )
        pooled = []
        for batch in data.some(N_TILES):
            share = F.avg_pool2d(batch["tissue"], factor, ceil_mode=True)[0, 0]
            mean = F.avg_pool2d(batch["x"] * batch["tissue"], factor, ceil_mode=True)[0]
            pooled.append((mean / share.clamp(min=1e-6))[:, share > 0.5])
        self.edges.copy_(gene_graph(torch.cat(pooled, 1)))

    def forward(self, x: Tensor, y: Tensor) -> Verdict:
        """Maps ``x`` and what was measured, zero where nothing was, each ``(B, G, H, W)`` on the network's scale."""
        size, n_genes = x.shape[:2]
        f = torch.stack([x, y], 2).flatten(0, 1)
        for layer in self.maps:
            f = F.leaky_relu(layer(f), 0.2)
        nodes = f.mean((2, 3)).unflatten(0, (size, n_genes)) + self.name.weight
        for layer in self.graph:
            nodes = nodes + F.leaky_relu(graph_convolution(nodes, self.edges, layer), 0.2)
        return Verdict(self.gene(nodes)[..., 0], self.overall(nodes.mean(1))[..., 0])


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


def adversarial_loss(fake: Verdict) -> Tensor:
    """What the generator minimizes: ``-D(fake)``, the mean over genes and overall. HaDM-ST, GDAL; hinge version."""
    return -(fake.genes.mean() + fake.overall.mean()) / 2


def hinge_loss(real: Verdict, fake: Verdict) -> Tensor:
    """What the discriminator minimizes: ``max(0, 1 - D(real)) + max(0, 1 + D(fake))``. HaDM-ST, GDAL; hinge version."""
    return sum(F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True)) / 2


def little_noised(t: Tensor, timesteps: int) -> Tensor:
    """Which items are judged: those at the lower half of the noise levels, or at least the least noised one.

    At the others an estimate is a mean over what might be, and ought to be blurred.

    Parameters
    ----------
    t
        Noise levels, shape ``(B,)``.
    timesteps
        How many there are.

    Returns
    -------
    Boolean, shape ``(B,)``.
    """
    return t < torch.clamp(t.min() + 1, min=timesteps // 2)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients through a module but not into it."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.requires_grad_(True)


def _opening(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1 x 1 convolution that starts at zero."""
    layer = nn.Conv2d(inputs, outputs, 1)
    layer.starts_at_zero = True
    return layer

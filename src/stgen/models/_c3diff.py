"""C3-Diff: cross-modal cross-content contrastive diffusion for super-resolved gene maps (Wang et al., CVPR 2026 Findings)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.data import Batch, MapData
from stgen.diffusion import Diffusion
from stgen.models._layers import ImageStem, ResBlock, Standardize, UNet, UNetEncoder, timestep_embedding
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
from stgen.transforms import TransformName

__all__ = ["C3Diff"]

logger = logging.getLogger("stgen")

Imputation = Literal["similarity", "mean", "zero", "drop"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "scale": "std", "residual": True, "prediction": "v", "width": 32, "code": 64,
        "widths": [16, 32, 48], "control_widths": [32, 64, 96], "blocks": 1, "attention": [], "patch": 2,
        "control_patch": 1, "genes_per_tile": 8, "modal_weight": 0.005, "content_weight": 0.005,
        "inter_sphere_weight": 0.003, "px_um": None, "tile_um": None, "schedule": {},
        "training": {
            "steps": 1000, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-4, "ema_decay": 0.99, "evaluate_every": 50,
        },
    },
    "paper": {  # the paper's supplement is not public: sizes of the released code, see the methods page
        "scale": "map", "residual": False, "prediction": "epsilon", "width": 55, "code": 224,
        "widths": [224, 448, 672, 896], "control_widths": [224, 448, 672, 896], "blocks": 2, "attention": [1, 2, 3],
        "patch": 4, "control_patch": 4, "genes_per_tile": 1, "modal_weight": 0.05, "content_weight": 0.05,
        "inter_sphere_weight": 0.03, "px_um": 10.0, "tile_um": 2560.0,
        "schedule": {"schedule": "scaled_linear", "beta_min": 0.00085, "beta_max": 0.012},
        "training": {
            "steps": 100_000, "batch_size": 8, "lr": 1e-4, "weight_decay": 1e-2, "ema_decay": 0.9999,
            "max_grad_norm": None, "patience": None,
        },
    },
}  # fmt: skip

EMBEDDING = 128  # size of the embeddings that are contrasted
TAU = 0.07  # at the start
FEW_NEGATIVES = 8
MOST_VALUES = 2**19  # of one channel that the denoiser works on at a time: more is slower on a CPU


class C3Diff(MapDiffusionModel):
    """C3-Diff: sharpens gene maps with histology, one gene at a time, with or without a low-resolution map.

    Histology and low-resolution map each have a modality encoder and a content encoder, whose features lie on unit
    hyperspheres and are arranged there by three contrastive losses. A control branch makes of them what guides a denoising
    U-Net, in which a code says which gene it is about. The networks are the same for all genes, however many.

    Parameters
    ----------
    genes
        Names of the genes, one to thousands.
    factor
        Bins along the side of a low-resolution one: 10 (100 µm to 10 µm) or 5 (to 20 µm), or any other.
    bin_um
        Side of a bin, in µm.
    image_channels
        Channels of the histology image.
    px_per_bin
        Pixels along a bin at which the image is read; by default such that they are 2.5 µm (paper: 10 µm).
    preset
        ``"default"`` is small and fits on a CPU in minutes; ``"paper"`` has the networks of the released code and wants a
        GPU.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    gene_embedding
        A vector for each gene (a table whose index names genes, of protein or language embeddings, say), from which gene
        codes are then made instead of being learned: see :meth:`with_genes`. Or the number of its columns, for a model
        whose weights are loaded.
    p_missing
        Share of the training tiles whose low-resolution map is hidden; 0 gives a model that cannot do without one.
    p_unconditional
        Share of the training tiles denoised without any condition, for guidance.
    guidance
        Weight ω of classifier-free guidance when sampling, :attr:`guidance`. It moves samples, and not the regression.
    augmentation
        Noise on the features of low-resolution maps in training (Eq. 1).
    sigma
        Its standard deviation, which the paper does not state.
    modal_weight, content_weight, inter_sphere_weight
        Weights of the three contrastive losses; 0 leaves one out. The paper does not state them: its preset has
        those that the released code evidently means, the default a tenth of that.
    imputation
        What stands for the features of a missing low-resolution map in training, until half of it is done: those of
        tiles with ``"similarity"`` in histology (the paper's), the ``"mean"`` of all, or ``"zero"``. ``"drop"`` leaves such
        tiles out.
    residual
        Let a regression on the control branch predict the mean, and diffuse what remains. Not in the paper.
    scale
        Scale of the maps: divided per gene by the ``"std"`` or the 99.5 % ``"quantile"`` of the training tissue, or
        (paper) by the range of each ``"map"``.
    prediction
        What the network predicts, see :class:`stgen.diffusion.Diffusion`.
    width
        Channels of each of the four encoders.
    code
        Size of a gene code.
    widths, control_widths, blocks, attention
        The denoising U-Net and the control branch: channels at each resolution; residual blocks; resolutions with
        self-attention.
    patch, control_patch
        Bins along the side of the squares that the denoising U-Net, and the control branch, take as one pixel each.
    genes_per_tile
        Genes that a training tile is denoised for.

    Attributes
    ----------
    guidance
        Weight ω of classifier-free guidance when sampling; 1 is none.

    Examples
    --------
    >>> import torch
    >>> from stgen import models
    >>> model = models.C3Diff(["A", "B"], width=8, widths=[8, 8], control_widths=[8, 8])
    >>> batch = {"h": torch.rand(1, 3, 64, 64), "y": torch.rand(1, 2, 16, 16), "valid": torch.ones(1, 1, 16, 16)}
    >>> model.sample(batch, n_samples=3, steps=2).shape
    torch.Size([1, 3, 2, 16, 16])
    >>> model.sample({"h": batch["h"]}, steps=2).shape  # without a low-resolution map
    torch.Size([1, 1, 2, 16, 16])
    """

    gene_wise: ClassVar[bool] = True

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
        gene_embedding: pd.DataFrame | int | None = None,
        p_missing: float = 0.5,
        p_unconditional: float = 0.1,
        guidance: float = 1.0,
        augmentation: bool = True,
        sigma: float = 0.03,
        modal_weight: float | None = None,
        content_weight: float | None = None,
        inter_sphere_weight: float | None = None,
        imputation: Imputation = "similarity",
        residual: bool | None = None,
        scale: GeneScaleKind | None = None,
        prediction: Literal["epsilon", "x_0", "v"] | None = None,
        width: int | None = None,
        code: int | None = None,
        widths: Sequence[int] | None = None,
        control_widths: Sequence[int] | None = None,
        blocks: int | None = None,
        attention: Sequence[int] | None = None,
        patch: int | None = None,
        control_patch: int | None = None,
        genes_per_tile: int | None = None,
    ) -> None:
        if imputation not in get_args(Imputation):
            raise ValueError(
                f"`imputation` must be one of {', '.join(map(repr, get_args(Imputation)))}, found {imputation!r}."
            )
        check_shares(p_missing=p_missing, p_unconditional=p_unconditional)
        given = {
            "residual": residual, "scale": scale, "prediction": prediction, "width": width, "code": code, "widths": widths,
            "control_widths": control_widths, "blocks": blocks, "attention": attention, "patch": patch,
            "control_patch": control_patch, "genes_per_tile": genes_per_tile, "modal_weight": modal_weight,
            "content_weight": content_weight, "inter_sphere_weight": inter_sphere_weight,
        }  # fmt: skip
        chosen = from_preset(PRESETS, preset, given, bin_um=bin_um, px_per_bin=px_per_bin)
        check_not_negative(sigma=sigma, **{name: chosen[name] for name in given if name.endswith("_weight")})
        if len(chosen["widths"]) != len(chosen["control_widths"]):
            raise ValueError(
                f"`widths` and `control_widths` must be of the same length, found {chosen['widths']} and "
                f"{chosen['control_widths']}."
            )
        if chosen["patch"] % chosen["control_patch"]:
            raise ValueError(
                f"`patch` must be a multiple of `control_patch`, found {chosen['patch']} and {chosen['control_patch']}."
            )
        table = _table(gene_embedding, genes) if isinstance(gene_embedding, pd.DataFrame) else None
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=chosen["px_per_bin"],
            transform=transform, preset=preset, gene_embedding=gene_embedding if table is None else table.shape[1],
            p_missing=p_missing, p_unconditional=p_unconditional, guidance=guidance, augmentation=augmentation, sigma=sigma,
            imputation=imputation, **{k: chosen[k] for k in given},
        )  # fmt: skip
        c = self.config
        self.align = 2 ** (len(c["widths"]) - 1) * c["patch"]
        self.fixed_tile = chosen["tile_um"] is not None
        if self.fixed_tile:
            self.align *= max(1, round(chosen["tile_um"] / bin_um / self.align))
        self.halo = 0 if self.fixed_tile else -(-32 // self.align) * self.align
        self.needs_low_res = p_missing == 0
        self.guidance = guidance
        self.diffusion = Diffusion(prediction=c["prediction"], **chosen["schedule"])
        self.image_scale = ImageScale(image_channels)
        self.gene_scale = GeneScale(len(self.genes), c["scale"])
        self.codes = GeneCode(len(self.genes), c["code"], c["gene_embedding"])
        if table is not None:
            self.codes.table.copy_(torch.as_tensor(table))
        self._make_encoders()
        self._make_control()
        self._make_denoiser()
        self.initialize()

    def _make_encoders(self) -> None:
        """Four encoders, their projections, and the learned temperature."""
        c, d = self.config, self.config["width"]
        self.stride = math.gcd(4, self.align)  # at which low-resolution maps, which are smooth, are encoded
        self.modality_h, self.content_h = (
            nn.Sequential(ImageStem(c["image_channels"], d, c["px_per_bin"]), ResBlock(d, d)) for _ in range(2)
        )
        self.profile = nn.Linear(c["code"], 2 * d)
        self.modality_y, self.content_y = (
            nn.Sequential(nn.Conv2d(2 * d + 1, d, 3, padding=1), ResBlock(d, d)) for _ in range(2)
        )
        self.to_sphere = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(d, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
                for name in ("modality_h", "content_h", "modality_y", "content_y")
            }
        )
        self.log_tau = nn.Parameter(torch.tensor(math.log(TAU)))

    def _make_control(self) -> None:
        """The control branch, with ``residual`` the regression on it, and the ways into the denoiser."""
        c = self.config
        hints, control = (4 * c["width"] + 1) * c["control_patch"] ** 2, c["control_widths"]
        if c["residual"]:
            self.control: UNetEncoder = UNet(
                hints, c["code"] * c["control_patch"] ** 2, control, None, c["blocks"], c["attention"]
            )
            self.readout, self.own = nn.Linear(c["code"], c["code"], bias=False), nn.Linear(c["code"], 2)
            self.own.starts_at_zero = True
        else:
            self.control = UNetEncoder(hints, control, None, c["blocks"], c["attention"])
        ratio = (c["patch"] // c["control_patch"]) ** 2
        self.inject = nn.ModuleList(
            ZeroControl(ratio * a, b, c["code"]) for a, b in zip(control, c["widths"], strict=True)
        )

    def _make_denoiser(self) -> None:
        """The denoising U-Net, and what tells it noise level and gene."""
        c, time = self.config, 4 * self.config["code"]
        self.time = nn.Sequential(nn.Linear(128, time), nn.SiLU(), nn.Linear(time, time))
        self.gene = nn.Linear(c["code"], time)
        side = c["patch"] ** 2
        self.unet = UNet((2 + c["residual"]) * side, side, c["widths"], time, c["blocks"], c["attention"])

    def initialize(self) -> None:
        """Draw initial weights from torch's global generator."""
        super().initialize()
        nn.init.constant_(self.log_tau, math.log(TAU))
        if self.codes.embedding is not None:
            nn.init.normal_(self.codes.embedding.weight, std=0.3)

    @property
    def guidance(self) -> float:
        """Weight ω of classifier-free guidance when sampling; 1 is none."""
        return self._guidance

    @guidance.setter
    def guidance(self, weight: float) -> None:
        if weight != 1 and self.config["p_unconditional"] == 0:
            raise ValueError(
                f"this model was not trained without condition (p_unconditional=0), which guidance={weight} would need; "
                "construct it with p_unconditional=0.1 and fit it, or leave guidance at 1."
            )
        if not (np.isfinite(weight) and weight >= 0):
            raise ValueError(f"`guidance` must be a finite number that is not negative, found {weight!r}.")
        self._guidance = self.config["guidance"] = float(weight)

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Guidance."""
        return {"guidance": self.guidance}

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit(self, train: MapData, validation: MapData | None = None, **options: Any) -> dict[str, list[float]]:
        """Fit the scales and the statistics of genes on the training tiles, then train.

        Options are those of :func:`stgen.train.fit`; those not given are the preset's.

        Raises
        ------
        ValueError
            If no training section has a low-resolution map: features of missing ones are then imputed from nothing.
        """
        options = {**PRESETS[self.config["preset"]]["training"], **options}
        if all(section.measurement is None for section in train.sections):
            raise ValueError(
                "no training section has a low-resolution map, which C3-Diff learns from even where it is to do without one. "
                "Pass low_res=, or leave it out to sum the fine map; for histology alone there is "
                "models.RegressionUNet(genes, use_low_res=False)."
            )
        if options["batch_size"] < FEW_NEGATIVES and self._contrastive_weights():
            logger.warning(
                "batches of %d tiles give the contrastive losses few negatives; batch_size=%d or more is better.",
                options["batch_size"],
                FEW_NEGATIVES,
            )
        self.image_scale.fit(train)
        self.gene_scale.fit(train)
        self.codes.fit(train, self.gene_scale.scale)
        return super().fit(train, validation, **options)

    def _contrastive_weights(self) -> dict[str, float]:
        """Weights of the contrastive losses that are in use."""
        weights = {name: self.config[f"{name}_weight"] for name in ("modal", "content", "inter_sphere")}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Denoising, regression of the mean (with ``residual``) and, in training, the contrastive losses, by name."""
        batch = self._complete(batch)
        size, n_genes = batch["x"].shape[:2]
        present = batch["valid"].flatten(1).any(1)
        if self.training:
            present = present & hidden_apart(present, self.config["p_missing"])
        features = self.encode(batch, present)
        known = batch["tissue"]
        if self.training and self.config["imputation"] == "drop":
            known = known * present[:, None, None, None]
        cond = self._condition(batch, features, present)
        if self.training:
            cond["kept"] = (torch.rand(size, device=known.device) >= self.config["p_unconditional"]).to(known)
        drawn = torch.rand(size, n_genes, device=known.device).argsort(1)[:, : self.config["genes_per_tile"]]
        some = {name: _pick(value, drawn) if name in PER_GENE else value for name, value in cond.items()}
        if self.config["residual"]:
            some["mean"] = some["mean"].detach()  # what remains is for the diffusion to model, not to make small
        x_0 = self.to_network(_pick(batch["x"], drawn), some)
        losses = self.diffusion.loss(lambda x_t, t: self._predict(x_t, t, some), x_0, known)
        self.add_regression(losses, batch["x"] / cond["scale"], cond.get("mean"), known)
        if self.training:
            for name, weight in self._contrastive_weights().items():
                losses[name] = CONTRASTIVE[name](features.embeddings, present, self.log_tau.exp())
                losses["loss"] = losses["loss"] + weight * losses[name]
        return losses

    # ---- conditions --------------------------------------------------------------------------------------------

    def _complete(self, batch: Batch) -> Batch:
        """The batch with a low-resolution map, of zeros and not valid if it has none."""
        if "y" in batch:
            return batch
        size, (_, *shape) = len(batch["h"]), self.sample_shape(batch)
        zeros = batch["h"].new_zeros
        return {**batch, "y": zeros(size, len(self.genes), *shape), "valid": zeros(size, 1, *shape)}

    def encode(self, batch: Batch, present: Tensor) -> Features:
        """Features of histology and low-resolution maps on unit hyperspheres. C3-Diff, Fig. 2a and Eq. 1.

        Parameters
        ----------
        batch
            Conditions, with ``y`` and ``valid``.
        present
            Which items' low-resolution maps may be looked at, shape ``(B,)``.
        """
        h = self.image_scale(batch["h"])
        m_h, c_h = (F.normalize(encoder(h), dim=1) for encoder in (self.modality_h, self.content_h))
        self.check_window(*m_h.shape[2:])
        here = present.to(h)[:, None, None, None]
        valid = F.avg_pool2d(batch["valid"] * here, self.stride)
        y = batch["y"] * here
        y = F.avg_pool2d(y / self.gene_scale.of(y), self.stride)
        profile = torch.einsum("bghw,gd->bdhw", y, self.profile(self.codes())) / y.shape[1] ** 0.5
        inputs = torch.cat([profile, valid], 1)
        m_y, c_y = (F.normalize(encoder(inputs), dim=1) for encoder in (self.modality_y, self.content_y))
        if self.training and self.config["augmentation"]:
            m_y, c_y = (augment(f, self.config["sigma"], dim=1) for f in (m_y, c_y))
        m_y, c_y = (f * (valid > 0) for f in (m_y, c_y))  # where nothing was measured, features are zero
        embeddings = {
            "m_h": self._embed("modality_h", m_h), "c_h": self._embed("content_h", c_h),
            "m_y": self._embed("modality_y", m_y, valid), "c_y": self._embed("content_y", c_y, valid),
        }  # fmt: skip
        strength = max(0.0, 1 - 2 * self.progress) if self.training else 0.0
        m_y = self._imputed(m_y, embeddings["m_h"], present, strength)
        c_y = self._imputed(c_y, embeddings["c_h"], present, strength)
        return Features(m_h, c_h, m_y, c_y, embeddings)

    def _embed(self, name: str, f: Tensor, weight: Tensor | None = None) -> Tensor:
        """A map's embedding on the unit hypersphere, ``(B, d, ...)`` to ``(B, 128)``; noised like the features are."""
        pooled = f.mean((2, 3))
        if weight is not None:
            pooled = (f * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-6)
        z = F.normalize(self.to_sphere[name](pooled), dim=1)
        noised = name.endswith("y") and self.training and self.config["augmentation"]
        return augment(z, self.config["sigma"], dim=1) if noised else z

    def _imputed(self, f_y: Tensor, z_h: Tensor, present: Tensor, strength: float) -> Tensor:
        """Features of low-resolution maps, those of missing ones imputed while training lasts."""
        kind = self.config["imputation"]
        if strength == 0 or kind in ("zero", "drop") or present.all() or not present.any():
            return f_y
        tau = self.log_tau.exp().detach() if kind == "similarity" else torch.inf
        filled = f_y.clone()
        imputed = impute(z_h[~present].detach(), z_h[present].detach(), f_y[present], tau)
        filled[~present] = (strength * imputed).to(filled)
        return filled

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """What guides the denoiser: levels of the control branch, codes, scale and (with ``residual``) the mean."""
        batch = self._complete(batch)
        present = batch["valid"].flatten(1).any(1)
        return self._condition(batch, self.encode(batch, present), present)

    def _condition(self, batch: Batch, features: Features, present: Tensor) -> dict[str, Tensor]:
        c = self.config
        here = present.to(features.m_h)[:, None, None, None]
        shape = features.m_h.shape[2:]
        upsampled = (F.interpolate(f, size=shape, mode="bilinear") for f in (features.m_y, features.c_y))
        hints = torch.cat([features.m_h, features.c_h, *upsampled], 1) * c["width"] ** 0.5
        hints = F.pixel_unshuffle(torch.cat([hints, batch["valid"] * here], 1), c["control_patch"])
        levels = self.control.encode(hints)
        gene, y = self._gene_index(batch), batch["y"] * here
        scale = self.gene_scale.of(y).expand(*y.shape[:2], 1, 1)
        y = _pick(y / scale, gene)
        cond = {"gene": gene, "y": y, "scale": _pick(scale, gene), "kept": here.new_ones(len(y))}
        if c["residual"]:
            levels = self.control.decode(levels)
            readout = F.pixel_shuffle(self.control.finish(levels[0]), c["control_patch"])
            codes = self.codes()[gene]
            gain, shift = self.own(codes)[..., None].chunk(2, 2)
            cond["mean"] = torch.einsum("bchw,bgc->bghw", readout, self.readout(codes)) + gain * y + shift
        ratio = c["patch"] // c["control_patch"]
        return cond | {f"control_{i}": F.pixel_unshuffle(level, ratio) for i, level in enumerate(levels)}

    def _gene_index(self, batch: Batch) -> Tensor:
        """The genes that a batch is to be denoised for, ``(B, K)``; all by default."""
        if "gene" in batch:
            return batch["gene"]
        return torch.arange(len(self.genes), device=batch["h"].device).expand(len(batch["h"]), -1)

    def sample_shape(self, batch: Batch) -> tuple[int, ...]:
        """``(G, H, W)``, for the genes that are asked for."""
        _, *shape = super().sample_shape(batch)
        return (self._gene_index(batch).shape[1], *shape)

    # ---- denoising ---------------------------------------------------------------------------------------------

    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The conditional denoising U-Net, applied to each gene's map by itself.

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
        chunk = max(1, MOST_VALUES // (len(x_t) * x_t.shape[2] * x_t.shape[3]))
        parts = [slice(i, i + chunk) for i in range(0, x_t.shape[1], chunk)]
        return torch.cat([self._guided(x_t, t, cond, part) for part in parts], 1)

    def _guided(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], genes: slice) -> Tensor:
        """The prediction for some of the genes, guided if asked for."""
        some = {name: value[:, genes] if name in PER_GENE else value for name, value in cond.items()}
        conditional = self._predict(x_t[:, genes], t, some)
        if self.guidance == 1:
            return conditional
        nothing = some | {"kept": torch.zeros_like(some["kept"])}
        return guided(conditional, self._predict(x_t[:, genes], t, nothing), self.guidance)

    def _predict(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """One pass of the U-Net; items that are not ``kept`` see no condition."""
        size, n_genes = x_t.shape[:2]
        kept = cond["kept"]
        code = self.codes()[cond["gene"]] * kept[:, None, None]  # (B, G, code)
        seen = [cond[name] * kept[:, None, None, None] for name in ("y", "mean") if name in cond]
        inputs = F.pixel_unshuffle(torch.stack([x_t, *seen], 2).flatten(0, 1), self.config["patch"])
        time = self.time(timestep_embedding(t, 128).to(x_t))
        time = F.silu(time[:, None] + self.gene(code)).flatten(0, 1)
        levels = [
            level + inject(cond[f"control_{i}"] * kept[:, None, None, None], code)
            for i, (level, inject) in enumerate(zip(self.unet.encode(inputs, time), self.inject, strict=True))
        ]
        output = self.unet.finish(self.unet.decode(levels, time)[0])
        return F.pixel_shuffle(output, self.config["patch"]).reshape(size, n_genes, *x_t.shape[2:])

    # ---- other genes -------------------------------------------------------------------------------------------

    def with_genes(self, genes: Sequence[str], gene_embedding: pd.DataFrame) -> C3Diff:
        """The same networks for other genes, also such as the model was not trained on.

        Codes come from the table. What the training tissue says of a gene (its scale and abundance) is, for a new one,
        predicted from the table by a ridge regression on the genes of the training.

        Parameters
        ----------
        genes
            Names of the genes that the new model is for.
        gene_embedding
            A vector for each of them, from where those of the training came.

        Returns
        -------
        A new, fitted model with the same networks.

        Raises
        ------
        ValueError
            If this model has learned a code for each gene by itself, or is not fitted, or the table is of another size.
        KeyError
            If the table lacks a gene.

        Examples
        --------
        >>> import numpy as np, pandas as pd
        >>> from stgen import models
        >>> table = pd.DataFrame(np.eye(3), index=["A", "B", "C"])
        >>> model = models.C3Diff(["A", "B"], gene_embedding=table, width=8, widths=[8, 8], control_widths=[8, 8])
        >>> model.record = {"sections": []}  # stands for a fit
        >>> model.with_genes(["B", "C"], table).genes
        ['B', 'C']
        """
        n_columns = self.config["gene_embedding"]
        if n_columns is None:
            raise ValueError(
                "this model has learned a code for each of its genes and knows no others; construct it with "
                "gene_embedding=<table of all genes> and fit it."
            )
        if not self.fitted:
            raise ValueError("this C3Diff has not been fitted; call stgen.tl.fit(model, data) first.")
        table = torch.as_tensor(_table(gene_embedding, genes))
        if table.shape[1] != n_columns:
            raise ValueError(f"the table has {table.shape[1]} columns and the model's has {n_columns}.")
        new = C3Diff(**{**self.config, "genes": list(genes)})
        new.load_state_dict({**self.state_dict(), **{k: v for k, v in new.state_dict().items() if _of_genes(k)}})
        statistics, scale = self.codes.predict(table.to(self.device))
        for i, gene in enumerate(genes):
            if gene in self.genes:
                known = self.genes.index(gene)
                statistics[i], scale[i] = self.codes.statistics[known], self.gene_scale.scale[known]
        new.codes.table.copy_(table)
        new.codes.statistics.copy_(statistics)
        new.gene_scale.scale.copy_(scale)
        new.record = {**self.record, "trained_on": self.genes}
        return new.to(self.device).eval()


PER_GENE = ("gene", "y", "mean", "scale")  # entries of a condition with genes in dimension 1


class Features(NamedTuple):
    """What the encoders make of a batch. Maps are of unit length at each bin, embeddings as a whole."""

    m_h: Tensor  # (B, d, H, W) modality of the histology
    c_h: Tensor  # (B, d, H, W) content of the histology
    m_y: Tensor  # (B, d, h, w) modality of the low-resolution map, at a coarser resolution
    c_y: Tensor  # (B, d, h, w) content of the low-resolution map
    embeddings: dict[str, Tensor]  # (B, 128) of each of the four


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
        """Take mean, share of bins with a count, and log scale from training tiles, each standardized over the genes."""
        total, some, n = 0, 0, 0
        for batch in data.some(N_TILES):
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
        self.weight = nn.Linear(inputs, outputs, bias=False)
        self.gate = nn.Linear(code, inputs)
        self.weight.starts_at_zero = True

    def forward(self, control: Tensor, code: Tensor) -> Tensor:
        """Control ``(B, inputs, H, W)`` and codes ``(B, G, code)`` to what is added, ``(B * G, outputs, H, W)``."""
        weight = self.weight.weight * (1 + self.gate(code))[:, :, None]  # (B, G, outputs, inputs)
        return torch.einsum("bchw,bgoc->bgohw", control, weight).flatten(0, 1)


# ---- the paper's equations -------------------------------------------------------------------------------------


def augment(z: Tensor, sigma: float, dim: int) -> Tensor:
    """``Norm(z + mu)`` with ``mu ~ N(0, sigma^2)``: noise, then back onto the unit hypersphere. C3-Diff, Eq. 1."""
    return F.normalize(z + sigma * torch.randn_like(z), dim=dim)


def contrastive_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """``-log(e^p / (e^p + sum_k e^n_k))``, the mean over anchors and their positives. C3-Diff, ``L_cl``.

    Parameters
    ----------
    positive
        Similarities ``z . z+ / tau`` of each anchor to its positives, shape ``(n, P)``; minus infinity where a pair is not
        one.
    negatives
        Similarities ``z . z- / tau``, shape ``(n, K)``; minus infinity where a pair is none.

    Returns
    -------
    A scalar; zero where no anchor has a positive and a negative.
    """
    against = negatives.logsumexp(1, keepdim=True).expand_as(positive)
    counted = positive.isfinite() & against.isfinite()
    terms = F.softplus(torch.where(counted, against - positive, 0.0))
    return (terms * counted).sum() / counted.sum().clamp(min=1)


def modal_loss(z: dict[str, Tensor], present: Tensor, tau: Tensor) -> Tensor:
    """Cross-modal loss: a modality's features belong together, whatever the sample. C3-Diff, ``L_modal``.

    Anchor ``M_h^j``, positives ``M_h^k`` of other samples, negatives all ``M_y^k``; and with ``h`` and ``y`` exchanged.

    Parameters
    ----------
    z
        Embeddings ``"m_h", "c_h", "m_y", "c_y"`` of a batch, each ``(B, d)`` on the unit hypersphere; ``y``'s augmented.
    present
        Which samples have a low-resolution map, shape ``(B,)``: others take no part on its side.
    tau
        Temperature.
    """
    m_h, m_y = z["m_h"], z["m_y"][present]
    across = m_h @ m_y.T / tau
    return contrastive_loss(_others(m_h @ m_h.T / tau), across) + contrastive_loss(_others(m_y @ m_y.T / tau), across.T)


def content_loss(z: dict[str, Tensor], present: Tensor, tau: Tensor) -> Tensor:
    """Cross-content loss: the two modalities of a sample belong together. C3-Diff, ``L_content``.

    Anchor ``C_h^j``, positive ``C_y^j``, negatives ``C_h^k`` and ``C_y^k`` of other samples; and with ``h`` and ``y``
    exchanged. Parameters as in :func:`modal_loss`; samples without a low-resolution map are negatives only.
    """
    c_h, c_y = z["c_h"], z["c_y"][present]
    own = torch.eye(len(c_h), dtype=torch.bool, device=c_h.device)[:, present]  # (B, P)
    across = c_h @ c_y.T / tau
    positive = across.masked_fill(~own, -torch.inf)
    to_h = torch.cat([_others(c_h @ c_h.T / tau), across.masked_fill(own, -torch.inf)], 1)
    to_y = torch.cat([_others(c_y @ c_y.T / tau), across.T.masked_fill(own.T, -torch.inf)], 1)
    return contrastive_loss(positive, to_h) + contrastive_loss(positive.T, to_y)


def inter_sphere_loss(z: dict[str, Tensor], present: Tensor, tau: Tensor) -> Tensor:
    """Inter-sphere loss: both features of a histology image belong together. C3-Diff, ``L_inter-sphere``.

    Anchor ``M_h^j``, positive ``C_h^j``, negatives ``C_h^k`` of other samples. Parameters as in :func:`modal_loss`.
    """
    similarity = z["m_h"] @ z["c_h"].T / tau
    return contrastive_loss(similarity.diagonal()[:, None], _others(similarity))


CONTRASTIVE = {"modal": modal_loss, "content": content_loss, "inter_sphere": inter_sphere_loss}


def _others(similarity: Tensor) -> Tensor:
    """Similarities with minus infinity on the diagonal."""
    return similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=similarity.device), -torch.inf)


def impute(z_missing: Tensor, z_present: Tensor, f_y: Tensor, tau: Tensor | float) -> Tensor:
    """``sum_k w_kl f_y^k`` with ``w_kl`` the softmax over ``k`` of ``z_l . z_k / tau``. C3-Diff, dynamic imputation.

    Parameters
    ----------
    z_missing, z_present
        Embeddings of the histology of samples without and with a low-resolution map, shapes ``(L, d)`` and ``(K, d)``.
    f_y
        Features of the low-resolution maps, shape ``(K, ...)``.
    tau
        Temperature; infinity gives the arithmetic mean.

    Returns
    -------
    Shape ``(L, ...)``.
    """
    weight = (z_missing @ z_present.T / tau).softmax(1)
    return torch.tensordot(weight.to(f_y), f_y, 1)


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """``omega eps(x_t, c) + (1 - omega) eps(x_t)``: classifier-free guidance. C3-Diff, Preliminaries."""
    return weight * conditional + (1 - weight) * unconditional


# ---- small things ----------------------------------------------------------------------------------------------


def _ridge(z: Tensor, target: Tensor) -> Tensor:
    """Coefficients and, last, intercepts of a ridge regression whose penalty is chosen by generalized cross-validation."""
    from sklearn.linear_model import RidgeCV

    ridge = RidgeCV(np.logspace(-2, 5, 15)).fit(z.cpu().numpy(), target.cpu().numpy())
    return torch.as_tensor(np.vstack([ridge.coef_.T, ridge.intercept_]), dtype=torch.float32)


def _table(table: pd.DataFrame, genes: Sequence[str]) -> np.ndarray:
    """Rows of a table of gene embeddings, checked."""
    missing = [gene for gene in genes if gene not in table.index]
    if missing:
        raise KeyError(
            f"`gene_embedding` lacks {len(missing)} of {len(genes)} genes: {', '.join(missing[:5])}. Its index must hold "
            "the names of the genes."
        )
    values = table.loc[list(genes)].to_numpy(np.float32)
    if len(values) != len(genes) or not np.isfinite(values).all():
        raise ValueError("`gene_embedding` must have one row for each gene, without missing values.")
    return values


def _of_genes(name: str) -> bool:
    """Whether a tensor of the state is of the genes, rather than of the networks that all share."""
    return name in ("gene_scale.scale", "codes.statistics", "codes.table")


def _pick(value: Tensor, gene: Tensor) -> Tensor:
    """The entries ``(B, K, ...)`` of some genes ``(B, K)`` among those of all, ``(B, G, ...)``."""
    return value[torch.arange(len(gene), device=gene.device)[:, None], gene]

"""C3-Diff: cross-modal cross-content contrastive diffusion for super-resolved gene maps (Wang et al., 2026)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen._checks import check_not_negative, check_whole
from stgen.data import Batch, MapData
from stgen.models._layers import ImageStem, ResBlock, UNet, UNetEncoder, timestep_embedding, zero_module
from stgen.models._map_diffusion import MapDiffusionModel
from stgen.models._maps import GeneScale, ImageScale
from stgen.models._options import choose
from stgen.models.c3diff.losses import CONTRASTIVE, augment, guided, impute
from stgen.models.c3diff.networks import GeneCode, ZeroControl, embedding_table
from stgen.models.c3diff.options import PRESETS
from stgen.transforms import TransformName

__all__ = ["C3Diff"]

logger = logging.getLogger("stgen")

EMBEDDING = 128  # size of the embeddings that are contrasted
TAU = 0.07  # at the start
FEW_NEGATIVES = 8
MOST_VALUES = 2**19  # of one channel that the denoiser works on at a time: more is slower on a CPU


class C3Diff(MapDiffusionModel):
    """C3-Diff: sharpens gene maps with histology, one gene at a time, with or without a low-resolution map.

    Histology and low-resolution map each have a modality encoder and a content encoder, whose features lie on unit
    hyperspheres and are arranged there by three contrastive losses. A control branch makes of them what guides a
    denoising U-Net, in which a code says which gene it is about. The networks are the same for all genes, however many.

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
        ``"default"`` is small and fits on a CPU in minutes; ``"paper"`` has the networks of the released code and wants
        a GPU.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    gene_embedding
        A vector for each gene (a table whose index names genes, of protein or language embeddings, say), from which
        gene codes are then made instead of being learned: see :meth:`with_genes`. Or the number of its columns, for a
        model whose weights are loaded.
    **options
        Fields of :class:`stgen.models.C3DiffOptions`, each in place of the preset's.

    Attributes
    ----------
    guidance
        Weight ω of classifier-free guidance when sampling; 1 is none. May be set, and is saved with the model.

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
        gene_embedding: pd.DataFrame | int | None = None,
        **options: Any,
    ) -> None:
        chosen = choose(PRESETS, preset, options, "C3Diff")
        table, columns = None, gene_embedding
        if isinstance(gene_embedding, pd.DataFrame):
            table = embedding_table(gene_embedding, genes)
            columns = table.shape[1]
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            px_um=chosen.px_um, transform=transform, preset=preset,
            gene_embedding=None if columns is None else check_whole("gene_embedding", columns),
            **chosen.options.to_config(),
        )  # fmt: skip
        self.options = o = chosen.options
        self.place_windows(2 ** (len(o.widths) - 1) * o.patch, chosen.tile_um)
        self.needs_low_res = o.p_missing == 0
        self.guidance = o.guidance
        self.diffusion = replace(chosen.diffusion, prediction=o.prediction)
        self.image_scale = ImageScale(self.config["image_channels"])
        self.gene_scale = GeneScale(len(self.genes), o.scale)
        self.codes = GeneCode(len(self.genes), o.code, self.config["gene_embedding"])
        if table is not None:
            self.codes.table.copy_(torch.as_tensor(table))
        self._make_encoders()
        self._make_control()
        self._make_denoiser()
        self.initialize()

    def _make_encoders(self) -> None:
        """Four encoders, their projections, and the learned temperature."""
        o, d = self.options, self.options.width
        channels, px = self.config["image_channels"], self.config["px_per_bin"]
        self.stride = math.gcd(4, self.align)  # at which low-resolution maps, which are smooth, are encoded
        self.modality_h, self.content_h = (nn.Sequential(ImageStem(channels, d, px), ResBlock(d, d)) for _ in range(2))
        self.profile = nn.Linear(o.code, 2 * d)
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
        o = self.options
        hints, control = (4 * o.width + 1) * o.control_patch**2, o.control_widths
        if o.residual:
            self.control: UNetEncoder = UNet(hints, o.code * o.control_patch**2, control, None, o.blocks, o.attention)
            self.readout = nn.Linear(o.code, o.code, bias=False)
            self.own = zero_module(nn.Linear(o.code, 2))
        else:
            self.control = UNetEncoder(hints, control, None, o.blocks, o.attention)
        ratio = (o.patch // o.control_patch) ** 2
        self.inject = nn.ModuleList(ZeroControl(ratio * a, b, o.code) for a, b in zip(control, o.widths, strict=True))

    def _make_denoiser(self) -> None:
        """The denoising U-Net, and what tells it noise level and gene."""
        o, time = self.options, 4 * self.options.code
        self.time = nn.Sequential(nn.Linear(128, time), nn.SiLU(), nn.Linear(time, time))
        self.gene = nn.Linear(o.code, time)
        side = o.patch**2
        self.unet = UNet((2 + o.residual) * side, side, o.widths, time, o.blocks, o.attention)

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
        weight = check_not_negative("guidance", weight)
        if weight != 1 and self.options.p_unconditional == 0:
            raise ValueError(
                f"this model was not trained without condition (p_unconditional=0), which guidance={weight} would "
                f"need; "
                "construct it with p_unconditional=0.1 and fit it, or leave guidance at 1."
            )
        self._guidance = weight

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Guidance."""
        return {"guidance": self.guidance}

    # ---- fitting -----------------------------------------------------------------------------------------------

    def check_training(self, train: MapData, options: Mapping[str, Any]) -> None:
        """Refuse tiles without any low-resolution map: features of missing ones are then imputed from nothing."""
        if all(section.measurement is None for section in train.sections):
            raise ValueError(
                "no training section has a low-resolution map, which C3-Diff learns from even where it is to do "
                "without one. "
                "Pass low_res=, or leave it out to sum the fine map; for histology alone there is "
                "models.RegressionUNet(genes, use_low_res=False)."
            )
        if options["batch_size"] < FEW_NEGATIVES and self._contrastive_weights():
            logger.warning(
                "batches of %d tiles give the contrastive losses few negatives; batch_size=%d or more is better.",
                options["batch_size"],
                FEW_NEGATIVES,
            )

    def fit_constants(self, train: MapData) -> None:
        """Take the scales and the statistics of genes from the training tiles."""
        super().fit_constants(train)
        self.codes.fit(train, self.gene_scale.scale)

    def _contrastive_weights(self) -> dict[str, float]:
        """Weights of the contrastive losses that are in use."""
        o = self.options
        weights = {"modal": o.modal_weight, "content": o.content_weight, "inter_sphere": o.inter_sphere_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Denoising, regression of the mean (with ``residual``) and, in training, the contrastive losses, by name."""
        batch = self.with_low_res(batch)
        size, n_genes = batch["x"].shape[:2]
        present = self.with_measurement(batch, self.options.p_missing)
        features = self.encode(batch, present)
        known = batch["tissue"]
        if self.training and self.options.imputation == "drop":
            known = known * present[:, None, None, None]
        cond = self._condition(batch, features, present)
        if self.training:
            cond["kept"] = (torch.rand(size, device=known.device) >= self.options.p_unconditional).to(known)
        drawn = torch.rand(size, n_genes, device=known.device).argsort(1)[:, : self.options.genes_per_tile]
        some = {name: _pick(value, drawn) if name in PER_GENE else value for name, value in cond.items()}
        losses = self.denoising_loss(_pick(batch["x"], drawn), some, known, self._predict).losses
        self.add_regression(losses, batch["x"], cond, known)
        if self.training:
            for name, weight in self._contrastive_weights().items():
                losses[name] = CONTRASTIVE[name](features.embeddings, present, self.log_tau.exp())
                losses["loss"] = losses["loss"] + weight * losses[name]
        return losses

    # ---- conditions --------------------------------------------------------------------------------------------

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
        if self.training and self.options.augmentation:
            m_y, c_y = (augment(f, self.options.sigma, dim=1) for f in (m_y, c_y))
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
        noised = name.endswith("y") and self.training and self.options.augmentation
        return augment(z, self.options.sigma, dim=1) if noised else z

    def _imputed(self, f_y: Tensor, z_h: Tensor, present: Tensor, strength: float) -> Tensor:
        """Features of low-resolution maps, those of missing ones imputed while training lasts."""
        kind = self.options.imputation
        if strength == 0 or kind in ("zero", "drop") or present.all() or not present.any():
            return f_y
        tau = self.log_tau.exp().detach() if kind == "similarity" else torch.inf
        filled = f_y.clone()
        imputed = impute(z_h[~present].detach(), z_h[present].detach(), f_y[present], tau)
        filled[~present] = (strength * imputed).to(filled)
        return filled

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """What guides the denoiser: levels of the control branch, codes, scale and (with ``residual``) the mean."""
        batch = self.with_low_res(batch)
        present = batch["valid"].flatten(1).any(1)
        return self._condition(batch, self.encode(batch, present), present)

    def _condition(self, batch: Batch, features: Features, present: Tensor) -> dict[str, Tensor]:
        o = self.options
        here = present.to(features.m_h)[:, None, None, None]
        shape = features.m_h.shape[2:]
        upsampled = (F.interpolate(f, size=shape, mode="bilinear") for f in (features.m_y, features.c_y))
        hints = torch.cat([features.m_h, features.c_h, *upsampled], 1) * o.width**0.5
        hints = F.pixel_unshuffle(torch.cat([hints, batch["valid"] * here], 1), o.control_patch)
        levels = self.control.encode(hints)
        gene, y = self._gene_index(batch), batch["y"] * here
        scale = self.gene_scale.of(y).expand(*y.shape[:2], 1, 1)
        y = _pick(y / scale, gene)
        cond = {"gene": gene, "y": y, "scale": _pick(scale, gene), "kept": here.new_ones(len(y))}
        if isinstance(self.control, UNet):  # with `residual`
            levels = self.control.decode(levels)
            readout = F.pixel_shuffle(self.control.finish(levels[0]), o.control_patch)
            codes = self.codes()[gene]
            gain, shift = self.own(codes)[..., None].chunk(2, 2)
            cond["mean"] = torch.einsum("bchw,bgc->bghw", readout, self.readout(codes)) + gain * y + shift
        ratio = o.patch // o.control_patch
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
        inputs = F.pixel_unshuffle(torch.stack([x_t, *seen], 2).flatten(0, 1), self.options.patch)
        time = self.time(timestep_embedding(t, 128).to(x_t))
        time = F.silu(time[:, None] + self.gene(code)).flatten(0, 1)
        levels = [
            level + inject(cond[f"control_{i}"] * kept[:, None, None, None], code)
            for i, (level, inject) in enumerate(zip(self.unet.encode(inputs, time), self.inject, strict=True))
        ]
        output = self.unet.finish(self.unet.decode(levels, time)[0])
        return F.pixel_shuffle(output, self.options.patch).reshape(size, n_genes, *x_t.shape[2:])

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
        table = torch.as_tensor(embedding_table(gene_embedding, genes))
        if table.shape[1] != n_columns:
            raise ValueError(f"the table has {table.shape[1]} columns and the model's has {n_columns}.")
        new = C3Diff(**{**self.config, "genes": list(genes), "guidance": self.guidance})
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


def _of_genes(name: str) -> bool:
    """Whether a tensor of the state is of the genes, rather than of the networks that all share."""
    return name in ("gene_scale.scale", "codes.statistics", "codes.table")


def _pick(value: Tensor, gene: Tensor) -> Tensor:
    """The entries ``(B, K, ...)`` of some genes ``(B, K)`` among those of all, ``(B, G, ...)``."""
    return value[torch.arange(len(gene), device=gene.device)[:, None], gene]

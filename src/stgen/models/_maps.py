"""What all models of gene maps share: windows of map, low-resolution map and histology on one grid, and their scales."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from stgen.data import Batch, MapData
from stgen.diffusion import weighted_mean
from stgen.measurement import Kernel
from stgen.models._base import DiffusionModel, Model
from stgen.models._layers import draw_weights
from stgen.transforms import TransformName, inverse_transform

__all__ = [
    "GeneScale",
    "ImageScale",
    "MapDiffusionModel",
    "MapModel",
    "check_not_negative",
    "check_shares",
    "from_preset",
    "hidden_apart",
]

N_TILES = 256  # training tiles that constants are taken from
VALUES_PER_TILE = 4096
PIXEL_UM = 2.5
TILE_UM = 640.0

GeneScaleKind = Literal["std", "quantile", "map"]


class MapModel(Model):
    """A model that sharpens gene maps.

    Parameters
    ----------
    genes
        Names of the genes.
    factor
        Bins along the side of a low-resolution one (10 for 100 µm to 10 µm).
    bin_um
        Side of a bin, in µm.
    image_channels
        Channels of the histology image.
    px_per_bin
        Pixels along a bin at which the image is read; by default such that they are 2.5 µm.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`; one that can be undone.

    Attributes
    ----------
    align
        Windows start at multiples of this many bins of the grid, and their sides are such multiples.
    halo
        Margin in bins, a multiple of ``align``, beyond which the rest of a section does not matter to a bin.
    kernel
        How the low-resolution data are interpolated, see :meth:`stgen.measurement.Measurement.interpolate`.
    gene_wise
        Each gene is sampled by itself, given the conditions; those that are wanted are named in a batch as ``gene``.
    fixed_tile
        Windows are squares of ``align`` bins and no others: the model sees a whole tile.
    needs_image, needs_low_res
        What the model cannot do without.
    uses_low_res
        Whether the model looks at the low-resolution data where there are any.
    needs_labels, needs_text
        Whether the model looks at a mask of nuclei (``s`` in a batch), and takes a prompt (``text``), of which
        ``embed_prompt(prompt)`` makes a vector.
    """

    takes: ClassVar[Literal["locations", "maps"]] = "maps"
    needs_image: ClassVar[bool] = True
    needs_low_res: bool = True
    uses_low_res: bool = True
    needs_labels: bool = False
    needs_text: bool = False
    gene_wise: ClassVar[bool] = False
    align: int = 1
    halo: int = 0
    kernel: Kernel = "gaussian"
    fixed_tile: bool = False

    def __init__(
        self,
        *,
        genes: Sequence[str],
        factor: int,
        bin_um: float,
        image_channels: int,
        px_per_bin: int | None,
        transform: TransformName,
        **config: Any,
    ) -> None:
        if not bin_um > 0:
            raise ValueError(f"`bin_um` must be a positive number of µm, found {bin_um!r}.")
        px_per_bin = max(1, round(bin_um / PIXEL_UM)) if px_per_bin is None else px_per_bin
        for name, value in (("factor", factor), ("image_channels", image_channels), ("px_per_bin", px_per_bin)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"`{name}` must be a positive whole number, found {value!r}.")
        inverse_transform(torch.zeros(1), transform)  # a map's counts must come back
        super().__init__(
            genes=list(genes), factor=factor, bin_um=float(bin_um), image_channels=image_channels, px_per_bin=px_per_bin,
            transform=transform, **config,
        )  # fmt: skip

    @property
    def tile(self) -> int:
        """Side of a training tile in bins, unless another is asked for: about 640 µm."""
        return max(1, round(TILE_UM / self.config["bin_um"] / self.align)) * self.align

    def expect(self, batch: Batch) -> Tensor | None:
        """The expected map on the scale ``transform``, ``(B, G, H, W)``, if the model knows it without drawing samples."""
        return None

    def check_window(self, height: int, width: int) -> None:
        """Refuse a window that the network cannot take."""
        if self.fixed_tile and (height, width) != (self.align, self.align):
            raise ValueError(
                f"this {type(self).__name__} takes tiles of {self.align} x {self.align} bins and no others, found "
                f"{height} x {width}."
            )
        if height % self.align or width % self.align:
            raise ValueError(
                f"{type(self).__name__} takes windows whose sides are multiples of {self.align} bins, found {height} x "
                f"{width}."
            )


class PointMapModel(MapModel):
    """A map model that predicts one map and no spread; :meth:`predict` is all that a subclass adds to its fit."""

    stochastic: ClassVar[bool] = False

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Map on the scale ``transform``, shape ``(B, G, H, W)``."""

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        n_samples: int = 1,
        steps: int | None = None,
        generator: Any = None,
        solver: str = "dpm++",
        noise: Any = None,
        project: Any = None,
    ) -> Tensor:
        """The prediction, projected if asked, as often as samples are asked for: ``(B, n_samples, G, H, W)``."""
        x = self.predict(batch)
        x = x if project is None else project(x)
        return x[:, None].expand(-1, n_samples, -1, -1, -1)


class MapDiffusionModel(MapModel, DiffusionModel):
    """A map model that diffuses; its condition has a ``scale`` for each gene and, for a residual, the predicted ``mean``."""

    def initialize(self) -> None:
        """Draw initial weights from torch's global generator."""
        draw_weights(self)

    def expect(self, batch: Batch) -> Tensor | None:
        """What the regression predicts, of a model that diffuses only what remains; samples scatter around it."""
        cond = self.condition(batch)
        return self.from_network(torch.zeros_like(cond["mean"]), cond) if "mean" in cond else None

    def add_regression(self, losses: dict[str, Tensor], x: Tensor, mean: Tensor | None, known: Tensor | None) -> None:
        """Add to the losses the squared error of a predicted mean, if there is one, on the network's scale.

        Parameters
        ----------
        losses
            Those of the diffusion; gets ``"mean"``, also as part of ``"loss"``.
        x
            Expression on the network's scale, shape ``(B, G, H, W)``.
        mean
            What the regression predicts of it.
        known
            Which bins are known, shape ``(B, 1, H, W)``; all by default.
        """
        if mean is not None:
            losses["mean"] = weighted_mean((x - mean).square(), known)
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


def from_preset(
    presets: Mapping[str, Mapping[str, Any]],
    preset: str,
    given: Mapping[str, Any],
    *,
    bin_um: float,
    px_per_bin: int | None,
) -> dict[str, Any]:
    """A preset with what is given (not ``None``) in place of its own; and ``px_per_bin``, of the preset's ``"px_um"``."""
    if preset not in presets:
        raise ValueError(f"`preset` must be one of {', '.join(map(repr, presets))}, found {preset!r}.")
    chosen = presets[preset] | {k: v for k, v in given.items() if v is not None}
    if px_per_bin is None and chosen["px_um"]:
        px_per_bin = max(1, round(bin_um / chosen["px_um"]))
    lists = {k: list(v) for k, v in chosen.items() if isinstance(v, Sequence) and not isinstance(v, str)}
    return {**chosen, **lists, "px_per_bin": px_per_bin}


def check_shares(**values: float) -> None:
    """Refuse what is no share of something that must not be all of it."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be a share in [0, 1), found {value!r}.")


def check_not_negative(**values: float) -> None:
    """Refuse negative and infinite numbers."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` must be a finite number that is not negative, found {value!r}.")


def hidden_apart(present: Tensor, p: float) -> Tensor:
    """Which samples are not hidden when each is with probability ``p``; one that is present never is, shape ``(B,)``."""
    chance = torch.rand(len(present), device=present.device)
    shown = chance >= p
    shown[torch.where(present, chance, -1.0).argmax()] = True
    return shown


class GeneScale(nn.Module):
    """Invertible scale of maps per gene, fitted on training tissue and kept with the weights.

    Parameters
    ----------
    n_genes
        Number of genes.
    kind
        Divide by the ``"std"`` of training bins, by their 99.5 % ``"quantile"`` (at least that of a single count), or,
        as the papers do, by the range of each ``"map"``. The range is that of the low-resolution map, which is there
        when sampling, too.
    """

    def __init__(self, n_genes: int, kind: GeneScaleKind) -> None:
        super().__init__()
        if kind not in get_args(GeneScaleKind):
            raise ValueError(f"`scale` must be one of {', '.join(map(repr, get_args(GeneScaleKind)))}, found {kind!r}.")
        self.kind = kind
        self.register_buffer("scale", torch.ones(n_genes))

    def fit(self, data: MapData) -> GeneScale:
        """Take the constants from training tiles."""
        x = torch.cat([_thinned(b["x"][0][:, b["tissue"][0, 0] > 0]) for b in data.some(N_TILES)], 1)
        if self.kind == "std":
            scale = x.std(1, correction=0)
        else:
            k = max(1, round(0.005 * x.shape[1]))
            smallest = torch.where(x > 0, x, torch.inf).amin(1)
            scale = torch.maximum(x.topk(k, 1).values[:, -1], torch.where(smallest.isfinite(), smallest, 0))
        self.scale.copy_(torch.where(scale > 1e-6, scale, torch.ones_like(scale)))
        return self

    def of(self, y: Tensor) -> Tensor:
        """What to divide by, shape ``(B, G, 1, 1)``, given the low-resolution maps ``(B, G, H, W)``."""
        fitted = self.scale[None, :, None, None]
        if self.kind != "map":
            return fitted
        low, high = y.amin((2, 3), keepdim=True), y.amax((2, 3), keepdim=True)
        return torch.where(high > low, high - low, fitted)


def _thinned(x: Tensor) -> Tensor:
    """At most ``VALUES_PER_TILE`` of the columns, evenly spread."""
    return x[:, :: max(1, -(-x.shape[1] // VALUES_PER_TILE))]


class ImageScale(nn.Module):
    """Standardization of image channels, fitted on training tissue; far values are compressed (``asinh``)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def fit(self, data: MapData) -> ImageScale:
        """Take mean and standard deviation of each channel from training tiles."""
        total, squares, n = 0, 0, 0
        for batch in data.some(N_TILES):
            h = batch["h"][0].double().flatten(1)
            total, squares, n = total + h.sum(1), squares + h.square().sum(1), n + h.shape[1]
        mean = total / n
        scale = (squares / n - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 1e-6, scale, torch.ones_like(scale)))
        return self

    def forward(self, h: Tensor) -> Tensor:
        """Standardize ``(B, C, ...)``."""
        return torch.asinh((h - self.mean[:, None, None]) / self.scale[:, None, None])

"""Models of gene maps: windows of map, low-resolution map and histology on one grid, and their scales."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from stgen._checks import check_choice, check_positive, check_whole
from stgen.data import Batch, MapData, MapInputs
from stgen.diffusion import Generators, Solver
from stgen.measurement import Kernel
from stgen.models._base import SteppedModel
from stgen.models._layers import draw_weights
from stgen.models._map_maker import MapMaker
from stgen.models._map_sampler import NetworkSampler
from stgen.sampling import MapSampler, SamplingOptions
from stgen.train import History
from stgen.transforms import TransformName, inverse_transform

__all__ = [
    "GeneScale",
    "GeneScaleKind",
    "ImageScale",
    "MapModel",
    "PointMapModel",
    "SteppedMapModel",
    "training_tiles",
]

N_TILES = 256  # training tiles that constants are taken from
VALUES_PER_TILE = 4096
PIXEL_UM = 2.5
TILE_UM = 640.0
HALO = 32  # bins, of the networks of all families

GeneScaleKind = Literal["std", "quantile", "map"]


def training_tiles(data: MapData, share: int = 1) -> Iterator[Batch]:
    """The tiles that constants are taken from, each as a batch of one; with a ``share``, only every so many of them."""
    return data.some(N_TILES // share)


class MapModel(MapMaker[MapData]):
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
    """

    takes: ClassVar[Literal["locations", "maps", "sections"]] = "maps"
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
        px_um: float = PIXEL_UM,
        **config: Any,
    ) -> None:
        check_positive("bin_um", bin_um)
        px_per_bin = max(1, round(bin_um / px_um)) if px_per_bin is None else px_per_bin
        inverse_transform(np.zeros(1), transform)  # a map's counts must come back
        super().__init__(
            genes=genes, factor=check_whole("factor", factor), bin_um=float(bin_um),
            image_channels=check_whole("image_channels", image_channels),
            px_per_bin=check_whole("px_per_bin", px_per_bin), transform=transform, **config,
        )  # fmt: skip

    def place_windows(self, align: int, tile_um: float | None = None) -> None:
        """Set :attr:`align`, and the :attr:`halo` or, with the side of a tile, that there are no other windows."""
        self.fixed_tile = tile_um is not None
        self.align = align
        if tile_um is not None:
            self.align *= max(1, round(tile_um / self.config["bin_um"] / align))
        self.halo = 0 if self.fixed_tile else -(-HALO // align) * align

    @property
    def tile(self) -> int:
        """Side of a training tile in bins, unless another is asked for: about 640 µm."""
        return max(1, round(TILE_UM / self.config["bin_um"] / self.align)) * self.align

    def expect(self, batch: Batch) -> Tensor | None:
        """The expected map on the scale ``transform``, ``(B, G, H, W)``, if it is known without drawing samples."""
        return None

    def sampler(self, inputs: MapInputs, genes: Sequence[str], options: SamplingOptions) -> MapSampler:
        """Windows sampled with the network."""
        return NetworkSampler(self, inputs, genes, options)

    def embed_prompt(self, prompt: str) -> np.ndarray:
        """What the model is told by a prompt, shape ``(D,)``, of a model that takes one."""
        raise ValueError(f"this {type(self).__name__} takes no text.")

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
        generator: Generators = None,
        solver: Solver = "dpm++",
        noise: Callable[[], Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The prediction, projected if asked, as often as samples are asked for: ``(B, n_samples, G, H, W)``."""
        x = self.predict(batch)
        x = x if project is None else project(x)
        return self.finite(x)[:, None].expand(-1, n_samples, -1, -1, -1)


class SteppedMapModel(MapModel, SteppedModel[MapData]):
    """A map model that is trained in steps, on maps and images that are brought to scale.

    What else a family takes from the training tiles before it is trained, :meth:`fit_constants` fits; what it must
    refuse before that, :meth:`check_training` does.
    """

    image_scale: ImageScale
    gene_scale: GeneScale

    def initialize(self) -> None:
        """Draw initial weights from torch's global generator."""
        draw_weights(self)

    def check_training(self, train: MapData, options: Mapping[str, Any]) -> None:
        """Refuse training tiles, or options of :func:`stgen.train.fit`, that the model cannot be trained with."""

    def fit_constants(self, train: MapData) -> None:
        """Take what does not change in training from the training tiles: here, the scales."""
        self.image_scale.fit(train)
        self.gene_scale.fit(train)

    def fit(self, train: MapData, validation: MapData | None = None, **options: Any) -> History:
        """Fit constants such as scales on the training tiles, then train.

        Options are those of :func:`stgen.train.fit`; those not given are :attr:`training_options`.

        Raises
        ------
        ValueError
            If the model cannot be trained on these tiles.
        """
        self.check_options(**options)
        self.check_training(train, {**self.training_options, **options})
        self.fit_constants(train)
        return super().fit(train, validation, **options)


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

    scale: Tensor

    def __init__(self, n_genes: int, kind: GeneScaleKind) -> None:
        super().__init__()
        self.kind = check_choice("scale", kind, get_args(GeneScaleKind))
        self.register_buffer("scale", torch.ones(n_genes))

    def fit(self, data: MapData) -> GeneScale:
        """Take the constants from training tiles."""
        x = torch.cat([_thinned(b["x"][0][:, b["tissue"][0, 0] > 0]) for b in training_tiles(data)], 1)
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

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def fit(self, data: MapData) -> ImageScale:
        """Take mean and standard deviation of each channel from training tiles."""
        total = squares = torch.zeros((), dtype=torch.float64)
        n = 0
        for batch in training_tiles(data):
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

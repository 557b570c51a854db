"""Simple models of gene maps with the interface of the others, to be reported beside every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stgen._checks import check_choice, check_each, check_flag, check_whole
from stgen.data import Batch, MapData, SpotData
from stgen.diffusion import weighted_mean
from stgen.features import gaussian_blur
from stgen.measurement import Kernel
from stgen.models._baselines import LinearProbe
from stgen.models._layers import ImageStem, UNet
from stgen.models._maps import GeneScale, ImageScale, PointMapModel, SteppedMapModel
from stgen.models._options import check_size
from stgen.train import History
from stgen.transforms import TransformName

__all__ = ["Interpolate", "PixelProbe", "RegressionUNet"]


class Interpolate(PointMapModel):
    """Interpolation of the low-resolution map, without the image: what guidance by histology must beat.

    Parameters
    ----------
    genes
        Names of the genes.
    kernel
        ``"nearest"``, ``"linear"`` (bilinear), ``"cubic"`` (bicubic) or ``"gaussian"``; see
        :meth:`stgen.measurement.Measurement.interpolate`.
    factor, bin_um, image_channels, px_per_bin, transform
        See :class:`stgen.models.RegressionUNet`. The image is not looked at.

    Examples
    --------
    >>> import torch
    >>> from stgen import models
    >>> model = models.Interpolate(["A"], kernel="nearest")
    >>> model.sample({"y": torch.ones(1, 1, 4, 4)}).shape
    torch.Size([1, 1, 1, 4, 4])
    """

    @property
    def needs_image(self) -> bool:
        """The image is not looked at."""
        return False

    def __init__(
        self,
        genes: Sequence[str],
        *,
        kernel: Kernel = "cubic",
        factor: int = 10,
        bin_um: float = 10.0,
        image_channels: int = 3,
        px_per_bin: int = 1,
        transform: TransformName = "log1p_raw",
    ) -> None:
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            transform=transform, kernel=check_choice("kernel", kernel, get_args(Kernel)),
        )  # fmt: skip
        self.kernel = kernel
        self.record = {"sections": []}  # there is nothing to fit

    def fit(self, train: MapData, validation: MapData | None = None, **options: Any) -> History:
        """Nothing to fit; there are no options."""
        self.check_options(**options)
        return {}

    def predict(self, batch: Batch) -> Tensor:
        """The interpolated map."""
        return batch["y"]


class PixelProbe(PointMapModel):
    """Linear probe for maps: ridge regression of a bin on plain image features and the interpolated low-resolution map.

    Features of a bin are the mean and the spread of each image channel, blurs of both at several scales, and the
    low-resolution map of all genes. The regression is :class:`stgen.models.LinearProbe`'s.

    Parameters
    ----------
    genes
        Names of the genes.
    blurs
        Standard deviations of the blurs, in bins.
    n_bins
        Bins to fit on, at most.
    factor, bin_um, image_channels, px_per_bin, transform
        See :class:`stgen.models.RegressionUNet`.

    Examples
    --------
    >>> import torch
    >>> from stgen import models
    >>> model = models.PixelProbe(["A"], image_channels=2, px_per_bin=2, blurs=[2.0])
    >>> batch = {"h": torch.rand(1, 2, 16, 16), "y": torch.ones(1, 1, 8, 8), "valid": torch.ones(1, 1, 8, 8)}
    >>> model.features(batch).shape, model.sample(batch).shape
    (torch.Size([1, 9, 8, 8]), torch.Size([1, 1, 1, 8, 8]))
    """

    kernel: Kernel = "linear"

    def __init__(
        self,
        genes: Sequence[str],
        *,
        blurs: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
        n_bins: int = 60_000,
        factor: int = 10,
        bin_um: float = 10.0,
        image_channels: int = 3,
        px_per_bin: int | None = None,
        transform: TransformName = "log1p_raw",
    ) -> None:
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            transform=transform, blurs=check_each("blurs", blurs, check_size, least=0),
            n_bins=check_whole("n_bins", n_bins),
        )  # fmt: skip
        blurs = self.config["blurs"]
        n_features = 2 * self.config["image_channels"] * (1 + len(blurs)) + len(self.genes)
        self.halo = int(np.ceil(3 * max(blurs, default=0)))
        self.probe = LinearProbe(self.genes, embedding_dim=n_features, transform=transform)

    def features(self, batch: Batch) -> Tensor:
        """Features of each bin, shape ``(B, D, H, W)``."""
        side = self.config["px_per_bin"]
        mean = F.avg_pool2d(batch["h"], side)
        spread = (F.avg_pool2d(batch["h"].square(), side) - mean.square()).clamp(min=0).sqrt()
        plain = torch.cat([mean, spread], 1)
        blurred = [
            gaussian_blur(plain, sigma, radius=int(np.ceil(3 * sigma)), repeat_edge=False)
            for sigma in self.config["blurs"]
        ]
        return torch.cat([plain, *blurred, batch["y"]], 1)

    def fit(self, train: MapData, validation: MapData | None = None, **options: Any) -> History:
        """Solve on training and validation tiles together: validation happens inside. There are no options."""
        self.check_options(**options)
        h, x, group = [], [], []
        rng = np.random.default_rng(0)
        for number, data in enumerate(d for d in (train, validation) if d is not None):
            for batch in data.some(128):
                known = np.flatnonzero(batch["tissue"].numpy())
                chosen = rng.permutation(known)[: self.config["n_bins"] // 128]
                h.append(self.features(batch)[0].flatten(1)[:, chosen].T)
                x.append(batch["x"][0].flatten(1)[:, chosen].T)
                section, row, column = data.corners[int(batch["index"])]
                block = hash((number, int(section), int(row) // data.tile, int(column) // data.tile))
                group.append(np.full(len(chosen), block))
        self.probe.fit(SpotData(torch.cat(x).numpy(), torch.cat(h).numpy(), np.concatenate(group)))
        return {}

    def predict(self, batch: Batch) -> Tensor:
        """The linear prediction."""
        return self.probe.predict(self.features(batch).movedim(1, -1)).movedim(-1, 1)


class RegressionUNet(SteppedMapModel, PointMapModel):
    """The convolutional network of the diffusion models, trained to predict the mean: blurred, but hard to beat.

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
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    use_low_res
        Give the network the low-resolution map; without it the map comes from the image alone.
    widths
        Channels at each resolution, finest first.

    Examples
    --------
    >>> import torch
    >>> from stgen import models
    >>> model = models.RegressionUNet(["A", "B"], image_channels=3, widths=[8, 8])
    >>> batch = {"h": torch.rand(1, 3, 32, 32), "y": torch.rand(1, 2, 8, 8), "valid": torch.ones(1, 1, 8, 8)}
    >>> model.sample(batch).shape
    torch.Size([1, 1, 2, 8, 8])
    """

    halo = 32

    def __init__(
        self,
        genes: Sequence[str],
        *,
        factor: int = 10,
        bin_um: float = 10.0,
        image_channels: int = 3,
        px_per_bin: int | None = None,
        transform: TransformName = "log1p_raw",
        use_low_res: bool = True,
        widths: Sequence[int] = (32, 64, 96),
    ) -> None:
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            transform=transform, use_low_res=check_flag("use_low_res", use_low_res),
            widths=check_each("widths", widths, check_whole),
        )  # fmt: skip
        channels, widths, n_genes = self.config["image_channels"], self.config["widths"], len(self.genes)
        self.align = 2 ** (len(widths) - 1)
        self.needs_low_res = self.uses_low_res = self.config["use_low_res"]
        self.image_scale, self.gene_scale = ImageScale(channels), GeneScale(n_genes, "std")
        self.stem = ImageStem(channels, widths[0], self.config["px_per_bin"])
        self.unet = UNet(widths[0] + (n_genes + 1 if self.uses_low_res else 0), n_genes, widths)
        self.initialize()

    @property
    def training_options(self) -> dict[str, Any]:
        """Those that are enough for the default widths."""
        return dict(TRAINING)

    def predict(self, batch: Batch) -> Tensor:
        """Map on the scale ``transform``, shape ``(B, G, H, W)``."""
        inputs = [self.stem(self.image_scale(batch["h"]))]
        self.check_window(*inputs[0].shape[2:])
        if self.config["use_low_res"]:
            inputs += [batch["y"] / self.gene_scale.of(batch["y"]), batch["valid"]]
        x = self.unet(torch.cat(inputs, 1))
        return x * self.gene_scale.of(x)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error in units of each gene's standard deviation."""
        error = (self.predict(batch) - batch["x"]) / self.gene_scale.of(batch["x"])
        loss = weighted_mean(error.square(), batch["tissue"])
        return {"loss": loss, "mse": loss.detach()}


TRAINING = {"steps": 600, "batch_size": 8, "lr": 2e-3, "ema_decay": 0.99, "weight_decay": 1e-4, "evaluate_every": 50}

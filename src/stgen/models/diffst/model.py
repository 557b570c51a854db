"""Diff-ST: cross-modal diffusion for super-resolved gene maps (Wang et al., MICCAI 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stgen.data import Batch, MapData
from stgen.models._layers import ImageStem, ResBlock, UNet, timestep_embedding
from stgen.models._map_diffusion import MapDiffusionModel
from stgen.models._maps import GeneScale, ImageScale, training_tiles
from stgen.models._options import choose
from stgen.models.diffst.graph import CoExpressionGraph
from stgen.models.diffst.networks import CellHierarchy, CrossModalModulation, Disentangling, disentangling_loss
from stgen.models.diffst.options import PRESETS
from stgen.transforms import TransformName

__all__ = ["DiffST"]

PATCH_UM = 160.0  # of a cell-level patch
NODE = 8  # bins along the side of a node of the graph, of a model that takes windows of any size


class DiffST(MapDiffusionModel):
    """Diff-ST: sharpens gene maps with histology, all genes jointly.

    A condition is made once per map from the low-resolution map and the image, read at two levels (tissue and cells),
    modulated by one another and split into what they share and what is each one's own. A U-Net, which also sees a graph
    of co-expressed genes, denoises the fine map under that condition.

    Parameters
    ----------
    genes
        Names of the genes, one to several hundred.
    factor
        Bins along the side of a low-resolution one: 10 (100 µm to 10 µm) or 5 (to 20 µm), or any other.
    bin_um
        Side of a bin, in µm.
    image_channels
        Channels of the histology image: 3 for H&E, any number for stains or for an embedding map.
    px_per_bin
        Pixels along a bin at which the image is read; by default such that they are 2.5 µm (paper: 2 µm). 1 for an
        image that already has one pixel per bin, such as an embedding map.
    preset
        ``"default"`` is small and fits on a CPU in minutes; ``"paper"`` follows the paper's Table 3 and wants a GPU.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    **options
        Fields of :class:`stgen.models.DiffSTOptions`, each in place of the preset's.

    Notes
    -----
    Default networks see a bounded neighborhood and normalize each pixel on its own, so that a bin's result does not
    depend on how a section is cut into tiles. The paper's preset attends to a whole tile of 2.56 mm and must be given
    just that.

    Examples
    --------
    >>> import torch
    >>> from stgen import models
    >>> model = models.DiffST(["A", "B"], image_channels=3, width=8, widths=[8, 8], mean_widths=[8, 8])
    >>> batch = {"h": torch.rand(1, 3, 64, 64), "y": torch.rand(1, 2, 16, 16), "valid": torch.ones(1, 1, 16, 16)}
    >>> model.sample(batch, n_samples=3, steps=2).shape
    torch.Size([1, 3, 2, 16, 16])
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
        chosen = choose(PRESETS, preset, options, "DiffST")
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            px_um=chosen.px_um, transform=transform, preset=preset, **chosen.options.to_config(),
        )  # fmt: skip
        self.options = o = chosen.options
        n_genes, d, px, image_channels = (
            len(self.genes),
            o.width,
            self.config["px_per_bin"],
            self.config["image_channels"],
        )
        patch = 2 ** max(0, round(math.log2(PATCH_UM / bin_um)))  # a power of two: `align` stays small
        fixed_tile = chosen.tile_um is not None
        node = factor if fixed_tile else NODE
        align = math.lcm(
            2 ** (len(o.widths) - 1), patch if o.hierarchy else 1, o.region if o.modulation else 1,
            node if o.graph and not fixed_tile else 1,
        )  # fmt: skip
        self.place_windows(align, chosen.tile_um)
        self.diffusion = replace(chosen.diffusion, prediction=o.prediction, learned_variance=o.learned_variance)

        self.image_scale, self.gene_scale = ImageScale(image_channels), GeneScale(n_genes, o.scale)
        self.tissue = nn.ModuleList([ImageStem(image_channels, d, px), ResBlock(d, d)])
        self.cells = CellHierarchy(image_channels, d, patch, px, o.reach) if o.hierarchy else None
        self.spots = nn.ModuleList([nn.Conv2d(n_genes + 1, d, 3, padding=1), ResBlock(d, d)])
        self.modulation = CrossModalModulation(d, o.region) if o.modulation else None
        self.disentangling = Disentangling(d) if o.disentangle else None
        self.fuse = nn.Conv2d(d // 2 * 3 if o.disentangle else 2 * d, d, 1)
        nodes = math.ceil(self.align / node) if fixed_tile else None
        self.graph = CoExpressionGraph(n_genes, node, o.alpha, nodes) if o.graph else None
        self.mean = UNet(d + n_genes + 1, n_genes, o.mean_widths or o.widths) if o.residual else None
        self.time = nn.Sequential(nn.Linear(128, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d), nn.SiLU())
        inputs = d + n_genes * (1 + o.graph + o.residual)
        self.unet = UNet(inputs, n_genes * (2 if o.learned_variance else 1), o.widths, 4 * d, o.blocks, o.attention)
        self.initialize()

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit_constants(self, train: MapData) -> None:
        """Take the scales, the gene graph and the range of entropies from the training tiles."""
        super().fit_constants(train)
        if self.graph is not None:
            self.graph.fit(train)
        if self.cells is not None:
            self.cells.fit([self.image_scale(batch["h"].to(self.device)) for batch in training_tiles(train, share=4)])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Denoising, regression of the mean (with ``residual``) and disentangling; each term by its name."""
        features, split = self.encode(batch)
        cond, known = self._condition(batch, features), batch.get("tissue")
        losses = self.denoising_loss(batch["x"], cond, known).losses
        self.add_regression(losses, batch["x"], cond, known)
        if split is not None:
            losses["disentangling"] = disentangling_loss(*split)
            losses["loss"] = losses["loss"] + self.options.disentangling_weight * losses["disentangling"]
        return losses

    # ---- the model ---------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Condition features ``(B, d, H, W)`` of histology and low-resolution map. Diff-ST, Section 2.2 and Fig. 2.

        Also the shared and unique features ``S_y, S_h, U_y, U_h``, if they are told apart.
        """
        h = self.image_scale(batch["h"])
        y = torch.cat([batch["y"] / self.gene_scale.of(batch["y"]), batch["valid"]], 1)
        f_h = self.tissue[1](self.tissue[0](h))
        self.check_window(*f_h.shape[2:])
        if self.cells is not None:
            f_h = f_h + self.cells(f_h, h, self.progress if self.options.curriculum else 0.0)
        f_y = self.spots[1](self.spots[0](y))
        if self.modulation is not None:
            f_y, f_h = self.modulation(f_y, f_h)
        if self.disentangling is None:
            return f_h + self.fuse(torch.cat([f_h, f_y], 1)), None
        s_y, u_y = self.disentangling(f_y)
        s_h, u_h = self.disentangling(f_h)
        return f_h + self.fuse(torch.cat([(s_y + s_h) / 2, u_h, u_y], 1)), (s_y, s_h, u_y, u_h)

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Features, scale and, with ``residual``, the predicted mean on the network's scale."""
        return self._condition(batch, self.encode(batch)[0])

    def _condition(self, batch: Batch, features: Tensor) -> dict[str, Tensor]:
        scale = self.gene_scale.of(batch["y"])
        cond = {"features": features, "scale": scale.expand(len(features), -1, -1, -1)}
        if self.mean is not None:
            cond["mean"] = self.mean(torch.cat([features, batch["y"] / scale, batch["valid"]], 1))
        return cond

    def denoise(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The conditional denoising U-Net over all genes jointly. Diff-ST, Eq. 2.

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
        Shape ``(B, G, H, W)``, or ``(B, 2, G, H, W)`` with a learned variance.
        """
        inputs = [x_t, cond["features"]]
        if self.graph is not None:
            inputs.append(self.graph(x_t))
        if self.mean is not None:
            inputs.append(cond["mean"])
        output = self.unet(torch.cat(inputs, 1), self.time(timestep_embedding(t, 128).to(x_t)))
        return output.unflatten(1, (2, -1)) if self.options.learned_variance else output

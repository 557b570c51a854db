"""Diff-ST: cross-modal diffusion for super-resolved gene maps (Wang et al., MICCAI 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.data import Batch, MapData
from stgen.diffusion import Diffusion
from stgen.models._layers import ChannelNorm, ImageStem, ResBlock, UNet, timestep_embedding
from stgen.models._maps import N_TILES, GeneScale, GeneScaleKind, ImageScale, MapDiffusionModel, from_preset
from stgen.transforms import TransformName

__all__ = ["DiffST"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "scale": "std", "residual": True, "prediction": "v", "width": 32, "region": 16, "reach": 1, "node": 8,
        "widths": [24, 48, 72], "mean_widths": [32, 64, 96], "blocks": 1, "attention": [],
        "px_um": None, "fixed_tile": False,
        "training": {
            "steps": 600, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-4, "ema_decay": 0.99, "evaluate_every": 50,
        },
    },
    "paper": {  # Table 3; network widths of the code that the paper builds on, see the methods page
        "scale": "map", "residual": False, "prediction": "epsilon", "width": 128, "region": 32, "reach": None, "node": None,
        "widths": [96, 96, 192, 192, 384, 384], "mean_widths": None, "blocks": 2, "attention": [3, 4, 5],
        "px_um": 2.0, "fixed_tile": True,
        "training": {
            "steps": 5000, "batch_size": 4, "lr": 1e-4, "weight_decay": 1e-5, "ema_decay": 0.9999,
            "max_grad_norm": None, "patience": None,
        },
    },
}  # fmt: skip

PATCH_UM = 160.0  # of a cell-level patch
TILE_UM = 2560.0  # side of the paper's histology images


class DiffST(MapDiffusionModel):
    """Diff-ST: sharpens gene maps with histology, all genes jointly.

    A condition is made once per map from the low-resolution map and the image, read at two levels (tissue and cells),
    modulated by one another and split into what they share and what is each one's own. A U-Net, which also sees a graph of
    co-expressed genes, denoises the fine map under that condition.

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
        Pixels along a bin at which the image is read; by default such that they are 2.5 µm (paper: 2 µm). 1 for an image
        that already has one pixel per bin, such as an embedding map.
    preset
        ``"default"`` is small and fits on a CPU in minutes; ``"paper"`` follows the paper's Table 3 and wants a GPU.
    transform
        Scale of expression, see :func:`stgen.transforms.transform_counts`.
    modulation
        Cross-modal adaptive modulation (Eq. 3); without it the two modalities are only concatenated.
    graph
        The graph of co-expressed genes (Eq. 4).
    hierarchy
        Cell-level patches besides the tissue-level image.
    disentangle
        Split features into shared and unique ones, with their loss.
    curriculum
        Raise the entropy that a patch must have while training proceeds.
    alpha
        Balance of the graph (Eq. 4).
    disentangling_weight
        Weight of the disentangling loss, which the paper does not state.
    residual
        Let a regression network predict the mean, and diffuse what remains. Not in the paper.
    scale
        Scale of the maps: divided per gene by the ``"std"`` or the 99.5 % ``"quantile"`` of the training tissue, or
        (paper) by the range of each ``"map"``.
    prediction
        What the network predicts, see :class:`stgen.diffusion.Diffusion`.
    learned_variance
        Learn the variance of the reverse process (Eq. 2: "can be learned").
    width
        Channels ``d_t = d_c = d`` of tissue and cell features and of the condition.
    region
        Side ``a`` of a modulated region, in bins.
    reach
        A tissue location attends to cell patches up to this many patches away; ``None`` for all in the tile.
    widths, mean_widths, blocks, attention
        The denoising U-Net and that of the mean: channels at each resolution; residual blocks; resolutions with
        self-attention.

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
        modulation: bool = True,
        graph: bool = True,
        hierarchy: bool = True,
        disentangle: bool = True,
        curriculum: bool = True,
        alpha: float = 0.2,
        disentangling_weight: float = 0.01,
        residual: bool | None = None,
        scale: GeneScaleKind | None = None,
        prediction: Literal["epsilon", "x_0", "v"] | None = None,
        learned_variance: bool = False,
        width: int | None = None,
        region: int | None = None,
        reach: int | None = None,
        widths: Sequence[int] | None = None,
        mean_widths: Sequence[int] | None = None,
        blocks: int | None = None,
        attention: Sequence[int] | None = None,
    ) -> None:
        given = {
            "residual": residual, "scale": scale, "prediction": prediction, "width": width, "region": region, "reach": reach,
            "widths": widths, "mean_widths": mean_widths, "blocks": blocks, "attention": attention,
        }  # fmt: skip
        chosen = from_preset(PRESETS, preset, given, bin_um=bin_um, px_per_bin=px_per_bin)
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels,
            px_per_bin=chosen["px_per_bin"], transform=transform,
            preset=preset, modulation=modulation, graph=graph, hierarchy=hierarchy, disentangle=disentangle,
            curriculum=curriculum, alpha=alpha, disentangling_weight=disentangling_weight,
            learned_variance=learned_variance, **{k: chosen[k] for k in given},
        )  # fmt: skip
        c = self.config
        n_genes, d = len(self.genes), c["width"]
        patch = 2 ** max(0, round(math.log2(PATCH_UM / bin_um)))  # a power of two: `align` stays small
        node = chosen["node"] or factor
        self.fixed_tile = chosen["fixed_tile"]
        self.align = math.lcm(
            2 ** (len(c["widths"]) - 1), patch if hierarchy else 1, c["region"] if modulation else 1,
            node if graph and not self.fixed_tile else 1,
        )  # fmt: skip
        if self.fixed_tile:
            self.align *= max(1, round(TILE_UM / bin_um / self.align))
        self.halo = 0 if self.fixed_tile else -(-32 // self.align) * self.align
        self.diffusion = Diffusion(prediction=c["prediction"], learned_variance=learned_variance)

        self.image_scale, self.gene_scale = ImageScale(image_channels), GeneScale(n_genes, c["scale"])
        self.tissue = nn.ModuleList([ImageStem(image_channels, d, c["px_per_bin"]), ResBlock(d, d)])
        self.cells = CellHierarchy(image_channels, d, patch, c["px_per_bin"], c["reach"]) if hierarchy else None
        self.spots = nn.ModuleList([nn.Conv2d(n_genes + 1, d, 3, padding=1), ResBlock(d, d)])
        self.modulation = CrossModalModulation(d, c["region"]) if modulation else None
        self.disentangling = Disentangling(d) if disentangle else None
        self.fuse = nn.Conv2d(2 * d if disentangle is False else d // 2 * 3, d, 1)
        nodes = math.ceil(self.align / node) if self.fixed_tile else None
        self.graph = CoExpressionGraph(n_genes, node, alpha, nodes) if graph else None
        self.mean = UNet(d + n_genes + 1, n_genes, c["mean_widths"] or c["widths"]) if c["residual"] else None
        self.time = nn.Sequential(nn.Linear(128, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d), nn.SiLU())
        inputs = d + n_genes * (1 + bool(graph) + bool(c["residual"]))
        self.unet = UNet(
            inputs, n_genes * (2 if learned_variance else 1), c["widths"], 4 * d, c["blocks"], c["attention"]
        )
        self.initialize()

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit(self, train: MapData, validation: MapData | None = None, **options: Any) -> dict[str, list[float]]:
        """Fit the scales, the gene graph and the range of entropies on the training tiles, then train.

        Options are those of :func:`stgen.train.fit`; those not given are the preset's.
        """
        self.image_scale.fit(train)
        self.gene_scale.fit(train)
        if self.graph is not None:
            self.graph.fit(train)
        if self.cells is not None:
            self.cells.fit([self.image_scale(batch["h"].to(self.device)) for batch in train.some(N_TILES // 4)])
        return super().fit(train, validation, **{**PRESETS[self.config["preset"]]["training"], **options})

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Denoising, regression of the mean (with ``residual``) and disentangling; each term by its name."""
        features, split = self.encode(batch)
        cond = self._condition(batch, features)
        known = batch.get("tissue")
        mean = cond.get("mean")
        if mean is not None:
            cond["mean"] = mean.detach()  # what remains is for the diffusion to model, not to make small
        x_0 = self.to_network(batch["x"], cond)
        losses = self.diffusion.loss(lambda x_t, t: self.denoise(x_t, t, cond), x_0, known)
        self.add_regression(losses, batch["x"] / cond["scale"], mean, known)
        if split is not None:
            losses["disentangling"] = disentangling_loss(*split)
            losses["loss"] = losses["loss"] + self.config["disentangling_weight"] * losses["disentangling"]
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
            f_h = f_h + self.cells(f_h, h, self.progress if self.config["curriculum"] else 0.0)
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
        return output.unflatten(1, (2, -1)) if self.config["learned_variance"] else output


class CellHierarchy(nn.Module):
    """Cell-level patches, selected by their entropy, to which tissue-level features attend. Diff-ST, Section 2.2 (2).

    Parameters
    ----------
    channels
        Channels of the image.
    width
        Features ``d_c`` of a patch, ``d_t`` of the tissue, and ``d`` of the attention.
    patch
        Side of a patch in bins; the tissue is queried twice as finely.
    px_per_bin
        Image pixels along a bin.
    reach
        Patches up to this many away are attended to; ``None`` for all.
    """

    def __init__(self, channels: int, width: int, patch: int, px_per_bin: int, reach: int | None) -> None:
        super().__init__()
        self.patch, self.px, self.reach = patch, patch * px_per_bin, reach
        n_stages = max(1, int(math.log2(max(self.px // 4, 2))))
        widths = [channels, *(max(8, width >> (n_stages - 1 - i)) for i in range(n_stages))]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), ChannelNorm(b), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(width, width, 1))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.nothing = nn.Linear(1, 2 * width, bias=False)  # key and value where no patch passes
        self.value.starts_at_zero = self.nothing.starts_at_zero = True
        self.register_buffer("entropies", torch.tensor([0.0, 0.0]))

    def fit(self, images: Sequence[Tensor]) -> None:
        """Take the range of the threshold, the minimum and the median entropy, from standardized training images."""
        entropies = torch.cat([patch_entropy(self.patches(h).flatten(0, 1)) for h in images])
        self.entropies.copy_(torch.stack([entropies.min(), entropies.median()]))

    def gamma(self, progress: float) -> Tensor:
        """Entropy that a patch must exceed: from the training minimum to the median, linearly over half the training."""
        low, high = self.entropies
        return low + (high - low) * min(1.0, 2 * progress)

    def patches(self, h: Tensor) -> Tensor:
        """Image ``(B, C, s H, s W)`` cut into patches ``(B, M, C, px, px)``, row by row."""
        tiles = h.unfold(2, self.px, self.px).unfold(3, self.px, self.px)  # (B, C, rows, columns, px, px)
        return tiles.flatten(2, 3).transpose(1, 2)

    def forward(self, f_tissue: Tensor, h: Tensor, progress: float) -> Tensor:
        """Cross-attention with ``Q = f(F_tissue) W_Q, K = f(F_cell) W_K, V = f(F_cell) W_V``. Diff-ST, Section 2.2 (2).

        Parameters
        ----------
        f_tissue
            Tissue features, shape ``(B, d_t, H, W)``.
        h
            Standardized image, shape ``(B, C, s H, s W)``.
        progress
            Share of the training that is done.

        Returns
        -------
        What the cells add to the tissue features, shape ``(B, d_t, H, W)``.
        """
        patches = self.patches(h)
        kept = patch_entropy(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]) > self.gamma(progress)  # (B, M)
        f_cell = self.encoder(patches.flatten(0, 1)).mean((2, 3)).unflatten(0, patches.shape[:2])
        stride = max(1, self.patch // 2)
        pooled = F.avg_pool2d(f_tissue, stride)  # (B, d, rows, columns)
        nothing = self.nothing(f_cell.new_ones(len(f_cell), 1, 1)).chunk(2, -1)
        q = self.query(pooled.flatten(2).transpose(1, 2))
        k = torch.cat([self.key(f_cell), nothing[0]], 1)
        v = torch.cat([self.value(f_cell), nothing[1]], 1)
        seen = kept[:, None] & self._near(pooled.shape[2:], stride).to(kept.device)
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], 1)], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        attended = attended.transpose(1, 2).unflatten(2, pooled.shape[2:])
        return F.interpolate(attended, size=f_tissue.shape[2:], mode="bilinear")

    def _near(self, shape: Sequence[int], stride: int) -> Tensor:
        """Which patches are within reach of which tissue location, shape ``(locations, M)``."""
        per_patch = self.patch // stride
        row, column = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        own = torch.stack([row, column], -1).flatten(0, 1) // per_patch  # (locations, 2): patch of each location
        grid = torch.meshgrid(*(torch.arange(n // per_patch) for n in shape), indexing="ij")
        distance = (own[:, None] - torch.stack(grid, -1).flatten(0, 1)[None]).abs().amax(-1)
        return distance <= (distance.max() if self.reach is None else self.reach)


def patch_entropy(patches: Tensor) -> Tensor:
    """Shannon entropy in bits of each patch's gray values, in 256 bins: the complexity E of Diff-ST, Section 2.2 (2).

    Parameters
    ----------
    patches
        Standardized patches, shape ``(n, C, px, px)``; gray is the mean of the channels, cut at 3 standard deviations.

    Returns
    -------
    Shape ``(n,)``, from 0 to 8.
    """
    gray = patches.mean(1).flatten(1).clamp(-3, 3)
    level = ((gray + 3) / 6 * 255).round().long()
    counts = torch.zeros(len(level), 256, device=level.device).scatter_add_(1, level, torch.ones_like(gray))
    p = counts / level.shape[1]
    return -(p * p.clamp(min=1e-12).log2()).sum(1)


class CrossModalModulation(nn.Module):
    """Cross-modal adaptive modulation, in both directions. Diff-ST, Section 2.2 (3).

    Parameters
    ----------
    width
        Channels ``c`` of both modalities.
    region
        Side ``a`` of the regions, which tile the map without overlap.
    """

    def __init__(self, width: int, region: int) -> None:
        super().__init__()
        self.region = region
        self.norm_y, self.norm_h = ChannelNorm(width), ChannelNorm(width)
        self.h2y, self.y2h = nn.Linear(width, width), nn.Linear(width, width)
        self.h2y.starts_at_zero = self.y2h.starts_at_zero = True

    def forward(self, f_y: Tensor, f_h: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality ``(B, c, H, W)``, filtered region by region with what it has in common with the other."""
        a_y, a_h = regions(self.norm_y(f_y), self.region), regions(self.norm_h(f_h), self.region)
        to_y, to_h = modulate(a_y, a_h, self.h2y), modulate(a_h, a_y, self.y2h)
        shape = f_y.shape[2:]
        return f_y + from_regions(to_y, self.region, shape), f_h + from_regions(to_h, self.region, shape)


def modulate(a: Tensor, other: Tensor, fc: nn.Module) -> Tensor:
    """``A w`` with ``w = FC(A^T A_other)``, the product a mean over the region's pixels. Diff-ST, Eq. 3.

    Parameters
    ----------
    a, other
        The regions of two modalities, shape ``(..., pixels, c)``.
    fc
        The fully connected layer, on rows of length ``c``.

    Returns
    -------
    Shape of ``a``.
    """
    return a @ fc(a.transpose(-1, -2) @ other / a.shape[-2])


def regions(x: Tensor, side: int) -> Tensor:
    """Map ``(B, c, H, W)`` as square regions ``(B, rows, columns, side * side, c)``."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, c, rows, side, columns, side)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def from_regions(x: Tensor, side: int, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`regions`."""
    x = x.unflatten(3, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(*x.shape[:2], *shape)


class Disentangling(nn.Module):
    """Features that a modality shares with the other, and features that only it has. Diff-ST, Section 2.2 (3).

    The two convolutions are the same for both modalities.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(width, width // 2, 3, padding=1)
        self.unique = nn.Conv2d(width, width // 2, 3, padding=1)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """``S`` and ``U``, each ``(B, c / 2, H, W)``."""
        return F.silu(self.shared(f)), F.silu(self.unique(f))


def disentangling_loss(s_y: Tensor, s_h: Tensor, u_y: Tensor, u_h: Tensor) -> Tensor:
    """``L_cm-dis = |S_y - S_h|_2 / |U_y - U_h|_2``, of features of unit length. Diff-ST, Section 2.2 (3)."""
    shared = (F.normalize(s_y, dim=1) - F.normalize(s_h, dim=1)).square().mean()
    unique = (F.normalize(u_y, dim=1) - F.normalize(u_h, dim=1)).square().mean()
    return ((shared + 1e-8) / (unique + 1e-3)).sqrt()


class CoExpressionGraph(nn.Module):
    """Graph network over genes whose edges are their co-expression on the training tissue. Diff-ST, Section 2.3.

    Parameters
    ----------
    n_genes
        Number of genes ``N``.
    node
        Bins along the side of the squares over which a gene's map is averaged: its averages are the node's features.
    alpha
        Balance of the graph.
    nodes
        With a number: ``W_g`` is a full matrix over all ``C = nodes ** 2`` features, which ties it to one size of tile.
        Without: ``W_g`` is a 3 x 3 convolution of the grid of features, for maps of any size.
    """

    def __init__(self, n_genes: int, node: int, alpha: float, nodes: int | None = None) -> None:
        super().__init__()
        self.node, self.alpha = node, alpha
        self.weight = (
            nn.Conv2d(1, 1, 3, padding=1, bias=False) if nodes is None else nn.Linear(nodes**2, nodes**2, bias=False)
        )
        self.register_buffer("intensity", torch.eye(n_genes))

    def fit(self, data: MapData) -> None:
        """Take the intensities from the low-resolution maps of training tiles."""
        y = torch.cat([F.avg_pool2d(batch["y"], self.node).flatten(2)[0] for batch in data.some(N_TILES)], 1)
        self.intensity.copy_(co_expression_intensity(y))

    def forward(self, x_t: Tensor) -> Tensor:
        """What the graph makes of noised maps ``(B, N, H, W)``; the same shape."""
        f_x = F.avg_pool2d(x_t, self.node, ceil_mode=True)
        if isinstance(self.weight, nn.Linear):
            weighted = self.weight(f_x.flatten(2)).unflatten(2, f_x.shape[2:])
        else:
            weighted = self.weight(f_x.flatten(0, 1)[:, None]).reshape(f_x.shape)
        f_out = graph_update(f_x.flatten(2), weighted.flatten(2), self.intensity, self.alpha).unflatten(
            2, f_x.shape[2:]
        )
        return F.interpolate(f_out, scale_factor=self.node)[:, :, : x_t.shape[2], : x_t.shape[3]]


def co_expression_intensity(y: Tensor) -> Tensor:
    """``I_ij = (p(i|j) + p(j|i)) / 2`` with ``p(i|j) = sum_s min(y_i, y_j) / sum_s y_j``, rows summing to 1.

    The relative expression intensity ``p`` is not defined in the paper. Diff-ST, Section 2.3.

    Parameters
    ----------
    y
        Expression at places ``s``, shape ``(N, places)``, not negative.

    Returns
    -------
    Shape ``(N, N)``.
    """
    y = y / y.amax(1, keepdim=True).clamp(min=1e-12)
    total = y.sum(1)
    together = torch.stack([torch.minimum(row, y).sum(1) for row in y])
    intensity = (together / total.clamp(min=1e-12)[None] + together / total.clamp(min=1e-12)[:, None]) / 2
    intensity = torch.where(torch.eye(len(y), dtype=torch.bool), 1.0, intensity)
    return intensity / intensity.sum(1, keepdim=True)


def graph_update(f_x: Tensor, weighted: Tensor, intensity: Tensor, alpha: float) -> Tensor:
    """``F_out = alpha delta(I F_x W_g) + (1 - alpha) F_x``, ``delta`` a leaky ReLU. Diff-ST, Eq. 4.

    Parameters
    ----------
    f_x, weighted
        Features ``F_x`` and ``F_x W_g`` of the genes, shape ``(B, N, C)``.
    intensity
        ``I``, shape ``(N, N)``.
    """
    return alpha * F.leaky_relu(intensity @ weighted, 0.2) + (1 - alpha) * f_x

"""What the networks of HaDM-ST are made of: the semantic transformer (HSD), alignment (CMSA), the head of each gene."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgen.models._layers import zero_conv, zero_module

__all__ = ["Alignment", "GeneHead", "SemanticTransformer", "TransformerLayer"]

EMBEDDING = 128  # of a region, for its alignment
MOST_VALUES = 2**20  # of one channel that the network over each gene works on at a time: more is slower on a CPU


class GeneHead(nn.Module):
    """Goes over each gene's map by itself, 2 x 2 bins at a time, with a small network that all genes share.

    The U-Net has fewer channels than there are genes and cannot pass on the noise in each gene's map, nor see that
    counts are whole numbers.

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
        self.leave = zero_conv(width, 4)

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


class SemanticTransformer(nn.Module):
    """What an image, its nuclei and a prompt say about expression, token by token. HaDM-ST, HSD.

    Tokens attend to the others of their window and to the prompt. Every second layer's windows lie half a window
    further, so that what tokens know spreads. Where a token is, a depthwise convolution tells it.

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
        """From ``(B, inputs, H, W)`` and text ``(B, text_dim)`` to ``(B, width, H / token, W / token)``."""
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
        self.place = zero_module(nn.Conv2d(width, width, 3, padding=1, groups=width))
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = zero_module(nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), zero_module(nn.Linear(2 * width, width)))

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


class Alignment(nn.Module):
    """Embeddings of regions of histology and of the low-resolution map, on the unit hypersphere. HaDM-ST, CMSA."""

    def __init__(self, width: int, region: int) -> None:
        super().__init__()
        self.region = region
        self.of_h, self.of_y = nn.Linear(width, EMBEDDING), nn.Linear(width, EMBEDDING)

    def forward(self, f_h: Tensor, f_y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``z_h`` and ``z_y``, ``(B, rows, columns, 128)``, and what was measured, ``(B, rows, columns)``."""
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

"""Building blocks that two model families or more use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ChannelNorm",
    "ImageStem",
    "PixelAttention",
    "ResBlock",
    "Standardize",
    "UNet",
    "UNetEncoder",
    "draw_weights",
    "timestep_embedding",
    "zero_conv",
    "zero_module",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def zero_module(module: ModuleT) -> ModuleT:
    """Mark a layer to begin at zero: :func:`draw_weights` will make it so."""
    module.__dict__["begins_at_zero"] = True
    return module


def zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1 x 1 convolution that begins at zero."""
    return zero_module(nn.Conv2d(inputs, outputs, 1))


class Standardize(nn.Module):
    """Invertible standardization per feature, fitted on training data and kept as buffers with the weights.

    Parameters
    ----------
    n_features
        Size of the last dimension.
    clamp
        Standardized values are clamped to ``[-clamp, clamp]``, which keeps a model off the far extrapolation that a
        section with another stain would ask of it. The inverse is then exact only inside.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int, clamp: float | None = None) -> None:
        super().__init__()
        self.clamp = clamp
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def fit(self, x: Tensor) -> Standardize:
        """Take mean and standard deviation from ``x``, shape ``(n, n_features)``; constant features keep scale 1."""
        mean, scale = x.mean(0), x.std(0, correction=0)  # where x is: the buffers may be on another device
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.ones_like(scale)))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Standardize."""
        z = (x - self.mean) / self.scale
        return z if self.clamp is None else z.clamp(-self.clamp, self.clamp)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo the standardization."""
        return z * self.scale + self.mean


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Sinusoidal features of the noise level, ``cos`` then ``sin``: Stem, Appendix C (after Vaswani et al., 2017).

    Parameters
    ----------
    t
        Noise levels, shape ``(B,)``.
    dim
        Even number of features.

    Returns
    -------
    Shape ``(B, dim)``.
    """
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ChannelNorm(nn.Module):
    """Root-mean-square normalization over the channels of each pixel, with a learned scale and shift per channel.

    Pixels are normalized on their own, not over the map as group normalization would: the network then gives a bin the
    same result in any tile.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * self.weight + self.bias


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input passes; the noise level scales and shifts what is between them.

    Starts as the identity (or as its 1 x 1 projection), once :func:`draw_weights` has set the second convolution to
    zero.
    """

    def __init__(self, inputs: int, outputs: int, time_dim: int | None = None) -> None:
        super().__init__()
        self.norm_in, self.conv_in = ChannelNorm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_out, self.conv_out = ChannelNorm(outputs), zero_module(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.time = None if time_dim is None else nn.Linear(time_dim, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``x`` is ``(B, inputs, H, W)``, ``time`` ``(B, time_dim)``; the result ``(B, outputs, H, W)``."""
        hidden = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.time is not None:
            scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
            hidden = hidden * (1 + scale) + shift
        return self.skip(x) + self.conv_out(F.silu(hidden))


class PixelAttention(nn.Module):
    """Self-attention over all pixels of a map, with a residual connection that starts closed."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        most = max(1, channels // head_dim)
        self.heads = next(n for n in range(most, 0, -1) if channels % n == 0)
        self.norm = ChannelNorm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), zero_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)  # (B, heads, dim, pixels)
        return x + self.out(attended.flatten(1, 2).unflatten(2, x.shape[2:]))


class UNetEncoder(nn.Module):
    """The way down of a :class:`UNet`, and its middle.

    Parameters
    ----------
    inputs
        Channels.
    widths
        Channels at each resolution, finest first; each is half as fine as the one before.
    time_dim
        Size of the noise level's embedding; none for a network without one.
    blocks
        Residual blocks at each resolution.
    attention
        Resolutions (numbers of ``widths``) with self-attention. It sees the whole tile, so that results come to depend
        on the tile.
    head_dim
        Channels of an attention head, or the next more that divide a level's.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        time_dim: int | None = None,
        blocks: int = 1,
        attention: Sequence[int] = (),
        head_dim: int = 48,
    ) -> None:
        super().__init__()
        self._level = partial(_level, time_dim=time_dim, blocks=blocks, attention=attention, head_dim=head_dim)
        self.enter = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(self._level(widths[max(i - 1, 0)], width, i) for i, width in enumerate(widths))
        self.middle = self._level(widths[-1], widths[-1], len(widths) - 1)

    def encode(self, x: Tensor, time: Tensor | None = None) -> list[Tensor]:
        """Features at each resolution, finest first; the last have been through the middle."""
        x = self.enter(x)
        levels = []
        for number, layers in enumerate(self.down):
            x = _through(layers, F.avg_pool2d(x, 2) if number else x, time)
            levels.append(x)
        return [*levels[:-1], _through(self.middle, levels[-1], time)]


class UNet(UNetEncoder):
    """Encoder and decoder with skip connections, for maps whose sides are multiples of ``2 ** (len(widths) - 1)``.

    Parameters
    ----------
    inputs, outputs
        Channels.
    widths, time_dim, blocks, attention, head_dim
        See :class:`UNetEncoder`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        widths: Sequence[int],
        time_dim: int | None = None,
        blocks: int = 1,
        attention: Sequence[int] = (),
        head_dim: int = 48,
    ) -> None:
        super().__init__(inputs, widths, time_dim, blocks, attention, head_dim)
        self.up = nn.ModuleList(
            self._level(widths[i + 1] + widths[i], widths[i], i) for i in reversed(range(len(widths) - 1))
        )
        self.norm = ChannelNorm(widths[0])
        self.leave = zero_module(nn.Conv2d(widths[0], outputs, 3, padding=1))

    def decode(self, levels: Sequence[Tensor], time: Tensor | None = None) -> list[Tensor]:
        """Features at each resolution on the way up, finest first, from those of :meth:`encode`."""
        *skips, x = levels
        decoded = [x]
        for layers in self.up:
            x = _through(layers, torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1), time)
            decoded.insert(0, x)
        return decoded

    def finish(self, x: Tensor) -> Tensor:
        """The output, from the finest features of :meth:`decode`."""
        return self.leave(F.silu(self.norm(x)))

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``x`` is ``(B, inputs, H, W)``, ``time`` ``(B, time_dim)``; the result ``(B, outputs, H, W)``."""
        return self.finish(self.decode(self.encode(x, time), time)[0])


def _level(
    start: int, width: int, number: int, *, time_dim: int | None, blocks: int, attention: Sequence[int], head_dim: int
) -> nn.ModuleList:
    """The layers at one resolution."""
    layers: list[nn.Module] = [ResBlock(start if i == 0 else width, width, time_dim) for i in range(blocks)]
    return nn.ModuleList([*layers, *([PixelAttention(width, head_dim)] if number in attention else [])])


def _through(layers: nn.Module, x: Tensor, time: Tensor | None) -> Tensor:
    for layer in layers.children():
        x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
    return x


class ImageStem(nn.Module):
    """Histology at ``s x s`` pixels per bin to features per bin, by convolutions that halve it (or divide it by 3, 5).

    Parameters
    ----------
    channels
        Channels of the image.
    width
        Features of a bin.
    px_per_bin
        Image pixels along a bin, ``s``.
    """

    def __init__(self, channels: int, width: int, px_per_bin: int) -> None:
        super().__init__()
        strides = prime_factors(px_per_bin)
        widths = [channels, *(max(16, width >> (len(strides) - i)) for i in range(len(strides))), width]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, stride + 2, stride, padding=1)
            for a, b, stride in zip(widths, widths[1:], [*strides, 1], strict=False)
        )

    def forward(self, h: Tensor) -> Tensor:
        """``h`` is ``(B, channels, s H, s W)``; the result ``(B, width, H, W)``."""
        for number, layer in enumerate(self.layers):
            h = layer(F.silu(h) if number else h)
        return h


def prime_factors(n: int) -> list[int]:
    """Prime factors in increasing order; none for 1."""
    divisor = next((d for d in range(2, n + 1) if n % d == 0), None)
    return [] if divisor is None else [divisor, *prime_factors(n // divisor)]


def draw_weights(module: nn.Module) -> None:
    """Draw the weights of all layers anew, as torch does; those of :func:`zero_module` become zero."""
    for layer in module.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
        if layer.__dict__.get("begins_at_zero", False):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

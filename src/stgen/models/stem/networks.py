"""What the transformer of Stem is made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TransformerBlock", "mlp", "modulate"]


class TransformerBlock(nn.Module):
    """Transformer block with adaLN-Zero: Peebles & Xie (2023), Figure 3; Stem, Appendix C."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh") if activation == "gelu" else nn.SiLU(),
            nn.Linear(mlp_ratio * width, width),
        )

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        """``tokens`` are ``(B, G, width)``, the condition ``c`` is ``(B, width)``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, -1)
        q, k, v = self.qkv(modulate(tokens, shift_a, scale_a)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + gate_a[:, None] * self.out(attended)
        return tokens + gate_m[:, None] * self.mlp(modulate(tokens, shift_m, scale_m))


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm whose shift and scale come from the condition (adaLN)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two-layer MLP with SiLU."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))

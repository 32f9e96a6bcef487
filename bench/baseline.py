"""The usual alternative: a plain GPT in the style of nanoGPT, to be measured beside ours.

LayerNorm, GELU, learned positions, linear layers without bias from N(0, 0.02), a tied head, AdamW,
cosine decay. Its CPU recipe (4 layers, 4 heads, width 128, context 64, batch 12, lr 1e-3 → 1e-4,
2000 steps) is the one whose published figure on character-level Shakespeare is a loss of 1.88 in
about three minutes.
"""

from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    n_ctx: int = 64
    vocab_size: int = 257
    batch: int = 12
    steps: int = 2000
    lr: float = 1e-3
    final_lr: float = 1e-4
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of update `step` (0 for the first)."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        decayed = (step - self.warmup) / (self.steps - self.warmup)             # 0 … 1
        return self.final_lr + 0.5 * (1 + cos(pi * decayed)) * (self.lr - self.final_lr)


class PlainGPT(nn.Module):
    """tokens (B, T) → logits (B, T, V)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        E, L = recipe.d_model, recipe.n_layers
        self.embed = nn.Embedding(recipe.vocab_size, E)
        self.embed_position = nn.Embedding(recipe.n_ctx, E)
        self.blocks = nn.ModuleList(PlainBlock(E, recipe.n_heads) for _ in range(L))
        self.norm = nn.LayerNorm(E, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:             # layers that write to the residual stream start smaller
                nn.init.normal_(p, std=0.02 / (2 * L) ** 0.5 if "out" in name else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.embed_position.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        matrices = [p for p in self.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


class PlainBlock(nn.Module):
    def __init__(self, E: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_attn, self.norm_mlp = nn.LayerNorm(E, bias=False), nn.LayerNorm(E, bias=False)
        self.qkv, self.attn_out = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)
        self.up = nn.Linear(E, 4 * E, bias=False)
        self.mlp_out = nn.Linear(4 * E, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                   for part in self.qkv(self.norm_attn(x)).chunk(3, dim=-1))    # (B, H, T, D) each
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(z.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.up(self.norm_mlp(x))))

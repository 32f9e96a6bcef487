"""The matrices of each head as the residual stream meets them: the gains of norms folded in, one
set of matrices per query head.

Rows are vectors, x @ w. A head reads by w_q, w_k and w_v (E, D) and writes by w_o (D, E). Its QK
circuit is w_q w_kᵀ and its OV circuit w_v w_o (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"). What is not linear is left out: the division by the norm, positions (under
RoPE these are the circuits at distance 0), smeared keys, and QK norm. So are biases, which add the
same whatever is read. LayerNorm's centring is linear and is folded in with its gain.
"""

from typing import NamedTuple

from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT
from model.layers import LayerNorm, RMSNorm


class Readers(NamedTuple):
    """How the heads of a layer read the residual stream: (H, E, D) each."""

    q: Tensor
    k: Tensor
    v: Tensor


def readers(model: GPT, layer: int) -> Readers:
    """w_q, w_k, w_v of a layer. Query heads of a group share keys and values."""
    block, config = model.blocks[layer], model.config

    def by_head(weight: Tensor) -> Tensor:                      # (heads D, E) → (H, E, D)
        weight = _after_norm(config, block.norm_attn, weight)
        matrices = weight.unflatten(0, (-1, config.head_size)).mT
        return matrices.repeat_interleave(config.n_heads // len(matrices), dim=0)

    attn = block.attn
    return Readers(by_head(attn.w_q.weight), by_head(attn.w_k.weight), by_head(attn.w_v.weight))


def writers(model: GPT, layer: int) -> Tensor:
    """w_o of a layer: (H, D, E)."""
    return model.blocks[layer].attn.w_o.weight.T.unflatten(0, (-1, model.config.head_size))


def token_embedding(model: GPT) -> Tensor:
    """W_E (V, E): what a token writes to the residual stream, without its position."""
    return model.embed.weight


def unembedding_after_norm(model: GPT) -> Tensor:
    """W_U (E, V) with the gain of the last norm: what the residual stream says about the next
    token."""
    return _after_norm(model.config, model.norm_final, model.unembedding).T


def _after_norm(config: ModelConfig, norm: RMSNorm | LayerNorm, weight: Tensor) -> Tensor:
    """`weight` (outputs, E) as it reads the residual stream through a norm without its division:
    times the gain, and without the mean that LayerNorm subtracts."""
    weight = weight * norm.gain
    return weight - weight.mean(-1, keepdim=True) if config.norm == "layernorm" else weight

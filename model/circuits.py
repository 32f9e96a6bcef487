"""The matrices of each head as the residual stream meets them: gains of the norms folded in, query heads in full.

Rows are vectors, x @ w, so a head reads by w_q, w_k and w_v (E, D) and writes by w_o (D, E); its QK circuit is w_q w_kᵀ and its OV
circuit w_v w_o (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). What is not linear is not in them:
the division by the norm, positions (under RoPE they are the circuits at distance 0), smeared keys, and QK norm. Nor are biases, which
add the same whatever is read. LayerNorm's centring is linear and is folded in with its gain.
"""

from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT
from model.layers import LayerNorm, RMSNorm


def readers(model: GPT, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """w_q, w_k, w_v of a layer, each (H, E, D); heads of a group share the same keys and values."""
    block, config = model.blocks[layer], model.config

    def by_head(weight: Tensor) -> Tensor:                      # (heads D, E) → (H, E, D)
        matrices = _behind(model.config, block.norm_attn, weight).unflatten(0, (-1, config.head_size)).mT
        return matrices.repeat_interleave(config.n_heads // len(matrices), dim=0)

    return by_head(block.attn.w_q.weight), by_head(block.attn.w_k.weight), by_head(block.attn.w_v.weight)


def writers(model: GPT, layer: int) -> Tensor:
    """w_o of a layer: (H, D, E)."""
    return model.blocks[layer].attn.w_o.weight.T.unflatten(0, (-1, model.config.head_size))


def embedding(model: GPT) -> Tensor:
    """W_E (V, E): what a token puts into the residual stream, positions left out."""
    return model.embed.weight


def unembedding(model: GPT) -> Tensor:
    """W_U (E, V): what the residual stream says about the next token."""
    return _behind(model.config, model.norm_final, model.unembedding).T


def _behind(config: ModelConfig, norm: RMSNorm | LayerNorm, weight: Tensor) -> Tensor:
    """`weight` (outputs, E) as it reads the residual stream from behind a norm, whose division is left out: with its gain, and blind to
    the mean that LayerNorm takes away."""
    weight = weight * norm.gain
    return weight - weight.mean(-1, keepdim=True) if config.norm == "layernorm" else weight

"""What a model costs before anything is allocated: parameters, FLOPs and bytes of a config.
`python -m training.plan CONFIG` prints them."""

import sys
from collections import Counter
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.gpt import GPT

# The first of these that a parameter's name contains says which part it belongs to.
PARTS = {".bias": "biases", "embed_position": "positions", "embed": "embedding",
         "lm_head": "head", ".w_q": "attention", ".w_k": "attention", ".w_v": "attention",
         ".w_o": "attention", ".mlp.": "MLP", "": "norms and gains"}


def parameters(config: ModelConfig) -> Counter[str]:
    """Parameters by part, counted on the model itself, built without memory."""
    with torch.device("meta"):
        model = GPT(config)
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        part = next(part for fragment, part in PARTS.items() if fragment in name)
        counts[part] += p.numel()
    return counts


def flops_per_token(config: ModelConfig, context: int | None = None) -> Counter[str]:
    """Floating-point operations of the forward pass per token; a multiply-add counts as two.
    Training costs three times that.

    Matrices: 2 per parameter that multiplies. Attention: 4 D per query head and key seen (q·k and
    A·v). Under a causal mask a query sees (context + 1) / 2 keys on average, in a window fewer
    (Kaplan et al. 2020, table 1, which leaves out the mask).
    """
    T = context or config.n_ctx
    E, H, K, D = config.d_model, config.n_heads, config.kv_heads, config.head_size
    keys_seen = 0.0                                         # on average, summed over layers
    for window in config.windows:
        if window is None or window >= T:
            keys_seen += (T + 1) / 2
        else:
            keys_seen += window - window * (window - 1) / (2 * T)
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    return Counter({
        "attention projections": 2 * config.n_layers * E * D * (2 * H + 2 * K),
        "attention scores and sums": int(4 * H * D * keys_seen),
        "MLP": 2 * config.n_layers * E * config.mlp_size * mlp_matrices,
        "head": 2 * E * (config.vocab_size or 0),
    })


class PatternBytes(NamedTuple):
    """Memory of attention patterns, if they were held; and of what flash attention holds instead,
    one float32 lse per query row."""

    one_head: int
    all_heads: int              # of all layers
    flash: int


def pattern_bytes(config: ModelConfig, element: int = 2,
                  context: int | None = None) -> PatternBytes:
    """The T × T attention pattern in numbers of `element` bytes."""
    T = context or config.n_ctx
    heads = config.n_heads * config.n_layers
    return PatternBytes(T * T * element, T * T * element * heads, T * 4 * heads)


def cache_bytes(config: ModelConfig, kv_heads: int, element: int = 2,
                context: int | None = None) -> int:
    """Keys and values of one sequence over all layers, with `kv_heads` key/value heads. A layer
    with a window keeps only its window."""
    T = context or config.n_ctx
    per_token = 2 * kv_heads * config.head_size * element
    return sum(per_token * min(window or T, T) for window in config.windows)


def activation_bytes_per_token(config: ModelConfig, element: int,
                               recompute: bool = False) -> int:
    """What autograd saves per token for the backward pass, in activations of `element` bytes, run
    eagerly. Compiled code saves less.

    `recompute`: each block keeps only its input, and one block at a time is run again. The copies
    of weights that are saved too do not grow with tokens: training/plan.py.
    """
    E = config.d_model
    # The last norm; the gradient that the loss already knows; tokens and targets.
    outside = norm_bytes_per_token(E, element) + element * E + 16
    block = block_activation_bytes_per_token(config, element)
    if recompute:
        return outside + block + element * E * config.n_layers
    return outside + block * config.n_layers


def norm_bytes_per_token(d_model: int, element: int) -> int:
    """x and x / rms(x) in float32, the rms, and what the next matrix reads."""
    return (4 + 4 + element) * d_model + 4


def block_activation_bytes_per_token(config: ModelConfig, element: int) -> int:
    """The same for one block."""
    E, H, K, D, F = (config.d_model, config.n_heads, config.kv_heads, config.head_size,
                     config.mlp_size)
    # Queries, keys, values; their result and its lse.
    attention = element * ((H + 2 * K) * D + H * D) + 4 * H
    if config.position == "rope":
        attention += element * (H + K) * D                  # rotated queries and keys
    if config.qk_norm:
        # As in norm; z once more, in another layout.
        attention += (8 if element < 4 else 4) * (H + K) * D + element * H * D
    if config.smear:
        attention += 2 * element * K * D
    mlp = 0
    if F:                                                   # before and after the nonlinearity
        mlp = norm_bytes_per_token(E, element)
        mlp += element * F * (4 if config.mlp == "swiglu" else 2)
    return norm_bytes_per_token(E, element) + attention + mlp


# --- the report -------------------------------------------------------------------------------

def report(config: ModelConfig, context: int | None = None) -> str:
    """All of it as text."""
    T = context or config.n_ctx
    parts, flops = parameters(config), flops_per_token(config, T)
    pattern = pattern_bytes(config, 2, T)
    attention = parts["attention"] / config.n_layers

    def row(name: str, value: str, note: str = "") -> str:
        return f"  {name:28}{value:>18}{note}"

    def counts(counter: Counter[str]) -> list[str]:
        return [row(name, f"{count:,}", f"  {count / counter.total():6.1%}")
                for name, count in counter.most_common()]

    variants = {"MHA": config.n_heads}
    if 1 < config.kv_heads < config.n_heads:
        variants[f"GQA, {config.kv_heads} heads (this config)"] = config.kv_heads
    elif config.n_heads > 4:
        variants["GQA, 4 queries a head"] = config.n_heads // 4
    variants["MQA"] = 1
    return "\n".join([
        f"{config.n_layers} layers × {config.n_heads} heads ({config.kv_heads} for keys and "
        f"values) of {config.head_size}, width {config.d_model}, MLP {config.mlp_size}, vocabulary "
        f"{config.vocab_size}, context {T}",
        "", "parameters", *counts(parts),
        row("total", f"{parts.total():,}"),
        row("attention of one block", f"{attention:,.0f}"),
        row("attention of one head", f"{attention / config.n_heads:,.0f}"),
        "", f"forward FLOPs per token at context {T}", *counts(flops),
        row("total", f"{flops.total():,}", "  (training: three times that)"),
        "", f"attention pattern at T = {T} in 16 bits, if it were held",
        row("one head", in_units(pattern.one_head), f"  ({pattern.one_head:,} bytes)"),
        row("all heads and layers", in_units(pattern.all_heads)),
        row("flash attention instead", in_units(pattern.flash)),
        "", f"KV cache of one sequence of {T} in 16 bits",
        *[row(name, in_units(cache_bytes(config, heads, 2, T)))
          for name, heads in variants.items()]])


def in_units(n: float) -> str:
    """A number of bytes, short: 12.3 MB."""
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("KB", "MB", "GB"):
        n /= 1000
        if n < 1000:
            return f"{n:,.1f} {unit}"
    return f"{n / 1000:,.1f} TB"


if __name__ == "__main__":                                  # the command of earlier versions
    sys.exit("error: this command is now: python -m training.plan CONFIG")

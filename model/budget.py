"""What a model costs before anything is allocated: parameters, FLOPs and bytes of a config. `python -m training.plan` prints them."""

import sys
from collections import Counter

import torch

from model.config import ModelConfig
from model.gpt import GPT


def parameters(config: ModelConfig) -> Counter[str]:
    """Parameters by part, counted on the model itself, built without memory."""
    with torch.device("meta"):
        model = GPT(config)
    kinds = {".bias": "biases", "embed_position": "positions", "embed": "embedding", "lm_head": "head", ".w_q": "attention",
             ".w_k": "attention", ".w_v": "attention", ".w_o": "attention", ".mlp.": "MLP", "": "norms and gains"}
    parts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        parts[next(kind for part, kind in kinds.items() if part in name)] += p.numel()
    return parts


def flops_per_token(config: ModelConfig, context: int | None = None) -> Counter[str]:
    """Floating-point operations of the forward pass per token, a multiply-add as two; training costs three times that.

    Matrices: 2 per parameter that multiplies. Attention: 4 D per query head and key seen (q·k and A·v), with
    (context + 1) / 2 keys seen on average under a causal mask, fewer in a window (Kaplan et al. 2020, table 1, which
    leaves out the mask).
    """
    T = context or config.n_ctx
    E, H, K, D = config.d_model, config.n_heads, config.kv_heads, config.head_size
    seen = sum((T + 1) / 2 if not w or w >= T else w - w * (w - 1) / (2 * T) for w in config.windows)
    return Counter({
        "attention projections": 2 * config.n_layers * E * D * (2 * H + 2 * K),
        "attention scores and sums": int(4 * H * D * seen),
        "MLP": 2 * config.n_layers * E * config.mlp_size * (3 if config.mlp == "swiglu" else 2),
        "head": 2 * E * (config.vocab_size or 0),
    })


def pattern_bytes(config: ModelConfig, element: int = 2, context: int | None = None) -> dict[str, int]:
    """The T × T attention pattern in `element`-byte numbers if it were held: one head's and all heads' of all layers;
    and what flash attention holds in its place, one float32 lse per query row."""
    T = context or config.n_ctx
    heads = config.n_heads * config.n_layers
    return {"one head": T * T * element, "all heads and layers": T * T * element * heads, "flash": T * 4 * heads}


def cache_bytes(config: ModelConfig, kv_heads: int, element: int = 2, context: int | None = None) -> int:
    """Keys and values of one sequence over all layers, with `kv_heads` key/value heads; a windowed layer keeps its window."""
    T = context or config.n_ctx
    return sum(2 * kv_heads * config.head_size * min(window or T, T) * element for window in config.windows)


def activation_bytes_per_token(config: ModelConfig, element: int, checkpointed: bool = False) -> int:
    """What training keeps per token for the backward pass, in `element`-byte activations, run eagerly: what autograd saves.

    `checkpointed`: each block keeps the residual stream it was given, and one block at a time is run again. Compiled code
    keeps less. The copies of weights that are saved too do not grow with tokens: training/plan.py.
    """
    E = config.d_model
    norm = (8 + element) * E + 4                # x and x / rms(x) in float32, what the next matrix reads, and the rms
    outside = norm + element * E + 16           # the last norm; the gradient that the loss already knows; tokens and targets
    block = block_activation_bytes_per_token(config, element)
    if checkpointed:
        return outside + block + element * E * config.n_layers
    return outside + block * config.n_layers


def block_activation_bytes_per_token(config: ModelConfig, element: int) -> int:
    """The same for one block."""
    E, H, K, D, F = config.d_model, config.n_heads, config.kv_heads, config.head_size, config.mlp_size
    norm = (8 + element) * E + 4
    attention = element * ((H + 2 * K) * D + H * D) + 4 * H             # queries, keys, values; their result and its lse
    if config.position == "rope":
        attention += element * (H + K) * D                              # turned
    if config.qk_norm:
        attention += (8 if element < 4 else 4) * (H + K) * D + element * H * D      # as in norm; z once more, laid out anew
    if config.smear:
        attention += 2 * element * K * D
    mlp = norm + element * F * (4 if config.mlp == "swiglu" else 2) if F else 0     # before and behind the nonlinearity
    return norm + attention + mlp


def report(config: ModelConfig, context: int | None = None) -> str:
    """All of it as text."""
    T = context or config.n_ctx
    parts, flops, pattern = parameters(config), flops_per_token(config, T), pattern_bytes(config, 2, T)
    attention = parts["attention"] / config.n_layers
    lines = [f"{config.n_layers} layers × {config.n_heads} heads ({config.kv_heads} for keys and values) of {config.head_size}, "
             f"width {config.d_model}, MLP {config.mlp_size}, vocabulary {config.vocab_size}, context {T}", "", "parameters"]
    lines += [f"  {name:28}{count:>18,}  {count / parts.total():6.1%}" for name, count in parts.most_common()]
    lines += [f"  {'together':28}{parts.total():>18,}",
              f"  {'attention of one block':28}{attention:>18,.0f}",
              f"  {'attention of one head':28}{attention / config.n_heads:>18,.0f}", "", f"forward FLOPs per token at context {T}"]
    lines += [f"  {name:28}{count:>18,}  {count / flops.total():6.1%}" for name, count in flops.most_common()]
    lines += [f"  {'together':28}{flops.total():>18,}  (training: three times that)", "",
              f"attention pattern at T = {T} in 16 bits, if it were held",
              f"  {'one head':28}{in_units(pattern['one head']):>18}  ({pattern['one head']:,} bytes)",
              f"  {'all heads and layers':28}{in_units(pattern['all heads and layers']):>18}",
              f"  {'flash attention instead':28}{in_units(pattern['flash']):>18}", "", f"KV cache of one sequence of {T} in 16 bits"]
    kinds = {"MHA": config.n_heads, f"GQA, {config.kv_heads} heads (this config)": config.kv_heads, "MQA": 1}
    if config.kv_heads in (1, config.n_heads):
        kinds = {"MHA": config.n_heads} | ({"GQA, 4 queries a head": config.n_heads // 4} if config.n_heads > 4 else {}) | {"MQA": 1}
    lines += [f"  {kind:28}{in_units(cache_bytes(config, heads, 2, T)):>18}" for kind, heads in kinds.items()]
    return "\n".join(lines)


def in_units(n: float) -> str:
    """A number of bytes, short."""
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("KB", "MB", "GB"):
        n /= 1000
        if n < 1000:
            return f"{n:,.1f} {unit}"
    return f"{n / 1000:,.1f} TB"


if __name__ == "__main__":                      # the command of earlier versions
    sys.exit("error: this command is now: python -m training.plan CONFIG")

"""Families of models that transformers knows: their config.json and their parameters' names, in tables that are read in both directions.

A family's `choices` say which of our options it has and what each is called there. Where a config.json lacks a key, transformers takes
the value of the first line, and so do we.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from errors import UserError
from model.config import ModelConfig

Choices = dict[str, list[tuple[Any, dict[str, Any]]]]      # our key → (our value, what config.json says then)

LLAMA_NAMES = {                     # ours → theirs; {} is the layer. Several of ours that share a name there are one matrix
    "embed": "model.embed_tokens", "embed_position": "model.embed_positions",
    "blocks.{}.norm_attn": "model.layers.{}.input_layernorm",
    "blocks.{}.attn": "model.layers.{}.self_attn",
    "blocks.{}.attn.w_q": "model.layers.{}.self_attn.q_proj", "blocks.{}.attn.w_k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.w_v": "model.layers.{}.self_attn.v_proj", "blocks.{}.attn.w_o": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.attn.norm_q": "model.layers.{}.self_attn.q_norm", "blocks.{}.attn.norm_k": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.norm_mlp": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.w_gate": "model.layers.{}.mlp.gate_proj", "blocks.{}.mlp.w_up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.w_down": "model.layers.{}.mlp.down_proj",
    "norm_final": "model.norm", "lm_head": "lm_head",
}
GPT2_NAMES = {
    "embed": "transformer.wte", "embed_position": "transformer.wpe",
    "blocks.{}.norm_attn": "transformer.h.{}.ln_1",
    "blocks.{}.attn.w_q": "transformer.h.{}.attn.c_attn", "blocks.{}.attn.w_k": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.w_v": "transformer.h.{}.attn.c_attn", "blocks.{}.attn.w_o": "transformer.h.{}.attn.c_proj",
    "blocks.{}.norm_mlp": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.w_up": "transformer.h.{}.mlp.c_fc", "blocks.{}.mlp.w_down": "transformer.h.{}.mlp.c_proj",
    "norm_final": "transformer.ln_f", "lm_head": "lm_head",
}
NEOX_NAMES = {
    "embed": "gpt_neox.embed_in",
    "blocks.{}.norm_attn": "gpt_neox.layers.{}.input_layernorm",
    "blocks.{}.attn.w_q": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attn.w_k": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attn.w_v": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attn.w_o": "gpt_neox.layers.{}.attention.dense",
    "blocks.{}.norm_mlp": "gpt_neox.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.w_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h", "blocks.{}.mlp.w_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "norm_final": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
}
LLAMA_SIZES = {                     # ours → theirs, the same number
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "d_head": "head_dim", "d_mlp": "intermediate_size", "n_ctx": "max_position_embeddings",
}
GPT2_SIZES = {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "d_mlp": "n_inner",
              "n_ctx": "n_positions"}
NEOX_SIZES = {ours: theirs for ours, theirs in LLAMA_SIZES.items() if ours not in ("n_kv_heads", "d_head")}
OPTIONAL = ("n_kv_heads", "d_head", "d_mlp")               # sizes that may be null: they then follow from others

UNTIED: Choices = {"tied_embeddings": [(False, {"tie_word_embeddings": False}), (True, {"tie_word_embeddings": True})]}
LLAMA_LIKE: Choices = UNTIED | {
    "norm": [("rmsnorm", {})], "position": [("rope", {})], "rope_dims": [(None, {})], "parallel": [(False, {})], "smear": [(False, {})],
    "mlp": [("swiglu", {"hidden_act": "silu"}), ("none", {"hidden_act": "silu"})],         # none is written as one unit of zeros
    "qk_norm": [(False, {})], "bias": [("none", {})],
}
GPT_LIKE: Choices = {"norm": [("layernorm", {})], "smear": [(False, {})], "qk_norm": [(False, {})]}
QWEN3_BIAS = [("none", {"attention_bias": False}), ("attention", {"attention_bias": True})]
LLAMA_BIAS = [(ours, given | {"mlp_bias": mlp}) for mlp, names in ((False, ("none", "attention")), (True, ("mlp", "all")))
              for ours, (_, given) in zip(names, QWEN3_BIAS)]


@dataclass(frozen=True)
class Family:
    """How one model_type writes a model down."""

    architecture: str
    names: dict[str, str]
    sizes: dict[str, str]
    choices: Choices
    eps: str = "rms_norm_eps"
    windows: Literal["none", "alike", "listed"] = "none"    # listed: full and windowed layers by `layer_types`
    window: int | None = None                               # where config.json lacks sliding_window
    windows_switch: bool = False                            # sliding_window counts with use_sliding_window alone
    square: bool = False                                    # as many key heads as query heads, which fill the width
    divides: bool = False                                   # transformers wants n_heads to divide the width
    layout: Literal["", "transposed", "by head"] = ""       # matrices stand transposed; q, k and v are one matrix, head by head
    rope_dims_default: float = 1.0                          # the share of a head that rope turns
    only: dict[str, Any] = field(default_factory=dict)      # settings with one value that is supported


FAMILIES = {                        # the first that fits is what a model is saved as
    "llama": Family("LlamaForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_LIKE | {"bias": LLAMA_BIAS}, divides=True),
    "mistral": Family("MistralForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_LIKE, windows="alike", window=4096),
    "ministral": Family("MinistralForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_LIKE, windows="listed", window=4096),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_LIKE | {"bias": [("qkv", {})]}, windows="listed", window=4096,
                    windows_switch=True),
    "qwen3": Family("Qwen3ForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_LIKE | {"bias": QWEN3_BIAS, "qk_norm": [(True, {})]},
                    windows="listed", window=4096, windows_switch=True),
    "gpt2": Family("GPT2LMHeadModel", GPT2_NAMES, GPT2_SIZES, GPT_LIKE | {
        "tied_embeddings": UNTIED["tied_embeddings"][::-1], "position": [("learned", {})], "parallel": [(False, {})], "bias": [("all", {})],
        "mlp": [("gelu_tanh", {"activation_function": "gelu_new"}), ("gelu_tanh", {"activation_function": "gelu_pytorch_tanh"}),
                ("gelu", {"activation_function": "gelu"})],
    }, "layer_norm_epsilon", square=True, layout="transposed",
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}),
    "gpt_neox": Family("GPTNeoXForCausalLM", NEOX_NAMES, NEOX_SIZES, GPT_LIKE | UNTIED | {
        "position": [("rope", {})], "bias": [("all", {"attention_bias": True}), ("mlp", {"attention_bias": False})],
        "parallel": [(True, {"use_parallel_residual": True}), (False, {"use_parallel_residual": False})],
        "mlp": [("gelu", {"hidden_act": "gelu"}), ("gelu_tanh", {"hidden_act": "gelu_new"}),
                ("gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"})],
    }, "layer_norm_eps", square=True, layout="by head", rope_dims_default=0.25),
}
OWN_TYPE = "induction_gpt"          # models that have no form in transformers: saved under Llama's names
OWN = Family("InductionGPT", LLAMA_NAMES, LLAMA_SIZES, UNTIED)


def family(config: ModelConfig) -> str:
    """The model_type whose equations are ours, or our own."""
    return next((name for name, of in FAMILIES.items() if not _misfits(config, name, of)), OWN_TYPE)


def obstacles(config: ModelConfig) -> list[str]:
    """What keeps a model from being one of transformers' own families: of the nearest one; empty for one that is."""
    return min((_misfits(config, name, of) for name, of in FAMILIES.items()), key=len)


def _misfits(config: ModelConfig, name: str, of: Family) -> list[str]:
    found = []
    for key, rows in of.choices.items():
        known = list(dict.fromkeys(str(value) for value, _ in rows))
        if (value := getattr(config, key)) not in [value for value, _ in rows]:
            found.append(f"{key}: {value} ({name} has {' and '.join(known)})")
    sizes = set(config.windows)
    if of.windows == "none" and sizes != {None}:
        found.append(f"windows ({name} has none)")
    elif len(sizes - {None}) > 1 or (of.windows == "alike" and len(sizes) > 1):
        found.append(f"windows of {len(sizes)} sizes ({name} has one)")
    if of.square and config.kv_heads != config.n_heads:
        found.append(f"n_kv_heads: {config.kv_heads} ({name} has as many as n_heads)")
    if of.square and config.n_heads * config.head_size != config.d_model:
        found.append(f"d_head: {config.head_size} ({name} has d_model / n_heads)")
    if of.divides and config.d_model % config.n_heads:
        found.append(f"n_heads: {config.n_heads} ({name} wants a divisor of d_model)")
    return found


# --- config.json ------------------------------------------------------------------------------------------------------------

def described(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """A model as its family's config.json says it: the shape alone, no token ids."""
    of = FAMILIES.get(model_type, OWN)
    ours = {"n_kv_heads": config.kv_heads, "d_head": config.head_size, "d_mlp": config.mlp_size or 1}
    said = {theirs: ours.get(key, getattr(config, key)) for key, theirs in of.sizes.items()} | {of.eps: config.norm_eps}
    for key, rows in of.choices.items():
        said |= next((given for value, given in rows if value == getattr(config, key)), {})
    if model_type == "gpt_neox":
        said |= {"rotary_emb_base": config.rope_base, "rotary_pct": _share(config.rope_size, config.head_size)}
    elif config.position == "rope":
        said["rope_theta"] = config.rope_base
    if scaling := config.rope_scaling:
        exact = scaling.model_copy(update={"fast": scaling.fast_turns, "slow": scaling.slow_turns})
        given = {theirs: value for ours, theirs in SCALING[scaling.kind].items() if (value := getattr(exact, ours)) is not None}
        said["rope_scaling"] = {"rope_type": scaling.kind} | given
    if of.windows != "none":
        said["sliding_window"] = next((window for window in config.windows if window), None)
    if of.windows == "listed":
        said |= {"use_sliding_window": any(config.windows),
                 "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows]}
    return said


def read_description(given: dict[str, Any], source: str, layers: int, largest: int) -> dict[str, Any]:
    """ModelConfig's keys of the model that a config.json describes; a UserError names the setting that is not supported, or a size that
    the files cannot hold: they have at most so many `layers`, and no dimension above `largest`."""
    model_type = given.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{source}: model_type={model_type!r} is not supported\n  supported: {', '.join(FAMILIES)}")
    of = FAMILIES[model_type]
    for key, value in (of.only | {"quantization_config": None}).items():
        if given.get(key, value) != value:
            raise _unsupported(source, key, given[key], [value])
    found: dict[str, Any] = {}
    for key, theirs in of.sizes.items():
        size = given.get(theirs)
        if not (size is None and key in OPTIONAL) and (type(size) is not int or size < 1):
            raise UserError(f"{source}: {theirs}={size!r} must be a whole number above 0")
        if key != "n_ctx" and (size or 0) > (most := layers if key == "n_layers" else largest):
            raise UserError(f"{source}: {theirs}={size} is more than the {most} that its safetensors files hold")
        found[key] = size
    if found["d_mlp"] is None and model_type != "gpt2":
        raise UserError(f"{source}: {of.sizes['d_mlp']} is missing")
    found["norm_eps"] = _number(source, of.eps, given.get(of.eps, 1e-6 if of.eps == "rms_norm_eps" else 1e-5))
    for key, rows in of.choices.items():
        first = rows[0][1]
        match = next((value for value, said in rows if all(given.get(k, first.get(k)) == v for k, v in said.items())), rows)
        if match is rows:
            wrong = next(k for k in first if given.get(k, first[k]) not in [said[k] for _, said in rows])
            raise _unsupported(source, wrong, given[wrong], list(dict.fromkeys(said[wrong] for _, said in rows)))
        found[key] = match
    if found["position"] == "rope":
        found |= _read_rope(given, of, found, source)
    return found | {"window": _read_windows(given, of, found["n_layers"], source)}


SCALING = {                         # rope scaling: ours → theirs
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "original_n_ctx": "original_max_position_embeddings", "fast": "high_freq_factor",
               "slow": "low_freq_factor"},
    "yarn": {"factor": "factor", "original_n_ctx": "original_max_position_embeddings", "fast": "beta_fast", "slow": "beta_slow",
             "attention_factor": "attention_factor", "truncate": "truncate"},
}


def _read_rope(given: dict, of: Family, sizes: dict, source: str) -> dict[str, Any]:
    """rope_base, rope_dims and rope_scaling, in the spelling of transformers 5 (rope_parameters) or of those before."""
    scaling = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(f"{source}: rope parameters of each kind of layer are not supported (one rope for all layers is)")

    def said(key: str, *names: str, default: float) -> float:
        value = scaling.get(key)
        return _number(source, key, value if value is not None else next((given[n] for n in names if given.get(n) is not None), default))

    base = said("rope_theta", "rope_theta", "rotary_emb_base", default=10000.0)
    share = said("partial_rotary_factor", "partial_rotary_factor", "rotary_pct", default=of.rope_dims_default)
    size = sizes.get("d_head") or sizes["d_model"] // sizes["n_heads"]
    turned = int(size * share)
    if of.choices.get("rope_dims") and turned != size:
        raise _unsupported(source, "partial_rotary_factor", share, [1.0])
    found = {"rope_base": base, "rope_dims": None if turned == size else turned}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return found
    if kind not in SCALING:
        raise _unsupported(source, "rope_scaling type", kind, ["default", *SCALING])
    if odd := [key for key in ("mscale", "mscale_all_dim") if scaling.get(key)]:
        raise _unsupported(source, f"rope_scaling {odd[0]}", scaling[odd[0]], [None])
    read = {ours: scaling.get(theirs) for ours, theirs in SCALING[kind].items() if scaling.get(theirs) is not None}
    if kind != "linear":
        read.setdefault("original_n_ctx", sizes["n_ctx"])
    whole = ("original_n_ctx", "truncate")
    read = {ours: value if ours in whole else _number(source, SCALING[kind][ours], value) for ours, value in read.items()}
    return found | {"rope_scaling": {"kind": kind} | read}


def _read_windows(given: dict, of: Family, n_layers: int, source: str) -> int | list | None:
    size = None if of.windows == "none" or (of.windows_switch and not given.get("use_sliding_window")) else (
        given.get("sliding_window", of.window))
    if of.windows != "listed" or size is None:
        return size
    first = given.get("max_window_layers", 28) if of.windows_switch else 0
    types = given.get("layer_types") or ["sliding_attention" if layer >= first else "full_attention" for layer in range(n_layers)]
    if wrong := [kind for kind in types if kind not in ("sliding_attention", "full_attention")]:
        raise _unsupported(source, "layer_types", wrong[0], ["full_attention", "sliding_attention"])
    windows = [size if kind == "sliding_attention" else None for kind in types]
    return windows if len(set(windows)) > 1 else windows[0]


def _share(part: int, whole: int) -> float:
    """The number whose int(whole × number) is `part`, as transformers counts."""
    return part / whole if int(whole * (part / whole)) == part else (part + 0.5) / whole


def _number(source: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{source}: {key}={value!r} must be a number")
    return float(value)


def _unsupported(source: str, key: str, value: Any, known: list) -> UserError:
    return UserError(f"{source}: {key}={value!r} is not supported\n  supported: {', '.join(map(repr, known))}")


# --- parameters ---------------------------------------------------------------------------------------------------------------

def by_their_name(names: Iterable[str], of: Family) -> dict[str, list[str]]:
    """Their tensors → the parameters of ours that each holds, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        module, leaf = name.rsplit(".", 1)
        layer = re.search(r"\.(\d+)(\.|$)", module)
        theirs = of.names[re.sub(r"\.\d+(?=\.|$)", ".{}", module, count=1)].format(layer[1] if layer else "")
        found.setdefault(f"{theirs}.{'weight' if leaf == 'gain' else leaf}", []).append(name)
    return found


def to_theirs(parts: list[Tensor], name: str, of: Family, n_heads: int) -> Tensor:
    """The tensor that a family makes of our parameters, the first of which is called `name`."""
    if of.layout == "by head" and len(parts) > 1:               # (H D, …) each → (H · parts · D, …)
        return torch.stack([part.unflatten(0, (n_heads, -1)) for part in parts], dim=1).flatten(0, 2)
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.mT if _transposed(whole, name, of) else whole


def to_ours(whole: Tensor, name: str, count: int, of: Family, n_heads: int) -> Iterator[Tensor]:
    """The `count` parameters in a family's tensor, the first of which is called `name`."""
    if of.layout == "by head" and count > 1:
        yield from (part.flatten(0, 1) for part in whole.unflatten(0, (n_heads, count, -1)).unbind(1))
    else:
        yield from (whole.mT if _transposed(whole, name, of) else whole).chunk(count)


def _transposed(whole: Tensor, name: str, of: Family) -> bool:
    return of.layout == "transposed" and whole.ndim == 2 and name.startswith("blocks.")

"""Families of models that transformers knows: their config.json and their parameters' names, in
tables that are read in both directions.

A family's `choices` say which of our options it has, and what config.json says for each. Where a
config.json lacks a key, transformers takes the value of the first row, and so do we.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from errors import UserError

import torch
from torch import Tensor

from model.config import ModelConfig

Settings = dict[str, Any]                               # keys and values of a config.json
Choices = dict[str, list[tuple[Any, Settings]]]         # our key → rows (our value, their settings)

# --- the tables -------------------------------------------------------------------------------

# Our module → theirs; {} is the layer. If several of ours have the same name there, they are one
# matrix there.
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "embed_position": "model.embed_positions",
    "blocks.{}.norm_attn": "model.layers.{}.input_layernorm",
    "blocks.{}.attn": "model.layers.{}.self_attn",
    "blocks.{}.attn.w_q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.w_k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.w_v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.w_o": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.attn.norm_q": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.norm_k": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.norm_mlp": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.w_gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.w_up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.w_down": "model.layers.{}.mlp.down_proj",
    "norm_final": "model.norm",
    "lm_head": "lm_head",
}
GPT2_NAMES = {
    "embed": "transformer.wte",
    "embed_position": "transformer.wpe",
    "blocks.{}.norm_attn": "transformer.h.{}.ln_1",
    "blocks.{}.attn.w_q": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.w_k": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.w_v": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attn.w_o": "transformer.h.{}.attn.c_proj",
    "blocks.{}.norm_mlp": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.w_up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.w_down": "transformer.h.{}.mlp.c_proj",
    "norm_final": "transformer.ln_f",
    "lm_head": "lm_head",
}
NEOX_NAMES = {
    "embed": "gpt_neox.embed_in",
    "blocks.{}.norm_attn": "gpt_neox.layers.{}.input_layernorm",
    "blocks.{}.attn.w_q": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attn.w_k": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attn.w_v": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attn.w_o": "gpt_neox.layers.{}.attention.dense",
    "blocks.{}.norm_mlp": "gpt_neox.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.w_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp.w_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "norm_final": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
LLAMA_SIZES = {                     # our key → theirs, with the same number
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "d_head": "head_dim",
    "d_mlp": "intermediate_size", "n_ctx": "max_position_embeddings",
}
GPT2_SIZES = {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer",
              "n_heads": "n_head", "d_mlp": "n_inner", "n_ctx": "n_positions"}
NEOX_SIZES = {ours: theirs for ours, theirs in LLAMA_SIZES.items()
              if ours not in ("n_kv_heads", "d_head")}
OPTIONAL_SIZES = ("n_kv_heads", "d_head", "d_mlp")      # may be null: they follow from others

UNTIED: Choices = {"tied_embeddings": [(False, {"tie_word_embeddings": False}),
                                       (True, {"tie_word_embeddings": True})]}
TIED: Choices = {"tied_embeddings": UNTIED["tied_embeddings"][::-1]}
LLAMA_CHOICES: Choices = UNTIED | {
    "norm": [("rmsnorm", {})],
    "position": [("rope", {})],
    "rope_dims": [(None, {})],
    "parallel": [(False, {})],
    "smear": [(False, {})],
    "mlp": [("swiglu", {"hidden_act": "silu"}),
            ("none", {"hidden_act": "silu"})],          # saved as one unit of zeros
    "qk_norm": [(False, {})],
    "bias": [("none", {})],
}
LLAMA_BIAS: list[tuple[Any, Settings]] = [
    ("none", {"attention_bias": False, "mlp_bias": False}),
    ("attention", {"attention_bias": True, "mlp_bias": False}),
    ("mlp", {"attention_bias": False, "mlp_bias": True}),
    ("all", {"attention_bias": True, "mlp_bias": True}),
]
QWEN3_BIAS: list[tuple[Any, Settings]] = [
    ("none", {"attention_bias": False}),
    ("attention", {"attention_bias": True}),
]
GPT_CHOICES: Choices = {"norm": [("layernorm", {})], "smear": [(False, {})],
                        "qk_norm": [(False, {})]}
GPT2_CHOICES: Choices = GPT_CHOICES | TIED | {
    "position": [("learned", {})],
    "parallel": [(False, {})],
    "bias": [("all", {})],
    "mlp": [("gelu_tanh", {"activation_function": "gelu_new"}),
            ("gelu_tanh", {"activation_function": "gelu_pytorch_tanh"}),
            ("gelu", {"activation_function": "gelu"})],
}
NEOX_CHOICES: Choices = GPT_CHOICES | UNTIED | {
    "position": [("rope", {})],
    "bias": [("all", {"attention_bias": True}), ("mlp", {"attention_bias": False})],
    "parallel": [(True, {"use_parallel_residual": True}),
                 (False, {"use_parallel_residual": False})],
    "mlp": [("gelu", {"hidden_act": "gelu"}),
            ("gelu_tanh", {"hidden_act": "gelu_new"}),
            ("gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"})],
}
ROPE_SCALING = {                    # by kind of scaling: our key → theirs
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "original_n_ctx": "original_max_position_embeddings",
               "fast": "high_freq_factor", "slow": "low_freq_factor"},
    "yarn": {"factor": "factor", "original_n_ctx": "original_max_position_embeddings",
             "fast": "beta_fast", "slow": "beta_slow", "attention_factor": "attention_factor",
             "truncate": "truncate"},
}


@dataclass(frozen=True)
class Family:
    """How one model_type writes a model down."""

    architecture: str
    names: dict[str, str]
    sizes: dict[str, str]
    choices: Choices
    eps: str = "rms_norm_eps"
    # alike: one window for all layers; listed: full and windowed layers, by `layer_types`
    windows: Literal["none", "alike", "listed"] = "none"
    default_window: int | None = None       # if config.json lacks sliding_window
    windows_switch: bool = False            # sliding_window counts only with use_sliding_window
    square: bool = False                    # as many key heads as query heads, which fill the width
    divides: bool = False                   # transformers wants n_heads to divide the width
    # transposed: matrices are stored transposed; by head: q, k and v are one matrix, head by head
    layout: Literal["", "transposed", "by head"] = ""
    default_rope_share: float = 1.0         # the fraction of a head that RoPE rotates
    fixed: Settings = field(default_factory=dict)           # settings with one supported value


FAMILIES = {                        # a model is saved as the first that fits
    "llama": Family("LlamaForCausalLM", LLAMA_NAMES, LLAMA_SIZES,
                    LLAMA_CHOICES | {"bias": LLAMA_BIAS}, divides=True),
    "mistral": Family("MistralForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_CHOICES,
                      windows="alike", default_window=4096),
    "ministral": Family("MinistralForCausalLM", LLAMA_NAMES, LLAMA_SIZES, LLAMA_CHOICES,
                        windows="listed", default_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA_NAMES, LLAMA_SIZES,
                    LLAMA_CHOICES | {"bias": [("qkv", {})]},
                    windows="listed", default_window=4096, windows_switch=True),
    "qwen3": Family("Qwen3ForCausalLM", LLAMA_NAMES, LLAMA_SIZES,
                    LLAMA_CHOICES | {"bias": QWEN3_BIAS, "qk_norm": [(True, {})]},
                    windows="listed", default_window=4096, windows_switch=True),
    "gpt2": Family("GPT2LMHeadModel", GPT2_NAMES, GPT2_SIZES, GPT2_CHOICES,
                   eps="layer_norm_epsilon", square=True, layout="transposed",
                   fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                          "add_cross_attention": False}),
    "gpt_neox": Family("GPTNeoXForCausalLM", NEOX_NAMES, NEOX_SIZES, NEOX_CHOICES,
                       eps="layer_norm_eps", square=True, layout="by head",
                       default_rope_share=0.25),
}
# Models that transformers has no form for are saved under Llama's names.
OWN_TYPE = "induction_gpt"
OWN = Family("InductionGPT", LLAMA_NAMES, LLAMA_SIZES, UNTIED)


# --- which family a model is ------------------------------------------------------------------

def family(config: ModelConfig) -> str:
    """The model_type whose equations are ours, or our own."""
    for name, candidate in FAMILIES.items():
        if not _misfits(config, name, candidate):
            return name
    return OWN_TYPE


def architecture_of(model_type: str) -> Family:
    """The family of a model_type; our own if transformers has none."""
    return FAMILIES.get(model_type, OWN)


def obstacles(config: ModelConfig) -> list[str]:
    """Why a model is none of transformers' families: what keeps it from the nearest. Empty if it
    is one."""
    return min((_misfits(config, name, candidate) for name, candidate in FAMILIES.items()),
               key=len)


def _misfits(config: ModelConfig, name: str, candidate: Family) -> list[str]:
    """What of a model the family cannot express."""
    misfits = []
    for key, rows in candidate.choices.items():
        value = getattr(config, key)
        if value not in [ours for ours, _ in rows]:
            known = list(dict.fromkeys(str(ours) for ours, _ in rows))
            misfits.append(f"{key}: {value} ({name} has {' and '.join(known)})")
    windows = set(config.windows)
    if candidate.windows == "none":
        if windows != {None}:
            misfits.append(f"windows ({name} has none)")
    elif len(windows - {None}) > 1 or (candidate.windows == "alike" and len(windows) > 1):
        misfits.append(f"windows of {len(windows)} sizes ({name} has one)")
    if candidate.square and config.kv_heads != config.n_heads:
        misfits.append(f"n_kv_heads: {config.kv_heads} ({name} has as many as n_heads)")
    if candidate.square and config.n_heads * config.head_size != config.d_model:
        misfits.append(f"d_head: {config.head_size} ({name} has d_model / n_heads)")
    if candidate.divides and config.d_model % config.n_heads:
        misfits.append(f"n_heads: {config.n_heads} ({name} wants a divisor of d_model)")
    return misfits


# --- writing config.json ----------------------------------------------------------------------

def describe(config: ModelConfig, model_type: str) -> Settings:
    """A model as its family's config.json describes it: the shape, without token ids."""
    of = architecture_of(model_type)
    settings: Settings = {}
    resolved = {"n_kv_heads": config.kv_heads, "d_head": config.head_size,
                "d_mlp": config.mlp_size or 1}          # what null stands for in our config
    for key, theirs in of.sizes.items():
        settings[theirs] = resolved.get(key, getattr(config, key))
    settings[of.eps] = config.norm_eps
    for key, rows in of.choices.items():
        value = getattr(config, key)
        settings |= next((theirs for ours, theirs in rows if ours == value), {})
    if model_type == "gpt_neox":
        settings["rotary_emb_base"] = config.rope_base
        settings["rotary_pct"] = _share(config.rope_size, config.head_size)
    elif config.position == "rope":
        settings["rope_theta"] = config.rope_base
    if scaling := config.rope_scaling:
        scaling = scaling.model_copy(
            update={"fast": scaling.fast_turns, "slow": scaling.slow_turns})
        settings["rope_scaling"] = {"rope_type": scaling.kind}
        for ours, theirs in ROPE_SCALING[scaling.kind].items():
            if (value := getattr(scaling, ours)) is not None:
                settings["rope_scaling"][theirs] = value
    if of.windows != "none":
        settings["sliding_window"] = next((window for window in config.windows if window), None)
    if of.windows == "listed":
        settings["use_sliding_window"] = any(config.windows)
        settings["layer_types"] = ["sliding_attention" if window else "full_attention"
                                   for window in config.windows]
    return settings


def _share(part: int, size: int) -> float:
    """A number whose int(size × number) is `part`, as transformers computes it."""
    share = part / size
    return share if int(size * share) == part else (part + 0.5) / size


# --- reading config.json ----------------------------------------------------------------------

def read_description(given: Settings, source: str, layers: int, largest: int) -> dict[str, Any]:
    """ModelConfig's keys for the model that a config.json describes.

    given               the contents of config.json
    source              names it in errors
    layers, largest     the most layers, and the largest dimension, that the weight files can hold
    Raises UserError for a setting that is not supported, and for a size that the files cannot hold.
    """
    model_type = given.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{source}: model_type={model_type!r} is not supported\n"
                        f"  supported: {', '.join(FAMILIES)}")
    of = FAMILIES[model_type]
    for key, value in (of.fixed | {"quantization_config": None}).items():
        if given.get(key, value) != value:
            raise _unsupported(source, key, given[key], [value])
    ours: dict[str, Any] = {}
    for key, theirs in of.sizes.items():
        size = given.get(theirs)
        missing = size is None and key in OPTIONAL_SIZES
        if not missing and (type(size) is not int or size < 1):
            raise UserError(f"{source}: {theirs}={size!r} must be a whole number above 0")
        most = layers if key == "n_layers" else largest
        if key != "n_ctx" and (size or 0) > most:
            raise UserError(f"{source}: {theirs}={size} is more than the {most} that its "
                            "safetensors files hold")
        ours[key] = size
    if ours["d_mlp"] is None and model_type != "gpt2":
        raise UserError(f"{source}: {of.sizes['d_mlp']} is missing")
    default_eps = 1e-6 if of.eps == "rms_norm_eps" else 1e-5
    ours["norm_eps"] = _number(source, of.eps, given.get(of.eps, default_eps))
    for key, rows in of.choices.items():
        ours[key] = _read_choice(given, rows, source)
    if ours["position"] == "rope":
        ours |= _read_rope(given, of, ours, source)
    ours["window"] = _read_windows(given, of, ours["n_layers"], source)
    return ours


def _read_choice(given: Settings, rows: list[tuple[Any, Settings]], source: str) -> Any:
    """Our value of the first row whose settings config.json has. A missing key has the value of the
    first row."""
    defaults = rows[0][1]
    for value, settings in rows:
        if all(given.get(key, defaults.get(key)) == setting for key, setting in settings.items()):
            return value
    for key, default in defaults.items():
        supported = list(dict.fromkeys(settings[key] for _, settings in rows))
        if given.get(key, default) not in supported:
            raise _unsupported(source, key, given[key], supported)
    shown = {key: given.get(key, default) for key, default in defaults.items()}
    raise UserError(f"{source}: {shown} is not supported together")


def _read_rope(given: Settings, of: Family, sizes: dict[str, Any], source: str) -> dict[str, Any]:
    """rope_base, rope_dims and rope_scaling, as transformers 5 writes them (rope_parameters) or
    earlier versions."""
    parameters = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise UserError(f"{source}: rope parameters of each kind of layer are not supported "
                        "(one rope for all layers is)")

    def read_number(key: str, *older_keys: str, default: float) -> float:
        candidates = [parameters.get(key), *[given.get(older) for older in older_keys], default]
        value = next(value for value in candidates if value is not None)
        return _number(source, key, value)

    base = read_number("rope_theta", "rope_theta", "rotary_emb_base", default=10000.0)
    share = read_number("partial_rotary_factor", "partial_rotary_factor", "rotary_pct",
                        default=of.default_rope_share)
    head_size = sizes.get("d_head") or sizes["d_model"] // sizes["n_heads"]
    rotated = int(head_size * share)
    if of.choices.get("rope_dims") and rotated != head_size:
        raise _unsupported(source, "partial_rotary_factor", share, [1.0])
    ours: dict[str, Any] = {"rope_base": base,
                            "rope_dims": None if rotated == head_size else rotated}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return ours
    if kind not in ROPE_SCALING:
        raise _unsupported(source, "rope_scaling type", kind, ["default", *ROPE_SCALING])
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            raise _unsupported(source, f"rope_scaling {key}", parameters[key], [None])
    scaling: dict[str, Any] = {"kind": kind}
    for key, theirs in ROPE_SCALING[kind].items():
        value = parameters.get(theirs)
        if value is not None:
            exact = key in ("original_n_ctx", "truncate")           # an int and a bool
            scaling[key] = value if exact else _number(source, theirs, value)
    if kind != "linear":
        scaling.setdefault("original_n_ctx", sizes["n_ctx"])
    return ours | {"rope_scaling": scaling}


def _read_windows(given: Settings, of: Family, n_layers: int,
                  source: str) -> int | list[int | None] | None:
    """The window of all layers, or of each."""
    if of.windows == "none" or (of.windows_switch and not given.get("use_sliding_window")):
        return None
    size = given.get("sliding_window", of.default_window)
    if of.windows == "alike" or size is None:
        return size
    first = given.get("max_window_layers", 28) if of.windows_switch else 0
    types = given.get("layer_types")
    if not types:
        types = ["sliding_attention" if layer >= first else "full_attention"
                 for layer in range(n_layers)]
    for layer_type in types:
        if layer_type not in ("sliding_attention", "full_attention"):
            raise _unsupported(source, "layer_types", layer_type,
                               ["full_attention", "sliding_attention"])
    windows = [size if layer_type == "sliding_attention" else None for layer_type in types]
    return windows if len(set(windows)) > 1 else windows[0]


def _number(source: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{source}: {key}={value!r} must be a number")
    return float(value)


def _unsupported(source: str, key: str, value: Any, supported: list[Any]) -> UserError:
    return UserError(f"{source}: {key}={value!r} is not supported\n"
                     f"  supported: {', '.join(map(repr, supported))}")


# --- parameters -------------------------------------------------------------------------------

def by_their_name(names: Iterable[str], of: Family) -> dict[str, list[str]]:
    """The family's tensors, and which of our parameters `names` each holds, in order."""
    tensors: dict[str, list[str]] = {}
    for name in names:
        module, leaf = name.rsplit(".", 1)
        layer = re.search(r"\.(\d+)(\.|$)", module)
        template = of.names[re.sub(r"\.\d+(?=\.|$)", ".{}", module, count=1)]
        their_module = template.format(layer[1] if layer else "")
        their_leaf = "weight" if leaf == "gain" else leaf
        tensors.setdefault(f"{their_module}.{their_leaf}", []).append(name)
    return tensors


def to_theirs(parts: Sequence[Tensor], name: str, of: Family, n_heads: int) -> Tensor:
    """The tensor that a family makes of our parameters, the first of which is called `name`."""
    if of.layout == "by head" and len(parts) > 1:               # (H D, …) each → (H · parts · D, …)
        by_head = [part.unflatten(0, (n_heads, -1)) for part in parts]
        return torch.stack(by_head, dim=1).flatten(0, 2)
    tensor = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return tensor.mT if _transposed(tensor, name, of) else tensor


def to_ours(tensor: Tensor, name: str, count: int, of: Family, n_heads: int) -> Iterator[Tensor]:
    """The `count` parameters in a family's tensor, the first of which is called `name`."""
    if of.layout == "by head" and count > 1:
        by_head = tensor.unflatten(0, (n_heads, count, -1))
        yield from (part.flatten(0, 1) for part in by_head.unbind(1))
    else:
        yield from (tensor.mT if _transposed(tensor, name, of) else tensor).chunk(count)


def _transposed(tensor: Tensor, name: str, of: Family) -> bool:
    return of.layout == "transposed" and tensor.ndim == 2 and name.startswith("blocks.")

"""Families of models that transformers knows: tables of their settings and of their parameters'
names, read in both directions by model/hf_config.py and model/huggingface.py.

A family's `choices` say which of our options it has, and what config.json says for each. Where a
config.json lacks a key, transformers takes the value of the first row, and so do we.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

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
    ("qkv", {"attention_bias": True, "mlp_bias": False}),       # saved with zeros for o's bias
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
    # As many key heads as query heads, which fill the width.
    square: bool = False
    # transformers wants n_heads to divide the width.
    heads_divide_width: bool = False
    # transposed: matrices are stored transposed; by head: q, k and v are one matrix, head by head
    layout: Literal["", "transposed", "by head"] = ""
    # A tied model is saved without the first word of its names: mlx-lm knows only these.
    short_names: bool = False
    default_rope_share: float = 1.0         # the fraction of a head that RoPE rotates
    fixed: Settings = field(default_factory=dict)           # settings with one supported value


FAMILIES = {                        # a model is saved as the first that fits
    "llama": Family("LlamaForCausalLM", LLAMA_NAMES, LLAMA_SIZES,
                    LLAMA_CHOICES | {"bias": LLAMA_BIAS}, heads_divide_width=True),
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
                   eps="layer_norm_epsilon", square=True, layout="transposed", short_names=True,
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
        if not _changes_to(config, candidate):
            return name
    return OWN_TYPE


def architecture_of(model_type: str) -> Family:
    """The family of a model_type; our own if transformers has none."""
    return FAMILIES.get(model_type, OWN)


def nearest_family(config: ModelConfig) -> tuple[str, list[str]]:
    """The family that takes the fewest changes, and these changes as overrides of a run's config.
    None if the model is of that family already."""
    changes = {name: _changes_to(config, candidate) for name, candidate in FAMILIES.items()}
    nearest = min(changes, key=lambda name: len(changes[name]))
    return nearest, changes[nearest]


def _changes_to(config: ModelConfig, candidate: Family) -> list[str]:
    """What would make the family express the model."""
    changes = []
    for key, rows in candidate.choices.items():
        options = [ours for ours, _ in rows]
        if getattr(config, key) not in options:
            changes.append(f"model.{key}={_as_yaml(options[0])}")
    sizes = {window for window in config.windows if window}
    if candidate.windows == "none" and sizes:
        changes.append("model.window=null")
    elif len(sizes) > 1 or (candidate.windows == "alike" and len({*config.windows}) > 1):
        changes.append(f"model.window={min(sizes)}")
    if candidate.square and config.kv_heads != config.n_heads:
        changes.append("model.n_kv_heads=null")
    if candidate.square and config.n_heads * config.head_size != config.d_model:
        changes.append("model.d_head=null")
    if candidate.heads_divide_width and config.d_model % config.n_heads:
        multiple = max(1, round(config.d_model / config.n_heads))
        changes.append(f"model.d_model={multiple * config.n_heads}")
    return changes


def _as_yaml(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))

"""A model in Hugging Face's names and config.json, so that `AutoModelForCausalLM` opens a checkpoint as it is.

The exact ModelConfig is kept inside config.json under `gpt`, and is what our own loading reads.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from errors import UserError
from model.config import ModelConfig
from model.gpt import GPT

OWN_TYPE = "induction_gpt"          # models that have no form in transformers

NAMES = {                           # ours → theirs; {} is the layer
    "embed.weight": "model.embed_tokens.weight",
    "embed_position.weight": "model.embed_positions.weight",
    "blocks.{}.norm_attn.gain": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attn.w_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attn.w_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attn.w_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attn.w_o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attn.norm_q.gain": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attn.norm_k.gain": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.attn.smear_alpha": "model.layers.{}.self_attn.smear_alpha",
    "blocks.{}.norm_mlp.gain": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp.w_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.w_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.w_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm_final.gain": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def obstacles(config: ModelConfig) -> list[str]:
    """What keeps a model from being one of transformers' own families; empty for one that is."""
    sizes = {window for window in config.windows if window}
    return [reason for reason, holds in {
        f"position: {config.position} (rope has a form)": config.position != "rope",
        f"mlp: {config.mlp} (swiglu and none have one)": config.mlp not in ("swiglu", "none"),
        "smear": config.smear,
        f"windows of {len(sizes)} sizes": len(sizes) > 1,
    }.items() if holds]


def family(config: ModelConfig) -> str:
    """The model_type whose equations are ours: llama, mistral, ministral, qwen3, or our own."""
    if obstacles(config):
        return OWN_TYPE
    if config.qk_norm:
        return "qwen3"
    if not any(config.windows):
        return "llama"
    return "mistral" if all(config.windows) else "ministral"


def hf_config(config: ModelConfig, end_of_text: int | None) -> dict:
    """The contents of config.json."""
    model_type = family(config)
    described = {
        "model_type": model_type,
        "architectures": ["InductionGPT" if model_type == OWN_TYPE else f"{model_type.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_size,
        "intermediate_size": config.mlp_size or 1, "hidden_act": "silu", "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base, "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False, "mlp_bias": False, "dtype": "float32",
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": None,
    }
    described["sliding_window"] = next((window for window in config.windows if window), None)
    if model_type in ("ministral", "qwen3"):
        described |= {"use_sliding_window": any(config.windows),
                      "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows]}
    return described | {"gpt": config.model_dump()}


def hf_state(model: GPT) -> dict[str, Tensor]:
    """The parameters under Hugging Face's names. An attention-only model gets MLPs of one unit of zeros."""
    state = {_rename(name, NAMES): p.detach() for name, p in model.named_parameters()}
    if model.config.mlp == "none" and family(model.config) != OWN_TYPE:
        state |= {name: value.clone() for name, value in _empty_mlps(model.config).items()}
    return state


def load_hf_state(model: GPT, state: dict[str, Tensor], source: str, fill: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Copy `state` into the model's parameters; a UserError where a name or a shape does not fit. `source` names it, `fill` copies."""
    theirs = {_rename(name, NAMES): p for name, p in model.named_parameters()}
    given = {name for name in state if not (model.config.mlp == "none" and name in _empty_mlps(model.config))}
    if different := sorted(given ^ set(theirs)):
        raise UserError(f"{source}: its parameters are not those of its config ({', '.join(different[:3])}"
                        f"{' …' if len(different) > 3 else ''})")
    with torch.no_grad():
        for name, p in theirs.items():
            if p.shape != state[name].shape:
                raise UserError(f"{source}: {name} is {tuple(state[name].shape)}, its config says {tuple(p.shape)}")
            fill(p, state[name])


def _empty_mlps(config: ModelConfig) -> dict[str, Tensor]:
    E = config.d_model
    shapes = {"post_attention_layernorm": (E,), "mlp.gate_proj": (1, E), "mlp.up_proj": (1, E), "mlp.down_proj": (E, 1)}
    return {f"model.layers.{layer}.{part}.weight": torch.zeros(shape)
            for layer in range(config.n_layers) for part, shape in shapes.items()}


def _rename(name: str, names: dict[str, str]) -> str:
    layer = re.search(r"\.(\d+)\.", name)
    return names[re.sub(r"\.\d+\.", ".{}.", name, count=1)].format(layer[1] if layer else "")

"""config.json of transformers' families: written from our ModelConfig, and read back."""

from typing import Any

from errors import UserError

from model.config import ModelConfig
from model.families import FAMILIES, OPTIONAL_SIZES, Family, Settings, architecture_of

DEFAULT_MAX_WINDOW_LAYERS = 28          # Qwen's, if config.json lacks it
ROPE_SCALING = {                    # by kind of scaling: our key → theirs
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "original_n_ctx": "original_max_position_embeddings",
               "fast": "high_freq_factor", "slow": "low_freq_factor"},
    "yarn": {"factor": "factor", "original_n_ctx": "original_max_position_embeddings",
             "fast": "beta_fast", "slow": "beta_slow", "attention_factor": "attention_factor",
             "truncate": "truncate"},
}


# --- writing ----------------------------------------------------------------------------------

def describe(config: ModelConfig, model_type: str) -> Settings:
    """A model as its family's config.json describes it: the shape, without token ids."""
    spec = architecture_of(model_type)
    settings: Settings = {}
    resolved = {"n_kv_heads": config.kv_heads, "d_head": config.head_size,
                "d_mlp": config.mlp_size or 1}          # what null stands for in our config
    for key, theirs in spec.sizes.items():
        settings[theirs] = resolved.get(key, getattr(config, key))
    settings[spec.eps] = config.norm_eps
    for key, rows in spec.choices.items():
        value = getattr(config, key)
        settings |= next((theirs for ours, theirs in rows if ours == value), {})
    if model_type == "gpt2":
        settings["n_ctx"] = config.n_ctx            # read by llama.cpp and mlx-lm
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
    if spec.windows != "none":
        settings["sliding_window"] = next((window for window in config.windows if window), None)
    if spec.windows == "listed":
        settings["use_sliding_window"] = any(config.windows)
        settings["layer_types"] = ["sliding_attention" if window else "full_attention"
                                   for window in config.windows]
    return settings


def _share(part: int, size: int) -> float:
    """A number whose int(size × number) is `part`, as transformers computes it."""
    share = part / size
    return share if int(size * share) == part else (part + 0.5) / size


# --- reading ----------------------------------------------------------------------------------

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
    spec = FAMILIES[model_type]
    for key, value in (spec.fixed | {"quantization_config": None}).items():
        if given.get(key, value) != value:
            raise _unsupported(source, key, given[key], [value])
    ours: dict[str, Any] = {}
    for key, theirs in spec.sizes.items():
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
        raise UserError(f"{source}: {spec.sizes['d_mlp']} is missing")
    default_eps = 1e-6 if spec.eps == "rms_norm_eps" else 1e-5
    ours["norm_eps"] = _number(source, spec.eps, given.get(spec.eps, default_eps))
    for key, rows in spec.choices.items():
        ours[key] = _read_choice(given, rows, source)
    if ours["position"] == "rope":
        ours |= _read_rope(given, spec, ours, source)
    ours["window"] = _read_windows(given, spec, ours["n_layers"], source)
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


def _read_rope(given: Settings, spec: Family, sizes: dict[str, Any], source: str) -> dict[str, Any]:
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
                        default=spec.default_rope_share)
    head_size = sizes.get("d_head") or sizes["d_model"] // sizes["n_heads"]
    rotated = int(head_size * share)
    if spec.choices.get("rope_dims") and rotated != head_size:
        raise _unsupported(source, "partial_rotary_factor", share, [1.0])
    ours: dict[str, Any] = {"rope_base": base,
                            "rope_dims": None if rotated == head_size else rotated}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return ours
    if rope_type not in ROPE_SCALING:
        raise _unsupported(source, "rope_scaling type", rope_type, ["default", *ROPE_SCALING])
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            raise _unsupported(source, f"rope_scaling {key}", parameters[key], [None])
    scaling: dict[str, Any] = {"kind": rope_type}
    for key, theirs in ROPE_SCALING[rope_type].items():
        value = parameters.get(theirs)
        if value is not None:
            exact = key in ("original_n_ctx", "truncate")           # an int and a bool
            scaling[key] = value if exact else _number(source, theirs, value)
    if rope_type != "linear":
        scaling.setdefault("original_n_ctx", sizes["n_ctx"])
    return ours | {"rope_scaling": scaling}


def _read_windows(given: Settings, spec: Family, n_layers: int,
                  source: str) -> int | list[int | None] | None:
    """The window of all layers, or of each."""
    if spec.windows == "none" or (spec.windows_switch and not given.get("use_sliding_window")):
        return None
    size = given.get("sliding_window", spec.default_window)
    if spec.windows == "alike" or size is None:
        return size
    first = given.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS) if spec.windows_switch else 0
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

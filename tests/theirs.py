"""Other people's models and tokenizers, small and random, as their own libraries save them."""

import json
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data.tokenizer import byte_letters

LLAMA = {"vocab_size": 640, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
LISTED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 640, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {"hidden_size": 64}
MODELS = {
    "llama": LLAMA, "llama tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama wide heads": LLAMA | {"head_dim": 16},
    "llama attention bias": LLAMA | {"attention_bias": True}, "llama mlp bias": LLAMA | {"mlp_bias": True},
    "llama all biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "llama linear rope": LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "llama llama3 rope": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "llama yarn rope": LLAMA | {"rope_parameters": YARN | {"rope_theta": 1e4}},
    "llama yarn rope, all set": LLAMA | {"rope_parameters": YARN | {"rope_theta": 1e4, "beta_fast": 8.0, "beta_slow": 2.0,
                                                                   "truncate": False, "attention_factor": 1.3}},
    "mistral": LLAMA | {"sliding_window": 9}, "mistral no window": LLAMA | {"sliding_window": None},
    "mistral wide heads": LLAMA | {"sliding_window": 9, "head_dim": 20},
    "ministral": LLAMA | {"sliding_window": 9, "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                          "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "qwen2": LLAMA, "qwen2 windows, tied": LLAMA | LISTED | {"tie_word_embeddings": True},
    "qwen3": LLAMA | {"head_dim": 16}, "qwen3 biases and windows": LLAMA | LISTED | {"head_dim": 12, "attention_bias": True},
    "gpt2": GPT2, "gpt2 untied, wide": GPT2 | {"tie_word_embeddings": False, "n_inner": 80, "layer_norm_epsilon": 1e-2},
    "gpt2 exact gelu": GPT2 | {"activation_function": "gelu"},
    "gpt_neox": NEOX, "gpt_neox sequential": NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500},
    "gpt_neox odd share": NEOX | {"rotary_pct": 0.5, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    "gpt_neox no attention bias": NEOX | {"attention_bias": False, "layer_norm_eps": 1e-2},
    "gpt_neox yarn": NEOX | {"rope_parameters": YARN | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
CORPUS = ["the quick brown fox jumps over the lazy dog, the cat and then the other one. ",
          "def the_function(a, b):\n    return a + b\n\n\n",
          "naïve café, 東京 and Москва; it's 12345 o'clock — don't they'll we'VE\t\ttabs  two   three spaces\n \n  x",
          "ﬁ Å é (combining) 🙂🙂"]


@torch.no_grad()
def make_theirs(kind: str, folder: Path, **save):
    """A random model of transformers' own, no weight of which is where it began, saved in `folder` beside a tokenizer of its family."""
    from transformers import AutoConfig, AutoModelForCausalLM
    name, settings = kind.split()[0], MODELS[kind]
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}     # it writes into them
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings, bos_token_id=None, eos_token_id=None)).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    model.save_pretrained(folder, **save)
    (folder / "generation_config.json").unlink(missing_ok=True)
    make_tokenizer(TOKENIZER_OF[name], folder)
    return model


def byte_level(alone: bool, **options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if alone else pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(metaspace: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


TOKENIZER_OF = {"gpt2": "gpt2", "gpt_neox": "pythia", "qwen2": "qwen", "qwen3": "qwen", "llama": "llama3", "mistral": "mistral",
                "ministral": "llama2"}
FORMS = ["gpt2", "pythia", "qwen", "llama3", "llama2", "mistral"]


def make_tokenizer(form: str, folder: Path) -> None:
    """A small tokenizer in the spelling of a family: tokenizer.json, and tokenizer_config.json with its special tokens."""
    folder.mkdir(exist_ok=True)
    by_pieces, alphabet = form in ("llama2", "mistral"), pre_tokenizers.ByteLevel.alphabet()
    tokenizer = pieces(form == "mistral") if by_pieces else byte_level(form in ("gpt2", "pythia"), ignore_merges=form == "llama3")
    if form in ("pythia", "qwen"):
        tokenizer.normalizer = normalizers.NFC()
    first = ["<unk>", "<s>", "</s>"] if by_pieces else ["<|endoftext|>", "<|padding|>"] if form == "pythia" else []
    first += [f"<0x{b:02X}>" for b in range(256)] if by_pieces else []
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=560, initial_alphabet=[] if by_pieces else alphabet, special_tokens=first, show_progress=False))
    if by_pieces:                                           # the pieces for bytes are no special tokens
        described = json.loads(tokenizer.to_str())
        described["added_tokens"] = described["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(described))
    if form == "pythia":                                    # as the real one, it has no token for a byte that UTF-8 never has
        described = json.loads(tokenizer.to_str())
        for byte in (0xC0, 0xFF):
            del described["model"]["vocab"][byte_letters()[byte]]
        tokenizer = Tokenizer.from_str(json.dumps(described))
    special = {"gpt2": ["<|endoftext|>"], "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
               "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]}.get(form, [])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if form == "pythia":                                    # runs of spaces, which are text
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    begin, end = {"gpt2": ("<|endoftext|>", "<|endoftext|>"), "pythia": ("<|endoftext|>", "<|endoftext|>"), "qwen": (None, "<|im_end|>"),
                  "llama3": ("<|begin_of_text|>", "<|end_of_text|>")}.get(form, ("<s>", "</s>"))
    if form in ("llama3", "llama2", "mistral"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "clean_up_tokenization_spaces": False}))
    if form == "qwen":                                      # names its beginning by number alone, and has two ends
        ids = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": ids[1], "eos_token_id": ids}))

"""Small random models and tokenizers of other families, as their own libraries save them."""

import copy
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

LLAMA = {"vocab_size": 640, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LISTED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 640, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {
    "hidden_size": 64}
MODELS = {
    "llama": LLAMA, "llama tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama wide heads": LLAMA | {"head_dim": 16},
    "llama attention bias": LLAMA | {"attention_bias": True},
    "llama mlp bias": LLAMA | {"mlp_bias": True},
    "llama all biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "llama linear rope": LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0,
                                                      "rope_theta": 500.0}},
    "llama llama3 rope": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "llama yarn rope": LLAMA | {"rope_parameters": YARN | {"rope_theta": 1e4}},
    "llama yarn rope, all set": LLAMA | {"rope_parameters": YARN | {
        "rope_theta": 1e4, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
        "attention_factor": 1.3}},
    "mistral": LLAMA | {"sliding_window": 9}, "mistral no window": LLAMA | {"sliding_window": None},
    "mistral wide heads": LLAMA | {"sliding_window": 9, "head_dim": 20},
    "ministral": LLAMA | {
        "sliding_window": 9, "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "qwen2": LLAMA, "qwen2 windows, tied": LLAMA | LISTED | {"tie_word_embeddings": True},
    "qwen3": LLAMA | {"head_dim": 16},
    "qwen3 biases and windows": LLAMA | LISTED | {"head_dim": 12, "attention_bias": True},
    "gpt2": GPT2,
    "gpt2 untied, wide": GPT2 | {"tie_word_embeddings": False, "n_inner": 80,
                                 "layer_norm_epsilon": 1e-2},
    "gpt2 exact gelu": GPT2 | {"activation_function": "gelu"},
    "gpt_neox": NEOX,
    "gpt_neox sequential": NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0,
                                   "rotary_emb_base": 500},
    "gpt_neox odd share": NEOX | {"rotary_pct": 0.5, "hidden_act": "gelu_new",
                                  "tie_word_embeddings": True},
    "gpt_neox no attention bias": NEOX | {"attention_bias": False, "layer_norm_eps": 1e-2},
    "gpt_neox yarn": NEOX | {"rope_parameters": YARN | {"rope_theta": 1e4,
                                                        "partial_rotary_factor": 0.5}},
}
CORPUS = [
    "the quick brown fox jumps over the lazy dog, the cat and then the other one. ",
    "def the_function(a, b):\n    return a + b\n\n\n",
    "naïve café, 東京 and Москва; it's 12345 o'clock — don't they'll we'VE\t\ttabs  two   three"
    " spaces\n \n  x",
    "ﬁ Å é (combining) 🙂🙂"]


@torch.no_grad()
def save_hf_model(name: str, folder: Path, **save):
    """Save a random model of transformers in `folder`, with a tokenizer of its family.

    `name`: a key of MODELS. No weight has its initial value.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    family = name.split()[0]
    settings = copy.deepcopy(MODELS[name])                  # transformers writes into it
    config = AutoConfig.for_model(family, **settings, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        center = 1 if parameter.ndim == 1 else 0            # gains are near 1
        parameter.copy_(torch.randn_like(parameter) * 0.2 + center)
    model.save_pretrained(folder, **save)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_hf_tokenizer(TOKENIZER_OF[family], folder)
    return model


TOKENIZER_OF = {"gpt2": "gpt2", "gpt_neox": "pythia", "qwen2": "qwen", "qwen3": "qwen",
                "llama": "llama3", "mistral": "mistral", "ministral": "llama2"}
FORMS = ["gpt2", "pythia", "qwen", "llama3", "llama2", "mistral"]
OVER_CHARACTERS = ("llama2", "mistral")                     # the others are over bytes
LEARNED_WITH = {                                            # special tokens that get the first ids
    "pythia": ["<|endoftext|>", "<|padding|>"],
    "llama2": ["<unk>", "<s>", "</s>"], "mistral": ["<unk>", "<s>", "</s>"]}
ADDED_AFTER = {                                             # special tokens that get the last ids
    "gpt2": ["<|endoftext|>"], "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]}
BOS_AND_EOS = {
    "gpt2": ("<|endoftext|>", "<|endoftext|>"), "pythia": ("<|endoftext|>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "llama2": ("<s>", "</s>"), "mistral": ("<s>", "</s>")}


def save_hf_tokenizer(form: str, folder: Path) -> None:
    """Save a small tokenizer as a family writes it.

    tokenizer.json, and tokenizer_config.json with the special tokens.
    """
    folder.mkdir(exist_ok=True)
    tokenizer = train_bpe_over_characters(form) if form in OVER_CHARACTERS else train_byte_bpe(form)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                  for text in ADDED_AFTER.get(form, [])])
    if form == "pythia":                                    # runs of spaces, which are text
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    begin, end = BOS_AND_EOS[form]
    if form in ("llama3", "llama2", "mistral"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end,
         "clean_up_tokenization_spaces": False}))
    if form == "qwen":                  # names its begin token by number only, and has two ends
        ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
        (folder / "generation_config.json").write_text(json.dumps(
            {"bos_token_id": ends[1], "eos_token_id": ends}))


def train_byte_bpe(form: str) -> Tokenizer:
    """gpt2, pythia, qwen, llama3."""
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE(ignore_merges=form == "llama3"))
    if form in ("gpt2", "pythia"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if form in ("pythia", "qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=560, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=LEARNED_WITH.get(form, []), show_progress=False))
    if form == "pythia":                # like the real one: no token for bytes that UTF-8 never has
        contents = json.loads(tokenizer.to_str())
        for byte in (0xC0, 0xFF):
            del contents["model"]["vocab"][byte_letters()[byte]]
        tokenizer = Tokenizer.from_str(json.dumps(contents))
    return tokenizer


def train_bpe_over_characters(form: str) -> Tokenizer:
    """llama2, mistral: with a token for each byte, for what has no other."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if form == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=560, special_tokens=[*LEARNED_WITH[form], *byte_tokens], show_progress=False))
    contents = json.loads(tokenizer.to_str())
    contents["added_tokens"] = contents["added_tokens"][:3]     # the byte tokens are not special
    return Tokenizer.from_str(json.dumps(contents))

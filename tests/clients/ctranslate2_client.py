"""CTranslate2: its converter reads a checkpoint, its Generator computes."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import transformers
from client import Reference, difference, equal, refused, refused_type, run, same_ids

EPSILON = ("LayerNorm's epsilon is 1e-5 in CTranslate2, whatever config.json says. Train with "
           "`model.norm_eps=1e-5`")
EPSILON_CHECK = "logits (another epsilon)"
NO_MINISTRAL = ("CTranslate2 has no Ministral. Train with one window for all layers (that is "
                "Mistral) or with none")
QWEN_WINDOWS = ("CTranslate2 ignores the windows of Qwen models without a warning. Train without "
                "biases and QK norm and with one window for all layers (that is Mistral)")
SHORT = ("longer texts than the window can be generated, as here, but not be scored: `score_batch` "
         "and `forward_batch` fail")
WIDE_HEADS = ("Llama's heads have d_model / n_heads numbers in CTranslate2: train with "
              "`model.d_head=null`")
VOCABULARY = ("GPT-2 must have as many embeddings as the tokenizer has tokens. Train with "
              "`model.vocab_size=null`, or cut the others off in transformers: "
              "`model.resize_token_embeddings(len(tokenizer))`, then `save_pretrained`")


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    facts = reference.facts
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model")

        def convert_and_check() -> dict[str, Any]:
            convert(checkpoint, target)
            return checks(Model(checkpoint, target), reference)

        def refusal(limit: str, *words: str) -> dict[str, Any]:
            refused(convert_and_check, *words)
            return {"limit": limit}

        if reference.model_type == "induction_gpt":
            return refused_type(convert_and_check)
        if reference.model_type == "ministral":
            return refusal(NO_MINISTRAL, "No conversion is registered", "MinistralConfig")
        if reference.model_type == "qwen2":
            return refusal(QWEN_WINDOWS, "greedy tokens")
        wide = facts["d_head"] * facts["n_heads"] != facts["d_model"]
        if reference.model_type == "llama" and wide:
            return refusal(WIDE_HEADS, "axis 2 has dimension")
        if reference.model_type == "gpt2" and facts["vocab_size"] > facts["n_vocab"]:
            refused(convert_and_check, "the model expected a vocabulary of size")
            cut = cut_vocabulary(checkpoint, Path(folder, "cut"))
            convert(cut, target)
            return {"checks": checks(Model(cut, target), reference), "limit": VOCABULARY}
        result = {"checks": convert_and_check()}
        if reference.model_type == "mistral":
            result["limit"] = SHORT
        if EPSILON_CHECK in result["checks"]:
            result["limit"] = EPSILON
        return result


class Model:
    """A converted model, and the tokenizer of its checkpoint: CTranslate2 has none."""

    def __init__(self, checkpoint: Path, converted: Path):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.generator = ctranslate2.Generator(str(converted), device="cpu", intra_threads=1)
        self.vocabulary = json.loads((converted / "vocabulary.json").read_text("utf-8"))
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        self.window = config.get("sliding_window")
        self.norm_eps = config.get("layer_norm_eps", config.get("layer_norm_epsilon"))

    def tokens(self, text: str) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(self.tokenizer(text).input_ids)

    def ids(self, text: str) -> list[int]:
        """Its own ids, which follow from the order of vocabulary.json."""
        return [self.vocabulary.index(token) for token in self.tokens(text)]


def checks(model: Model, reference: Reference) -> dict[str, Any]:
    prompt = model.tokens(reference.prompt)
    generated = model.generator.generate_batch(
        [prompt], max_length=20, sampling_topk=1, include_prompt_in_result=False)[0]
    greedy = equal(generated.sequences_ids[0], reference.greedy, "greedy tokens:")
    if model.window:
        refused(lambda: model.generator.forward_batch([prompt]), "buffer to copy")
    logits = np.array(model.generator.forward_batch([prompt[:model.window]]))[0]
    expected = reference.logits[:model.window, :len(model.vocabulary)]
    name = "logits" if model.norm_eps in (None, 1e-5) else EPSILON_CHECK
    return {"ids": same_ids(reference, model.ids), "greedy": greedy,
            name: difference(logits, expected)}


def cut_vocabulary(checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint without the embeddings that stand for no token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(target)
    return target


def convert(checkpoint: Path, target: Path) -> None:
    """Run the converter's command."""
    command = Path(sys.executable).with_name("ct2-transformers-converter")
    done = subprocess.run([command, "--model", checkpoint, "--output_dir", target],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


if __name__ == "__main__":
    run("CTranslate2", f"{ctranslate2.__version__} (transformers {transformers.__version__})",
        check)

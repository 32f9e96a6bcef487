"""transformers 4 and 5, as their users use them: generation, batches, pipelines, Trainer, PEFT."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from client import Reference, difference, equal, refused, run, same_ids
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

VERSION = int(transformers.__version__.split(".")[0])
OWN = ("transformers has no such model: training prints a note that names the nearest change of "
       "the config. Look at it with this project")
EMBEDDINGS = {"gpt2": "wte", "gpt_neox": "embed_in"}        # others: embed_tokens


def open_checkpoint(checkpoint: Path, **options: Any) -> tuple[Any, Any]:
    """The model and the tokenizer as the README opens them."""
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), **options)
    return model, AutoTokenizer.from_pretrained(str(checkpoint))


@torch.no_grad()
def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    if reference.model_type == "induction_gpt":
        refused(lambda: AutoModelForCausalLM.from_pretrained(str(checkpoint)),
                "induction_gpt", "Transformers does not recognize this architecture")
        return {"limit": OWN}
    model, tokenizer = open_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        checks = {
            **check_numbers(model, tokenizer, reference),
            "batch": check_batch(model, tokenizer, reference),
            **check_generation(model, tokenizer, checkpoint, reference),
            "save_pretrained": check_saving(model, tokenizer, checkpoint, Path(folder)),
        }
        with torch.enable_grad():
            checks["Trainer"] = check_trainer(checkpoint, reference, folder)
            checks["PEFT"] = check_lora(checkpoint, reference, folder)
    return {"checks": checks}


def check_numbers(model: Any, tokenizer: Any, reference: Reference) -> dict[str, Any]:
    """Ids both ways, logits of what the tokenizer returns, attention patterns."""
    ids = same_ids(reference, lambda text: tokenizer(text).input_ids)
    special = reference.facts["special"]
    equal(tokenizer(special["text"], split_special_tokens=True).input_ids, special["ids"])
    for name, text in reference.texts.items():
        if not reference.facts["prefixed"] and "imported" not in reference.facts["shape"]:
            equal(tokenizer.decode(text["ids"]), text["text"], f"decoded {name}:")
    given = tokenizer(reference.prompt, return_tensors="pt")
    equal(sorted(given), ["attention_mask", "input_ids"])
    logits = model(**given).logits[0]
    model.set_attn_implementation("eager")
    attentions = model(**given, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    base = AutoModel.from_pretrained(model.name_or_path)
    assert base(**given).last_hidden_state.shape[:2] == given.input_ids.shape
    return {"ids": ids, "logits": difference(logits, reference.logits),
            "patterns": difference(torch.cat(attentions), reference.patterns)}


def check_batch(model: Any, tokenizer: Any, reference: Reference) -> float:
    """Texts of different lengths in one batch, without setting anything: each as if alone."""
    prompts = [reference.prompt, "x", "import os"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    continued = model.generate(**batch, max_new_tokens=8, do_sample=False)
    equal(continued[0, -8:].tolist(), reference.greedy[:8], "a row of a batch:")
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    together = model(**batch, position_ids=positions).logits
    largest = 0.0
    for n, prompt in enumerate(prompts):
        alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
        largest = max(largest, difference(together[n, -len(alone):], alone.numpy()))
    return largest


def check_generation(model: Any, tokenizer: Any, checkpoint: Path, reference: Reference
                     ) -> dict[str, str]:
    """generate() in its ways, and the pipeline."""
    given, ids = tokenizer(reference.prompt, return_tensors="pt"), reference.ids

    def continued(**options: Any) -> list[int]:
        return model.generate(**given, **options)[0, len(ids):].tolist()

    greedy = equal(continued(max_new_tokens=20, do_sample=False), reference.greedy)
    for options in ({"prompt_lookup_num_tokens": 2},
                    {"cache_implementation": "static", "disable_compile": True}):
        equal(continued(max_new_tokens=20, do_sample=False, **options), reference.greedy)
    for options in ({}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 4}):
        assert 1 <= len(continued(max_new_tokens=8, **options)) <= 8
    assert model.generate(max_new_tokens=4).shape[1] > 1            # begins a text by itself
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**given, max_new_tokens=20, do_sample=False, streamer=streamer)
    equal("".join(streamer), tokenizer.decode(reference.greedy))
    half = AutoModelForCausalLM.from_pretrained(str(checkpoint), torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(**given).logits.isfinite().all()
    generator = pipeline("text-generation", model=str(checkpoint), device="cpu")
    prompts = [reference.prompt, "import os", "x"]
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    alone = generator(reference.prompt, **options)[0]["generated_text"]
    batch = [row[0]["generated_text"] for row in generator(prompts, batch_size=3, **options)]
    equal(alone, tokenizer.decode(reference.greedy, skip_special_tokens=True))
    equal(batch[0], alone)
    return {"greedy": greedy, "pipeline": "equal"}


def check_saving(model: Any, tokenizer: Any, checkpoint: Path, folder: Path) -> str:
    """save_pretrained and back: the same weights and tokenizer."""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    again, tokenizer_again = open_checkpoint(folder)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    text = "x = é🙂\n  don't"
    return equal(tokenizer_again(text).input_ids, tokenizer(text).input_ids)


def texts(reference: Reference) -> list[str]:
    """Paragraphs of different lengths."""
    return [part for part in reference.facts["heldout"]["text"].split("\n\n") if part.strip()][:12]


@contextlib.contextmanager
def trained(model: Any, tokenizer: Any, reference: Reference, folder: str
            ) -> Iterator[float]:
    """Train three steps with Trainer and its padding collator; the training loss."""
    limit = reference.facts["n_ctx"]
    rows = [tokenizer(text, truncation=True, max_length=limit) for text in texts(reference)]
    arguments = TrainingArguments(folder, max_steps=3, per_device_train_batch_size=4, report_to=[],
                                  use_cpu=True, learning_rate=1e-3, save_strategy="no",
                                  disable_tqdm=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    yield trainer.train().training_loss


def check_trainer(checkpoint: Path, reference: Reference, folder: str) -> str:
    """Trainer pads by itself. The collator leaves the padding token out of the labels, and with it
    the end-of-text tokens of the texts."""
    model, tokenizer = open_checkpoint(checkpoint)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [tokenizer(f"{text}{tokenizer.eos_token}") for text in ("a", "a longer text")]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    if tokenizer.pad_token == tokenizer.eos_token:
        assert (labels != tokenizer.eos_token_id).all() and (labels[:, -1] == -100).all()
    with trained(model, tokenizer, reference, folder) as loss:
        assert np.isfinite(loss) and loss < 20, loss
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved or "mlp" in name or "post_attention" in name or "o_proj.bias" in name, name
    return "works"


def check_lora(checkpoint: Path, reference: Reference, folder: str) -> str:
    """LoRA on PEFT's own choice of matrices and on all; the merged model is the trained one."""
    model, _ = open_checkpoint(checkpoint)
    assert get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).get_nb_trainable_parameters()[0]
    model, tokenizer = open_checkpoint(checkpoint)
    given = tokenizer(reference.prompt, return_tensors="pt")
    before = model(**given).logits
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with trained(tuned, tokenizer, reference, folder):
        pass
    with torch.no_grad():
        after = tuned.eval()(**given).logits
        merged = tuned.merge_and_unload()(**given).logits
    assert (after - before).abs().max() > 1e-3
    assert (after - merged).abs().max() < 1e-4
    return "works"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run(f"transformers {VERSION}", transformers.__version__, check)

"""transformers 4 and 5, as their users use them: generation, batches, pipelines, Trainer, PEFT."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from client import (
    Reference,
    difference,
    equal,
    open_tokenizer,
    refused,
    refused_type,
    run,
    same_ids,
)
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

VERSION = int(transformers.__version__.split(".")[0])
LORA = ("PEFT does not know which matrices to adapt. Say "
        "`LoraConfig(target_modules=\"all-linear\", …)`")


def open_model(checkpoint: Path) -> Any:
    """The model as the README opens it."""
    return AutoModelForCausalLM.from_pretrained(str(checkpoint))


@torch.no_grad()
def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    if reference.model_type == "induction_gpt":
        return refused_type(lambda: open_model(checkpoint))
    model = open_model(checkpoint)
    tokenizer, limit = open_tokenizer(checkpoint, reference)
    with tempfile.TemporaryDirectory() as folder:
        checks = {
            **check_numbers(model, tokenizer, reference),
            "batch": check_batch(model, tokenizer, reference),
            **check_generation(model, tokenizer, checkpoint, reference),
            "saved again": check_saving(model, tokenizer, reference),
            "added token": check_added_token(checkpoint, reference),
        }
        with torch.enable_grad():
            checks["Trainer"] = check_trainer(checkpoint, tokenizer, reference, folder)
            checks["PEFT"] = check_lora(checkpoint, tokenizer, reference, folder)
    if reference.model_type == "ministral":
        refused(lambda: get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), "target_modules")
        limit = LORA
    return {"checks": checks, "limit": limit}


def check_numbers(model: Any, tokenizer: Any, reference: Reference) -> dict[str, Any]:
    """Ids both ways, logits of what the tokenizer returns, attention patterns."""
    ids = same_ids(reference, lambda text: tokenizer(text).input_ids)
    special = reference.facts["special"]
    equal(tokenizer(special["text"], split_special_tokens=True).input_ids, special["ids"])
    if "<|endoftext|>" in tokenizer.all_special_tokens:
        assert tokenizer(special["text"]).input_ids != special["ids"], "the note is out of date"
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
    prompts = [reference.prompt, "x", f"{reference.prompt} = 1, 2"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert not batch.attention_mask[0].all(), "the prompt is not padded"
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
    given = {"tokenizer": tokenizer} if reference.model_type == "qwen2" else {}
    generator = pipeline("text-generation", model=str(checkpoint), device="cpu", **given)
    prompts = [reference.prompt, f"{reference.prompt} = 1, 2", "x"]
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    alone = generator(reference.prompt, **options)[0]["generated_text"]
    batch = [row[0]["generated_text"] for row in generator(prompts, batch_size=3, **options)]
    equal(alone, tokenizer.decode(reference.greedy, skip_special_tokens=True))
    equal(batch[0], alone)
    return {"greedy": greedy, "pipeline": "equal"}


def check_saving(model: Any, tokenizer: Any, reference: Reference) -> str:
    """save_pretrained and back: the same weights and tokenizer. run.py imports what is left there.
    """
    folder = reference.folder / f"saved by transformers {VERSION}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    again = open_model(folder)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    tokenizer_again, _ = open_tokenizer(folder, reference)
    return same_ids(reference, lambda text: tokenizer_again(text).input_ids)


def check_added_token(checkpoint: Path, reference: Reference) -> str:
    """A token of the user's own, on the device that accelerate chooses."""
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), device_map="auto")
    tokenizer, _ = open_tokenizer(checkpoint, reference)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    equal(tokenizer("<|mine|>x").input_ids[-2], size, "the id of a new token:")
    model.resize_token_embeddings(len(tokenizer))
    logits = model(torch.tensor([reference.ids])).logits[0, :, :size]
    assert difference(logits, reference.logits[:, :size]) < 1e-4
    return "works"


def texts(reference: Reference) -> list[str]:
    """Paragraphs of different lengths."""
    return [part for part in reference.facts["heldout"]["text"].split("\n\n") if part.strip()][:12]


def train(model: Any, tokenizer: Any, reference: Reference, folder: str) -> float:
    """Train three steps with Trainer and its padding collator; the training loss."""
    limit = reference.facts["n_ctx"]
    rows = [tokenizer(text, truncation=True, max_length=limit) for text in texts(reference)]
    arguments = TrainingArguments(folder, max_steps=3, per_device_train_batch_size=4, report_to=[],
                                  use_cpu=True, learning_rate=1e-3, save_strategy="no",
                                  disable_tqdm=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    return trainer.train().training_loss


def check_trainer(checkpoint: Path, tokenizer: Any, reference: Reference, folder: str) -> str:
    """Trainer pads by itself. The collator leaves the padding token out of the labels, and with it
    the end-of-text tokens of the texts."""
    model = open_model(checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [tokenizer(f"{text}{tokenizer.eos_token}") for text in ("a", "a longer text")]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    equal(tokenizer.pad_token, tokenizer.eos_token, "the padding token:")
    assert (labels[:, -1] == -100).all(), "the documented limit has gone: labels have their ends"
    loss = train(model, tokenizer, reference, folder)
    assert np.isfinite(loss) and loss < 20, loss
    still = [name for name, parameter in model.named_parameters()
             if torch.equal(parameter, before[name])]
    attention_only = reference.facts["shape"] == "llama-attention-only"
    assert all("mlp" in name or "post_attention" in name for name in still) if attention_only else (
        not still), f"training does not move {still}"
    return "works"


def check_lora(checkpoint: Path, tokenizer: Any, reference: Reference, folder: str) -> str:
    """LoRA on PEFT's own choice of matrices and on all; the merged model is the trained one."""
    if reference.model_type != "ministral":
        chosen = get_peft_model(open_model(checkpoint), LoraConfig(task_type="CAUSAL_LM"))
        assert chosen.get_nb_trainable_parameters()[0]
    model = open_model(checkpoint)
    given = tokenizer(reference.prompt, return_tensors="pt")
    before = model(**given).logits
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    train(tuned, tokenizer, reference, folder)
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

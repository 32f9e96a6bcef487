"""SAELens: sparse autoencoders of a layer, trained on transformers' model and on TransformerLens's
bridge."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from client import Reference, difference, open_tokenizer, refused, refused_type, run
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.load_model import load_model
from transformer_lens.model_bridge import TransformerBridge

WINDOWS = ("TransformerLens has no such model. Give SAELens "
           "`model_class_name=\"AutoModelForCausalLM\"` and the name of transformers' module")
# The module whose output is the residual stream after layer 0.
LAYER = {"gpt2": "transformer.h.0", "gpt_neox": "gpt_neox.layers.0"}


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    def load() -> Any:
        return load_model("AutoModelForCausalLM", str(checkpoint), device="cpu")

    if reference.model_type == "induction_gpt":
        return refused_type(load)
    ids = torch.tensor([reference.ids])
    hook = LAYER.get(reference.model_type, "model.layers.0")
    _, limit = open_tokenizer(checkpoint, reference)
    train(checkpoint, reference, hook, None)
    if reference.model_type == "ministral":
        refused(lambda: boot(checkpoint), "Could not determine supported architecture")
        return {"checks": {"training on transformers": "works"}, "limit": WINDOWS}
    bridge = boot(checkpoint)
    with torch.no_grad():
        logits = difference(bridge(ids)[0], reference.logits)
        _, cache = load().run_with_cache(ids, names_filter=[hook])
        through_bridge = bridge.run_with_cache(ids)[1]["blocks.0.hook_resid_post"]
        assert (cache[hook] - through_bridge).abs().max() < 1e-4
    train(checkpoint, reference, "blocks.0.hook_resid_post", bridge)
    return {"checks": {"logits": logits, "training on transformers": "works",
                       "training on TransformerLens": "works"}, "limit": limit}


def boot(checkpoint: Path) -> Any:
    return TransformerBridge.boot_transformers(str(checkpoint), device="cpu", dtype=torch.float32)


def train(checkpoint: Path, reference: Reference, hook: str, model: Any) -> None:
    """Train an autoencoder for 20 steps of 64 tokens."""
    width, text = reference.facts["d_model"], reference.facts["heldout"]["text"]
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=width, d_sae=2 * width, l1_coefficient=1),
        model_name=str(checkpoint), model_class_name="AutoModelForCausalLM", hook_name=hook,
        dataset_path="given below", is_dataset_tokenized=False, streaming=False,
        context_size=reference.facts["n_ctx"], training_tokens=20 * 64,
        train_batch_size_tokens=64, store_batch_size_prompts=2, n_batches_in_buffer=4,
        device="cpu", logger=LoggingConfig(log_to_wandb=False), n_checkpoints=0,
        output_path=str(Path.cwd() / "sae"))
    dataset = Dataset.from_list([{"text": text}] * 4)
    runner = LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_model=model)
    before = runner.sae.W_enc.detach().clone()
    after = runner.run().W_enc.detach()
    assert after.isfinite().all() and not torch.equal(before, after)
    saved = json.loads((Path.cwd() / "sae" / "cfg.json").read_text())
    assert (saved["d_in"], saved["d_sae"]) == (width, 2 * width)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run("SAELens", f"{version('sae-lens')} (transformers {transformers.__version__}, "
        f"TransformerLens {version('transformer-lens')})", check)

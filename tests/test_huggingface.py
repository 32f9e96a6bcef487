"""A checkpoint opened by transformers without our code: same logits, same greedy text."""

import json
import subprocess
import sys

from errors import UserError

import pytest
import torch
from safetensors.torch import load_file
from small_models import checkpoint_of, continue_one, perturbed_model

from model.families import OWN_TYPE, family, nearest_family
from model.gpt import GPT
from model.huggingface import load_hf_state
from settings.validate import validate
from settings.yaml12 import override
from training.checkpoint import find_checkpoint, load_model
from training.config import Config

SHAPES = {                  # the first word is the family
    "llama": {}, "llama mha": {"n_kv_heads": 4}, "llama tied": {"tied_embeddings": True},
    "llama mqa": {"n_kv_heads": 1, "d_head": 12}, "llama base": {"rope_base": 500.0},
    "llama attention only": {"mlp": "none"},
    "qwen3": {"qk_norm": True}, "qwen3 windows": {"qk_norm": True, "window": [None, 6]},
    "qwen3 window": {"qk_norm": True, "window": 5},
    "mistral": {"window": 7}, "ministral": {"window": [6, None]},
    "llama scaled rope": {
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_n_ctx": 32},
        "bias": "attention"},
    "llama qkv biases": {"bias": "qkv"}, "qwen2": {"bias": "qkv", "window": [None, 6]},
    "llama qkv biases, attention only": {"bias": "qkv", "mlp": "none"},
    "gpt2": {"norm": "layernorm", "bias": "all", "mlp": "gelu_tanh", "position": "learned",
             "n_kv_heads": 4, "tied_embeddings": True},
    "gpt2 untied": {"norm": "layernorm", "bias": "all", "mlp": "gelu_tanh", "n_kv_heads": 4,
                    "position": "learned"},
    "gpt_neox": {"norm": "layernorm", "bias": "all", "mlp": "gelu", "parallel": True,
                 "rope_dims": 4, "n_kv_heads": 4},
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_and_greedy_text_are_theirs(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = perturbed_model(vocab_size=257, n_ctx=64, **SHAPES[name])
    path = checkpoint_of(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.config.model_type == family(model.config) == name.split()[0]
    text = "def f(x):\n    return"
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == list(text.encode())
    assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)
    greedy = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1]:].tolist()
    assert continue_one(model, ids[0].tolist(), 30, ends=[256]) == greedy
    again, _ = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert torch.equal(again(ids), model(ids))


SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("import os", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False)[0])
print(json.dumps([text, model(ids).logits[0, -1].tolist()]))
"""


def test_no_code_of_ours_is_needed(trained, tmp_path):
    """The README's claim, in a process that cannot import this project."""
    checkpoint = find_checkpoint(trained)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(checkpoint)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, logits = json.loads(done.stdout)
    model, tokenizer = load_model(checkpoint)
    ids = tokenizer.encode("import os").tolist()
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids]))[0, -1], torch.tensor(logits), atol=1e-4)
    ours = continue_one(model, ids, 16, ends=tokenizer.ends)
    assert text == "import os" + tokenizer.decode(ours)


@pytest.mark.parametrize("shape", [
    {"position": "learned"}, {"position": "sinusoidal", "tied_embeddings": True},
    {"position": "none", "mlp": "none"}, {"smear": True},
    {"norm": "layernorm"}, {"bias": "qkv", "qk_norm": True}, {"parallel": True}, {"rope_dims": 4},
    {"norm": "layernorm", "bias": "all", "mlp": "gelu", "position": "learned"},     # grouped heads
    {"mlp": "gelu"}, {"mlp": "relu2", "qk_norm": True}, {"window": [3, 5]}])
@torch.no_grad()
def test_shapes_that_transformers_lacks_are_saved_the_same_way(shape, tmp_path):
    model = perturbed_model(**shape)
    assert family(model.config) == OWN_TYPE
    # The changes that training names make it a model that other programs open.
    tree = {"model": model.config.model_dump()}
    nearest, changes = nearest_family(model.config)
    override(tree, changes)
    changed = validate(Config, tree, "a test").model
    assert changes and (family(changed), nearest_family(changed)) == (nearest, (nearest, []))
    path = checkpoint_of(model, tmp_path)
    assert json.loads((path / "config.json").read_text())["model_type"] == OWN_TYPE
    again, _ = load_model(path)
    tokens = torch.randint(50, (2, 20))
    assert torch.equal(again(tokens), model(tokens))


def test_both_names_of_gpt2s_tensors_are_read(tmp_path):
    """Earlier versions wrote transformer.h.0…; OpenAI's file, which mlx-lm expects, has h.0…"""
    model = perturbed_model(**SHAPES["gpt2"])
    state = load_file(checkpoint_of(model, tmp_path) / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in state and "wte.weight" in state
    for prefix in ("", "transformer."):
        again = GPT(model.config)
        load_hf_state(again, {prefix + name: value for name, value in state.items()}, "a test")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_weights_of_another_shape_are_refused():
    model = perturbed_model()
    with pytest.raises(UserError, match="not those of its config"):
        load_hf_state(model, {"model.norm.weight": torch.ones(32)}, "x.safetensors")

"""A checkpoint opened by transformers alone: same logits, same greedy text."""

import json
import subprocess
import sys

import pytest
import torch
from test_model import make

from data.byte_bpe import bytes_tokenizer
from errors import UserError
from model.families import OWN_TYPE, family, obstacles
from model.generate import Sampling, generate
from model.huggingface import load_hf_state
from training.checkpoint import find_checkpoint, load_model, save_checkpoint, snapshot

FAMILIES = {
    "llama": {}, "llama mha": {"n_kv_heads": 4}, "llama tied": {"tied_embeddings": True}, "llama mqa": {"n_kv_heads": 1, "d_head": 12},
    "llama base": {"rope_base": 500.0}, "llama attention only": {"mlp": "none"},
    "qwen3": {"qk_norm": True}, "qwen3 windows": {"qk_norm": True, "window": [None, 6]}, "qwen3 window": {"qk_norm": True, "window": 5},
    "mistral": {"window": 7}, "ministral": {"window": [6, None]},
    "llama scaled rope": {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_n_ctx": 32}, "bias": "attention"},
    "qwen2": {"bias": "qkv", "window": [None, 6]},
    "gpt2": {"norm": "layernorm", "bias": "all", "mlp": "gelu_tanh", "position": "learned", "n_kv_heads": 4, "tied_embeddings": True},
    "gpt_neox": {"norm": "layernorm", "bias": "all", "mlp": "gelu", "parallel": True, "rope_dims": 4, "n_kv_heads": 4},
}


def checkpoint_of(model, folder):
    return save_checkpoint(folder, snapshot(model, {}, {"step": 3}, "", bytes_tokenizer(), copy=False))


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_text_are_theirs(kind, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = make(vocab_size=257, n_ctx=64, **kind)
    path = checkpoint_of(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.config.model_type == family(model.config) == next(n for n, k in FAMILIES.items() if k is kind).split()[0]
    text = "def f(x):\n    return"
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == list(text.encode())
    assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)
    greedy = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1]:].tolist()
    ours = [row[0] for row in generate(model, ids.tolist(), 30, Sampling(temperature=0), ends=[256])]
    assert ours == greedy
    again, _ = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert torch.equal(again(ids), model(ids))


def test_no_code_of_ours_is_needed(trained, tmp_path):
    """The README's claim, in a process that cannot import this project."""
    script = ("import sys, json; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
              "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
              "ids = t('import os', return_tensors='pt').input_ids\n"
              "print(json.dumps([t.decode(m.generate(ids, max_new_tokens=16, do_sample=False)[0]), m(ids).logits[0, -1].tolist()]))")
    checkpoint = find_checkpoint(trained)
    done = subprocess.run([sys.executable, "-c", script, str(checkpoint)], cwd=tmp_path, capture_output=True, text=True)
    text, logits = json.loads(done.stdout)
    model, tokenizer = load_model(checkpoint)
    ids = tokenizer.encode("import os").tolist()
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids]))[0, -1], torch.tensor(logits), atol=1e-4)
    ours = [row[0] for row in generate(model, [ids], 16, Sampling(temperature=0), ends=tokenizer.ends)]
    assert text == "import os" + tokenizer.decode(ours)


@pytest.mark.parametrize("kind", [{"position": "learned"}, {"position": "sinusoidal", "tied_embeddings": True},
                                  {"position": "none", "mlp": "none"}, {"smear": True},
                                  {"norm": "layernorm"}, {"bias": "qkv", "qk_norm": True}, {"parallel": True}, {"rope_dims": 4},
                                  {"norm": "layernorm", "bias": "all", "mlp": "gelu", "position": "learned"},       # grouped heads
                                  {"mlp": "gelu"}, {"mlp": "relu2", "qk_norm": True}, {"window": [3, 5]}])
@torch.no_grad()
def test_what_has_no_form_there_is_saved_the_same_way(kind, tmp_path):
    model = make(**kind)
    assert family(model.config) == OWN_TYPE and obstacles(model.config)
    path = checkpoint_of(model, tmp_path)
    assert json.loads((path / "config.json").read_text())["model_type"] == OWN_TYPE
    again, _ = load_model(path)
    tokens = torch.randint(50, (2, 20))
    assert torch.equal(again(tokens), model(tokens))


def test_weights_of_another_shape_are_refused():
    model = make()
    with pytest.raises(UserError, match="not those of its config"):
        load_hf_state(model, {"model.norm.weight": torch.ones(32)}, "x.safetensors")

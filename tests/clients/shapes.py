"""The checkpoints that clients open: a few steps of train.py for every kind of model that we save,
and models of transformers that were imported.

They are trained into a folder named after the code that trains and saves, so a second run finds
them there, and a change of that code trains them anew.
"""

import argparse
import ast
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from theirs import save_hf_model

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / ".clients"
CODE = ("model", "kernels", "data", "training", "settings")
CONFIG = ROOT / "configs" / "shakespeare_char.yaml"
GPT2_CONFIG = ROOT / "configs" / "gpt2_small.yaml"
BPE = "data.tokenizer={kind: bpe, vocab_size: 512}"
# zero_init=false: after thirty steps, projections that began at zero would do too little.
RUN = ("data.files=[corpus.txt]", "train.steps=30", "model.n_layers=2", "model.zero_init=false",
       "checkpoint.every=30", "eval.every=0", "heads.every=0", "log.wandb=disabled")
GPT2_RUN = ("data.corpus=files", "data.hub=null", "model.n_heads=4", "model.d_model=128",
            "model.n_ctx=64", "train.batch_tokens=768", "optimizer.warmup_steps=1",
            "optimizer.adam_lr=0.01")
GPT2 = ("model.position=learned", "model.norm=layernorm", "model.bias=all", "model.mlp=gelu_tanh")

TRAINED = {                     # shape → what its run changes
    "llama-bytes": (),
    "llama-gqa": (BPE, "model.n_kv_heads=2"),
    "llama-mqa-wide": (BPE, "model.n_kv_heads=1", "model.d_head=64"),
    "llama-tied": (BPE, "model.tied_embeddings=true"),
    "llama-attention-only": (BPE, "model.mlp=none"),
    "llama-qkv-bias": (BPE, "model.bias=qkv"),
    "llama-sharded": (BPE, "distributed=fsdp"),          # two files of weights
    # A window shorter than the prompts of reference.py.
    "mistral": (BPE, "model.window=8"),
    "ministral": (BPE, "model.window=[8,null]"),
    "qwen2-windows": (BPE, "model.bias=qkv", "model.window=[8,null]"),
    "qwen3": (BPE, "model.qk_norm=true", "model.n_kv_heads=2"),
    "gpt2": (BPE, *GPT2_RUN, "model.vocab_size=576"),       # more than the tokenizer's, as there
    "gpt2-bytes-untied": GPT2,
    "gpt_neox": (BPE, "model.norm=layernorm", "model.bias=all", "model.mlp=gelu",
                 "model.parallel=true", "model.rope_dims=8", "model.d_mlp=null"),
    "gpt_neox-sequential": (BPE, "model.norm=layernorm", "model.bias=all", "model.mlp=gelu_tanh"),
    "own-gelu": (BPE, "model.mlp=gelu"),
    "own-learned": (BPE, "model.position=learned"),
    "own-relu2": ("model.mlp=relu2",),
}
IMPORTED = {                    # shape → the model of tests/theirs.py, saved in two files
    "imported-gpt2": "gpt2",                # GPT-2's tokenizer
    "imported-llama": "llama",              # Llama 3's: a BOS token begins every prompt
}
SHAPES = (*TRAINED, *IMPORTED)


def store() -> Path:
    """The folder of the shapes that this code trains; those of other versions are deleted."""
    digest = hashlib.sha256()
    files = [path for package in CODE for path in (ROOT / package).rglob("*.py")]
    files += [ROOT / "train.py", ROOT / "tests" / "theirs.py", CONFIG, GPT2_CONFIG]
    for path in sorted(files):
        digest.update(path.read_bytes())
    folder = STORE / f"shapes-{digest.hexdigest()[:12]}"
    for other in STORE.glob("shapes-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder)
    return folder


def checkpoint_of(shape: str, folder: Path) -> Path:
    """The checkpoint of a shape in the store `folder`; trained or imported unless it is there."""
    run, made_by = folder / "runs" / shape, folder / f"{shape}.command"
    if shape in IMPORTED:
        arguments = ["-m", "training.import_model", f"sources/{shape}", f"runs/{shape}"]
    else:
        config = GPT2_CONFIG if shape == "gpt2" else CONFIG
        arguments = [str(ROOT / "train.py"), str(config), *RUN, *TRAINED[shape], f"run={shape}"]
        if shape == "llama-sharded":
            arguments = [*["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
                         *arguments]
    if not made_by.exists() or made_by.read_text() != " ".join(arguments):
        shutil.rmtree(run, ignore_errors=True)
        if shape in IMPORTED:
            save_for_import(IMPORTED[shape], folder / "sources" / shape)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                    "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment,
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {shape}: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        made_by.write_text(" ".join(arguments))
    return run / "checkpoints" / "latest"


def save_for_import(name: str, folder: Path) -> None:
    """Save a random model of transformers in several files, with as many embeddings as its
    tokenizer has tokens: a trained model predicts no others."""
    from transformers import PreTrainedTokenizerFast
    model = save_hf_model(name, folder)
    model.resize_token_embeddings(len(PreTrainedTokenizerFast.from_pretrained(str(folder))))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_texts(folder: Path) -> None:
    """corpus.txt to train on and heldout.txt to measure: modules of Python's library."""
    for name, modules in (("corpus.txt", (argparse, ast)), ("heldout.txt", (textwrap,))):
        texts = [Path(str(module.__file__)).read_text("utf-8") for module in modules]
        (folder / name).write_text("".join(texts), "utf-8")

"""lm-eval: bits per byte of a local text, through its Python function and its command."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from client import Reference, difference, equal, open_tokenizer, refused_type, run
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TWICE = ("models whose prompts begin with a token of their own (imported ones: Llama 3 …) get it "
         "twice. Add `add_bos_token=False` to `--model_args`")
TASK = """task: heldout
dataset_path: json
dataset_kwargs:
  data_files: {{test: {texts}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    options = {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu"}
    if reference.model_type == "induction_gpt":
        return refused_type(lambda: HFLM(**options))
    folder = Path.cwd()
    (folder / "texts.jsonl").write_text(json.dumps({"text": reference.facts["heldout"]["text"]}))
    (folder / "heldout.yaml").write_text(TASK.format(texts=folder / "texts.jsonl"))
    tokenizer, limit = open_tokenizer(checkpoint, reference)
    if limit:
        options["tokenizer"] = tokenizer
    ours = np.array(reference.facts["heldout"]["bits_per_byte"])
    if reference.facts["prefixed"]:
        given_twice = difference(evaluate(HFLM(**options, batch_size=4), folder), ours)
        assert given_twice > 1e-4, "the documented limit has gone: the begin token is there once"
        options["add_bos_token"], limit = False, TWICE
    model = HFLM(**options, batch_size=4)
    equal(model.max_length, reference.facts["n_ctx"], "the context:")
    theirs = evaluate(model, folder)
    if reference.facts["shape"] == "llama-gqa":
        equal(round(by_command(checkpoint, folder), 10), round(theirs, 10), "the command:")
    return {"limit": limit, "checks": {"bits_per_byte": difference(theirs, ours),
                                       "ids": check_ids(model, reference)}}


def check_ids(model: Any, reference: Reference) -> str:
    """The ids of texts, without the token that begins prompts: that is lm-eval's prefix token."""
    equal(model.prefix_token_id, reference.facts["begin"], "the prefix token:")
    for name, text in reference.texts.items():
        if name != "empty":
            bare = text["ids"][1:] if reference.facts["prefixed"] else text["ids"]
            equal(model.tok_encode(text["text"]), bare, f"ids of {name}:")
    return "equal"


def evaluate(model: Any, folder: Path) -> float:
    """Bits per byte as lm-eval's Python function gives it."""
    found = simple_evaluate(model=model, tasks=["heldout"], task_manager=TaskManager(
        include_path=str(folder), include_defaults=False), bootstrap_iters=0)
    return found["results"]["heldout"]["bits_per_byte,none"]


def by_command(checkpoint: Path, folder: Path) -> float:
    """Bits per byte as `lm_eval --model hf` gives it."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--model_args",
         f"pretrained={checkpoint},dtype=float32", "--tasks", "heldout", "--include_path", folder,
         "--device", "cpu", "--batch_size", "4", "--output_path", folder / "found"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    file, = (folder / "found").rglob("results_*.json")
    return json.loads(file.read_text())["results"]["heldout"]["bits_per_byte,none"]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run("lm-eval", f"{version('lm-eval')} (transformers {transformers.__version__})", check)

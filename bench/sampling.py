"""Tokens per second of cached decoding: against recomputing everything, and against transformers: `python -m bench.sampling`.

One checkpoint, opened by both sides; batch 1, fp32, greedy, alternating, medians. The floor is the time that reading
every weight once takes at the bandwidth measured in the same run: no decoder of one token at a time can be faster.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "THP_MEM_ALLOC_ENABLE": "1"}         # sample.py sets the second too; both sides have it

import torch

from data.tokenizer import bytes_tokenizer
from errors import ArgumentParser, run_command
from files import whole_file
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.gpt import GPT
from training.checkpoint import load_model, save_checkpoint, snapshot

SHAPES = {
    "small (4 layers, width 128)": ModelConfig(n_layers=4, n_heads=4, d_model=128, d_mlp=344, n_ctx=2048, vocab_size=257),
    "gpt2-small (12 layers, width 768)": ModelConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=2048, n_ctx=2048, vocab_size=50304,
                                                     tied_embeddings=True),
}


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median_of_each(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each call's median seconds, taken in turn so that a slow moment falls on all alike."""
    for call in calls.values():
        call()
    taken = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in taken) for name in calls}


def read_floor(model: GPT) -> float:
    """Seconds to read every weight that one token needs, at the bandwidth of a large matrix-vector product."""
    matrix, vector = torch.randn(16384, 4096), torch.randn(1, 4096)         # 268 MB: far beyond the caches
    measured = min(seconds_of(lambda: torch.nn.functional.linear(vector, matrix)) for _ in range(10))
    needed = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name or model.lm_head is None)
    return measured * needed / matrix.numel()


@torch.inference_mode()
def main() -> None:
    parser = ArgumentParser("python -m bench.sampling", description="Cached decoding against recomputation and against transformers.")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded a round (default 48)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median counts (default 5)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024], help="tokens already read (default 256 1024)")
    parser.add_argument("--shape", choices=["small", "gpt2-small"], action="append", help="default: both")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} thread(s), batch 1, fp32")
    for name, config in SHAPES.items():
        if args.shape and name.split()[0] not in args.shape:
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = GPT(config)
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
            path = save_checkpoint(Path(folder), snapshot(model, {}, {"step": 1}, "", bytes_tokenizer(), copy=False))
            model = load_model(path)[0].pack()
            theirs = AutoModelForCausalLM.from_pretrained(path).eval()
        floor = read_floor(model)
        print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, read floor {floor * 1e3:.2f} ms a token")
        for context in args.contexts:
            prompt = torch.randint(257, (1, context), generator=torch.Generator().manual_seed(0))

            def ours(n: int, prompt=prompt, model=model) -> list[int]:
                return [row[0] for row in generate(model, prompt.tolist(), n, Sampling(temperature=0))]

            def transformers(n: int, prompt=prompt, theirs=theirs) -> list[int]:
                out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
                return out[0, prompt.shape[1]:].tolist()

            assert ours(8) == transformers(8), "the two sides must say the same"
            one, many = 1, args.tokens + 1                      # their difference is decoding alone, without the prefill
            t = median_of_each({"ours 1": lambda: ours(one), "ours": lambda: ours(many), "theirs 1": lambda: transformers(one),
                                "theirs": lambda: transformers(many), "recompute": lambda: model(prompt)[:, -1]}, args.rounds)
            a, b = (t["ours"] - t["ours 1"]) / args.tokens, (t["theirs"] - t["theirs 1"]) / args.tokens
            print(f"  context {context:5}: {b / a:5.2f} × transformers, {t['recompute'] / a:6.1f} × recomputing, {a / floor:5.2f} × the floor    "
                  f"ours {1 / a:6.0f} tokens/s ({a * 1e3:.2f} ms), transformers {1 / b:6.0f} ({b * 1e3:.2f} ms)", flush=True)
            rows.append({"model": name, "context": context, "ours_ms": a * 1e3, "transformers_ms": b * 1e3, "recompute_ms": t["recompute"] * 1e3,
                         "floor_ms": floor * 1e3, "prefill_ms": t["ours 1"] * 1e3, "transformers_prefill_ms": t["theirs 1"] * 1e3})
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    with whole_file(results / "sampling.json", "w") as file:
        json.dump({"torch": torch.__version__, "threads": args.threads, "machine": platform.platform(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    run_command(main)

"""Tokens per second of cached decoding: against recomputing everything, and against transformers: `python -m bench.sampling`.

One checkpoint, opened by both sides, each in a process of its own as its user would start it; batch 1, fp32, greedy,
taking turns, medians. The floor is the time that reading every weight once takes at the bandwidth measured in the same
run: no decoder of one token at a time can be faster.
"""

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import results
from bench.side import Side
from data.tokenizer import bytes_tokenizer
from errors import ArgumentParser, run_command
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import load_model, save_checkpoint, snapshot

SHAPES = {
    "small": ModelConfig(n_layers=4, n_heads=4, d_model=128, d_mlp=344, n_ctx=2048, vocab_size=257),
    "gpt2-small": ModelConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=2048, n_ctx=2048, vocab_size=50304, tied_embeddings=True),
}


def prompt_of(context: int) -> torch.Tensor:
    return torch.randint(257, (1, context), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def serve_ours(pipe, path: Path, threads: int) -> None:
    """As sample.py does it; `("recompute", context)` is one pass over everything, `("floor",)` the reading of all weights."""
    from model.generate import Sampling, generate
    torch.set_num_threads(threads)
    model = load_model(path)[0].pack()
    matrix, vector = torch.randn(4096, 16384).mT, torch.randn(1, 4096)      # 268 MB, laid out as the model's own weights
    while (request := pipe.recv()) is not None:
        started, said = time.perf_counter(), []
        match request:
            case ("recompute", context):
                model(prompt_of(context))
            case ("floor",):
                torch.nn.functional.linear(vector, matrix)
            case (context, n):
                said = [row[0] for row in generate(model, prompt_of(context).tolist(), n, Sampling(temperature=0))]
        pipe.send((time.perf_counter() - started, said))


@torch.inference_mode()
def serve_transformers(pipe, path: Path, threads: int) -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = None                 # random weights may say it: both sides go on
    while (request := pipe.recv()) is not None:
        (context, n), started = request, time.perf_counter()
        prompt = prompt_of(context)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False, pad_token_id=0)
        pipe.send((time.perf_counter() - started, out[0, context:].tolist()))


def measure(ours: Side, theirs: Side, context: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one decoded token on either side, of recomputing all, and of the prefills."""
    assert ours(context, 8)[1] == theirs(context, 8)[1], "the two sides must say the same"
    taken = []
    for _ in range(rounds):
        prefill, their_prefill = ours(context, 1)[0], theirs(context, 1)[0]
        taken.append({"prefill": prefill, "their prefill": their_prefill, "recompute": ours("recompute", context)[0],
                      "decode": (ours(context, tokens + 1)[0] - prefill) / tokens,
                      "their decode": (theirs(context, tokens + 1)[0] - their_prefill) / tokens})
    return {name: statistics.median(t[name] for t in taken) * 1e3 for name in taken[0]}


def main() -> None:
    parser = ArgumentParser("python -m bench.sampling", description="Cached decoding against recomputation and against transformers.")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded a round (default 48)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median counts (default 5)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 256, 1024], help="tokens already read (default 16 256 1024)")
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: both")
    args = parser.parse_args()
    rows = []
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} thread(s), batch 1, fp32")
    for name in args.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            torch.manual_seed(0)
            model = GPT(SHAPES[name])
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
            path = save_checkpoint(Path(folder), snapshot(model, {}, {"step": 1}, "", bytes_tokenizer(), copy=False))
            ours = Side(serve_ours, path, args.threads, environment={"THP_MEM_ALLOC_ENABLE": "1"})     # as sample.py sets it
            theirs = Side(serve_transformers, path, args.threads)
            read = sum(p.numel() for part, p in model.named_parameters() if "embed" not in part or model.lm_head is None)
            floor = min(ours("floor")[0] for _ in range(10)) * read / (4096 * 16384) * 1e3
            print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, read floor {floor:.2f} ms a token")
            for context in args.contexts:
                t = measure(ours, theirs, context, args.tokens, args.rounds)
                a, b = t["decode"], t["their decode"]
                print(f"  context {context:5}: {b / a:5.2f} × transformers, {t['recompute'] / a:6.1f} × recomputing, {a / floor:5.2f} × "
                      f"the floor    ours {1e3 / a:6.0f} tokens/s ({a:.2f} ms), transformers {1e3 / b:6.0f} ({b:.2f} ms)", flush=True)
                rows.append({"model": name, "context": context, "floor_ms": floor} | {f"{k.replace(' ', '_')}_ms": t[k] for k in t})
            ours.close()
            theirs.close()
    results.write("sampling", {"threads": args.threads, "rows": rows})


if __name__ == "__main__":
    run_command(main)

"""Tokens per second of cached decoding: `python -m bench.sampling`.

Compared with transformers and with recomputing everything for each token. All open one checkpoint,
each in a process of its own as its user would start it: ours as sample.py does, with and without
--compile, transformers with its dynamic and with its static cache; greedy, taking turns, medians.
Prefill is the time to the first token, decode that of each later one. The floor reads every weight,
and every cached key and value, once, at the bandwidth measured in the same run: no decoder of one
token at a time can be faster. At the end many prompts of different lengths, one by one and
together.
"""

import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from errors import ArgumentParser, run_command

import torch

from bench import results
from bench.results import DEVICE, DTYPE, GPU
from bench.side import Side, at_once
from bench.turn import wait_for_turn
from data.byte_bpe import bytes_tokenizer
from model.compiled import CompiledStep
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.gpt import GPT
from training.checkpoint import load_model
from training.save_checkpoint import checkpoint_contents, save_checkpoint

CONTEXT = 8192 + 256
SHAPES = {
    "small": ModelConfig(
        n_layers=4, n_heads=4, d_model=128, d_mlp=344, n_ctx=CONTEXT, vocab_size=257),
    "gpt2-small": ModelConfig(
        n_layers=12, n_heads=12, d_model=768, d_mlp=2048, n_ctx=CONTEXT, vocab_size=50304,
        tied_embeddings=True),
    "1b": ModelConfig(
        n_layers=16, n_heads=32, n_kv_heads=8, d_model=2048, d_mlp=8192, n_ctx=CONTEXT,
        vocab_size=128256, tied_embeddings=True),
}
# A prefill of more tokens takes minutes, or more memory than there is.
MAX_PREFILL_TOKENS = 2 ** 19 if GPU else 2 ** 14
BATCH_SIZES = (1, 8, 32)            # how many of the many prompts are continued together


class Continuation(NamedTuple):
    """What a side answers: its times, and the first row's tokens."""

    prefill: float                  # seconds to the first token
    decode: float                   # seconds for each later token
    tokens: list[int]


def continuation(started: float, token_times: Sequence[float], tokens: list[int]) -> Continuation:
    """A `Continuation` that started at one time and had its tokens at the others."""
    decode = (token_times[-1] - token_times[0]) / (len(token_times) - 1)
    return Continuation(token_times[0] - started, decode, tokens)


def random_prompts(batch: int, context: int) -> torch.Tensor:
    """(batch, context) token ids."""
    return torch.randint(257, (batch, context), generator=torch.Generator().manual_seed(0))


def many_prompts(count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 8 to 128 tokens, and the number of tokens to continue each by, 8 to 128."""
    generator = torch.Generator().manual_seed(1)
    lengths, new_tokens = torch.randint(8, 129, (2, count), generator=generator).tolist()
    prompts = [torch.randint(257, (n,), generator=generator).tolist() for n in lengths]
    return prompts, new_tokens


# --- the sides -------------------------------------------------------------------------------

@torch.inference_mode()
def serve_ours(pipe: Connection, path: Path, threads: int, compile: bool) -> None:
    """`("continue", batch, context, n)` → Continuation; `("many", prompts, batch_size)` → seconds;
    `("bandwidth",)` → bytes per second."""
    torch.set_num_threads(threads)
    model = load_model(path, DEVICE)[0].to(DTYPE).pack()
    model.compute_dtype = DTYPE
    greedy = Sampling(temperature=0)
    step = CompiledStep(model) if compile else None
    # 268 MB in fp32; on a GPU 1 GB in bf16, more than its L2 cache.
    operands = torch.randn(2, 2 ** (28 if GPU else 25), device=DEVICE, dtype=DTYPE)
    while (request := pipe.recv()) is not None:
        started = time.perf_counter()
        match request:
            case ("bandwidth",):                    # by PyTorch's fastest read
                for _ in range(10):
                    total = operands.amax() if GPU else torch.dot(operands[0], operands[1])
                float(total)                        # waits for the device
                pipe.send(10 * operands.nbytes / (time.perf_counter() - started))
            case ("many", count, batch_size):
                prompts, remaining = many_prompts(count)

                def wanted(row: int, remaining: list[int] = remaining) -> bool:
                    remaining[row] -= 1
                    return remaining[row] > 0

                for _ in generate(model, prompts, 128, greedy, batch_size=batch_size,
                                  wanted=wanted, compiled_step=step):
                    pass
                pipe.send(time.perf_counter() - started)
            case ("continue", batch, context, n):
                prompts, times, tokens = random_prompts(batch, context).tolist(), [], []
                for row_tokens in generate(model, prompts, n, greedy, batch_size=batch,
                                           compiled_step=step):
                    times.append(time.perf_counter())
                    tokens.append(row_tokens[0])
                pipe.send(continuation(started, times, tokens))


@torch.inference_mode()
def serve_transformers(pipe: Connection, path: Path, threads: int, cache: str) -> None:
    """`("continue", batch, context, n)` → Continuation."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"          # read when it is imported
    from transformers import AutoModelForCausalLM, StoppingCriteria, logging
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE).to(DEVICE).eval()   # type: ignore[arg-type]
    # Random weights may produce the end token: both sides go on.
    model.generation_config.eos_token_id = None

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            int(ids[0, -1])                                 # waits for the device
            self.times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    while (request := pipe.recv()) is not None:
        _, batch, context, n = request
        clock, prompt = Clock(), random_prompts(batch, context).to(DEVICE)
        started = time.perf_counter()
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False,
            pad_token_id=0, cache_implementation=cache, stopping_criteria=[clock])
        pipe.send(continuation(started, clock.times, ids[0, context:].tolist()))


# --- the comparison --------------------------------------------------------------------------

def save(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of that shape, with weights that continue every prompt differently."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    model.allocate(DEVICE)
    for p in model.parameters():            # gains around 1, matrices around 0
        torch.nn.init.normal_(p, float(p.ndim == 1), p.shape[-1] ** -0.5)
    return save_checkpoint(
        folder,
        checkpoint_contents(model.cpu(), {}, {"step": 1}, "", bytes_tokenizer(), copy=False))


def bytes_read(config: ModelConfig, batch: int, context: int) -> int:
    """Bytes that a step must read: the weights, and the keys and values of every row.

    An embedding that is not also the unembedding is only looked up, not read.
    """
    with torch.device("meta"):
        parameters = GPT(config).named_parameters()
    weights = sum(p.numel() for name, p in parameters
                  if "embed" not in name or config.tied_embeddings)
    keys_and_values = 2 * batch * context * config.n_layers * config.kv_heads * config.head_size
    return DTYPE.itemsize * (weights + keys_and_values)


def measure(sides: dict[str, Side], batch: int, context: int, tokens: int,
            rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each side's prefill and of each of its decoding steps."""
    # As many tokens as are timed: for another number transformers compiles anew.
    warm_up = at_once(sides, "continue", batch, context, tokens + 1)
    wait_for_turn()
    texts = {name: answer.tokens for name, answer in warm_up.items()}
    assert GPU or len(set(map(tuple, texts.values()))) == 1, f"the sides differ: {texts}"
    answers: dict[str, list[Continuation]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answers[name].append(side("continue", batch, context, tokens + 1))
    return {name: {"prefill_ms": statistics.median(answer.prefill for answer in timed) * 1e3,
                   "decode_ms": statistics.median(answer.decode for answer in timed) * 1e3}
            for name, timed in answers.items()}


HEADER = (
    "  batch  context        dynamic    static  recomputing   floor       ms    tokens/s"
    "   prefill: tokens/s  dynamic\n"
    "                       (their time / ours)         (ours / floor)")


def lines(batch: int, context: int, medians: dict[str, dict[str, float]], floor: float) -> str:
    """A line of the table for each arm of ours; `floor` in milliseconds."""
    rows = []
    for arm in ("ours", "compiled"):
        if arm not in medians:
            continue
        decode, prefill = medians[arm]["decode_ms"], medians[arm]["prefill_ms"]
        dynamic, static = (medians[cache]["decode_ms"] / decode for cache in ("dynamic", "static"))
        rows.append(
            f"  {batch:5}  {context:7}  {arm:8}  {dynamic:5.2f} ×  {static:6.2f} ×  "
            f"{prefill / decode:9.1f} ×  {decode / floor:4.2f} ×  {decode:7.2f}  "
            f"{batch / decode * 1e3:10,.0f}  {batch * context / prefill * 1e3:18,.0f}"
            f"  {medians['dynamic']['prefill_ms'] / prefill:5.2f} ×")
    return "\n".join(rows)


def compare_many(side: Side, arm: str, count: int, rounds: int) -> dict:
    """Time many prompts with every batch size, print and return seconds by batch size."""
    tokens = sum(many_prompts(count)[1])
    for size in BATCH_SIZES:
        side("many", count, size)                           # warm, and compiled
    seconds = {size: statistics.median(side("many", count, size) for _ in range(rounds))
               for size in BATCH_SIZES}
    together = ", ".join(f"{size} at a time {seconds[1] / seconds[size]:.2f} ×"
                         for size in BATCH_SIZES[1:])
    print(f"  {arm}: {count} prompts of 8 to 128 tokens, {tokens:,} new tokens: one by one "
          f"{tokens / seconds[1]:,.0f} tokens/s; {together}", flush=True)
    return {"arm": arm, "tokens": tokens, "seconds": seconds}


def parse_arguments() -> Namespace:
    parser = ArgumentParser(
        "python -m bench.sampling",
        description="Cached decoding compared with transformers and with recomputation.")
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="CPU threads (default 1)")
    parser.add_argument("--tokens", type=int, default=48, metavar="N",
                        help="tokens decoded in a round (default 48)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N",
                        help="timed rounds; the median counts (default 3)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 8192], metavar="N",
                        help="tokens of the prompts (default 256 1024 8192)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="N",
                        help="rows decoded together (default 1 8 64); with only 1 the many prompts "
                             "are left out")
    parser.add_argument("--prompts", type=int, default=64, metavar="N",
                        help="number of prompts of different lengths at the end (default 64)")
    parser.add_argument("--shape", choices=list(SHAPES), action="append",
                        help="default: small and gpt2-small, on a GPU 1b too")
    parser.add_argument("--eager", action="store_true",
                        help="leave out the compiled arm, which takes half a minute per batch size")
    parser.add_argument("--results", default="sampling", metavar="NAME",
                        help="write the figures to NAME.json (default sampling)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    arms = ["ours"] if args.eager else ["ours", "compiled"]
    pages = {"THP_MEM_ALLOC_ENABLE": "1"}                   # as sample.py sets it
    rows: list[dict] = []
    many: list[dict] = []
    device = results.device(args.threads)
    print(f"{device}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}; "
          "one decoding step of all rows")
    for name in args.shape or list(SHAPES)[:3 if GPU else 2]:
        config = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            path = save(config, Path(folder))
            sides = {arm: Side(serve_ours, path, args.threads, arm == "compiled",
                               environment=pages) for arm in arms}
            sides |= {cache: Side(serve_transformers, path, args.threads, cache)
                      for cache in ("dynamic", "static")}
            print(f"\n{name}\n{HEADER}")
            for batch in args.batches:
                for context in args.contexts:
                    if batch * context > MAX_PREFILL_TOKENS:
                        continue
                    medians = measure(sides, batch, context, args.tokens, args.rounds)
                    bandwidth = max(sides["ours"]("bandwidth") for _ in range(10))
                    floor = bytes_read(config, batch, context) / bandwidth * 1e3
                    print(lines(batch, context, medians, floor), flush=True)
                    rows.append({"model": name, "batch": batch, "context": context,
                                 "gb_s": bandwidth / 1e9, "floor_ms": floor, "sides": medians})
                    results.write(args.results, {"device": device, "rows": rows, "many": many})
            if max(args.batches) > 1:
                many += [{"model": name, **compare_many(sides[arm], arm, args.prompts, args.rounds)}
                         for arm in arms]
            for side in sides.values():
                side.close()
    results.write(args.results, {"device": device, "rows": rows, "many": many})


if __name__ == "__main__":
    run_command(main)

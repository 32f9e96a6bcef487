"""Tokens per second of cached decoding beside transformers' and beside recomputing everything: `python -m bench.sampling`.

One checkpoint, opened by each side in a process of its own as its user would start it: ours as sample.py does, with and without
--compile, transformers with its dynamic and with its static cache; greedy, taking turns, medians. Prefill is the time to the first token,
decode that of each later one. The floor reads every weight, and the cache that a token sees, once, at the bandwidth measured in the same
run: no decoder of one token at a time can be faster. At the end many prompts of different lengths, one by one and together.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import results
from bench.results import DEVICE, DTYPE, GPU
from bench.side import Side, at_once
from data.byte_bpe import bytes_tokenizer
from errors import ArgumentParser, run_command
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import load_model, save_checkpoint, snapshot

CONTEXT = 8192 + 256
SHAPES = {
    "small": ModelConfig(n_layers=4, n_heads=4, d_model=128, d_mlp=344, n_ctx=CONTEXT, vocab_size=257),
    "gpt2-small": ModelConfig(n_layers=12, n_heads=12, d_model=768, d_mlp=2048, n_ctx=CONTEXT, vocab_size=50304, tied_embeddings=True),
    "1b": ModelConfig(n_layers=16, n_heads=32, n_kv_heads=8, d_model=2048, d_mlp=8192, n_ctx=CONTEXT, vocab_size=128256,
                      tied_embeddings=True),
}
MOST_READ = 2 ** 19 if GPU else 2 ** 14             # tokens of a prefill: more take minutes, or more memory than there is


def prompts_of(batch: int, context: int) -> torch.Tensor:
    return torch.randint(257, (batch, context), generator=torch.Generator().manual_seed(0))


def many_prompts(number: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 8 to 128 tokens, and how many tokens each is continued by: 8 to 128."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 129, (2, number), generator=draw).tolist()
    return [torch.randint(257, (n,), generator=draw).tolist() for n in lengths[0]], lengths[1]


def intervals(started: float, told: list[float]) -> tuple[float, float]:
    """Seconds to the first token, and of each later one."""
    return told[0] - started, (told[-1] - told[0]) / (len(told) - 1)


@torch.inference_mode()
def serve_ours(pipe, path: Path, threads: int, compile: bool) -> None:
    """`(batch, context, n)` → prefill, decode, what was said; `("many", prompts, batch_size)` → seconds; `("floor",)` → bytes a second."""
    from model.compiled import CompiledStep
    from model.generate import Sampling, generate
    torch.set_num_threads(threads)
    model, greedy = load_model(path, DEVICE)[0].to(DTYPE).pack(), Sampling(temperature=0)
    model.compute_dtype = DTYPE
    step = CompiledStep(model) if compile else None
    read = torch.randn(2, 2 ** 25, device=DEVICE, dtype=DTYPE)              # 268 MB in fp32
    while (request := pipe.recv()) is not None:
        started, told, said = time.perf_counter(), [], []
        match request:
            case ("floor",):                        # two streams of memory: the fastest that PyTorch reads
                for _ in range(10):
                    product = torch.dot(read[0], read[1])
                float(product)                      # a GPU has done it by now
                pipe.send(10 * read.nbytes / (time.perf_counter() - started))
            case ("many", number, batch_size):
                prompts, left = many_prompts(number)

                def wanted(row: int, left=left) -> bool:
                    left[row] -= 1
                    return left[row] > 0

                for _ in generate(model, prompts, 128, greedy, batch_size=batch_size, wanted=wanted, step=step):
                    pass
                pipe.send(time.perf_counter() - started)
            case (batch, context, n):
                for tokens in generate(model, prompts_of(batch, context).tolist(), n, greedy, batch_size=batch, step=step):
                    told.append(time.perf_counter())
                    said.append(tokens[0])
                pipe.send((*intervals(started, told), said))


@torch.inference_mode()
def serve_transformers(pipe, path: Path, threads: int, cache: str) -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM, StoppingCriteria, logging
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE).to(DEVICE).eval()
    model.generation_config.eos_token_id = None                 # random weights may say it: both sides go on

    class Clock(StoppingCriteria):
        def __init__(self):
            self.told: list[float] = []

        def __call__(self, ids, scores, **_) -> torch.Tensor:
            int(ids[0, -1])                                     # a GPU has said it by now
            self.told.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    while (request := pipe.recv()) is not None:
        (batch, context, n), clock = request, Clock()
        prompt, started = prompts_of(batch, context).to(DEVICE), time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False, pad_token_id=0,
                             cache_implementation=cache, stopping_criteria=[clock])
        pipe.send((*intervals(started, clock.told), out[0, context:].tolist()))


def measure(sides: dict[str, Side], batch: int, context: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each side's prefill and of each of its decoding steps."""
    first = {name: said for name, (_, _, said) in at_once(sides, batch, context, 8).items()}        # warm, and the same text
    assert GPU or len({tuple(said) for said in first.values()}) == 1, f"the sides must say the same: {first}"
    taken: dict[str, list] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            taken[name].append(side(batch, context, tokens + 1)[:2])
    return {name: dict(zip(("prefill_ms", "decode_ms"), (statistics.median(part) * 1e3 for part in zip(*found))))
            for name, found in taken.items()}


def save(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of that shape, with weights that say something else for every prompt."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return save_checkpoint(folder, snapshot(model, {}, {"step": 1}, "", bytes_tokenizer(), copy=False))


def bytes_read(config: ModelConfig, batch: int, context: int) -> int:
    """What one step must read: every weight but the embeddings that are looked up, and the keys and values of every row."""
    with torch.device("meta"):
        parameters = GPT(config).named_parameters()
    weights = sum(p.numel() for name, p in parameters if "embed" not in name or config.tied_embeddings)
    return DTYPE.itemsize * (weights + 2 * batch * context * config.n_layers * config.kv_heads * config.head_size)


HEADER = ("  batch  context        dynamic    static  recomputing   floor       ms    tokens/s   prefill: tokens/s  dynamic\n"
          "                       (their time / ours)         (ours / its)")


def lines(batch: int, context: int, found: dict[str, dict[str, float]], floor: float) -> str:
    """One of ours, one of ours compiled."""
    table = []
    for arm in [arm for arm in ("ours", "compiled") if arm in found]:
        decode, prefill = found[arm]["decode_ms"], found[arm]["prefill_ms"]
        dynamic, static = (found[cache]["decode_ms"] / decode for cache in ("dynamic", "static"))
        table.append(f"  {batch:5}  {context:7}  {arm:8}  {dynamic:5.2f} ×  {static:6.2f} ×  {prefill / decode:9.1f} ×  "
                     f"{decode / floor:4.2f} ×  {decode:7.2f}  {batch / decode * 1e3:10,.0f}  {batch * context / prefill * 1e3:18,.0f}"
                     f"  {found['dynamic']['prefill_ms'] / prefill:5.2f} ×")
    return "\n".join(table)


def main() -> None:
    parser = ArgumentParser("python -m bench.sampling", description="Cached decoding beside transformers and beside recomputation.")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded a round (default 48)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median counts (default 3)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 8192], help="tokens already read (default 256 1024 8192)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64],
                        help="rows decoded together (default 1 8 64); 1 alone leaves out the many prompts")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts of different lengths at the end (default 64)")
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: small and gpt2-small, on a GPU 1b too")
    parser.add_argument("--eager", action="store_true", help="without the compiled arm, which compiles every batch for half a minute")
    args = parser.parse_args()
    arms = ["ours"] if args.eager else ["ours", "compiled"]
    rows, many = [], []
    device = results.device(args.threads)
    print(f"{device}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}; one decoding step of all rows")
    for name in args.shape or list(SHAPES)[:3 if GPU else 2]:
        config = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            path = save(config, Path(folder))
            pages = {"THP_MEM_ALLOC_ENABLE": "1"}               # as sample.py sets it
            sides = {arm: Side(serve_ours, path, args.threads, arm == "compiled", environment=pages) for arm in arms}
            sides |= {cache: Side(serve_transformers, path, args.threads, cache) for cache in ("dynamic", "static")}
            bandwidth = max(sides["ours"]("floor") for _ in range(10))
            print(f"\n{name}: {bandwidth / 1e9:.1f} GB/s\n{HEADER}")
            for batch, context in ((b, c) for b in args.batches for c in args.contexts if b * c <= MOST_READ):
                found = measure(sides, batch, context, args.tokens, args.rounds)
                floor = bytes_read(config, batch, context) / bandwidth * 1e3
                print(lines(batch, context, found, floor), flush=True)
                rows.append({"model": name, "batch": batch, "context": context, "floor_ms": floor, "sides": found})
                results.write("sampling", {"device": device, "rows": rows, "many": many})
            said = sum(many_prompts(args.prompts)[1])
            for arm in arms if max(args.batches) > 1 else []:
                sizes = (1, 8, 32)
                for size in sizes:
                    sides[arm]("many", args.prompts, size)      # warm, and compiled
                seconds = {size: statistics.median(sides[arm]("many", args.prompts, size) for _ in range(args.rounds)) for size in sizes}
                print(f"  {arm}: {args.prompts} prompts of 8 to 128 tokens, {said:,} tokens said: one by one "
                      f"{said / seconds[1]:,.0f} tokens/s; "
                      + ", ".join(f"{size} at a time {seconds[1] / seconds[size]:.2f} ×" for size in sizes[1:]), flush=True)
                many.append({"model": name, "arm": arm, "tokens": said, "seconds": seconds})
            for side in sides.values():
                side.close()
    results.write("sampling", {"device": device, "rows": rows, "many": many})


if __name__ == "__main__":
    run_command(main)

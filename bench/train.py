"""Tokens per second and peak memory of a training step, ours against a plain GPT's: `python -m bench.train`.

Same blocks' parameters, batch and context; every arm in a process of its own, taking turns, medians. The ceiling is the rate of a large
matrix product measured in the same run; what a step of ours spends is split into matrix products at their own shapes, attention, the
optimizer, and the rest (norms, rotations, activations, loss, launching), so that the table says what bounds it.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from bench import results
from bench.baseline import PlainGPT, Recipe
from bench.results import DEVICE, DTYPE, GPU
from bench.side import Side, at_once
from errors import ArgumentParser, run_command
from kernels.attention import attention
from model.budget import flops_per_token
from model.compiled import keep_apart_by_cpu
from model.config import ModelConfig
from model.gpt import GPT
from training.config import OptimizerConfig
from training.device import keep_freed_memory, training_loss
from training.optimizer import Optimizer
from training.run import memory_gb


class Shape(NamedTuple):
    n_layers: int
    n_heads: int
    d_model: int
    n_ctx: int
    windows: int
    vocab_size: int

    @property
    def config(self) -> ModelConfig:
        """Ours, with the recipe's choices: RoPE, QK norm, ReLU² and RMSNorm for learned positions, GELU and LayerNorm."""
        return ModelConfig(n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model, d_mlp=4 * self.d_model, mlp="relu2",
                           qk_norm=True, n_ctx=self.n_ctx, vocab_size=self.vocab_size, tied_embeddings=True)

    @property
    def tokens(self) -> int:
        return self.n_ctx * self.windows

    @property
    def flops(self) -> int:
        """Of a training step, without the optimizer's."""
        return 3 * flops_per_token(self.config).total() * self.tokens

    def __str__(self) -> str:
        return f"{self.n_layers} layers, width {self.d_model}, {self.windows} × {self.n_ctx} tokens"


SHAPES = [Shape(12, 12, 768, 1024, 16, 50304)] if GPU else [
    Shape(4, 4, 128, 64, 12, 257), Shape(4, 4, 128, 256, 3, 257), Shape(6, 6, 384, 64, 32, 257), Shape(6, 6, 384, 256, 8, 257)]


def seconds(call: Callable[..., object], *arguments) -> float:
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call(*arguments)
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best(call: Callable[[], object], times: int) -> float:
    return min(seconds(call) for _ in range(times))


# --- the arms --------------------------------------------------------------------------------------------------------

def serve_plain(pipe, shape: Shape, threads: int, compiled: bool) -> None:
    """nanoGPT's step: autocast on a GPU, the whole batch's logits, clipping, fused AdamW."""
    torch.set_num_threads(threads)
    before = memory_gb(DEVICE)
    recipe = Recipe(shape.n_layers, shape.n_heads, shape.d_model, shape.n_ctx, shape.vocab_size, shape.windows)
    model = PlainGPT(recipe).to(DEVICE)
    optimizer = model.optimizer(recipe)
    loss = model.loss
    if compiled:
        keep_apart_by_cpu()
        loss = torch.compile(loss)

    def forward_backward(tokens, targets):
        with torch.autocast(DEVICE.type, DTYPE) if GPU else nullcontext():
            found = loss(tokens, targets)
        found.backward()

    def update(step):
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    answer(pipe, shape, forward_backward, update, before)


def serve_ours(pipe, shape: Shape, threads: int, compiled: bool, kind: str) -> None:
    """The trainer's step."""
    torch.set_num_threads(threads)
    if not GPU:
        keep_freed_memory()
    before = memory_gb(DEVICE)
    model = GPT(shape.config).to(DEVICE)
    model.compute_dtype = DTYPE
    optimizer = Optimizer(model, OptimizerConfig(kind=kind, lr=1e-3), steps=1000)
    loss = training_loss(model, compiled)
    answer(pipe, shape, lambda tokens, targets: loss(tokens, targets).backward(), lambda step: optimizer.step(step, shape.tokens), before)


def answer(pipe, shape: Shape, forward_backward: Callable, update: Callable, before: float) -> None:
    """Seconds of forward and backward pass, seconds of the update, and MB so far, as often as asked."""
    draw = torch.Generator().manual_seed(0)
    step = 0
    while pipe.recv() is not None:
        step += 1
        tokens = torch.randint(shape.vocab_size, (shape.windows, shape.n_ctx + 1), generator=draw).to(DEVICE)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        taken = seconds(forward_backward, inputs, targets), seconds(update, step)
        pipe.send((*taken, (memory_gb(DEVICE) - before) * 1e3))


def serve_ceilings(pipe, shape: Shape, threads: int) -> None:
    """FLOP/s of a large product, and the seconds that a step's products and its attention take alone."""
    torch.set_num_threads(threads)
    size = 8192 if GPU else 2048
    large = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    E, V, N = shape.d_model, shape.vocab_size, shape.tokens
    sizes = [*[(E, 3 * E), (E, E), (E, 4 * E), (4 * E, E)] * shape.n_layers, (E, V)]
    layer = {(i, o): tuple(torch.randn(*s, device=DEVICE, dtype=DTYPE) for s in ((N, i), (o, i), (N, o))) for i, o in sizes}
    q, k, v, grad = (torch.randn(shape.windows, shape.n_heads, shape.n_ctx, E // shape.n_heads, device=DEVICE, dtype=DTYPE)
                     for _ in range(4))

    def products():
        for x, w, g in (layer[size] for size in sizes):
            x @ w.T, g @ w, g.T @ x                         # forward, and the gradients of the input and of the weights

    def attend():
        for x in (q, k, v):
            x.requires_grad_()
        attention(q, k, v).backward(grad)
    while pipe.recv() is not None:
        pipe.send((2 * size ** 3 / best(lambda: large @ large, 3), best(products, 3), shape.n_layers * best(attend, 3)))


# --- the comparison --------------------------------------------------------------------------------------------------

def compare(shape: Shape, threads: int, rounds: int, compiled: bool) -> dict:
    """All arms in turn; what each comes to, and the ceilings."""
    arms = {"plain": Side(serve_plain, shape, threads, GPU), "ours, AdamW": Side(serve_ours, shape, threads, GPU, "adamw"),
            "ours, Muon": Side(serve_ours, shape, threads, GPU, "muon")}
    if compiled and not GPU:                                # a GPU's are compiled anyway
        arms |= {"plain, compiled": Side(serve_plain, shape, threads, True),
                 "ours, AdamW, compiled": Side(serve_ours, shape, threads, True, "adamw")}
    ceilings = Side(serve_ceilings, shape, threads)
    taken, limits = {name: [] for name in arms}, []
    for _ in range(2):                                      # to compile and to find memory
        at_once(arms, "step")
    for n in range(rounds):
        limits.append(ceilings("measure"))                  # the best of several, so it needs no round to warm up
        for name, arm in arms.items():
            taken[name].append(arm("step"))
        results.meanwhile(f"{shape}: round {n + 1} of {rounds}")
    results.meanwhile("")
    for side in (*arms.values(), ceilings):
        side.close()
    rate, products, attend = (statistics.median(column) for column in zip(*limits))
    rows = {}
    for name, ones in taken.items():
        passes, update = (statistics.median(column) for column in list(zip(*ones))[:2])
        whole = statistics.median(a + b for a, b, _ in ones)
        rows[name] = {"ms": whole * 1e3, "update_ms": update * 1e3, "passes_ms": passes * 1e3, "tokens_per_second": shape.tokens / whole,
                      "of_matrix_rate": shape.flops / whole / rate, "mb": ones[-1][2]}
    return {"shape": shape._asdict(), "flops": shape.flops, "matrix_rate": rate, "products_ms": products * 1e3,
            "attention_ms": attend * 1e3, "arms": rows}


def table(shape: Shape, found: dict) -> str:
    plain, ours = found["arms"]["plain"], found["arms"]["ours, AdamW"]
    lines = [f"\n{shape}: {shape.flops / 1e9:.1f} GFLOP a step, a large product does {found['matrix_rate'] / 1e9:,.0f} GFLOP/s",
             f"  {'':22} × plain  of the rate  tokens/s        ms   update     MB"]
    lines += [f"  {name:22} {plain['ms'] / arm['ms']:7.2f}  {arm['of_matrix_rate']:11.0%}  {arm['tokens_per_second']:8,.0f} "
              f"{arm['ms']:9.2f} {arm['update_ms']:8.2f} {arm['mb']:6.0f}" for name, arm in found["arms"].items()]
    rest = ours["passes_ms"] - found["products_ms"] - found["attention_ms"]
    lines.append(f"  ours, AdamW: matrix products alone {found['products_ms'] / ours['ms']:.0%}, attention alone "
                 f"{found['attention_ms'] / ours['ms']:.0%}, update {ours['update_ms'] / ours['ms']:.0%}, the rest {rest / ours['ms']:.0%}")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser("python -m bench.train", description="A training step, ours against a plain GPT's.")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each whose median counts (default 10)")
    parser.add_argument("--shape", type=int, nargs="+", choices=range(len(SHAPES)), help="which: " + "; ".join(
        f"{n} {shape}" for n, shape in enumerate(SHAPES)) + " (default: all)")
    parser.add_argument("--eager", action="store_true", help="on a CPU without the compiled arms, whose start takes minutes")
    args = parser.parse_args()
    device = results.device(args.threads)
    print(f"{device}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}")
    rows = []
    for shape in [SHAPES[n] for n in args.shape or range(len(SHAPES))]:
        rows.append(compare(shape, args.threads, args.rounds, not args.eager))
        print(table(shape, rows[-1]), flush=True)
        results.write("train", {"device": device, "threads": args.threads, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    run_command(main)

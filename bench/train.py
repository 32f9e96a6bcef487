"""Tokens per second and peak memory of a training step, ours and a plain GPT's.

    python -m bench.train

The blocks have the same number of parameters, the batch and the context are the same. Every arm
runs in a process of its own, they take turns, and medians count. The ceiling is the rate of a large
matrix product measured in the same run. The time of our step is split into matrix products at their
own shapes, attention, the optimizer, and the rest (norms, rotations, activations, loss, launches),
so that the table shows what bounds it.

A GPU starts the first kernels of a step late if Python waits for the end of the one before, as it
must to time a single step. A trainer runs ahead; "in a row" are steps without waiting between them.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

from errors import ArgumentParser, run_command

import torch
from torch import Tensor

from bench import results
from bench.baseline import PlainGPT, Recipe
from bench.results import DEVICE, DTYPE, GPU
from bench.side import Side, at_once
from bench.timers import kernel_milliseconds, seconds_of
from bench.turn import wait_for_turn
from kernels.attention import attention
from model.budget import flops_per_token
from model.compiled import keep_apart_by_cpu
from model.config import ModelConfig
from model.gpt import GPT
from training.config import OptimizerConfig
from training.device import keep_freed_memory, peak_memory_gb, training_loss
from training.optimizer import Optimizer


class Shape(NamedTuple):
    n_layers: int
    n_heads: int
    d_model: int
    n_ctx: int
    windows: int
    vocab_size: int

    @property
    def config(self) -> ModelConfig:
        """Our model of this shape, with the choices of our recipe.

        RoPE, QK norm, ReLU² and RMSNorm, where the plain GPT has learned positions, GELU and
        LayerNorm.
        """
        return ModelConfig(
            n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model,
            d_mlp=4 * self.d_model, mlp="relu2", qk_norm=True, n_ctx=self.n_ctx,
            vocab_size=self.vocab_size, tied_embeddings=True)

    @property
    def recipe(self) -> Recipe:
        """The plain GPT of this shape."""
        return Recipe(n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model,
                      n_ctx=self.n_ctx, vocab_size=self.vocab_size, batch=self.windows)

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.n_ctx * self.windows

    @property
    def flops(self) -> int:
        """FLOPs of a training step, without those of the optimizer."""
        return 3 * flops_per_token(self.config).total() * self.tokens

    def __str__(self) -> str:
        return (f"{self.n_layers} layers, width {self.d_model}, "
                f"{self.windows} × {self.n_ctx} tokens")


GPU_SHAPES = [Shape(12, 12, 768, 1024, 16, 50304)]
CPU_SHAPES = [Shape(4, 4, 128, 64, 12, 257), Shape(4, 4, 128, 256, 3, 257),
              Shape(6, 6, 384, 64, 32, 257), Shape(6, 6, 384, 256, 8, 257)]
SHAPES = GPU_SHAPES if GPU else CPU_SHAPES
IN_A_ROW = 4            # steps


class StepTime(NamedTuple):
    """What a side measured in one step."""

    passes: float           # seconds of the forward and backward pass
    update: float           # seconds of the optimizer
    in_a_row: float         # seconds of each of several steps without waiting between them
    mb: float               # peak memory so far, above what was held at the start

    @property
    def total(self) -> float:
        """Seconds of the step, waited for after each of both parts."""
        return self.passes + self.update


class Ceilings(NamedTuple):
    matrix_rate: float      # FLOP/s of a large matrix product
    products: float         # seconds of a step's matrix products without anything else
    attention: float        # seconds of a step's attention without anything else


def best(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several calls."""
    return min(seconds_of(call) for _ in range(times))


# --- the arms --------------------------------------------------------------------------------

def serve_plain(pipe: Connection, shape: Shape, threads: int, compiled: bool) -> None:
    """nanoGPT's step: autocast on a GPU, the logits of the whole batch, clipping, fused AdamW."""
    torch.set_num_threads(threads)
    before = peak_memory_gb(DEVICE)
    recipe = shape.recipe
    model = PlainGPT(recipe).to(DEVICE)
    optimizer = model.optimizer(recipe)
    loss_of = model.loss
    if compiled:
        keep_apart_by_cpu()
        loss_of = torch.compile(loss_of)

    def forward_backward(tokens: Tensor, targets: Tensor) -> None:
        with torch.autocast(DEVICE.type, DTYPE) if GPU else nullcontext():
            loss = loss_of(tokens, targets)
        loss.backward()

    def update(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    time_steps(pipe, shape, forward_backward, update, before)


def serve_ours(pipe: Connection, shape: Shape, threads: int, compiled: bool,
               optimizer_kind: Literal["muon", "adamw"]) -> None:
    """The trainer's step."""
    torch.set_num_threads(threads)
    if not GPU:
        keep_freed_memory()
    before = peak_memory_gb(DEVICE)
    model = GPT(shape.config).to(DEVICE)
    model.compute_dtype = DTYPE
    optimizer = Optimizer(model, OptimizerConfig(kind=optimizer_kind, lr=1e-3), steps=1000)
    loss_of = training_loss(model, compiled)

    def forward_backward(tokens: Tensor, targets: Tensor) -> None:
        loss_of(tokens, targets).backward()

    def update(step: int) -> None:
        optimizer.step(step, shape.tokens)

    time_steps(pipe, shape, forward_backward, update, before)


def time_steps(pipe: Connection, shape: Shape, forward_backward: Callable[[Tensor, Tensor], None],
               update: Callable[[int], None], before: float) -> None:
    """Answer every request with the `StepTime` of one more step; `before` is in GB."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.windows, shape.n_ctx + 1)
    step = 0

    def several(inputs: Tensor, targets: Tensor) -> None:
        for _ in range(IN_A_ROW):
            forward_backward(inputs, targets)
            update(step)

    while pipe.recv() is not None:
        step += 1
        tokens = torch.randint(shape.vocab_size, size, generator=generator).to(DEVICE)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        passes_seconds = seconds_of(forward_backward, inputs, targets)
        update_seconds = seconds_of(update, step)
        in_a_row = passes_seconds + update_seconds      # on a CPU every call waits for its end
        if GPU:
            in_a_row = seconds_of(several, inputs, targets) / IN_A_ROW
        mb = (peak_memory_gb(DEVICE) - before) * 1e3
        pipe.send(StepTime(passes_seconds, update_seconds, in_a_row, mb))


def serve_ceilings(pipe: Connection, shape: Shape, threads: int) -> None:
    """Answer every request with `Ceilings`, each the best of three."""
    torch.set_num_threads(threads)
    size = 8192 if GPU else 2048
    large = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    E, V, N = shape.d_model, shape.vocab_size, shape.tokens
    # (inputs, outputs) of every weight matrix: QKV, output, both of the MLP, unembedding.
    matrices = [*[(E, 3 * E), (E, E), (E, 4 * E), (4 * E, E)] * shape.n_layers, (E, V)]
    operands = {}
    for inputs, outputs in set(matrices):
        x = torch.randn(N, inputs, device=DEVICE, dtype=DTYPE)
        w = torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
        grad = torch.randn(N, outputs, device=DEVICE, dtype=DTYPE)
        operands[inputs, outputs] = x, w, grad
    heads = (shape.windows, shape.n_heads, shape.n_ctx, E // shape.n_heads)     # (B, H, T, D)
    q, k, v, grad_out = (torch.randn(heads, device=DEVICE, dtype=DTYPE) for _ in range(4))

    def products() -> None:
        for matrix in matrices:
            x, w, grad = operands[matrix]
            x @ w.T                                         # forward
            grad @ w                                        # the gradient of the input
            grad.T @ x                                      # the gradient of the weights

    def attend() -> None:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]       # of a captured graph's own
        torch.autograd.grad(attention(*leaves), leaves, grad_out)

    while pipe.recv() is not None:
        matrix_rate = 2 * size ** 3 / best(lambda: large @ large, 3)
        # Without the Python that starts it, which in a step runs beside other work of the GPU.
        attention_ms = min(kernel_milliseconds(attend) for _ in range(3))
        pipe.send(Ceilings(matrix_rate, best(products, 3), shape.n_layers * attention_ms / 1e3))


# --- the comparison --------------------------------------------------------------------------

def start_arms(shape: Shape, threads: int, compiled: bool) -> dict[str, Side]:
    """A process for each arm; on a GPU all are compiled."""
    arms = {"plain": Side(serve_plain, shape, threads, GPU),
            "ours, AdamW": Side(serve_ours, shape, threads, GPU, "adamw"),
            "ours, Muon": Side(serve_ours, shape, threads, GPU, "muon")}
    if compiled and not GPU:
        arms["plain, compiled"] = Side(serve_plain, shape, threads, True)
        arms["ours, AdamW, compiled"] = Side(serve_ours, shape, threads, True, "adamw")
    return arms


def compare(shape: Shape, threads: int, rounds: int, compiled: bool) -> dict:
    """Time all arms in turn and the ceilings with them: the JSON row of this shape."""
    arms = start_arms(shape, threads, compiled)
    ceilings = Side(serve_ceilings, shape, threads)
    steps: dict[str, list[StepTime]] = {name: [] for name in arms}
    limits: list[Ceilings] = []
    for _ in range(2):                                      # compile, and allocate memory
        at_once(arms, "step")
    wait_for_turn()
    for n in range(rounds):
        limits.append(ceilings("measure"))                  # the best of three: needs no warm-up
        for name, arm in arms.items():
            steps[name].append(arm("step"))
        results.meanwhile(f"{shape}: round {n + 1} of {rounds}")
    results.meanwhile("")
    for side in (*arms.values(), ceilings):
        side.close()

    matrix_rate = statistics.median(limit.matrix_rate for limit in limits)
    rows = {}
    for name, timed in steps.items():
        total = statistics.median(step.total for step in timed)
        rows[name] = {
            "ms": total * 1e3,
            "update_ms": statistics.median(step.update for step in timed) * 1e3,
            "passes_ms": statistics.median(step.passes for step in timed) * 1e3,
            "in_a_row_ms": statistics.median(step.in_a_row for step in timed) * 1e3,
            "tokens_per_second": shape.tokens / total,
            "of_matrix_rate": shape.flops / total / matrix_rate,
            "mb": timed[-1].mb}
    return {"shape": shape._asdict(), "flops": shape.flops, "matrix_rate": matrix_rate,
            "products_ms": statistics.median(limit.products for limit in limits) * 1e3,
            "attention_ms": statistics.median(limit.attention for limit in limits) * 1e3,
            "arms": rows}


def table(shape: Shape, row: dict) -> str:
    """A row of `compare` as text."""
    plain, ours = row["arms"]["plain"], row["arms"]["ours, AdamW"]
    lines = [f"\n{shape}: {shape.flops / 1e9:.1f} GFLOP per step, "
             f"a large product runs at {row['matrix_rate'] / 1e9:,.0f} GFLOP/s",
             f"  {'':22} × plain  of the rate  tokens/s        ms   update  in a row     MB"]
    lines += [f"  {name:22} {plain['ms'] / arm['ms']:7.2f}  {arm['of_matrix_rate']:11.0%}  "
              f"{arm['tokens_per_second']:8,.0f} {arm['ms']:9.2f} {arm['update_ms']:8.2f} "
              f"{arm['in_a_row_ms']:9.2f} {arm['mb']:6.0f}" for name, arm in row["arms"].items()]
    rest_ms = ours["passes_ms"] - row["products_ms"] - row["attention_ms"]
    lines.append(f"  ours, AdamW: matrix products {row['products_ms'] / ours['ms']:.0%}, "
                 f"attention {row['attention_ms'] / ours['ms']:.0%}, "
                 f"update {ours['update_ms'] / ours['ms']:.0%}, rest {rest_ms / ours['ms']:.0%}")
    return "\n".join(lines)


def main() -> None:
    shapes = "; ".join(f"{n} {shape}" for n, shape in enumerate(SHAPES))
    parser = ArgumentParser("python -m bench.train",
                            description="A training step, ours and a plain GPT's.")
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N",
                        help="timed steps of each arm; the median counts (default 10)")
    parser.add_argument("--shape", type=int, nargs="+", choices=range(len(SHAPES)),
                        help=f"shapes to time: {shapes} (default: all)")
    parser.add_argument("--eager", action="store_true",
                        help="on a CPU: leave out the compiled arms, which start after minutes")
    args = parser.parse_args()
    device = results.device(args.threads)
    print(f"{device}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}")
    rows = []
    for n in args.shape or range(len(SHAPES)):
        rows.append(compare(SHAPES[n], args.threads, args.rounds, not args.eager))
        print(table(SHAPES[n], rows[-1]), flush=True)
        results.write("train", {"device": device, "threads": args.threads, "rounds": args.rounds,
                                "rows": rows})


if __name__ == "__main__":
    run_command(main)

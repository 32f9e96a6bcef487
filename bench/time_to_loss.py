"""Time and tokens until our recipe passes a plain one's final loss: `python -m bench.time_to_loss`.

Both are trained in one process on the same bytes and judged on the same validation windows;
evaluation is not timed. The plain recipe is bench/baseline.py, ours configs/shakespeare_char.yaml.
`--ablate` also trains our recipe without each of its ingredients.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import ArgumentParser, run_command

import torch
from torch import Tensor

from bench import results
from bench.baseline import PlainGPT, Recipe
from data.batches import Batch
from data.corpus import pydoc_topics, stdlib_files
from data.dataset import Dataset
from files import atomic_write
from model.gpt import GPT
from training.config import Config, load_config
from training.device import choose_micro_batch
from training.optimizer import Optimizer

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "shakespeare_char.yaml"
INGREDIENTS = {             # the changes that take each ingredient out of our recipe
    "adamw for muon": ["optimizer.kind=adamw", "optimizer.lr=0.003"],
    "gelu for swiglu": ["model.mlp=gelu", "model.d_mlp=512"],
    "small embeddings": ["model.embedding_std=0.02"],
    "learned positions for rope": ["model.position=learned"],
    "blocks not starting at zero": ["model.zero_init=false"],
    "cosine for linear": ["optimizer.schedule=cosine"],
}
TEXT_BYTES = 1_115_394      # as many as the Shakespeare file of nanoGPT's published figure has


def default_text(folder: Path) -> Path:
    """A text file of TEXT_BYTES bytes of Python's own reference and library."""
    text = b"".join(pydoc_topics())
    for source in stdlib_files():
        if len(text) > TEXT_BYTES:
            break
        text += source.read_bytes()
    path = folder / "text.txt"
    with atomic_write(path) as file:
        file.write(text[:TEXT_BYTES])
    return path


@torch.no_grad()
def validation_loss(summed_loss: Callable[[Batch], Tensor], validation: list[Batch]) -> float:
    """Nats per token."""
    nats = sum(float(summed_loss(batch)) for batch in validation)
    return nats / sum(batch.targets.numel() for batch in validation)


def train_plain(data: Dataset, validation: list[Batch], recipe: Recipe, seed: int) -> dict:
    """Train the plain recipe to its end: seconds, tokens, final validation loss."""
    torch.manual_seed(seed)
    model = PlainGPT(recipe)
    optimizer = model.optimizer(recipe)
    batches = data.training(recipe.batch * recipe.n_ctx, recipe.n_ctx)
    seconds = 0.0
    for step in range(recipe.steps):
        batch = batches[step]
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        model.loss(batch.tokens, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started
        progress("plain", step + 1, recipe.steps, seconds)

    def summed_loss(batch: Batch) -> Tensor:
        return model.loss(batch.tokens, batch.targets) * batch.targets.numel()

    loss = validation_loss(summed_loss, validation)
    tokens = recipe.steps * recipe.batch * recipe.n_ctx
    return {"seconds": seconds, "tokens": tokens, "loss": loss}


def train_ours(config: Config, data: Dataset, validation: list[Batch], target: float | None,
               every: int = 10) -> dict:
    """Train our recipe until its validation loss passes `target`, or to its end without one.

    The loss is computed every `every` steps of the second half. `reached` is the step that passed.
    """
    model_config = config.model.model_copy(update={"vocab_size": data.tokenizer.n_vocab})
    model = GPT(model_config, config.seed)
    steps = config.train.steps
    optimizer = Optimizer(model, config.optimizer, steps)
    batches = data.training(config.train.batch_tokens, config.model.n_ctx)
    micro_batch = choose_micro_batch(config, model)
    seconds, loss, reached = 0.0, float("inf"), None
    for step in range(1, steps + 1):
        batch = batches[step - 1]
        started = time.perf_counter()
        for part in batch.split(micro_batch):
            model.loss(*part).backward()
        optimizer.step(step, config.train.batch_tokens)
        seconds += time.perf_counter() - started
        progress("ours", step, steps, seconds)
        looking = target is not None and step % every == 0 and step > steps // 2
        if looking or step == steps:
            loss = validation_loss(lambda batch: model.loss(*batch), validation)
            if target is not None and loss <= target:
                reached = step
                break
    return {"seconds": seconds, "tokens": step * config.train.batch_tokens, "loss": loss,
            "reached": reached, "steps": step}


def train_seeds(config: Config, seeds: int, validation: list[Batch],
                target: float | None) -> list[dict]:
    """`train_ours` once for each seed."""
    return [train_ours(config.model_copy(update={"seed": seed}), Dataset(config.data, seed),
                       validation, target) for seed in range(seeds)]


def progress(name: str, step: int, steps: int, seconds: float) -> None:
    """Show the step on a terminal."""
    if step % 20 == 0 or step == steps:
        end = "\n" if step == steps else ""
        results.meanwhile(f"{name}  {step}/{steps}  {seconds:.0f} s", end=end)


def compare(config: Config, data: Dataset, validation: list[Batch], recipe: Recipe, threads: int,
            seeds: int) -> dict:
    """Train both recipes on `threads` threads, print and return how they compare."""
    torch.set_num_threads(threads)
    plain = train_plain(data, validation, recipe, seed=0)
    ours = train_seeds(config, seeds, validation, plain["loss"])
    seconds = statistics.median(run["seconds"] for run in ours)
    tokens = statistics.median(run["tokens"] for run in ours)
    passed = sum(run["reached"] is not None for run in ours)
    ratio_seconds, ratio_tokens = seconds / plain["seconds"], tokens / plain["tokens"]
    print(f"{threads} thread(s): ours takes {ratio_seconds:.3f} of the time and "
          f"{ratio_tokens:.3f} of the tokens to pass {plain['loss']:.4f} "
          f"({passed} of {len(ours)} seeds)\n"
          f"  plain {plain['seconds']:7.1f} s  {plain['tokens']:>10,} tokens\n"
          f"  ours  {seconds:7.1f} s  {tokens:>10,.0f} tokens", flush=True)
    return {"threads": threads, "ratio_seconds": ratio_seconds, "ratio_tokens": ratio_tokens,
            "passed": passed, "plain": plain, "ours": ours}


def ablate(overrides: Sequence[str], validation: list[Batch], seeds: int) -> list[dict]:
    """Train our recipe without each ingredient to its end, print and return the losses."""
    steps = load_config(CONFIG, overrides).train.steps
    print(f"\nours without one ingredient, {steps} steps: mean loss of {seeds} seeds, "
          "each loss, median seconds")
    rows = []
    for name, changes in {"all of it": [], **INGREDIENTS}.items():
        config = load_config(CONFIG, [*overrides, *changes])
        runs = train_seeds(config, seeds, validation, target=None)
        losses = [run["loss"] for run in runs]
        seconds = statistics.median(run["seconds"] for run in runs)
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"  {name:30} {statistics.mean(losses):.4f}  ({each})  {seconds:6.1f} s", flush=True)
        rows.append({"without": name, "losses": losses, "seconds": seconds})
    return rows


def main() -> None:
    parser = ArgumentParser(
        "python -m bench.time_to_loss",
        description="Time until our recipe passes a plain GPT's final validation loss.")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change our recipe")
    parser.add_argument("--text", metavar="FILE",
                        help="a text file to train on (default: 1.1 MB of Python's own library)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N",
                        help="compare on each of these numbers of threads (default 1 2)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N",
                        help="runs of our recipe; the median counts (default 3)")
    parser.add_argument("--steps", type=int, default=2000, metavar="N",
                        help="steps of the plain recipe (default 2000)")
    parser.add_argument("--ablate", action="store_true",
                        help="also train our recipe without each ingredient")
    args = parser.parse_args()

    text = Path(args.text) if args.text else default_text(results.folder())
    overrides = [f"data.files=[{text}]", "data.val_fraction=0.1", *args.overrides]
    config = load_config(CONFIG, overrides)
    recipe = Recipe(steps=args.steps)
    data = Dataset(config.data, seed=0)
    assert data.shards is not None                  # a text corpus
    validation = data.validation(2 ** 17, recipe.n_ctx, 256)
    validation_tokens = sum(batch.targets.numel() for batch in validation)
    print(f"{text.name}: {len(data.shards.train):,} bytes for training, "
          f"{validation_tokens:,} for validation; {platform.machine()}, torch {torch.__version__}")
    rows = [compare(config, data, validation, recipe, threads, args.seeds)
            for threads in args.threads]
    ablations = ablate(overrides, validation, args.seeds) if args.ablate else []
    results.write("time_to_loss", {"text": text.name, "runs": rows, "ablations": ablations})


if __name__ == "__main__":
    run_command(main)

"""Seconds and tokens until our recipe passes the final validation loss of a plain one: `python -m bench.time_to_loss`.

Both are trained in one process on the same bytes and judged on the same validation windows; evaluation is not timed.
The plain recipe is bench/baseline.py, ours is configs/shakespeare_char.yaml; `--ablate` takes ours apart.
"""

import platform
import statistics
import time
from pathlib import Path

import torch

from bench import results
from bench.baseline import PlainGPT, Recipe
from data.batches import Batch
from data.corpus import pydoc_topics, stdlib_files
from data.dataset import Dataset
from errors import ArgumentParser, run_command
from files import atomic_write
from model.gpt import GPT
from training.config import Config, load_config
from training.device import choose_micro_batch
from training.optimizer import Optimizer

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "shakespeare_char.yaml"
INGREDIENTS = {             # what each part of the recipe gave: the same run without it
    "adamw for muon": ["optimizer.kind=adamw", "optimizer.lr=0.003"],
    "gelu for swiglu": ["model.mlp=gelu", "model.d_mlp=512"],
    "small embeddings": ["model.embedding_std=0.02"],
    "learned positions for rope": ["model.position=learned"],
    "blocks not starting at zero": ["model.zero_init=false"],
    "cosine for linear": ["optimizer.schedule=cosine"],
}


def default_text(folder: Path) -> Path:
    """About 1.1 MB of Python's own library and reference, as much text as the Shakespeare file of the published figure."""
    text = b"".join(pydoc_topics())
    for path in stdlib_files():
        if len(text) > 1_115_394:
            break
        text += path.read_bytes()
    path = folder / "text.txt"
    with atomic_write(path) as file:
        file.write(text[:1_115_394])
    return path


@torch.no_grad()
def validation_loss(loss, validation: list[Batch]) -> float:
    return sum(float(loss(b)) for b in validation) / sum(b.targets.numel() for b in validation)


def train_plain(data: Dataset, validation: list[Batch], recipe: Recipe, seed: int) -> dict:
    """The plain recipe to its end: seconds, tokens, final validation loss."""
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
    loss = validation_loss(lambda b: model.loss(b.tokens, b.targets) * b.targets.numel(), validation)
    return {"seconds": seconds, "tokens": recipe.steps * recipe.batch * recipe.n_ctx, "loss": loss}


def train_ours(config: Config, data: Dataset, validation: list[Batch], target: float | None, every: int = 10) -> dict:
    """Our recipe until its validation loss passes `target`, looked at every few steps; without one, to its end."""
    model = GPT(config.model.model_copy(update={"vocab_size": data.tokenizer.n_vocab}), config.seed)
    optimizer = Optimizer(model, config.optimizer, config.train.steps)
    batches = data.training(config.train.batch_tokens, config.model.n_ctx)
    micro_batch = choose_micro_batch(config, model)
    seconds, loss, reached = 0.0, float("inf"), None
    for step in range(1, config.train.steps + 1):
        batch = batches[step - 1]
        started = time.perf_counter()
        for part in batch.split(micro_batch):
            model.loss(*part).backward()
        optimizer.step(step, config.train.batch_tokens)
        seconds += time.perf_counter() - started
        progress("ours", step, config.train.steps, seconds)
        if (target is not None and step % every == 0 and step > config.train.steps // 2) or step == config.train.steps:
            loss = validation_loss(lambda b: model.loss(*b), validation)
            if target is not None and loss <= target:
                reached = step
                break
    return {"seconds": seconds, "tokens": step * config.train.batch_tokens, "loss": loss, "reached": reached, "steps": step}


def progress(name: str, step: int, steps: int, seconds: float) -> None:
    if step % 20 == 0 or step == steps:
        results.meanwhile(f"{name}  {step}/{steps}  {seconds:.0f} s", end="\n" if step == steps else "")


def main() -> None:
    parser = ArgumentParser("python -m bench.time_to_loss", description="Time until our recipe passes a plain GPT's final validation loss.")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change our recipe")
    parser.add_argument("--text", help="a text file to train on (default: 1.1 MB of Python's own library)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--seeds", type=int, default=3, help="runs of ours; the median counts (default 3)")
    parser.add_argument("--steps", type=int, default=2000, help="of the plain recipe (default 2000)")
    parser.add_argument("--ablate", action="store_true", help="also our recipe without each ingredient")
    args = parser.parse_args()

    text = Path(args.text) if args.text else default_text(results.folder())
    fixed = [f"data.files=[{text}]", "data.val_fraction=0.1"]
    config = load_config(CONFIG, [*fixed, *args.overrides])
    recipe = Recipe(steps=args.steps)
    data = Dataset(config.data, seed=0)
    validation = data.validation(2 ** 17, recipe.n_ctx, 256)
    rows = []
    print(f"{text.name}: {len(data.shards.train):,} bytes to train on, {sum(b.targets.numel() for b in validation):,} to judge by; "
          f"{platform.machine()}, torch {torch.__version__}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        plain = train_plain(data, validation, recipe, seed=0)
        ours = [train_ours(config.model_copy(update={"seed": seed}), Dataset(config.data, seed), validation, plain["loss"])
                for seed in range(args.seeds)]
        seconds, tokens = (statistics.median(run[key] for run in ours) for key in ("seconds", "tokens"))
        passed = sum(run["reached"] is not None for run in ours)
        print(f"{threads} thread(s): ours takes {seconds / plain['seconds']:.3f} of the time and {tokens / plain['tokens']:.3f} of "
              f"the tokens to pass {plain['loss']:.4f} ({passed} of {len(ours)} seeds)\n"
              f"  plain {plain['seconds']:7.1f} s  {plain['tokens']:>10,} tokens\n"
              f"  ours  {seconds:7.1f} s  {tokens:>10,.0f} tokens", flush=True)
        rows.append({"threads": threads, "ratio_seconds": seconds / plain["seconds"], "ratio_tokens": tokens / plain["tokens"],
                     "passed": passed, "plain": plain, "ours": ours})
    ablations = []
    if args.ablate:
        print(f"\nours without one ingredient, {config.train.steps} steps: mean loss of {args.seeds} seeds, each, median seconds")
        for name, changes in {"all of it": [], **INGREDIENTS}.items():
            changed = load_config(CONFIG, [*fixed, *args.overrides, *changes])
            ends = [train_ours(changed.model_copy(update={"seed": seed}), Dataset(config.data, seed), validation, None)
                    for seed in range(args.seeds)]
            losses, seconds = [end["loss"] for end in ends], statistics.median(end["seconds"] for end in ends)
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            print(f"  {name:30} {statistics.mean(losses):.4f}  ({each})  {seconds:6.1f} s", flush=True)
            ablations.append({"without": name, "losses": losses, "seconds": seconds})
    results.write("time_to_loss", {"text": text.name, "runs": rows, "ablations": ablations})


if __name__ == "__main__":
    run_command(main)

"""A run on disk: its directory, its lock, its measurements, its checkpoints, and how it stops."""

import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from data.load_tokenizer import load_tokenizer
from errors import UserError
from files import atomic_write, exclusive_lock, explain_disk_errors
from model.budget import flops_per_token
from model.gpt import GPT
from training.checkpoint import (
    load_optimizer,
    load_weights,
    point_at_newest,
    prune,
    read_state,
    save_checkpoint,
    snapshot,
    whole_checkpoints,
)
from training.config import Config, differences, dump_config, load_config
from training.distributed import ALONE, World
from training.logger import Console, Metrics, Wandb, short
from training.optimizer import Optimizer

FIXED = ("run:", "seed:", "init_from:", "model.", "data.", "optimizer.kind:")       # what a run cannot be continued without
UNTRAINED = ("run:", "seed:", "init_from:", "model.", "data.tokenizer.")        # the same before its first step, of an imported run say
PEAK_FLOPS = {                                              # dense 16-bit matrix products, from the makers' data sheets
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "A10G": 70e12,
}


def config_of(target: str, overrides: list[str]) -> tuple[Config, Path, list[str]]:
    """The config that a command line names, a YAML file or a run directory to continue, the run's directory, and what
    the overrides change of a run that was begun."""
    if Path(target).is_dir():
        saved_file = Path(target) / "config.yaml"
        if not saved_file.exists():
            raise UserError(f"{target} holds no config.yaml, so it is no run (runs/NAME continues one, configs/NAME.yaml starts one)")
        config = load_config(saved_file, overrides)
        changed = differences(load_config(saved_file), config)
        if fixed := [change for change in changed if change.startswith(FIXED if newest_state(Path(target))["step"] else UNTRAINED)]:
            raise UserError(f"{target} cannot be continued with another {'; '.join(fixed[:3])}\n"
                            f"  start a run from its weights instead: python train.py CONFIG run=NEW init_from={target} "
                            f"data.tokenizer={target}/checkpoints/latest")
        return config, Path(target), changed
    config = load_config(target, overrides)
    folder = Path("runs") / config.run
    if (folder / "config.yaml").exists() and (
            changed := differences(load_config(folder / "config.yaml"), config)):
        raise UserError(f"{folder} holds a run of another config ({'; '.join(changed[:3])}{'; …' if changed[3:] else ''})\n"
                        f"  continue it with: python train.py {folder}   or begin another with: run=NEW")
    return config, folder, []


def newest_state(folder: Path) -> dict:
    """What the newest checkpoint of a run notes; of a run without one, step 0."""
    whole = whole_checkpoints(folder / "checkpoints")
    return read_state(whole[-1]) if whole else {"step": 0, "tokens": 0, "seconds": 0.0, "data": {}}


def only_trainer(folder: Path):
    """Hold the lock of a run."""
    return exclusive_lock(folder / ".lock", f"{folder} is being trained by another process\n"
                                      "  wait for it, stop it, or begin another run with: run=NEW")


def tidy(checkpoints: Path, config: Config) -> None:
    """Delete what a kill left of a checkpoint that was being written or deleted, and do what it left undone.

    Only when the newest has been verified: a damaged one must not be left alone.
    """
    for unfinished in checkpoints.glob(".partial-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    point_at_newest(checkpoints)
    prune(checkpoints, config.checkpoint.keep, config.checkpoint.steps)


class Run:
    """An open run directory. Leaving `with Run(…) as run` closes everything and frees the lock."""

    def __init__(self, config: Config, folder: Path, model: GPT, optimizer: Optimizer, data: Dataset, world: World = ALONE):
        """Load what the run's newest checkpoint holds into model and optimizer, then open its files.

        Of several processes the first alone holds the lock, writes, speaks and logs.
        Raises UserError where another trainer holds the run, its checkpoint is damaged, or its data is not `data`.
        """
        self.world = world
        self.config, self.folder, self.checkpoints = config, folder, folder / "checkpoints"
        self.model, self.optimizer, self.data = model, optimizer, data
        self.device = model.embed.weight.device
        self.stop_requested = False
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None
        self.stack = ExitStack()
        with world.together(), self.explained("opening"):
            if world.first:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self.stack.enter_context(only_trainer(folder))
        try:
            with world.together(), self.explained("opening"):
                if not (folder / ".lock").exists():
                    raise UserError(f"{folder} is not where all processes can see it: several machines need a file system that they share")
            with self.explained("opening"):
                self._restore()
            with world.together(), self.explained("opening"):
                self._open()
        except BaseException:
            self.stack.close()
            raise

    def _restore(self) -> None:
        state = newest_state(self.folder)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        whole = whole_checkpoints(self.checkpoints)
        if whole and not self.step:                         # imported: nothing of ours but the weights, which are its tokenizer's
            if load_tokenizer(whole[-1] / "tokenizer.json").hash != self.data.tokenizer.hash:
                raise self.world.error(f"{self.folder} was imported with another tokenizer, its weights mean other tokens\n"
                                       f"  use its own: data.tokenizer={self.folder}/checkpoints/latest")
            load_weights(self.model, whole[-1], self.world)
        elif whole:
            if state["data"]["hash"] != self.data.identity["hash"]:
                raise self.world.error(
                    f"{self.folder} was trained on other data than is there now; it lay in {state['data'].get('folder')}\n"
                    "  bring that back, or begin another run with: run=NEW")
            load_weights(self.model, whole[-1], self.world)
            theirs = load_config(whole[-1] / "training_state" / "config.yaml")
            if fixed := [change for change in differences(self.config, theirs) if change.startswith(FIXED)]:
                raise self.world.error(f"{whole[-1]} belongs to another run ({'; '.join(fixed[:3])})\n"
                                       "  delete it to go on from the one before, or begin another run with: run=NEW")
            self.optimizer.load_state_dict(load_optimizer(whole[-1]))
        self.world.gather(None)                             # all have read what is about to be pruned
        if self.world.first:
            tidy(self.checkpoints, self.config)

    def _open(self) -> None:
        self.git = git_revision()
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self.console = Console(self.step, self.config.train.steps, silent=not self.world.first)
        self.say = self.console.say
        if self.world.first:
            with atomic_write(self.folder / "config.yaml", "w") as file:
                file.write(f"# git {self.git}, torch {torch.__version__}\n{dump_config(self.config)}")
            self.metrics = Metrics(self.folder / "metrics.jsonl", self.step)
            self.wandb = Wandb(self.config.log, self.folder, self.config.run, self.config.model_dump() | {
                "git": self.git, "torch": torch.__version__, "device": device, "processes": self.world.size}, self.say)
        half = self.model.compute_dtype.itemsize == 2
        self.peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if half and name in device), None)
        self.flops_per_token = 3 * flops_per_token(self.model.config).total()
        self.record: dict[str, Any] = {}                # this step's measurements
        self.latest: dict[str, Any] = {}              # the newest of each
        self.validated: tuple[int | None, float | None] = (None, None)      # the last step evaluated, and its loss
        self.unchecked: tuple[int, Tensor, Tensor] | None = None
        self.opened = self.timed_from = time.monotonic()
        self.timed_tokens = 0
        self.handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait_for_checkpoint()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.world.first:
                self.wandb.finish(exit_code=0 if kind is None else 1)
                self.metrics.close()
            self.writer.shutdown()
            self.stack.close()

    def _stop(self, number: int, frame) -> None:
        if self.stop_requested and number == signal.SIGINT:         # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.stop_requested = True
        self.say(f"{signal.Signals(number).name}: finishing this step, then saving")

    def explained(self, doing: str):
        return explain_disk_errors(f"{doing} {self.folder}", f"make room where it lies, then: python train.py {self.folder}")

    # --- each step ---

    def count(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Note a completed update; its `loss`, everyone's, and `grad_norm` () stay on the device until they are logged."""
        self.check_finite()
        self.unchecked = (step, loss, grad_norm)
        self.step = step
        self.tokens += self.config.train.batch_tokens
        self.timed_tokens += self.config.train.batch_tokens
        if step % self.config.log.every == 0 or step == self.config.train.steps:
            self.check_finite()
            speed = self.timed_tokens / (time.monotonic() - self.timed_from)
            self.log({"train/loss": loss.item(), "train/lr": self.optimizer.lr(step), "train/grad_norm": grad_norm.item(),
                      "train/tokens_per_second": round(speed, 1), "train/memory_gb": round(memory_gb(self.device), 4)})
            if self.peak_flops:
                self.log({"train/mfu": round(speed * self.flops_per_token / self.peak_flops / self.world.size, 4)})
            self.console.progress(step, self.record)
            self.timed_from, self.timed_tokens = time.monotonic(), 0

    def check_finite(self) -> None:
        """Raise a UserError if the update counted last had a loss or gradient that is no number.

        Asked one step later, when the device has long finished it, or just before something is built on it.
        """
        if self.unchecked is None:
            return
        (step, *values), self.unchecked = self.unchecked, None
        for name, value in zip(("loss", "gradient norm"), values):
            if not math.isfinite(value.item()):
                whole, windows = whole_checkpoints(self.checkpoints), self.config.windows_per_step
                raise self.world.error(
                    f"the {name} became {value.item()} at step {step} (batch {step - 1}: windows {(step - 1) * windows} to "
                    f"{step * windows - 1}); {f'the newest checkpoint is {whole[-1]}' if whole else 'no checkpoint was saved yet'}\n"
                    f"  try a lower optimizer.lr{', or train.precision=bf16' if self.config.train.precision == 'fp16' else ''}")

    def log(self, metrics: Mapping[str, float | list[float]]) -> None:
        """Add measurements to this step's record."""
        if not self.record:
            self.record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.elapsed, 3)}
        self.record |= metrics

    def end_step(self) -> None:
        """Write this step's record, if it has one, as one line."""
        if self.record and self.world.first:
            with self.explained("writing metrics.jsonl of"):
                self.metrics.write(self.record)
            self.wandb.log(self.record)
            self.latest |= self.record
            if "val/loss" in self.record:
                self.validated = (self.step, self.record["val/loss"])
        self.record = {}

    def show(self, make: Callable[[], dict]) -> None:
        """Log pictures, tables and pages to wandb, if it is there to see them."""
        if self.world.first and self.wandb.run is not None:
            self.wandb.log({"step": self.step, "tokens": self.tokens} | make())

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What the block takes does not count as training time in tokens per second."""
        before = time.monotonic()
        yield
        self.timed_from += time.monotonic() - before

    @property
    def elapsed(self) -> float:
        """Seconds this run has trained, in all its processes together."""
        return self.seconds + time.monotonic() - self.opened

    # --- saving ---

    def save(self) -> None:
        """Save a checkpoint of this step and delete those that are no longer kept."""
        self.check_finite()
        self.wait_for_checkpoint()
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.elapsed, "data": self.data.identity, "git": self.git,
                 "val_loss": self.validated[1] if self.validated[0] == self.step else None}
        what = snapshot(self.model, self.optimizer.state_dict(), state, dump_config(self.config), self.data.tokenizer,
                        copy=self.config.checkpoint.background, world=self.world)
        self.writing = self.writer.submit(self._write, what)
        if not self.config.checkpoint.background:
            self.wait_for_checkpoint()

    def _write(self, what) -> None:
        save_checkpoint(self.checkpoints, what, self.world)
        if self.world.first:
            prune(self.checkpoints, self.config.checkpoint.keep, self.config.checkpoint.steps)

    def wait_for_checkpoint(self) -> None:
        """Until the checkpoint being written is on the disk; raises what went wrong with it."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def summary(self) -> str:
        """What the run has come to and where everything is."""
        saved = whole_checkpoints(self.checkpoints)
        latest = self.latest
        lines = [f"step       {self.step} of {self.config.train.steps}, {short(self.tokens)} tokens, {self.elapsed:.0f} s"]
        if "val/loss" in latest:
            then = "" if self.validated[0] == self.step else f" (at step {self.validated[0]})"
            lines.append(f"validation {latest['val/loss']:.4f} nats per token, {latest['val/bpb']:.4f} bits per byte{then}")
        heads = {key.rsplit("/", 1)[-1]: value for key, value in latest.items() if key.startswith("heads/prefix_matching/")}
        if heads:
            best = max(heads, key=lambda head: heads[head])
            lines.append(f"heads      {best} matches prefixes at {heads[best]:.2f} (1: a perfect induction head); random tokens cost "
                         f"{latest['repeat/loss_first']:.2f} nats, repeated {latest['repeat/loss_second']:.2f}")
        if "train/tokens_per_second" in latest:
            lines.append(f"speed      {short(latest['train/tokens_per_second'])} tokens/s")
        lines.append(f"saved      {saved[-1] if saved else 'no checkpoint (checkpoint.every=0)'}")
        if (self.folder / "report.html").exists():
            lines.append(f"look       {self.folder}/report.html in a browser; python heads.py {self.folder}")
        lines.append(f"measured   {self.folder}/metrics.jsonl" + (f", {self.wandb.where}" if self.wandb.run else ""))
        if self.step < self.config.train.steps:
            lines.append(f"continue   {self.world.command} train.py {self.folder}")
        return "\n".join(lines)


def git_revision() -> str | None:
    """The commit this code is at, with + where it was changed since; None outside a repository."""
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args],
                              capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def memory_gb(device: torch.device) -> float:
    """The most memory that this process has held on its device, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

"""An open run directory: its lock, its measurements, its checkpoints, and how it stops."""

import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

from errors import UserError, command

import torch
from torch import Tensor

from data.dataset import Dataset
from files import atomic_write, explain_disk_errors
from model.budget import flops_per_token
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import list_checkpoints
from training.config import Config, dump_config
from training.device import Hardware, peak_memory_gb
from training.logger import Console, Metrics, Record, short
from training.optimizer import Optimizer
from training.parallel import Parallel
from training.resume import Progress, only_trainer
from training.save_checkpoint import Contents, checkpoint_contents, prune, save_checkpoint
from training.wandb_log import Wandb

Value = TypeVar("Value")
PEAK_FLOPS = {                      # dense 16-bit matrix products, from the makers' data sheets
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "4090": 165e12, "A10G": 70e12,
}


class Update(NamedTuple):
    """A completed update. Its numbers stay on the device until they are asked for."""

    step: int
    loss: Tensor                # ()
    grad_norm: Tensor           # ()


class Evaluation(NamedTuple):
    step: int
    loss: float


class Run:
    """A run directory held by this process: `with Run(…) as run`. Leaving it closes all files.

    Opening takes the lock and reads nothing. `start` opens the logs, once `resume` has said where
    the run goes on. Among several processes only the first holds the lock, writes and prints.
    """

    # Opened by `start`, the last two only in the first process.
    console: Console
    metrics: Metrics
    wandb: Wandb

    def __init__(self, config: Config, folder: Path, hardware: Hardware, parallel: Parallel):
        """Raises UserError if another process trains the run, or if the processes do not share a
        file system."""
        self.config, self.folder, self.checkpoints = config, folder, folder / "checkpoints"
        self.hardware, self.parallel, self.world = hardware, parallel, parallel.world
        self.stop_requested = False
        self.step, self.tokens, self.seconds_before = 0, 0, 0.0
        self.record: Record = {}                # this step's metrics
        self.latest: Record = {}                # the newest value of every metric
        self.evaluated: Evaluation | None = None            # the newest
        self.unchecked: Update | None = None
        self.timed_tokens = 0                   # since `timed_from`
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending_checkpoint: Future[None] | None = None
        self.stack = ExitStack()                # what is closed at the end, last opened first
        with self.world.together(), self.explained("opening"):
            if self.world.first:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self.stack.enter_context(only_trainer(folder))
        self.stack.callback(self.writer.shutdown)
        try:
            with self.world.together():
                if not (folder / ".lock").exists():
                    raise UserError(f"{folder} is not visible to all processes: several machines "
                                    "need a shared file system")
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self.wait_for_checkpoint()
        finally:
            self.stack.__exit__(error_type, error, traceback)

    def start(self, progress: Progress, model_config: ModelConfig) -> None:
        """Open the logs at the step the run goes on from, and stop on Ctrl-C, SIGTERM and
        a hang-up (a closed terminal, a lost connection) from now on."""
        self.step, self.tokens = progress.step, progress.tokens
        self.history = progress.history
        self.seconds_before = progress.seconds
        device = self.hardware.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.git = git_revision()
        self.console = Console(self.step, self.config.train.steps, silent=not self.world.first)
        with self.world.together(), self.explained("opening"):
            if self.world.first:
                self._open_logs(name)
        half = self.hardware.precision.itemsize == 2
        self.peak_flops = next(
            (flops for model, flops in PEAK_FLOPS.items() if half and model in name), None)
        # The backward pass costs two forward passes.
        self.flops_per_token = 3 * flops_per_token(model_config).total()
        self.opened = self.timed_from = time.monotonic()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)        # Windows has no SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue                                # nohup: the run outlives its terminal
            previous = signal.signal(number, self._request_stop)
            self.stack.callback(signal.signal, number, previous)

    def _open_logs(self, device_name: str) -> None:
        with atomic_write(self.folder / "config.yaml", "w") as file:
            file.write(f"# git {self.git}, torch {torch.__version__}\n{dump_config(self.config)}")
        self.metrics = Metrics(self.folder / "metrics.jsonl", self.step)
        self.stack.callback(self.metrics.close)
        versions = {"git": self.git, "torch": torch.__version__, "device": device_name,
                    "processes": self.world.size}
        self.wandb = Wandb(self.config.log, self.folder, self.config.run,
                           self.config.model_dump() | versions, self.say)
        self.stack.push(self._finish_wandb)

    def _finish_wandb(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.wandb.finish(exit_code=0 if error_type is None else 1)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:         # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.stop_requested = True
        with suppress(RuntimeError):        # it came while a line was being printed
            self.say(f"{signal.Signals(number).name}: finishing this step, then saving")

    def enter(self, context: AbstractContextManager[Value]) -> Value:
        """Enter a context that is left when the run is closed."""
        return self.stack.enter_context(context)

    def say(self, text: str) -> None:
        """Print a line that stays, in the first process."""
        self.console.say(text)

    def explained(self, doing: str) -> AbstractContextManager[None]:
        """Turn disk errors inside the block into a UserError that says how to go on."""
        return explain_disk_errors(f"{doing} {self.folder}",
                                   f"make room there, then: {command('train.py')} {self.folder}")

    # --- metrics ------------------------------------------------------------------------------

    def record_update(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Record a completed update: the mean loss of all processes and the gradient
        norm, scalar tensors."""
        self.check_finite()
        self.unchecked = Update(step, loss, grad_norm)
        self.step = step
        self.tokens += self.config.train.batch_tokens
        self.timed_tokens += self.config.train.batch_tokens
        if step % self.config.log.every == 0 or step == self.config.train.steps:
            self.check_finite()
            rate = self.timed_tokens / (time.monotonic() - self.timed_from)
            self.add_metrics({
                "train/loss": loss.item(), "train/lr": lr, "train/grad_norm": grad_norm.item(),
                "train/tokens_per_second": round(rate, 1),
                "train/memory_gb": round(peak_memory_gb(self.hardware.device), 4)})
            if self.peak_flops:
                mfu = rate * self.flops_per_token / self.peak_flops / self.world.size
                self.add_metrics({"train/mfu": round(mfu, 4)})
            self.console.progress(step, self.record)
            self.timed_from, self.timed_tokens = time.monotonic(), 0

    def check_finite(self) -> None:
        """Raise a UserError if the newest update has a loss or a gradient norm that is not finite.

        It is called one step later, when the device has long finished the update, or just before
        something is built on it. Reading the loss at once would make the host wait.
        """
        if self.unchecked is None:
            return
        step, loss, grad_norm = self.unchecked
        self.unchecked = None
        for name, value in (("loss", loss.item()), ("gradient norm", grad_norm.item())):
            if math.isfinite(value):
                continue
            checkpoints, windows = list_checkpoints(self.checkpoints), self.config.windows_per_step
            saved = (f"the newest checkpoint is {checkpoints[-1]}" if checkpoints
                     else "no checkpoint was saved yet")
            fix = "try a lower optimizer.lr"
            if self.config.train.precision == "fp16":
                fix += ", or train.precision=bf16"
            raise self.world.error(
                f"the {name} became {value} at step {step} (batch {step - 1}: windows "
                f"{(step - 1) * windows} to {step * windows - 1}); {saved}\n  {fix}")

    def add_metrics(self, metrics: Mapping[str, float | list[float]]) -> None:
        """Add metrics to this step's record."""
        if not self.record:
            self.record = {"step": self.step, "tokens": self.tokens,
                           "seconds": round(self.seconds, 3)}
        self.record |= metrics

    def write_record(self) -> None:
        """Write this step's record, if it has one, as a line of metrics.jsonl and to wandb."""
        if self.record and self.world.first:
            with self.explained("writing metrics.jsonl of"):
                self.metrics.write(self.record)
            # The report of the last step belongs to the same row.
            ends = self.stop_requested or self.step == self.config.train.steps
            self.wandb.log(self.record, more=ends)
            self.latest |= self.record
            if "val/loss" in self.record:
                self.evaluated = Evaluation(self.step, self.record["val/loss"])
        self.record = {}

    def log_media(self, make: Callable[[], dict[str, Any]]) -> None:
        """Log pictures, tables and pages to wandb. They are made only if wandb is there."""
        if self.world.first and self.wandb.run is not None:
            self.wandb.log({"step": self.step, "tokens": self.tokens} | make(), more=True)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """The time of the block does not count in train/tokens_per_second."""
        before = time.monotonic()
        yield
        self.timed_from += time.monotonic() - before

    @property
    def seconds(self) -> float:
        """How long this run has trained, before and after all interruptions."""
        return self.seconds_before + time.monotonic() - self.opened

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, model: GPT, optimizer: Optimizer, data: Dataset) -> None:
        """Save a checkpoint of this step and delete those that are no longer kept."""
        self.check_finite()
        self.wait_for_checkpoint()
        newest = self.evaluated
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds,
                 "data": data.identity, "history": list(self.history), "git": self.git,
                 "val_loss": newest.loss if newest and newest.step == self.step else None}
        background = self.config.checkpoint.background
        contents = checkpoint_contents(model, optimizer.state_dict(), state,
                                       dump_config(self.config), data.tokenizer,
                                       copy=background, parallel=self.parallel)
        self.pending_checkpoint = self.writer.submit(self._write_checkpoint, contents)
        if not background:
            self.wait_for_checkpoint()

    def _write_checkpoint(self, contents: Contents) -> None:
        save_checkpoint(self.checkpoints, contents, self.parallel)
        if self.world.first:
            prune(self.checkpoints, self.config.checkpoint.keep, self.config.checkpoint.steps)

    def wait_for_checkpoint(self) -> None:
        """Return once the pending checkpoint is on the disk. Raises what went wrong with it."""
        pending, self.pending_checkpoint = self.pending_checkpoint, None
        if pending is not None:
            pending.result()

    # --- the end ------------------------------------------------------------------------------

    def summary(self, heads: str | None = None, verdict: str | None = None) -> str:
        """The results so far, and the paths of everything the run has written. `heads`, `verdict`:
        what to say of its heads."""
        latest, steps = self.latest, self.config.train.steps
        lines = [f"step       {self.step} of {steps}, {short(self.tokens)} tokens, "
                 f"{self.seconds:.0f} s"]
        if "val/loss" in latest:
            step = self.evaluated.step if self.evaluated else None
            when = "" if step == self.step else f" (at step {step})"
            lines.append(f"validation {latest['val/loss']:.4f} nats per token, "
                         f"{latest['val/bpb']:.4f} bits per byte{when}")
        if heads:
            lines.append(f"heads      {heads}")
        if verdict:
            lines.append(f"verdict    {verdict}")
        if "train/tokens_per_second" in latest:
            lines.append(f"speed      {short(latest['train/tokens_per_second'])} tokens/s")
        checkpoints = list_checkpoints(self.checkpoints)
        lines.append(f"saved      {checkpoints[-1]}" if checkpoints
                     else "saved      no checkpoint (checkpoint.every=0)")
        if (self.folder / "report.html").exists():
            lines.append(f"look       {self.folder}/report.html in a browser; "
                         f"{command('heads.py')} {self.folder}")
        wandb = f", {self.wandb.where}" if self.wandb.run else ""
        lines.append(f"metrics    {self.folder}/metrics.jsonl{wandb}")
        if self.step < steps:
            lines.append(f"continue   {self.world.command} {self.folder}")
        return "\n".join(lines)


def git_revision() -> str | None:
    """The commit of this code, with + if it was changed since; None outside a repository."""
    def git(*args: str) -> str:
        words = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(words, capture_output=True, encoding="utf-8", timeout=60,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None

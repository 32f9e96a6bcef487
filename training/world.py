"""The processes that train together: their ranks, and the messages they send each other.

`torchrun --nproc-per-node=N train.py CONFIG` starts N of them. How they share a model is
training/parallel.py.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from errors import UserError, command, first_line, path_of

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
# The other processes wait for minutes while one prepares a corpus. A process that dies is noticed
# at once, whatever this limit is.
MESSAGE_TIMEOUT = timedelta(days=7)


class World:
    """The processes that train together. A single process is a world that sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        if size > 1:
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store outlives a restart, and still holds the addresses of the dead.
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
                store = dist.PrefixStore(f"start {restart}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            # Messages go between hosts, so no GPU is waited for. The thread that writes
            # checkpoints has a group of its own.
            self.messages = dist.new_group(backend="gloo", timeout=MESSAGE_TIMEOUT)
            self.saving = dist.new_group(backend="gloo", timeout=MESSAGE_TIMEOUT)

    @property
    def first(self) -> bool:
        """Whether this process prints, logs and measures heads for all."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """How train.py is started in as many processes; its arguments follow."""
        if self.size == 1:
            return command("train.py")
        processes = os.environ.get("LOCAL_WORLD_SIZE", self.size)
        return f"torchrun --nproc-per-node={processes} {path_of('train.py')}"

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def gather(self, value: Value, saving: bool = False) -> list[Value]:
        """Every process's `value`, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.saving if saving else self.messages)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.messages)
        return bool(flags)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's x, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        """Return once every process has come this far."""
        self.gather(None)

    @contextmanager
    def together(self, saving: bool = False) -> Iterator[None]:
        """End all processes if the block raises a UserError in any of them, and print it once."""
        if self.size == 1:
            yield
            return
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = str(error)
        for rank, message in enumerate(self.gather(mistake, saving)):
            if message is not None:
                raise UserError(message) if self.rank == rank else SystemExit(2)

    def error(self, message: str) -> BaseException:
        """The exception to raise for a mistake that every process sees. Only the first prints."""
        return UserError(message) if self.first else SystemExit(2)

    def in_turn(self, make: Callable[[], Value]) -> Value:
        """Call `make` in every process: in the first one, then in the first of each machine, then
        in the rest. What the earlier ones leave on disk, the later ones find."""
        if self.size == 1:
            return make()
        made = False
        for turn in (self.first, self.local_rank == 0, True):
            with self.together():
                if turn and not made:
                    value, made = make(), True
        return value

    @contextmanager
    def explain_lost_process(self, target: str) -> Iterator[None]:
        """Turn PyTorch's error for a process that died during an exchange into a UserError."""
        try:
            yield
        except RuntimeError as error:
            from_exchange = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self.size == 1 or not (from_exchange or "NCCL" in str(error)):
                raise
            raise UserError(
                f"process {self.rank} of {self.size} has lost another ({_reason(error)})\n"
                f"  start all again from the newest checkpoint: torchrun … train.py {target}   "
                "(torchrun --max-restarts=3 does it by itself)") from None


def join() -> World:
    """Meet the processes that torchrun started with this one; without torchrun, a world of one."""
    try:
        return World(rank=int(os.environ.get("RANK", 0)),
                     size=int(os.environ.get("WORLD_SIZE", 1)),
                     local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    except (RuntimeError, ValueError) as error:
        size = os.environ["WORLD_SIZE"]
        raise UserError(f"WORLD_SIZE={size}: the processes did not find each other "
                        f"({_reason(error)})\n"
                        "  start them with torchrun --nproc-per-node=N train.py …") from None


def _reason(error: Exception) -> str:
    """The first line of the error, without the line of C++ that raised it."""
    return first_line(Exception(re.sub(r"\[[^]]*\] ", "", str(error))))

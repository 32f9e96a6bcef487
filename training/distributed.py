"""Several processes as one trainer: `torchrun --nproc-per-node=N train.py CONFIG`.

Every process takes its rows of the same batches. Under ddp each holds the whole model and they average gradients; under fsdp each holds
a share of every parameter's rows, gathers a block when it is needed, and keeps that share's gradients and optimizer state alone.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError, first_line
from model.gpt import GPT

T = TypeVar("T")
PATIENCE = timedelta(days=7)    # for messages: others wait while one prepares a corpus; a process that dies is noticed at once


class World:
    """The processes that train together. One alone is a world in which nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.kind: str | None = None                            # ddp or fsdp, once a model is known
        self.twin: GPT | None = None
        if size > 1:
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":       # torchrun's store outlives a restart, and with it where the dead were found
                store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=size)
            self.messages = dist.new_group(backend="gloo", timeout=PATIENCE)        # between hosts: no GPU is waited for
            self.saving = dist.new_group(backend="gloo", timeout=PATIENCE)          # the same for the thread that writes checkpoints

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks, logs and looks at heads for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.kind == "fsdp"

    @property
    def command(self) -> str:
        """How these processes are started, to be followed by `train.py …`."""
        return "python" if self.size == 1 else f"torchrun --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', self.size)}"

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    # --- what they say to each other ---

    def gather(self, value: T, saving: bool = False) -> list[T]:
        """Everyone's `value`, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.saving if saving else self.messages)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds for any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.messages)
        return bool(flags)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's x, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    @contextmanager
    def together(self, saving: bool = False) -> Iterator[None]:
        """A user's mistake that the block meets in any process ends all of them, and is said once."""
        if self.size == 1:
            yield
            return
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = str(error)
        mistakes = self.gather(mistake, saving)
        for rank, message in enumerate(mistakes):
            if message is not None:
                raise UserError(message) if self.rank == rank else SystemExit(2)

    def error(self, message: str) -> BaseException:
        """What to raise for a mistake that every process sees."""
        return UserError(message) if self.first else SystemExit(2)

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` makes in every process, after the first has done it, and after the first of each machine: they leave files."""
        made: list[T] = []
        for turn in (self.first, self.local_rank == 0, True):
            with self.together():
                if turn and not made:
                    made.append(make())
            if self.size == 1:
                break
        return made[0]

    @contextmanager
    def others_may_die(self, target: str) -> Iterator[None]:
        """Say what happened where another process has gone in the middle of an exchange."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
                raise
            raise UserError(f"process {self.rank} of {self.size} has lost another ({_reason(error)})\n"
                            f"  start all again from the newest checkpoint: torchrun … train.py {target}   "
                            "(torchrun --max-restarts=3 does it by itself)") from None

    # --- a model among them ---

    def place(self, model: GPT, device: torch.device) -> None:
        """Give a model that was made on the meta device its memory here: all of it, or this process's share. Weights are not set."""
        if self.sharded:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # a second to import
            half = model.compute_dtype if model.compute_dtype.itemsize == 2 else None
            options: dict[str, Any] = {"mesh": dist.init_device_mesh(device.type, (self.size,)),
                       "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)}
            for block in model.blocks:
                fully_shard(block, **options)
            fully_shard(model, **options, reshard_after_forward=True)       # or an evaluation would leave the embeddings gathered
            for method in ("loss", "losses"):
                register_fsdp_forward_method(model, method)
            model.to_empty(device=device)                                   # a share of each parameter, of which allocate knows nothing
            model.make_tables()
        else:
            model.allocate(device)

    def fill(self, p: Tensor, whole: Tensor) -> None:
        """Copy `whole` into p, or this process's rows of it where p is sharded."""
        mine = local(p)
        if mine is not p:
            rows = -(-p.shape[0] // self.size)                      # fully_shard gives every process as many, the last ones fewer
            whole = whole[rows * self.rank:rows * self.rank + len(mine)]
        mine.copy_(whole)

    def replicate(self, model: GPT, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`loss` of the model, whose backward pass leaves the mean of everyone's gradients."""
        if self.kind != "ddp":
            return loss
        device = model.embed.weight.device
        with warnings.catch_warnings(action="ignore", category=FutureWarning):      # 2.13 is about to rename broadcast_buffers
            return DistributedDataParallel(_Loss(model, loss), device_ids=[device] if device.type == "cuda" else None,
                                           broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulate(self, parts: list[T], model: Any, loss: Callable[..., Tensor]) -> Iterator[T]:
        """A batch's parts, one after another; gradients are exchanged behind the last alone."""
        for n, part in enumerate(parts, 1):
            if self.sharded:
                model.set_requires_gradient_sync(n == len(parts))
            elif isinstance(loss, DistributedDataParallel):
                loss.require_backward_grad_sync = n == len(parts)
            yield part

    @torch.no_grad()
    def whole(self, model: GPT) -> GPT | None:
        """The model with all its weights, to look at: in the first process, None in the others. All must ask."""
        if not self.sharded:
            return model if self.first else None
        if self.first and self.twin is None:
            with torch.device("meta"):
                self.twin = GPT(model.config)
            self.twin.allocate(model.embed.weight.device)
            self.twin.compute_dtype, self.twin.attention_backend = model.compute_dtype, model.attention_backend
        twins = dict(self.twin.named_parameters()) if self.twin else {}
        for name, p in model.named_parameters():
            full = whole_tensor(p)
            if self.first:
                twins[name].copy_(full)
        return self.twin


ALONE = World()


def join() -> World:
    """Meet the processes that torchrun has started with this one; without it, be alone."""
    try:
        return World(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the processes did not find each other ({_reason(error)})\n"
                        "  start them with torchrun --nproc-per-node=N train.py …") from None


def _reason(error: Exception) -> str:
    return first_line(Exception(re.sub(r"\[[^]]*\] ", "", str(error))))          # without the line of C++ that says it


class _Loss(nn.Module):
    """A function of a model's parameters as a module, which is what DDP takes."""

    def __init__(self, model: GPT, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(*batch)


def local(x: Tensor) -> Tensor:
    """The part of x that this process holds: all of it, unless it is sharded. In-place changes reach x."""
    return x.to_local() if hasattr(x, "to_local") else x            # a DTensor; asked this way since its import takes a second


def whole_tensor(x: Tensor) -> Tensor:
    """All of x. Every process must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def over_whole_matrices(function: Callable[[Tensor], Tensor], pieces: Tensor, rows: int, world: World) -> Tensor:
    """`function` (N, R, C) → (N, R, C) of whole matrices, each computed in one process alone: every process does its share of the N.

    pieces (N, r, C)    what this process holds of the N matrices of R = `rows` rows: its share of the rows under fsdp, else all
    → (N, r, C)         the same part of the results
    """
    size, (N, r, C) = world.size, pieces.shape
    if size == 1:
        return function(pieces)
    each = -(-N // size)                                                        # matrices a process computes
    mine = range(min(N, world.rank * each), min(N, (world.rank + 1) * each))
    if not world.sharded:
        results, done = pieces.new_empty(size, each, rows, C), pieces.new_zeros(each, rows, C)
        if mine:
            done[:len(mine)] = function(pieces[mine.start:mine.stop])
        dist.all_gather(list(results), done)
        return results.flatten(0, 1)[:N]
    chunk = -(-rows // size)                                                    # rows a process holds, the last ones fewer
    sent = pieces.new_zeros(size, each, chunk, C)
    sent.view(size * each, chunk, C)[:N, :r] = pieces
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)                                           # my matrices' rows, by the process that holds them
    whole = got.transpose(0, 1).reshape(each, size * chunk, C)
    if mine:
        whole[:len(mine), :rows] = function(whole[:len(mine), :rows])
    back = torch.empty_like(sent)                                               # `whole` may be a view of `got`
    dist.all_to_all_single(back, whole.view(each, size, chunk, C).transpose(0, 1).contiguous())
    return back.view(size * each, chunk, C)[:N, :r]

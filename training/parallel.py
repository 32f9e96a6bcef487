"""How the processes of a world share one model: one immutable choice, made before the model has
memory.

    Parallel        the base class, and the case of one process: it holds the whole model
    DataParallel    every process holds the whole model; they average gradients (DDP, Li et al.
                    2020, "PyTorch Distributed")
    FullySharded    every process holds a share of each parameter's rows, with its gradient and its
                    optimizer state, and gathers a block's weights while it computes (FSDP, Zhao et
                    al. 2023)

Every process takes its own rows of each batch. All methods are called by all processes.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT
from training.world import World

Value = TypeVar("Value")
Loss = Callable[..., Tensor]
MatrixFunction = Callable[[Tensor], Tensor]         # (N, R, C) → (N, R, C), matrix by matrix


@dataclass(frozen=True)
class Parallel:
    """What the strategies offer. As it stands here, one process holds the whole model."""

    world: World
    name = "one process"
    sharded = False

    def place(self, model: GPT, device: torch.device) -> None:
        """Allocate the parameters that this process holds of a model on the meta device. Their
        values are not set."""
        model.allocate(device)

    def fill(self, p: Tensor, full: Tensor) -> None:
        """Copy a parameter's full value into the part that this process holds."""
        p.copy_(full)

    def replicate(self, model: GPT, loss: Loss) -> Loss:
        """`loss`, such that its backward pass leaves the mean of every process's gradients. FSDP
        does that by hooks of its own."""
        return loss

    def accumulate(self, parts: Sequence[Value], model: GPT, loss: Loss) -> Iterator[Value]:
        """The micro-batches of a batch. Gradients are exchanged only after the last one."""
        yield from parts

    def full_model(self, model: GPT) -> GPT | None:
        """The model in which the first process will find all weights; None in the others."""
        return model if self.world.first else None

    def gather_weights(self, model: GPT, full_model: GPT | None) -> None:
        """Bring `full_model` up to date with the weights of `model`."""

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from the norm of those that this process holds."""
        return norm

    def map_matrices(self, function: MatrixFunction, pieces: Tensor, rows: int) -> Tensor:
        """Apply `function` to N whole matrices, each in one process only.

        pieces (N, r, C)    what this process holds of the N matrices of R = `rows` rows
        → (N, r, C)         the same rows of the results
        """
        return function(pieces)


class DataParallel(Parallel):
    """Every process holds the whole model."""

    name = "ddp"

    def replicate(self, model: GPT, loss: Loss) -> Loss:
        device = model.embed.weight.device
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # PyTorch 2.13 warns that broadcast_buffers will be renamed.
            return DistributedDataParallel(
                _LossModule(model, loss), broadcast_buffers=False, gradient_as_bucket_view=True,
                device_ids=[device] if device.type == "cuda" else None)

    def accumulate(self, parts: Sequence[Value], model: GPT, loss: Loss) -> Iterator[Value]:
        assert isinstance(loss, DistributedDataParallel)
        for number, part in enumerate(parts, 1):
            loss.require_backward_grad_sync = number == len(parts)
            yield part

    def map_matrices(self, function: MatrixFunction, pieces: Tensor, rows: int) -> Tensor:
        N, _, C = pieces.shape
        share, mine = _matrices_of(self.world, N)
        done = pieces.new_zeros(share, rows, C)
        if mine:
            done[:len(mine)] = function(pieces[mine.start:mine.stop])
        results = pieces.new_empty(self.world.size, share, rows, C)
        dist.all_gather(list(results), done)
        return results.flatten(0, 1)[:N]


class FullySharded(Parallel):
    """Every process holds a share of each parameter's rows."""

    name = "fsdp"
    sharded = True

    def place(self, model: GPT, device: torch.device) -> None:
        from torch.distributed.fsdp import (  # a second to import
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )
        half = model.compute_dtype if model.compute_dtype.itemsize == 2 else None
        options: dict[str, Any] = {
            "mesh": dist.init_device_mesh(device.type, (self.world.size,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)}
        for block in model.blocks:
            fully_shard(block, **options)
        # Without resharding, an evaluation would leave the embeddings gathered.
        fully_shard(model, **options, reshard_after_forward=True)
        for method in ("loss", "losses"):
            register_fsdp_forward_method(model, method)
        model.to_empty(device=device)           # model.allocate() knows nothing of shares
        model.make_tables()

    def fill(self, p: Tensor, full: Tensor) -> None:
        mine = local(p)
        if mine is p:                           # not sharded: an optimizer's step counter
            p.copy_(full)
            return
        # fully_shard gives every process the same number of rows, the last ones fewer.
        rows = -(-p.shape[0] // self.world.size)
        start = rows * self.world.rank
        mine.copy_(full[start:start + len(mine)])

    def accumulate(self, parts: Sequence[Value], model: GPT, loss: Loss) -> Iterator[Value]:
        for number, part in enumerate(parts, 1):
            model.set_requires_gradient_sync(number == len(parts))      # type: ignore[operator]
            yield part

    @torch.no_grad()
    def full_model(self, model: GPT) -> GPT | None:
        if not self.world.first:
            return None
        with torch.device("meta"):
            full_model = GPT(model.config)
        full_model.allocate(model.embed.weight.device)
        full_model.compute_dtype = model.compute_dtype
        full_model.attention_backend = model.attention_backend
        return full_model

    @torch.no_grad()
    def gather_weights(self, model: GPT, full_model: GPT | None) -> None:
        targets = dict(full_model.named_parameters()) if full_model else {}
        for name, p in model.named_parameters():
            full = full_tensor(p)               # one at a time: no process holds them all twice
            if full_model:
                targets[name].copy_(full)

    def total_norm(self, norm: Tensor) -> Tensor:
        return self.world.sum(norm.square()).sqrt()

    def map_matrices(self, function: MatrixFunction, pieces: Tensor, rows: int) -> Tensor:
        size, (N, r, C) = self.world.size, pieces.shape
        share, mine = _matrices_of(self.world, N)
        rows_each = -(-rows // size)                # rows that a process holds, the last ones fewer
        sent = pieces.new_zeros(size, share, rows_each, C)
        sent.view(size * share, rows_each, C)[:N, :r] = pieces
        received = torch.empty_like(sent)           # my matrices, by the process that had the rows
        dist.all_to_all_single(received, sent)
        matrices = received.transpose(0, 1).reshape(share, size * rows_each, C)
        if mine:
            matrices[:len(mine), :rows] = function(matrices[:len(mine), :rows])
        by_holder = matrices.view(share, size, rows_each, C).transpose(0, 1).contiguous()
        results = torch.empty_like(sent)            # `matrices` may be a view of `received`
        dist.all_to_all_single(results, by_holder)
        return results.view(size * share, rows_each, C)[:N, :r]


ONE_PROCESS = Parallel(World())


def _matrices_of(world: World, N: int) -> tuple[int, range]:
    """How many of N matrices a process computes at most, and which of them are this one's."""
    share = -(-N // world.size)
    return share, range(min(N, world.rank * share), min(N, (world.rank + 1) * share))


class _LossModule(nn.Module):
    """A function of a model's parameters as a module, since DDP takes only modules."""

    def __init__(self, model: GPT, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(*batch)


def local(x: Tensor) -> Tensor:
    """The part of x that this process holds: all of it, unless it is sharded. Changing it in place
    changes x."""
    # Asked this way because importing DTensor takes a second.
    return x.to_local() if hasattr(x, "to_local") else x


def full_tensor(x: Tensor) -> Tensor:
    """All of x. Every process must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

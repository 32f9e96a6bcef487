"""What the processes of a run exchange. test_distributed.py starts it with torchrun.

Prints "agreed" in each process in which every check passes.
"""

import math

import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.gpt import GPT
from training.optimizer import orthogonalise
from training.parallel import DataParallel, FullySharded, Parallel
from training.world import World, join

# N matrices of R rows and C columns: odd numbers of rows, fewer matrices than processes, and shares
# without a row.
SHAPES = [(2, 8, 20), (4, 9, 9), (1, 5, 9), (5, 2, 7), (3, 33, 10)]


def check_matrices(parallel: Parallel, world: World, N: int, R: int, C: int) -> None:
    """Each matrix is orthogonalised as a whole and by only one of the processes."""
    generator = torch.Generator().manual_seed(N * R * C)
    matrices = torch.randn(N, R, C, generator=generator)
    own_rows = slice(None)
    if parallel.sharded:
        share = math.ceil(R / world.size)
        own_rows = slice(share * world.rank, share * (world.rank + 1))
    computed = 0                    # matrices that this process orthogonalises

    def orthogonalise_and_count(pieces: torch.Tensor) -> torch.Tensor:
        nonlocal computed
        computed += len(pieces)
        return orthogonalise(pieces)

    result = parallel.map_matrices(orthogonalise_and_count, matrices[:, own_rows], R)
    expected = orthogonalise(matrices)[:, own_rows]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert computed <= math.ceil(N / world.size), "a process computes only its share"


def all_reduce(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's exchange of a bucket of gradients. Adds the bucket's number to `sent`."""
    sent.append(bucket.index())
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda _: bucket.buffer())


def check_gradients(parallel: Parallel) -> None:
    """Gradients are exchanged once for a batch, in the backward pass of its last part."""
    with torch.device("meta"):
        model = GPT(ModelConfig(n_layers=2, d_model=32, n_ctx=16, vocab_size=50, mlp="none"))
    parallel.place(model, torch.device("cpu"))
    model.init_weights(0, parallel.fill)
    loss = parallel.replicate(model, model.loss)
    sent: list[int] = []
    if not parallel.sharded:
        loss.register_comm_hook(sent, all_reduce)
    tokens = torch.arange(64).view(4, 16) % 50
    exchanges = []                  # after each part, the number of exchanges so far
    for part in parallel.accumulate([0, 1, 2], model, loss):
        loss((tokens + part) % 50, tokens).backward()
        if parallel.sharded:        # the exchange sets the gradients of a process's rows
            exchanges.append(int(all(p.grad is not None for p in model.parameters())))
        else:
            exchanges.append(len(sent))
    assert exchanges == [0, 0, 1], (parallel.name, exchanges)


if __name__ == "__main__":
    world = join()
    for parallel in (DataParallel(world), FullySharded(world)):
        for shape in SHAPES:
            check_matrices(parallel, world, *shape)
        check_gradients(parallel)
    print("agreed")
    world.close()

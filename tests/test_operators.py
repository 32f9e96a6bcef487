"""The kernels as operators of PyTorch, which compile, checkpoint, count and shard like its own."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attention_cases import DEVICE
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard  # noqa: TID253  the test needs it anyway
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kernels import flash
from kernels.attention import attention, decode
from kernels.decode import decode as decode_operator
from kernels.statistics import head_statistics, induction_targets, tokens_before
from kernels.statistics_triton import statistics

if DEVICE == "cpu":
    import interpreter  # noqa: F401    for the processes that a test starts: no conftest there


def qkv(T=20, H=2, K=1, D=16, grad=True):
    torch.manual_seed(0)
    return [torch.randn(2, T, heads, D, device=DEVICE).transpose(1, 2).requires_grad_(grad)
            for heads in (H, K, K)]


def operators():
    q, k, v = qkv()
    plain = plain_q, plain_k, plain_v = [t.detach() for t in (q, k, v)]
    ids = torch.randint(0, 5, (2, 20), device=DEVICE)
    out, lse = flash.flash_attention(*plain, True, None, None, 0.25)
    masks = (True, 7, ids.sort(1)[0], 0.25)
    positions = torch.arange(20, device=DEVICE).expand(2, 20)
    return {
        "forward": (flash.flash_attention, (q, k, v, *masks)),
        "backward": (flash.flash_attention_backward, (out, *plain, out, lse, *masks)),
        "decode": (decode_operator, (plain_q[:, :, :1], plain_k, plain_v, positions[:, -1:],
                                     positions, 7, 0.25)),
        "head_statistics": (statistics, (plain_q, plain_k, lse, ids, tokens_before(ids),
                                         induction_targets(ids), 7, None, 0.25)),
    }


@pytest.mark.parametrize("name", ["forward", "backward", "decode", "head_statistics"])
def test_opcheck(name):
    """PyTorch's own check of schema, autograd, fake tensors and tracing with dynamic shapes."""
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


def test_compiles_whole_and_for_any_length():
    """No graph breaks, the same results, and one graph for all lengths when they are dynamic."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def block(q, k, v):
        return attention(torch.sin(q), k, v, window=9, backend="triton").square().sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    for T in (20, 33, 47):
        inputs = qkv(T)
        expected = torch.autograd.grad(block(*inputs), inputs)
        got = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(torch.allclose(a, b) for a, b in zip(got, expected))
    assert len(graphs) == 1

    def entropy(q, k, lse, ids):
        return head_statistics(q, k, lse, ids, backend="triton").entropy

    q, k, v = qkv(grad=False)
    _, lse = attention(q, k, v, backend="triton", return_lse=True)
    ids = torch.randint(0, 5, (2, 20), device=DEVICE)
    compiled = torch.compile(entropy, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, lse, ids), entropy(q, k, lse, ids))


def test_activation_checkpointing():
    """Recomputed, or with our operator's output kept by name, as with PyTorch's operators."""
    calls = []
    launched = flash.launch

    def counted(kernel, *arguments, **named):
        calls.append(kernel.__name__)
        launched(kernel, *arguments, **named)

    def keep_ours(context, operator, *arguments, **named):
        if operator is torch.ops.kernels.flash_attention.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def selective():
        return create_selective_checkpoint_contexts(keep_ours)

    def block(q, k, v):
        return attention(torch.sin(q), k, v, backend="triton").square().sum()

    inputs, flash.launch = qkv(), counted
    try:
        expected = torch.autograd.grad(block(*inputs), inputs)
        for options, forwards in (({}, 2), ({"context_fn": selective}, 1)):
            calls.clear()
            result = checkpoint(block, *inputs, use_reentrant=False, **options)
            got = torch.autograd.grad(result, inputs)
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
            assert calls.count("forward") == forwards and calls.count("backward_kv") == 1
    finally:
        flash.launch = launched


def test_floating_point_operations_are_counted_as_pytorch_counts_its_own():
    q, k, v = qkv(T=64, H=2, K=2)
    with FlopCounterMode(display=False) as forward:
        out = attention(q, k, v, backend="triton")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == sdpa_flop_count(q.shape, k.shape, v.shape)
    expected = sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)
    assert backward.get_total_flops() == expected


def test_lse_has_no_gradient():
    q, k, v = qkv()
    out, lse = attention(q, k, v, backend="triton", return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_decoding_has_no_gradient():
    q, k, v = qkv()
    positions = torch.arange(20, device=DEVICE).expand(2, 20)
    out = decode(q[:, :, :1], k, v, positions[:, -1:], positions, backend="triton")
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def shard(rank: int, port: int, results) -> None:
    """One of two processes: a layer around our attention under DDP, then under FSDP2."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    for wrapper in ("ddp", "fsdp"):
        model, x = layer(), batch()
        if wrapper == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model(x[rank:rank + 1]).square().mean().backward()
        grad = next(model.parameters()).grad
        results[f"{wrapper}{rank}"] = (grad.full_tensor() if wrapper == "fsdp" else grad).tolist()
    dist.destroy_process_group()
    # Seen once: a gloo thread that still holds a tensor when Python ends aborts the process.
    os._exit(0)


def batch() -> torch.Tensor:
    return torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))


def layer() -> torch.nn.Module:
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv = torch.nn.Linear(32, 4 * 16, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (4, 16)).transpose(1, 2).split((2, 1, 1), dim=1)
            return attention(q, k, v, backend="triton")
    return Layer()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes on the CPU, under the interpreter")
def test_ddp_and_fsdp2():
    """Two processes: their averaged gradient is that of one process with both halves of a batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(shard, (port, results), nprocs=2)
        results = dict(results)
    model = layer()
    model(batch()).square().mean().backward()
    for name in ("ddp0", "ddp1", "fsdp0", "fsdp1"):
        assert torch.allclose(torch.tensor(results[name]), model.qkv.weight.grad, atol=1e-6), name

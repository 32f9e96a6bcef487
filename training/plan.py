"""What a config costs, and what fits on N devices: `python -m training.plan CONFIG [--world-size N] [key.path=value …]`.

Weights, gradients and optimizer state are float32, activations bf16, attention is flash attention. Nothing is run: what is
saved for the backward pass is held to measurement in tests/test_budget.py, the sharded part is arithmetic.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

from errors import ArgumentParser, UserError, run_command
from model import budget
from model.budget import activation_bytes_per_token, flops_per_token, in_units, parameters
from model.config import ModelConfig
from model.cross_entropy import CHUNK_ELEMENTS
from settings.validate import Settings, validate
from settings.yaml12 import override, read_file
from training.config import load_config

BF16, FP32 = 2, 4
FREE = 0.9                  # of a device's memory; the rest is left to the driver, NCCL's buffers and fragmentation
MUON_BYTES = 16             # per element while equally shaped matrices are orthogonalised: Nesterov, their stack, x twice, the update


class ModelPart(Settings):
    """The part of a config file that the costs of a model need."""

    model: ModelConfig = ModelConfig()


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    devices: int
    memory: float           # bytes of one
    bandwidth: float        # bytes per second that one moves, in each direction at once
    flops: float            # peak of one, in bf16, per second
    mfu: float              # the share of it that the model's own operations reach without recomputation


@dataclass(frozen=True)
class Plan:
    """One way to train: `ddp` (everything on every device) or `fsdp` (all state sharded), with or without recomputation."""

    model: ModelConfig
    optimizer: str          # muon | adamw
    batch_tokens: int
    cluster: Cluster
    distributed: str        # ddp | fsdp
    checkpointed: bool

    @property
    def shards(self) -> int:
        return self.cluster.devices if self.distributed == "fsdp" else 1

    @cached_property
    def parameters(self) -> Counter[str]:
        return parameters(self.model)

    @property
    def matrices(self) -> int:
        """Parameters of the blocks' matrices: those that Muon moves."""
        return self.parameters["attention"] + self.parameters["MLP"]

    @property
    def state(self) -> Counter[str]:
        """Bytes of one device's weights, gradients and optimizer state: DDP's buckets are the gradients themselves."""
        total = self.parameters.total()
        moments = self.matrices + 2 * (total - self.matrices) if self.optimizer == "muon" else 2 * total
        return Counter({name: -(-FP32 * n // self.shards) for name, n in
                        {"weights": total, "gradients": total, "optimizer": moments}.items()})

    @property
    def passing(self) -> Counter[str]:
        """Bytes besides state and activations that a forward and backward pass holds at its height.

        Under DDP autograd saves the bf16 copies of the weights that it multiplied by, of recomputed blocks one block's; under FSDP it
        saves what is gathered again.
        """
        block, head = self.matrices // self.model.n_layers, self.model.d_model * (self.model.vocab_size or 0)
        parts = Counter({"cross-entropy": 2 * FP32 * head + BF16 * head + (FP32 + 2 * BF16) * CHUNK_ELEMENTS})
        if self.distributed == "fsdp":
            outside = self.parameters.total() - self.matrices               # embedding and head
            parts["gathered"] = BF16 * (2 * block + outside)                # a block, and the next one on its way
            parts["gradients of a block"] = (BF16 + FP32) * block           # as computed, and on their way to their owners
        else:
            parts["copies of weights"] = BF16 * block * (1 if self.checkpointed else self.model.n_layers)
        return Counter({name: int(n) for name, n in parts.items()})

    @property
    def orthogonalising(self) -> int:
        """Bytes that Muon's step holds besides the state: the equally shaped matrices of all layers at once, dealt out over
        the shards but never in pieces."""
        if self.optimizer != "muon":
            return 0
        c = self.model
        sizes: Counter[tuple[int, int]] = Counter()
        H, K, E, F = c.n_heads * c.head_size, c.kv_heads * c.head_size, c.d_model, c.mlp_size
        for shape in [(H, E), (K, E), (K, E), (E, H)] + [(F, E)] * (F and (2 if c.mlp == "swiglu" else 1)) + [(E, F)] * bool(F):
            sizes[shape] += c.n_layers
        return max(MUON_BYTES * rows * columns * -(-n // self.shards) for (rows, columns), n in sizes.items())

    @property
    def window(self) -> int:
        """Bytes of one window's activations."""
        return self.model.n_ctx * activation_bytes_per_token(self.model, BF16, self.checkpointed)

    def bytes(self, windows: int) -> int:
        """The most that a device holds, in a pass over `windows` windows or in the optimizer's step."""
        return self.state.total() + max(self.passing.total() + windows * self.window, self.orthogonalising)

    @property
    def share(self) -> int:
        """Windows of a step that fall to the device with the most, for which the others wait."""
        return -(-self.batch_tokens // (self.model.n_ctx * self.cluster.devices))

    @property
    def room(self) -> int:
        """How many windows fit at once; 0: not one."""
        free = FREE * self.cluster.memory - self.state.total()
        return max(0, int((free - self.passing.total()) // self.window)) if free >= self.orthogonalising else 0

    @property
    def micro_batch(self) -> int:
        """Windows of a forward pass: the largest divisor of a device's share that fits; 0: none."""
        return max((n for n in range(1, min(self.share, self.room) + 1) if self.share % n == 0), default=0)

    @property
    def accumulation(self) -> int:
        """Forward passes of a step."""
        return self.share // self.micro_batch

    @property
    def moved(self) -> int:
        """Bytes that one device sends in a step, and receives: rings. DDP: one all-reduce of float32 gradients, after the last
        pass. FSDP, in every pass: weights gathered in bf16 forward and backward, gradients scattered in float32."""
        total = self.parameters.total()
        others = (self.cluster.devices - 1) / self.cluster.devices
        if self.distributed == "ddp":
            return int(2 * others * FP32 * total)
        return int(others * (2 * BF16 + FP32) * total) * self.accumulation

    @property
    def compute_seconds(self) -> float:
        """Of a step, at the stated MFU; recomputation adds a third: a second forward pass."""
        flops = 3 * flops_per_token(self.model).total() * self.share * self.model.n_ctx
        return flops / (self.cluster.flops * self.cluster.mfu) * (4 / 3 if self.checkpointed else 1)

    @property
    def communication_seconds(self) -> float:
        return self.moved / self.cluster.bandwidth

    @property
    def seconds(self) -> float:
        """Of a step whose communication hides behind its computation as far as it can."""
        return max(self.compute_seconds, self.communication_seconds)


def plans(model: ModelConfig, optimizer: str, batch_tokens: int, cluster: Cluster) -> list[Plan]:
    return [Plan(model, optimizer, batch_tokens, cluster, way, checkpointed)
            for way, checkpointed in product(("ddp", "fsdp"), (False, True))]


def devices_needed(model: ModelConfig, optimizer: str, batch_tokens: int, cluster: Cluster, most: int = 2 ** 20) -> int | None:
    """The smallest power of two of such devices on which one window fits, sharded and recomputed; None: no number does."""
    n = 1
    while n <= most:
        if Plan(model, optimizer, batch_tokens, replace(cluster, devices=n), "fsdp", True).room:
            return n
        n *= 2
    return None


def fit_report(model: ModelConfig, optimizer: str, batch_tokens: int, cluster: Cluster) -> str:
    """All of it as text."""
    all_plans = plans(model, optimizer, batch_tokens, cluster)
    lines = [f"training on {cluster.devices:,} devices of {in_units(cluster.memory)} ({FREE:.0%} of it used), {optimizer}, "
             f"{batch_tokens:,} tokens a step of {model.n_ctx}", "",
             f"{'bytes a device':28}" + "".join(f"{p.distributed + (', recomputed' if p.checkpointed else ''):>18}" for p in all_plans)]
    for part in ("weights", "gradients", "optimizer"):
        lines.append(_row(part, [in_units(p.state[part]) for p in all_plans]))
    for part in ("gathered", "gradients of a block", "copies of weights", "cross-entropy"):
        lines.append(_row(part, [in_units(p.passing[part]) for p in all_plans]))
    lines += [_row("activations of a window", [in_units(p.window) for p in all_plans]),
              _row("together, with one window", [in_units(p.bytes(1)) for p in all_plans])]
    if optimizer == "muon":
        lines.append(_row("in Muon's step instead", [in_units(p.state.total() + p.orthogonalising) for p in all_plans]))
    fit = [p for p in all_plans if p.room]
    lines += [_row("windows that fit", [f"{p.room:,}" if p.room else "none" for p in all_plans])]
    if fit:
        lines += [_row("micro-batch × passes", [f"{p.micro_batch} × {p.accumulation}" if p.room else "–" for p in all_plans]), "",
                  f"a step at {cluster.flops / 1e12:,.0f} TFLOP/s × {cluster.mfu:.0%} MFU and {cluster.bandwidth / 1e9:,.0f} GB/s a device",
                  _row("sent by a device", [in_units(p.moved) if p.room else "–" for p in all_plans]),
                  _row("communication", [f"{p.communication_seconds:,.2f} s" if p.room else "–" for p in all_plans]),
                  _row("computation", [f"{p.compute_seconds:,.2f} s" if p.room else "–" for p in all_plans])]
    lines += ["", *_advice(fit, model, optimizer, batch_tokens, cluster)]
    return "\n".join(lines)


def _advice(fit: list[Plan], model: ModelConfig, optimizer: str, batch_tokens: int, cluster: Cluster) -> list[str]:
    if not fit:
        last = Plan(model, optimizer, batch_tokens, cluster, "fsdp", True)
        missing = last.bytes(1) - FREE * cluster.memory
        needed = devices_needed(model, optimizer, batch_tokens, cluster)
        return [f"nothing fits: sharded and recomputed, one window lacks {in_units(missing)}",
                f"  {needed:,} such devices would do" if needed else
                f"  no number of such devices would do: shorten model.n_ctx={model.n_ctx} or split the layers themselves"]
    best = min(fit, key=lambda p: p.seconds)
    windows, N = batch_tokens // model.n_ctx, cluster.devices
    lines = []
    if windows % N:
        whole = max(1, round(windows / N)) * N * model.n_ctx
        lines.append(f"{windows:,} windows do not divide among {N:,} devices: some wait for others (try train.batch_tokens={whole})")
    lines.append(f"distributed={best.distributed} train.checkpoint_activations={str(best.checkpointed).lower()} "
                 f"train.micro_batch={best.micro_batch}")
    tokens = best.batch_tokens / best.seconds
    lines.append(f"  the shortest step that fits, if communication hides behind computation: {best.seconds:,.2f} s, "
                 f"{tokens:,.0f} tokens/s, {1e12 / tokens / 86400:,.1f} days for 10¹² tokens")
    return lines


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:26}" + "".join(f"{cell:>18}" for cell in cells)


def with_vocabulary(config: ModelConfig, tokenizer: str | dict) -> ModelConfig:
    """`config` with the vocabulary size that its tokenizer will have, where that is known without making it."""
    if config.vocab_size is not None:
        return config
    known = {"bytes": 257, "gpt2": 50257, "r50k_base": 50257, "cl100k_base": 100277, "o200k_base": 200019}
    kind = tokenizer if isinstance(tokenizer, str) else tokenizer.get("kind", "bytes")
    size = known.get(kind) or (tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None) or 50257
    return config.model_copy(update={"vocab_size": size})


def positive(text: str) -> float:
    """An argument above zero."""
    if not (number := float(text)) > 0:
        raise ValueError(text)
    return number


def main() -> None:
    parser = ArgumentParser("python -m training.plan", description="Parameters, FLOPs and memory of a config, without allocating it; "
                            "with --world-size, what fits on so many devices and how long a step takes.")
    parser.add_argument("config", help="a YAML file of configs/, or runs/NAME")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="change a value, for example model.n_ctx=4096")
    parser.add_argument("--world-size", type=int, metavar="N", help="devices to train on (1 where one is described below)")
    parser.add_argument("--device-memory", type=positive, default=80, metavar="GB", help="of one device, in 10⁹ bytes (default 80)")
    parser.add_argument("--bandwidth", type=positive, default=50, metavar="GB/s", help="that one device sends and receives (default 50)")
    parser.add_argument("--tflops", type=positive, default=989, metavar="T", help="bf16 peak of one device (default 989, an H100's)")
    parser.add_argument("--mfu", type=positive, default=0.4, help="the share of the peak that is reached (default 0.4, an assumption)")
    args = parser.parse_intermixed_args()
    described = any(getattr(args, name) != parser.get_default(name) for name in ("device_memory", "bandwidth", "tflops", "mfu"))
    world_size = 1 if args.world_size is None and described else args.world_size
    path = Path(args.config) / "config.yaml" if Path(args.config).is_dir() else Path(args.config)
    tree = read_file(path)
    overridden = override(tree, args.overrides)
    tokenizer = (tree.get("data") or {}).get("tokenizer") or {}
    config = with_vocabulary(validate(ModelPart, {"model": tree.get("model") or {}}, str(path), overridden).model, tokenizer)
    print(budget.report(config))
    if world_size is not None:
        if world_size < 1:
            raise UserError(f"--world-size {world_size}: at least one device is needed")
        whole = load_config(path, args.overrides)
        cluster = Cluster(world_size, args.device_memory * 1e9, args.bandwidth * 1e9, args.tflops * 1e12, args.mfu)
        print("\n" + fit_report(config, whole.optimizer.kind, whole.train.batch_tokens, cluster))


if __name__ == "__main__":
    run_command(main)

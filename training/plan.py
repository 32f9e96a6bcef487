"""What a config costs, and how it fits on N devices: `python -m training.plan CONFIG
[--world-size N] [key.path=value …]`.

Weights, gradients and optimizer state are float32, activations bf16, attention is flash attention.
Nothing is run. tests/test_budget.py compares what is saved for the backward pass with measurement;
the sharded part is arithmetic.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

from errors import ArgumentParser, UserError, run_command

from console import stdout_is_the_result
from model import budget
from model.budget import activation_bytes_per_token, flops_per_token, in_units, parameters
from model.config import ModelConfig
from model.cross_entropy import GPU_CHUNK_ELEMENTS
from settings.validate import Settings, validate
from settings.yaml12 import override, read_file
from training.config import divisors, load_config

BF16, FP32 = 2, 4           # bytes
# Of a device's memory. The driver, NCCL's buffers and fragmentation take the rest.
USABLE = 0.9
# Bytes per element while matrices of one shape are orthogonalised: Nesterov's average, the stack of
# all, x twice, the update.
MUON_BYTES = 16


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    devices: int
    memory: float           # bytes of one device
    bandwidth: float        # bytes per second that one device moves, in each direction at once
    flops: float            # bf16 peak of one device, per second
    mfu: float              # fraction of the peak that the model's own operations reach


@dataclass(frozen=True)
class Plan:
    """One way to train: `ddp` (everything on every device) or `fsdp` (all state sharded), with or
    without recomputing activations."""

    model: ModelConfig
    optimizer: Literal["muon", "adamw"]
    batch_tokens: int
    cluster: Cluster
    strategy: Literal["ddp", "fsdp"]
    recompute: bool

    @property
    def shards(self) -> int:
        return self.cluster.devices if self.strategy == "fsdp" else 1

    @cached_property
    def parameters(self) -> Counter[str]:
        return parameters(self.model)

    @property
    def matrices(self) -> int:
        """Parameters in the matrices of the blocks, which Muon moves."""
        return self.parameters["attention"] + self.parameters["MLP"]

    @property
    def state_bytes(self) -> Counter[str]:
        """Weights, gradients and optimizer state of one device. DDP's buckets are the gradients."""
        total = self.parameters.total()
        if self.optimizer == "muon":
            moments = self.matrices + 2 * (total - self.matrices)
        else:
            moments = 2 * total
        counts = {"weights": total, "gradients": total, "optimizer": moments}
        return Counter({name: -(-FP32 * n // self.shards) for name, n in counts.items()})

    @property
    def pass_bytes(self) -> Counter[str]:
        """What a forward and backward pass holds at its peak, in addition to state and activations.

        Under DDP autograd saves the bf16 copies of the weights that it multiplied by; with
        recomputation, one block's. Under FSDP it saves none: they are gathered again.
        """
        block = self.matrices // self.model.n_layers
        head = self.model.d_model * (self.model.vocab_size or 0)
        logits = (FP32 + 2 * BF16) * GPU_CHUNK_ELEMENTS
        parts = Counter({"cross-entropy": 2 * FP32 * head + BF16 * head + logits})
        if self.strategy == "fsdp":
            outside = self.parameters.total() - self.matrices       # embedding and head
            parts["gathered"] = BF16 * (2 * block + outside)        # a block, and the next coming
            # As computed, and on their way to the processes that own them.
            parts["gradients of a block"] = (BF16 + FP32) * block
        else:
            blocks = 1 if self.recompute else self.model.n_layers
            parts["copies of weights"] = BF16 * block * blocks
        return Counter({name: int(n) for name, n in parts.items()})

    @property
    def muon_bytes(self) -> int:
        """What Muon's step holds in addition to the state: the matrices of one shape of all layers
        at once, dealt out over the shards, but never in pieces."""
        if self.optimizer != "muon":
            return 0
        model = self.model
        E, F = model.d_model, model.mlp_size
        query_rows, key_rows = model.n_heads * model.head_size, model.kv_heads * model.head_size
        shapes = [(query_rows, E), (key_rows, E), (key_rows, E), (E, query_rows)]
        if F:
            shapes += [(F, E), (E, F)]
            if model.mlp == "swiglu":
                shapes.append((F, E))
        matrices = Counter({shape: shapes.count(shape) * model.n_layers for shape in shapes})
        return max(MUON_BYTES * rows * columns * -(-n // self.shards)
                   for (rows, columns), n in matrices.items())

    @property
    def window_bytes(self) -> int:
        """Activations of one window."""
        per_token = activation_bytes_per_token(self.model, BF16, self.recompute)
        return self.model.n_ctx * per_token

    def peak_bytes(self, windows: int) -> int:
        """The most that a device holds, in a pass over `windows` windows or in Muon's step."""
        passing = self.pass_bytes.total() + windows * self.window_bytes
        return self.state_bytes.total() + max(passing, self.muon_bytes)

    @property
    def windows_that_fit(self) -> int:
        """How many windows fit in a forward pass; 0 if not one does."""
        free = USABLE * self.cluster.memory - self.state_bytes.total()
        if free < self.muon_bytes:
            return 0
        return max(0, int((free - self.pass_bytes.total()) // self.window_bytes))

    @property
    def windows_per_device(self) -> int:
        """Windows of a step on the device with the most, for which the others wait."""
        return -(-self.batch_tokens // (self.model.n_ctx * self.cluster.devices))

    @property
    def micro_batch(self) -> int:
        """Windows of a forward pass: the largest divisor of a device's windows that fits, or 0."""
        most = min(self.windows_per_device, self.windows_that_fit)
        return max((n for n in divisors(self.windows_per_device) if n <= most), default=0)

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return self.windows_per_device // self.micro_batch

    @property
    def sent_bytes(self) -> int:
        """What one device sends in a step (and receives), by ring algorithms.

        DDP: one all-reduce of float32 gradients, after the last pass. FSDP, in every pass: weights
        gathered in bf16, forward and backward, and gradients scattered in float32.
        """
        total = self.parameters.total()
        others = (self.cluster.devices - 1) / self.cluster.devices
        if self.strategy == "ddp":
            return int(2 * others * FP32 * total)
        return int(others * (2 * BF16 + FP32) * total) * self.passes

    @property
    def compute_seconds(self) -> float:
        """Of a step, at the assumed MFU. Recomputing adds a third: a second forward pass."""
        tokens = self.windows_per_device * self.model.n_ctx
        flops = 3 * flops_per_token(self.model).total() * tokens
        seconds = flops / (self.cluster.flops * self.cluster.mfu)
        return seconds * 4 / 3 if self.recompute else seconds

    @property
    def communication_seconds(self) -> float:
        return self.sent_bytes / self.cluster.bandwidth

    @property
    def seconds(self) -> float:
        """Of a step whose communication overlaps its computation as far as possible."""
        return max(self.compute_seconds, self.communication_seconds)


def plans(model: ModelConfig, optimizer: Literal["muon", "adamw"], batch_tokens: int,
          cluster: Cluster) -> list[Plan]:
    """The four ways to train: DDP and FSDP, without and with recomputation."""
    strategies: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    return [Plan(model, optimizer, batch_tokens, cluster, strategy, recompute)
            for strategy, recompute in product(strategies, (False, True))]


def devices_needed(smallest: Plan, most: int = 2 ** 20) -> int | None:
    """The smallest power of two of such devices on which a plan fits one window; None if none up
    to `most` does."""
    n = 1
    while n <= most:
        if replace(smallest, cluster=replace(smallest.cluster, devices=n)).windows_that_fit:
            return n
        n *= 2
    return None


# --- the report -------------------------------------------------------------------------------

def plan_report(model: ModelConfig, optimizer: Literal["muon", "adamw"], batch_tokens: int,
                cluster: Cluster) -> str:
    """A table of the four plans, and which one to take."""
    all_plans = plans(model, optimizer, batch_tokens, cluster)
    fitting = [plan for plan in all_plans if plan.windows_that_fit]

    def row(name: str, cell: Callable[[Plan], str], only_fitting: bool = False) -> str:
        cells = ["–" if only_fitting and plan not in fitting else cell(plan) for plan in all_plans]
        return f"  {name:26}" + "".join(f"{text:>18}" for text in cells)

    def state_row(part: str) -> str:
        return row(part, lambda plan: in_units(plan.state_bytes[part]))

    def pass_row(part: str) -> str:
        return row(part, lambda plan: in_units(plan.pass_bytes[part]))

    titles = [plan.strategy + (", recomputed" if plan.recompute else "") for plan in all_plans]
    lines = [
        f"training on {cluster.devices:,} devices of {in_units(cluster.memory)} ({USABLE:.0%} of "
        f"it used), {optimizer}, {batch_tokens:,} tokens a step of {model.n_ctx}", "",
        f"{'bytes per device':28}" + "".join(f"{title:>18}" for title in titles),
        *map(state_row, ("weights", "gradients", "optimizer")),
        *map(pass_row, ("gathered", "gradients of a block", "copies of weights", "cross-entropy")),
        row("activations of a window", lambda plan: in_units(plan.window_bytes)),
        row("total, with one window", lambda plan: in_units(plan.peak_bytes(1)))]
    if optimizer == "muon":
        lines.append(row("or in Muon's step", lambda plan: in_units(
            plan.state_bytes.total() + plan.muon_bytes)))
    lines.append(row("windows that fit", lambda plan: (
        f"{plan.windows_that_fit:,}" if plan.windows_that_fit else "none")))
    if fitting:
        lines += [
            row("micro-batch × passes", lambda plan: f"{plan.micro_batch} × {plan.passes}", True),
            "", f"a step at {cluster.flops / 1e12:,.0f} TFLOP/s × {cluster.mfu:.0%} MFU and "
            f"{cluster.bandwidth / 1e9:,.0f} GB/s per device",
            row("sent by a device", lambda plan: in_units(plan.sent_bytes), True),
            row("communication", lambda plan: f"{plan.communication_seconds:,.2f} s", True),
            row("computation", lambda plan: f"{plan.compute_seconds:,.2f} s", True)]
    lines += ["", *(_best(fitting) if fitting else _nothing_fits(all_plans[-1]))]
    return "\n".join(lines)


def _best(fitting: list[Plan]) -> list[str]:
    """The plan with the shortest step, as settings."""
    best = min(fitting, key=lambda plan: plan.seconds)
    n_ctx, devices, lines = best.model.n_ctx, best.cluster.devices, []
    windows = best.batch_tokens // n_ctx
    if windows % devices:
        nearest = max(1, round(windows / devices)) * devices * n_ctx
        lines.append(f"{windows:,} windows do not divide among {devices:,} devices: some wait for "
                     f"others (try train.batch_tokens={nearest})")
    rate = best.batch_tokens / best.seconds
    return [
        *lines,
        f"distributed={best.strategy} "
        f"train.checkpoint_activations={str(best.recompute).lower()} "
        f"train.micro_batch={best.micro_batch}",
        f"  the shortest step that fits, if communication overlaps computation: "
        f"{best.seconds:,.2f} s, {rate:,.0f} tokens/s, {1e12 / rate / 86400:,.1f} days for "
        "10¹² tokens"]


def _nothing_fits(smallest: Plan) -> list[str]:
    """What is missing, and how many devices would be enough."""
    missing = smallest.peak_bytes(1) - USABLE * smallest.cluster.memory
    needed = devices_needed(smallest)
    if needed:
        fix = f"{needed:,} such devices would be enough"
    else:
        fix = (f"no number of such devices is enough: shorten model.n_ctx={smallest.model.n_ctx} "
               "or split the layers themselves")
    return [f"nothing fits: sharded and recomputed, one window lacks {in_units(missing)}",
            f"  {fix}"]


# --- the command ------------------------------------------------------------------------------

class ModelPart(Settings):
    """The part of a config file that the costs of a model need."""

    model: ModelConfig = ModelConfig()


def with_vocabulary(config: ModelConfig, tokenizer: str | dict[str, Any]) -> ModelConfig:
    """`config` with the vocabulary size of its tokenizer, where that is known without making it;
    GPT-2's otherwise."""
    if config.vocab_size is not None:
        return config
    known = {"bytes": 257, "gpt2": 50257, "r50k_base": 50257, "cl100k_base": 100277,
             "o200k_base": 200019}
    if isinstance(tokenizer, str):
        size = known.get(tokenizer)
    else:
        size = known.get(tokenizer.get("kind", "bytes")) or tokenizer.get("vocab_size")
    return config.model_copy(update={"vocab_size": size or 50257})


def positive(text: str) -> float:
    """Parse a number above zero. The function's name appears in argparse's errors."""
    number = float(text)
    if not number > 0:
        raise ValueError(text)
    return number


def main() -> None:
    parser = ArgumentParser(
        "python -m training.plan",
        description="Parameters, FLOPs and memory of a config, without allocating it; with "
                    "--world-size, what fits on that many devices and how long a step takes.")
    parser.add_argument("config", help="a YAML file of configs/, or runs/NAME")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change a value, for example model.n_ctx=4096")
    parser.add_argument("--world-size", type=int, metavar="N",
                        help="devices to train on (1 if one is described below)")
    parser.add_argument("--device-memory", type=positive, default=80, metavar="GB",
                        help="of one device, in 10⁹ bytes (default 80)")
    parser.add_argument("--bandwidth", type=positive, default=50, metavar="GB/s",
                        help="that one device sends and receives (default 50)")
    parser.add_argument("--tflops", type=positive, default=989, metavar="T",
                        help="bf16 peak of one device (default 989, an H100's)")
    parser.add_argument("--mfu", type=positive, default=0.4,
                        help="fraction of the peak that is reached (default 0.4, an assumption)")
    args = parser.parse_intermixed_args()
    stdout_is_the_result()
    described = any(getattr(args, name) != parser.get_default(name)
                    for name in ("device_memory", "bandwidth", "tflops", "mfu"))
    devices = 1 if args.world_size is None and described else args.world_size
    path = Path(args.config) / "config.yaml" if Path(args.config).is_dir() else Path(args.config)
    tree = read_file(path)
    overridden = override(tree, args.overrides)
    tokenizer = (tree.get("data") or {}).get("tokenizer") or {}
    part = validate(ModelPart, {"model": tree.get("model") or {}}, str(path), overridden)
    model = with_vocabulary(part.model, tokenizer)
    print(budget.report(model))
    if devices is not None:
        if devices < 1:
            raise UserError(f"--world-size {devices}: at least one device is needed")
        # Only now is the whole file checked: the batch and the optimizer are needed too.
        config = load_config(path, args.overrides)
        cluster = Cluster(devices, args.device_memory * 1e9, args.bandwidth * 1e9,
                          args.tflops * 1e12, args.mfu)
        print("\n" + plan_report(model, config.optimizer.kind, config.train.batch_tokens, cluster))


if __name__ == "__main__":
    run_command(main)

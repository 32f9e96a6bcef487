"""What watching heads costs a run: `python -m bench.probe_overhead [CONFIG] [key.path=value …]`.

Training steps and measurements of the heads alternate in one process, as in train.py. The share is
the time of one measurement (and of the pictures for wandb, at their own interval) divided by the
time of the steps between two measurements.
"""

import statistics
import tempfile
from pathlib import Path

from errors import ArgumentParser, UserError, run_command

import torch

from bench import results
from bench.timers import seconds_of
from bench.turn import wait_for_turn
from data.dataset import Dataset
from induction.probe_set import probes_of
from induction.watch import HeadWatch
from report.snapshots import PatternRecorder
from training.build import build_model
from training.config import Config, load_config
from training.device import choose_hardware, choose_micro_batch, training_loss
from training.optimizer import Optimizer
from training.parallel import ONE_PROCESS


def measure(config: Config, rounds: int) -> tuple[torch.device, dict[str, list[float]]]:
    """Seconds of the steps between two measurements, of a measurement and of the pictures.

    A first round warms up and is not returned.
    """
    hardware = choose_hardware(config)
    device = hardware.device
    data = Dataset(config.data, config.seed)
    batches = data.training(config.train.batch_tokens, config.model.n_ctx)
    text = None
    if data.shards:
        text = data.validation(config.eval.tokens, config.model.n_ctx, 1)[0].tokens[0].to(device)
    model, _ = build_model(config, data.tokenizer, hardware, ONE_PROCESS.world)
    micro_batch = choose_micro_batch(config, model)
    optimizer = Optimizer(model, config.optimizer, config.train.steps)
    loss_of = training_loss(model, config.train.compile)
    probes = probes_of(config.data, config.model.n_ctx, data.tokenizer, config.seed)
    if probes is None:
        raise UserError(f"model.n_ctx={config.model.n_ctx} is too short for a probe (try 64)")
    probes = probes.to(device)
    step = 0

    def train() -> None:
        nonlocal step
        for batch in batches.prefetch(step, step + config.heads.every, device):
            for part in batch.split(micro_batch):
                loss_of(*part).backward()
            step += 1
            float(optimizer.step(step, config.train.batch_tokens))

    seconds: dict[str, list[float]] = {"steps": [], "look": [], "pictures": []}
    with tempfile.TemporaryDirectory() as folder:
        watch = HeadWatch(model.config, probes)
        recorder = PatternRecorder(model.config, probes, text, data.tokenizer, Path(folder),
                                   every=config.heads.every, steps=config.train.steps)

        def look() -> None:
            tokens = step * config.train.batch_tokens
            watch(model, tokens)
            if recorder.due(step):
                recorder.save(model, step, tokens)

        for number in range(rounds + 1):
            if number == 1:
                wait_for_turn()
            seconds["steps"].append(seconds_of(train))
            seconds["look"].append(seconds_of(look))
            seconds["pictures"].append(seconds_of(lambda: recorder.pictures(model, watch.measured)))
    return device, {part: values[1:] for part, values in seconds.items()}


def main() -> None:
    parser = ArgumentParser("python -m bench.probe_overhead",
                            description="What watching heads costs a run.")
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml",
                        help="the run's config (default: the quickstart)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--rounds", type=int, default=8, metavar="N",
                        help="number of timed measurements (default 8)")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    device, seconds = measure(config, args.rounds)

    medians = {part: statistics.median(values) for part, values in seconds.items()}
    images_every = config.heads.images_every
    pictures_per_look = config.heads.every / images_every if images_every else 0
    share = (medians["look"] + pictures_per_look * medians["pictures"]) / medians["steps"]
    ms = {part: 1000 * median for part, median in medians.items()}
    print(f"{share:.2%} of training time: a measurement {ms['look']:.1f} ms, "
          f"pictures {ms['pictures']:.1f} ms every {images_every} steps, "
          f"{config.heads.every} steps {ms['steps']:.0f} ms ({device}, {args.rounds} rounds)")
    results.write("probe_overhead", {
        "config": args.config, "overrides": args.overrides, "device": str(device), "share": share,
        "milliseconds": {part: [1000 * t for t in values] for part, values in seconds.items()}})


if __name__ == "__main__":
    run_command(main)

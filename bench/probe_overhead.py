"""What watching heads costs a run: `python -m bench.probe_overhead [CONFIG] [key.path=value …]`, the quickstart by default.

Training steps and looks alternate in one process, as in train.py; the share is that of one look (and of the pictures for wandb, at
their own pace) in the steps between two looks.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from training.distributed import ALONE

from bench import results
from data.dataset import Dataset
from errors import ArgumentParser, run_command
from induction.probes import probes_of
from induction.watch import HeadWatch
from report.snapshots import PatternRecorder
from train import build_model
from training.config import load_config
from training.device import choose_hardware, choose_micro_batch, training_loss
from training.optimizer import Optimizer


def main() -> None:
    parser = ArgumentParser("python -m bench.probe_overhead", description="What watching heads costs a run.")
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="the run (default: the quickstart)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="looks to time (default 8)")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    hardware = choose_hardware(config)
    device = hardware.device
    data = Dataset(config.data, config.seed)
    batches = data.training(config.train.batch_tokens, config.model.n_ctx)
    text = data.validation(config.eval.tokens, config.model.n_ctx, 1)[0].tokens[0].to(device) if data.shards else None
    model = build_model(config, data.tokenizer, hardware, ALONE, new=True)
    micro_batch = choose_micro_batch(config, model)
    optimizer, loss_of = Optimizer(model, config.optimizer, config.train.steps), training_loss(model, config.train.compile)
    probes = probes_of(config.data, config.model.n_ctx, data.tokenizer, config.seed).to(device)

    times: dict[str, list[float]] = {"steps": [], "look": [], "pictures": []}
    with tempfile.TemporaryDirectory() as folder:
        watch = HeadWatch(model.config, probes)
        recorder = PatternRecorder(model.config, probes, text, data.tokenizer, Path(folder),
                                   every=config.heads.every, steps=config.train.steps)

        def timed(what: str, function) -> None:
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[what].append(time.perf_counter() - started)

        step = 0

        def train() -> None:
            nonlocal step
            for batch in batches.prefetch(step, step + config.heads.every, device):
                for part in batch.split(micro_batch):
                    loss_of(*part).backward()
                step += 1
                float(optimizer.step(step, config.train.batch_tokens))

        def look() -> None:
            watch(model, step * config.train.batch_tokens)
            if recorder.due(step):
                recorder.save(model, step, step * config.train.batch_tokens)

        for _ in range(args.rounds + 1):
            timed("steps", train)
            timed("look", look)
            timed("pictures", lambda: recorder.pictures(model, watch.measured))
    middle = {what: statistics.median(found[1:]) for what, found in times.items()}          # the first of each is a warm-up
    between = config.heads.every / config.heads.images_every if config.heads.images_every else 0
    share = (middle["look"] + between * middle["pictures"]) / middle["steps"]
    print(f"{share:.2%} of training time: a look {1000 * middle['look']:.1f} ms, pictures {1000 * middle['pictures']:.1f} ms every "
          f"{config.heads.images_every} steps, {config.heads.every} steps {1000 * middle['steps']:.0f} ms ({device}, {args.rounds} rounds)")
    results.write("probe_overhead", {"config": args.config, "overrides": args.overrides, "device": str(device), "share": share,
                                     "milliseconds": {what: [1000 * t for t in found[1:]] for what, found in times.items()}})


if __name__ == "__main__":
    run_command(main)

"""Train a model: `python train.py configs/quickstart.yaml [key.path=value …]`.

A run directory instead of the file continues that run: `python train.py runs/quickstart`.
"""

import os
from collections.abc import Callable
from math import log
from pathlib import Path

import own_modules  # noqa: F401   first: it says what is in the way of the others
from errors import ArgumentParser, UserError, command, path_of, run_command

import torch

from data.batches import Batch
from data.dataset import Dataset
from data.tokenizer import Tokenizer
from induction.behaviour import icl_score
from induction.examine import examine_run
from induction.history import best_head_history
from induction.metrics import ICL_SCORE
from induction.probe_set import probes_of
from induction.verdict import Verdict
from induction.watch import HeadWatch, knockout_metrics
from model.families import nearest_family
from model.gpt import GPT
from report.export import headline, summary
from report.page import probe_view, write_report
from report.snapshots import PatternRecorder
from report.text import heads_summary
from report.viewer import write_viewer
from training.build import build_model, origin_of
from training.checkpoint import (
    list_checkpoints,
    read_state,
    verify,
)
from training.config import Change
from training.device import (
    check_shares,
    choose_hardware,
    choose_micro_batch,
    training_loss,
)
from training.loaded_run import LoadedRun, load_run
from training.optimizer import Optimizer
from training.profile import profiled
from training.resume import (
    Job,
    clean_up,
    data_of,
    job_of,
    listed,
    newest_progress,
    only_trainer,
    resume,
)
from training.run import Run
from training.world import World, join


def train(job: Job, world: World) -> None:
    """Train a model as the job's config says, from the newest checkpoint of its run if there is
    one. `world`: the processes that train together."""
    config, folder, changes = job
    saved = newest_progress(folder)
    if saved.step >= config.train.steps:
        with world.together():
            if world.first:
                finish(job, saved.step)
        return

    # Build: hardware, data, model, optimizer. `together`: a UserError in one process ends all.
    with world.together():
        check_shares(config, world)
        hardware = choose_hardware(config, world)
    data = world.in_turn(lambda: Dataset(data_of(config, folder), config.seed, saved.data_folder,
                                         saved.data_hash))
    with world.together():
        origin = origin_of(config, data.tokenizer) if saved.step == 0 else None
    model, parallel = build_model(config, data.tokenizer, hardware, world, origin)
    micro_batch = choose_micro_batch(config, model, parallel)       # rows of a forward pass
    with world.together():
        batches = data.training(config.train.batch_tokens, config.model.n_ctx)
        validation = data.validation(config.eval.tokens, config.model.n_ctx, micro_batch)
    optimizer = Optimizer(model, config.optimizer, config.train.steps, parallel)
    loss_of = training_loss(model, config.train.compile, parallel)

    with Run(config, folder, hardware, parallel) as run:
        # Resume: weights, optimizer state and step of the newest checkpoint.
        with run.explained("opening"):
            progress = resume(config, folder, model, optimizer, data, parallel, origin)
        run.start(progress, model.config)
        announce(run, model, data, micro_batch, changes)
        full_model = parallel.full_model(model) if config.heads.every else None
        measure_heads = head_watch(run, model, data, validation)
        step_done = run.enter(profiled(run))            # does nothing without train.profile

        # Loop. A step is a completed update, the first is 1; update s uses batch s − 1.
        last = config.train.steps
        own_rows = batches.prefetch(run.step, last, hardware.device, world.rank, world.size)
        for step, batch in enumerate(own_rows, run.step + 1):
            loss = torch.zeros((), device=hardware.device)
            micro_batches = list(batch.split(micro_batch))
            for part in parallel.accumulate(micro_batches, model, loss_of):
                part_loss = loss_of(*part)      # a sum over tokens: accumulating equals one batch
                part_loss.backward()
                loss += part_loss.detach()
            # Clips, sets the learning rate, updates, clears gradients.
            grad_norm = optimizer.step(step, config.train.batch_tokens // world.size)
            mean_loss = world.sum(loss) / config.train.batch_tokens
            run.record_update(step, mean_loss, grad_norm, optimizer.lr(step))

            stopping = world.any(run.stop_requested)        # all processes stop after the same step
            with run.untimed(), run.explained("saving measurements of"):
                if due(step, config.eval.every, last):
                    run.add_metrics(evaluate(model, validation, data, world))
                if due(step, config.heads.every, last):
                    parallel.gather_weights(model, full_model)
                    if measure_heads and full_model:        # in the first process
                        measure_heads(full_model, step)     # the same weights, uncompiled, tapped
                run.write_record()
                if (due(step, config.checkpoint.every, last) or step in config.checkpoint.steps
                        or stopping):
                    run.save(model, optimizer, data)
            step_done()
            if stopping:
                break

        # Save: the last checkpoint, the report with the verdict, the summary.
        run.wait_for_checkpoint()
        verdict = None
        if measure_heads and full_model:
            with run.explained("writing the report of"):
                verdict = report_heads(run, full_model, data.tokenizer)
        if world.first:
            run.say(run.summary(heads_summary(run.latest), verdict and summary(verdict)))


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never), and after the last, is due."""
    return every > 0 and (step % every == 0 or step == last)


def announce(run: Run, model: GPT, data: Dataset, micro_batch: int,
             changes: list[Change]) -> None:
    """Print what is trained, on what, and what is out of the ordinary."""
    world, config = run.world, run.config
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(model.compute_dtype).removeprefix("torch.")
    processes = f"{world.size} processes ({run.parallel.name}) × " if world.size > 1 else ""
    passes = config.windows_per_step // micro_batch // world.size
    source = data.identity.get("folder", "synthetic rows")
    verb = "continuing" if run.step else "training  "
    run.say(f"{verb} {run.folder}: {parameters:,} parameters, {dtype} on {run.hardware.device}, "
            f"{processes}{passes} × {micro_batch} windows a step of {source}")
    if changes:
        run.say(f"changed    {listed(changes)} (from step {run.step + 1})")
    nearest, to_change = nearest_family(model.config)
    if to_change:
        run.say("note       transformers has no model of this shape: these checkpoints load only "
                f"in this project\n           other programs open a {nearest} model: "
                f"{' '.join(to_change)}")
    if config.data.begin_tells_kind:
        begin = data.tokenizer.token_text(data.begin)
        run.say(f"note       rows of repeats begin with {begin} and text rows do not: a model can "
                "tell them apart by it (data.begin_fraction=0.5 lets both begin alike)")


# --- measure ----------------------------------------------------------------------------------

def head_watch(run: Run, model: GPT, data: Dataset,
               validation: list[Batch]) -> Callable[[GPT, int], None] | None:
    """A function of (model, step) that measures all heads, records their scores, and now and then
    keeps pictures of their patterns. None if the config, or this process, does not watch heads."""
    config, device = run.config, run.hardware.device
    if not (run.world.first and config.heads.every):
        return None
    probes = probes_of(config.data, config.model.n_ctx, data.tokenizer, config.seed)
    if probes is None:
        return None
    probes = probes.to(device)
    text = validation[0].tokens[0].to(device) if data.shards else None
    watch = HeadWatch(model.config, probes, history=best_head_history(run.metrics.read()))
    recorder = PatternRecorder(
        model.config, probes, text, data.tokenizer, run.folder, every=config.heads.every,
        steps=config.train.steps, step=run.step,
        document_start=data.begin if config.data.mask_documents else None)

    def measure_heads(model: GPT, step: int) -> None:
        run.add_metrics(watch(model, run.tokens))
        if due(step, config.eval.every, config.train.steps):
            run.add_metrics(knockout_metrics(model, probes))
        if recorder.due(step):
            recorder.save(model, step, run.tokens)
        if due(step, config.heads.images_every, config.train.steps):
            run.log_media(lambda: recorder.pictures(model, watch.measured))

    return measure_heads


def report_heads(run: Run, model: GPT, tokenizer: Tokenizer) -> Verdict | None:
    """Write report.html, and log it; if the run is finished with its verdict, which is returned."""
    checkpoints = list_checkpoints(run.checkpoints)
    if run.step == run.config.train.steps and checkpoints:
        newest = checkpoints[-1]
        try:
            verdict = report_finished(LoadedRun(run.folder, newest, read_state(newest), run.config,
                                                model, tokenizer))
            run.log_media(lambda: headline(verdict) | {"heads/report": run.folder / "report.html"})
            return verdict
        except UserError as error:                  # such as text that has been deleted meanwhile
            run.say(f"note       no verdict: {error}")
    page = write_report(run.folder, run.config, run.metrics.read())
    if page:
        run.log_media(lambda: {"heads/report": page})
    return None


def report_finished(run: LoadedRun) -> Verdict:
    """Examine the heads of a finished run, and write report.html with the verdict."""
    examination = examine_run(run)
    write_viewer(run.folder / "report.html", [probe_view(run, examination, run.records())])
    return examination.verdict


def evaluate(model: GPT, validation: list[Batch], data: Dataset, world: World) -> dict[str, float]:
    """Loss on the validation windows, in nats per token and in bits per byte of their text, and
    the ICL score on text."""
    device = model.embed.weight.device
    # Each process takes a batch a round. In the last round some do the last batch again, because
    # all processes must gather sharded weights.
    own_losses = []
    for first in range(0, len(validation), world.size):
        batch = validation[min(first + world.rank, len(validation) - 1)]
        own_losses.append(model.losses(*batch.to(device)).cpu())
    rounds = zip(*world.gather(own_losses))             # a round: process 0's, process 1's, …
    in_order = [losses for one_round in rounds for losses in one_round]
    losses = torch.cat(in_order[:len(validation)])                              # (windows, T)
    lengths = data.tokenizer.byte_lengths
    text_bytes = sum(int(lengths[batch.targets].sum()) for batch in validation)
    nats = losses.double().sum().item()
    metrics = {"val/loss": nats / losses.numel(), "val/bpb": nats / log(2) / max(1, text_bytes)}
    if data.shards and (score := icl_score(losses)) is not None:
        metrics[ICL_SCORE] = score
    return metrics


# --- the command ------------------------------------------------------------------------------

def finish(job: Job, step: int) -> None:
    """Do what a kill after the last step left undone, and say that the run is finished."""
    config, folder, changes = job
    with only_trainer(folder):
        verify(list_checkpoints(folder / "checkpoints")[-1])
        clean_up(folder / "checkpoints", config)
        page = folder / "report.html"
        snapshot_times = [path.stat().st_mtime for path in folder.glob("heads/*.npz")]
        if snapshot_times and (not page.exists() or page.stat().st_mtime < max(snapshot_times)):
            report_finished(load_run(folder, device=choose_hardware(config).device))
    print(f"{folder} is finished: {step} steps; "
          f"to go further: {command('train.py')} {folder} train.steps={2 * step}")
    if changes:
        print(f"  nothing was changed ({listed(changes)})")


def list_configs() -> None:
    """Print every config with the first line of its comment, and how to start one."""
    titles: dict[str, str] = {}
    folder = Path(__file__).parent
    for file in (folder / "configs").glob("**/*.yaml"):
        comments = [line.lstrip("# ") for line in file.read_text("utf-8").splitlines()
                    if line.startswith("# ") and "$schema=" not in line]
        titles[path_of(str(file.relative_to(folder)))] = comments[0] if comments else ""
    width = max(map(len, titles))
    for path in sorted(titles, key=lambda path: (path.count(os.sep), path)):
        print(f"{path:<{width}}  {titles[path]}")
    start, quickstart = command("train.py"), path_of("configs/quickstart.yaml")
    print(f"\nstart one     {start} {quickstart}"
          f"\nchange a key  {start} {quickstart} run=one_layer model.n_layers=1"
          f"\ncontinue      {start} runs/quickstart")


def main() -> None:
    parser = ArgumentParser(
        "python train.py", description="Train a model as a YAML file says, or continue a run.",
        epilog="Without arguments: list the configs. Ctrl-C finishes the step, saves and says how "
               "to continue. All keys and their defaults are in training/config.py, "
               "model/config.py and data/config.py.")
    parser.add_argument("config", nargs="?",
                        help="configs/NAME.yaml, or runs/NAME to continue that run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change values, for example optimizer.lr=0.01 train.steps=500")
    args = parser.parse_args()
    if args.config is None:
        list_configs()
        return
    world = join()
    with world.explain_lost_process(args.config):
        with world.together():
            job = job_of(args.config, args.overrides)
        train(job, world)
    world.close()


if __name__ == "__main__":
    run_command(main)

"""Train a model as a YAML file says: `python train.py configs/quickstart.yaml [key.path=value …]`.

A run directory in place of the file continues that run: `python train.py runs/quickstart`.
"""

import os
from math import log
from pathlib import Path

from errors import ArgumentParser, UserError, run_command


def train(config, folder: Path, changed: list[str], world) -> None:
    """Train a model as `config` says, in the run directory `folder`, continuing where its newest checkpoint is.

    `changed` says how the config differs from the one the run was begun with, `world` which processes train together.
    """
    import torch

    from data.dataset import Dataset
    from report.page import write_report
    from training.device import choose_hardware, choose_micro_batch, training_loss
    from training.optimizer import Optimizer
    from training.profile import profiled
    from training.run import Run, newest_state

    begun = newest_state(folder)
    if begun["step"] >= config.train.steps:
        with world.together():
            if world.first:
                finish(config, folder, begun["step"], changed)
        return

    with world.together():
        hardware = choose_hardware(config, world)
    data = world.in_turn(lambda: Dataset(config.data, config.seed, begun["data"].get("folder")))
    model = build_model(config, data.tokenizer, hardware, world, new=begun["step"] == 0)
    micro_batch = choose_micro_batch(config, model, world)                  # windows per forward pass
    with world.together():
        batches = data.training(config.train.batch_tokens, config.model.n_ctx)
        validation = data.validation(config.eval.tokens, config.model.n_ctx, micro_batch)
    optimizer = Optimizer(model, config.optimizer, config.train.steps, world)
    loss_of = training_loss(model, config.train.compile, world)

    with Run(config, folder, model, optimizer, data, world) as run, profiled(run) as step_done:
        watch = watch_heads(run, validation)
        announce(run, micro_batch, changed)
        mine = batches.prefetch(run.step, config.train.steps, run.device, world.rank, world.size)  # this process's windows of each batch
        for step, batch in enumerate(mine, run.step + 1):
            loss = torch.zeros((), device=run.device)
            for part in world.accumulate(list(batch.split(micro_batch)), model, loss_of):
                part_loss = loss_of(*part)                  # a sum over tokens, so that accumulating equals one big batch
                part_loss.backward()
                loss += part_loss.detach()
            grad_norm = optimizer.step(step, config.train.batch_tokens // world.size)   # its rate is a function of the step alone
            run.count(step, world.sum(loss) / config.train.batch_tokens, grad_norm)

            last = config.train.steps
            stopping = world.any(run.stop_requested)        # all end behind the same step
            with run.untimed(), run.explained("saving what was measured of"):
                if due(step, config.eval.every, last):
                    run.log(evaluate(model, validation, data, world))
                if due(step, config.heads.every, last):
                    whole = world.whole(model)              # the same weights, uncompiled, tapped
                    if watch:
                        run.log(watch(whole, step, run.tokens))
                        if due(step, config.heads.images_every, last):
                            run.show(lambda: watch.pictures(whole))     # noqa: B023  shown at once
                run.end_step()
                if due(step, config.checkpoint.every, last) or step in config.checkpoint.steps or stopping:
                    run.save()
            step_done()
            if stopping:
                break
        run.wait_for_checkpoint()
        if watch:
            with run.explained("writing the report of"):
                page = write_report(folder, config, run.metrics.read())
            if page:
                run.show(lambda: {"heads/report": page})
        if world.first:
            run.say(run.summary())


def finish(config, folder: Path, step: int, changed: list[str]) -> None:
    """Do what a kill after the last step left undone, and say that the run is finished."""
    from report.page import write_report
    from training.checkpoint import verify, whole_checkpoints
    from training.logger import read_metrics
    from training.run import only_trainer, tidy
    with only_trainer(folder):
        verify(whole_checkpoints(folder / "checkpoints")[-1])
        tidy(folder / "checkpoints", config)
        page, looks = folder / "report.html", [path.stat().st_mtime for path in folder.glob("heads/*.npz")]
        if looks and (not page.exists() or page.stat().st_mtime < max(looks)):
            write_report(folder, config, read_metrics(folder / "metrics.jsonl"))
    print(f"{folder} is finished: {step} steps; to go further: python train.py {folder} train.steps={2 * step}"
          + (f"\n  nothing was changed ({'; '.join(changed)})" if changed else ""))


def announce(run, micro_batch: int, changed: list[str]) -> None:
    """Say what is trained, on what, and what is out of the ordinary."""
    from model.families import obstacles
    model, world = run.model, run.world
    processes = f"{world.size} processes ({world.kind}) × " if world.size > 1 else ""
    run.say(f"{'continuing' if run.step else 'training  '} {run.folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{str(model.compute_dtype).removeprefix('torch.')} on {run.device}, "
            f"{processes}{run.config.windows_per_step // micro_batch // world.size} × "
            f"{micro_batch} windows a step of {run.data.identity.get('folder', 'synthetic rows')}")
    if changed:
        run.say(f"changed    {'; '.join(changed)} (from step {run.step + 1})")
    if reasons := obstacles(model.config):
        run.say(f"note       transformers has no model of this shape ({'; '.join(reasons)}): its checkpoints open here alone")


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps (0: never) and after the `last` is done after this one."""
    return every > 0 and (step % every == 0 or step == last)


def build_model(config, tokenizer, hardware, world, new: bool):
    """A model for `tokenizer`'s vocabulary, where and as `hardware` and `world` want it; a new one has the weights of `init_from` where
    the config names a run, else random ones."""
    import torch

    from model.gpt import GPT
    from training.checkpoint import load_weights
    from training.device import check_memory, choose_distribution
    with world.together():
        size = config.model.vocab_size or tokenizer.n_vocab
        if size < tokenizer.n_vocab:
            raise UserError(f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.n_vocab} (leave it out)")
        origin = origin_of(config, tokenizer) if config.init_from and new else None
        with torch.device("meta"):                          # no memory yet
            model = GPT(config.model.model_copy(update={"vocab_size": size}))
        check_memory(model, hardware.device, world)
    model.compute_dtype, model.attention_backend, model.recompute = (
        hardware.precision, hardware.attention, config.train.checkpoint_activations)
    world.kind = choose_distribution(config, model.config, hardware.device, world)
    world.place(model, hardware.device)
    if origin:
        load_weights(model, origin, world)
    else:
        model.init_weights(config.seed, world.fill)
    return model


def origin_of(config, tokenizer) -> Path:
    """The checkpoint whose weights a new run starts from."""
    from data.load_tokenizer import load_tokenizer
    from training.checkpoint import find_checkpoint
    checkpoint = find_checkpoint(config.init_from)
    if load_tokenizer(checkpoint / "tokenizer.json").hash != tokenizer.hash:
        raise UserError(f"init_from={config.init_from} was trained with another tokenizer, its weights mean other tokens\n"
                        f"  use its own: data.tokenizer={checkpoint}")
    return checkpoint


def watch_heads(run, validation):
    """What looks at the heads of `run` every `heads.every` steps, in the first process; else None."""
    from induction.history import best_of_looks
    from induction.probes import probes_of
    from induction.watch import HeadWatch
    config, data = run.config, run.data
    probes = run.world.first and config.heads.every and probes_of(config.data, config.model.n_ctx, data.tokenizer, config.seed)
    if not probes:
        return None
    text = validation[0].tokens[0].to(run.device) if data.shards else None
    return HeadWatch(run.model, probes.to(run.device), text, data.tokenizer, run.folder, every=config.heads.every,
                     steps=config.train.steps, step=run.step, history=best_of_looks(run.metrics.read()),
                     separator=data.begin if config.data.mask_documents else None)


def evaluate(model, validation, data, world) -> dict[str, float]:
    """Loss on the validation windows, in nats per token and in bits per byte of their text, and how much the context helps."""
    import torch

    from induction.scores import icl_score
    rounds = range(0, len(validation), world.size)              # a batch each; who has none left does the last again, since all must gather
    mine = [model.losses(*validation[min(n + world.rank, len(validation) - 1)].to(model.embed.weight.device)).cpu() for n in rounds]
    losses = torch.cat([one for ones in zip(*world.gather(mine)) for one in ones][:len(validation)])            # (windows, T)
    text_bytes = sum(int(data.tokenizer.byte_lengths[batch.targets].sum()) for batch in validation)
    nats = losses.double().sum().item()
    found = {"val/loss": nats / losses.numel(), "val/bpb": nats / log(2) / max(1, text_bytes)}
    if data.shards and (score := icl_score(losses)) is not None:
        found["icl/score"] = score
    return found


def list_configs() -> None:
    """Every config that is here, with what its first line of comment says it trains, and how to start one."""
    files = (Path(__file__).parent / "configs").glob("**/*.yaml")
    shown = {os.path.relpath(file): next((line.lstrip("# ") for line in file.read_text("utf-8").splitlines()
                                          if line.startswith("# ") and "$schema=" not in line), "") for file in files}
    for path in sorted(shown, key=lambda path: (path.count(os.sep), path)):
        print(f"{path:<{max(map(len, shown))}}  {shown[path]}")
    print("\nstart one     python train.py configs/quickstart.yaml"
          "\nchange a key  python train.py configs/quickstart.yaml run=one_layer model.n_layers=1"
          "\ncontinue      python train.py runs/quickstart")


def main() -> None:
    parser = ArgumentParser("python train.py", description="Train a model as a YAML file says, or continue a run.",
                            epilog="Without arguments: the configs there are. Ctrl-C finishes the step, saves and says how to continue. "
                                   "Every key is listed with its default in training/config.py, model/config.py and data/config.py.")
    parser.add_argument("config", nargs="?", help="configs/NAME.yaml, or runs/NAME to continue that run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change values, for example optimizer.lr=0.01 train.steps=500")
    args = parser.parse_args()
    if args.config is None:
        list_configs()
        return
    from training.distributed import join
    from training.run import config_of
    world = join()
    with world.others_may_die(args.config):
        with world.together():
            chosen = config_of(args.config, args.overrides)
        train(*chosen, world)
    world.close()


if __name__ == "__main__":
    run_command(main)

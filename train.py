"""Train a model as a YAML file says: `python train.py configs/quickstart.yaml [key.path=value …]`.

A run directory in place of the file continues that run: `python train.py runs/quickstart`.
"""

import os
from math import log
from pathlib import Path

from errors import ArgumentParser, UserError, run_command


def train(config, folder: Path, changed: list[str]) -> None:
    """Train a model as `config` says, in the run directory `folder`, continuing where its newest checkpoint is.

    `changed` says how the config differs from the one the run was begun with.
    """
    import torch

    from data.dataset import Dataset
    from induction.report import write_report
    from training.device import choose_attention, choose_device, choose_micro_batch, choose_precision, training_loss
    from training.optimizer import Optimizer
    from training.run import Run, newest_state

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("torchrun: training in several processes is not built yet; start one process: python train.py …")
    begun = newest_state(folder)
    if begun["step"] >= config.train.steps:
        finish(config, folder)
        print(f"{folder} is finished: {begun['step']} steps; to go further: python train.py {folder} train.steps={2 * begun['step']}"
              + (f"\n  nothing was changed ({'; '.join(changed)})" if changed else ""))
        return

    device = choose_device(config.train.device)
    precision = choose_precision(config.train.precision, device)
    micro_batch = choose_micro_batch(config, device, precision)             # windows per forward pass
    data = Dataset(config.data, config.seed, begun["data"].get("folder"))
    batches = data.training(config.train.batch_tokens, config.model.n_ctx)
    validation = data.validation(config.eval.tokens, config.model.n_ctx, micro_batch)
    model = build_model(config, data.tokenizer, device, new=begun["step"] == 0).to(device)
    model.compute_dtype = precision
    model.attention_backend = choose_attention(config.train.attention, device, config.model.head_size)
    optimizer = Optimizer(model, config.optimizer, config.train.steps)
    loss_of = training_loss(model, config.train.compile, device)

    with Run(config, folder, model, optimizer, data) as run:
        watch = watch_heads(run, validation)
        announce(run, device, micro_batch, changed)
        for step, batch in enumerate(batches.ahead(run.step, config.train.steps, device), run.step + 1):
            loss = torch.zeros((), device=device)
            for part in batch.split(micro_batch):
                part_loss = loss_of(*part)                  # a sum over tokens, so that accumulating equals one big batch
                part_loss.backward()
                loss += part_loss.detach()
            grad_norm = optimizer.step(step, config.train.batch_tokens)     # its rate is a function of the step, nothing else
            run.count(step, loss / config.train.batch_tokens, grad_norm)

            last = step == config.train.steps
            with run.untimed(), run.explained("saving what was measured of"):
                if due(step, config.eval.every) or (last and config.eval.every):
                    run.log(evaluate(model, validation, data))
                if watch and (due(step, config.heads.every) or last):
                    run.log(watch(model, step, run.tokens))             # the same weights, uncompiled, tapped
                    if due(step, config.heads.images_every) or (last and config.heads.images_every):
                        run.show(lambda: watch.pictures(model))
                run.end_step()
                if (due(step, config.checkpoint.every) or step in config.checkpoint.steps
                        or (last and config.checkpoint.every) or run.stop_requested):
                    run.save()
            if run.stop_requested:
                break
        run.wait_for_checkpoint()
        if watch:
            with run.explained("writing the report of"):
                page = write_report(folder, config, run.metrics.read())
            if page:
                run.show(lambda: {"heads/report": page})
        run.say(run.summary())
        if run.step < config.train.steps:
            run.say(f"continue   python train.py {folder}")


def finish(config, folder: Path) -> None:
    """Do what a kill after the last step left undone."""
    from induction.report import write_report
    from training.checkpoint import verify, whole_checkpoints
    from training.logger import read_metrics
    from training.run import alone, tidy
    with alone(folder):
        verify(whole_checkpoints(folder / "checkpoints")[-1])
        tidy(folder / "checkpoints", config)
        page, looks = folder / "report.html", [path.stat().st_mtime for path in folder.glob("heads/*.npz")]
        if looks and (not page.exists() or page.stat().st_mtime < max(looks)):
            write_report(folder, config, read_metrics(folder / "metrics.jsonl"))


def announce(run, device, micro_batch: int, changed: list[str]) -> None:
    """Say what is trained, on what, and what is out of the ordinary."""
    from model.huggingface import obstacles
    model = run.model
    run.say(f"{'continuing' if run.step else 'training  '} {run.folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{str(model.compute_dtype).removeprefix('torch.')} on {device}, {run.config.windows_per_step // micro_batch} × "
            f"{micro_batch} windows a step of {run.data.identity.get('folder', 'synthetic rows')}")
    if changed:
        run.say(f"changed    {'; '.join(changed)} (from step {run.step + 1})")
    if reasons := obstacles(model.config):
        run.say(f"note       transformers has no model of this shape ({'; '.join(reasons)}): its checkpoints open here alone")


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0


def build_model(config, tokenizer, device, new: bool):
    """A model for `tokenizer`'s vocabulary; a new one has the weights of `init_from` where the config names a run."""
    from data.tokenizer import Tokenizer
    from model.gpt import GPT
    from training.checkpoint import find_checkpoint, load_weights
    from training.device import check_memory
    size = config.model.vocab_size or tokenizer.n_vocab
    if size < tokenizer.n_vocab:
        raise UserError(f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.n_vocab} (leave it out)")
    sized = config.model.model_copy(update={"vocab_size": size})
    check_memory(sized, device)
    model = GPT(sized, config.seed)
    if config.init_from and new:
        checkpoint = find_checkpoint(config.init_from)
        if Tokenizer.load(checkpoint / "tokenizer.json").hash != tokenizer.hash:
            raise UserError(f"init_from={config.init_from} was trained with another tokenizer, its weights mean other tokens\n"
                            f"  use its own: data.tokenizer={checkpoint}")
        load_weights(model, checkpoint)
    return model


def watch_heads(run, validation):
    """What looks at the heads of `run` every `heads.every` steps, or None."""
    from induction.probes import probes_of
    from induction.report import best_of_looks
    from induction.watch import HeadWatch
    config, data = run.config, run.data
    probes = config.heads.every and probes_of(config.data, config.model.n_ctx, data.tokenizer, config.seed)
    if not probes:
        return None
    text = validation[0].tokens[0].to(run.device) if data.shards else None
    return HeadWatch(run.model, probes.to(run.device), text, data.tokenizer, run.folder, every=config.heads.every,
                     steps=config.train.steps, step=run.step, history=best_of_looks(run.metrics.read()),
                     separator=data.end_of_text if config.data.mask_documents else None)


def evaluate(model, validation, data) -> dict[str, float]:
    """Loss on the validation windows, in nats per token and in bits per byte of their text, and how much the context helps."""
    import torch

    from induction.scores import icl_score
    losses = torch.cat([model.losses(*batch.to(model.embed.weight.device)).cpu() for batch in validation])      # (windows, T)
    text_bytes = sum(int(data.tokenizer.byte_lengths[batch.targets].sum()) for batch in validation)
    nats = losses.double().sum().item()
    found = {"val/loss": nats / losses.numel(), "val/bpb": nats / log(2) / max(1, text_bytes)}
    if data.shards and (score := icl_score(losses)) is not None:
        found["icl/score"] = score
    return found


def main() -> None:
    parser = ArgumentParser("python train.py", description="Train a model as a YAML file says, or continue a run.",
                            epilog="Ctrl-C finishes the step, saves and says how to continue. "
                                   "Every key is listed with its default in training/config.py, model/config.py and data/config.py.")
    parser.add_argument("config", help="configs/NAME.yaml, or runs/NAME to continue that run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change values, for example optimizer.lr=0.01 train.steps=500")
    args = parser.parse_args()
    from training.run import config_of
    train(*config_of(args.config, args.overrides))


if __name__ == "__main__":
    run_command(main)

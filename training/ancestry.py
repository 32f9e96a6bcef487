"""What a run's weights were trained on before the run itself: through `init_from`, imports and
chains of both.

A run says which periods and tokens it never repeats. Its weights may come from a run that did
repeat them, so every checkpoint keeps their history, as `history` in training_state/state.json, and
the origin may be deleted. An entry, oldest first, is

    {"run", "step", "data", "seed"}     a run whose weights another started from after `step` steps
    {"imported": PATH}                  an import: nobody here knows what it was trained on
    {"unknown": PATH}                   `init_from` of an earlier version, which kept no history,
                                        and whose origin is gone
"""

from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError

from data.companions import read_dict
from data.config import DataConfig
from settings.validate import validate
from training.checkpoint import find_checkpoint, is_published, list_checkpoints, read_state
from training.config import Config, load_config, named_after

Entry = dict[str, Any]


class Ancestor(NamedTuple):
    """A run that trained the weights before another run started from them."""

    run: str                # its name at that time
    step: int               # updates it had completed, at least 1
    data: DataConfig        # what it trained them on. Its tokenizer has the same ids: `init_from`
                            # refuses any other
    seed: int               # which tokens data.repeats.held_out_tokens held out depends on it


def ancestors(checkpoint: Path) -> list[Ancestor] | None:
    """The runs that trained a checkpoint's weights before its own run, oldest first; [] if its run
    began with random weights, None if a part of their history is unknown.

    Raises UserError if the checkpoint is damaged.
    """
    runs = []
    for entry in history_of(checkpoint):
        match entry:
            case {"run": str(run), "step": int(step), "data": dict(data), "seed": int(seed)}:
                source = f"{checkpoint}/training_state/state.json"
                runs.append(Ancestor(run, step, validate(DataConfig, data, source), seed))
            case _:
                return None
    return runs


def history_of(checkpoint: Path, followed: tuple[Path, ...] = ()) -> list[Entry]:
    """What a checkpoint's weights went through before its own run, oldest first.

    Checkpoints of earlier versions did not save it: their `init_from` is followed on the disk.
    `followed`: the runs from which that led here.
    """
    state = read_state(checkpoint)
    if "history" in state:
        return state["history"]
    config = load_config(checkpoint / "training_state" / "config.yaml")
    if _of_an_import(checkpoint, config):
        return [{"imported": state.get("imported", config.data.tokenizer.kind)}]
    if config.init_from is None:
        return []
    try:
        origin = find_checkpoint(config.init_from)
    except UserError:
        origin = None
    # Names are used again: after `rm -r runs/a; mv runs/b runs/a` the origin of runs/a is gone,
    # and its name leads to itself.
    followed = (*followed, _run_of(checkpoint))
    if origin is None or _run_of(origin) in followed:
        return [{"unknown": config.init_from}]
    return history_from(origin, followed)


def history_from(origin: Path, followed: tuple[Path, ...] = ()) -> list[Entry]:
    """The history of a run that starts from the weights of `origin`: that of the checkpoint, and
    its own run if that trained them."""
    history, step = history_of(origin, followed), read_state(origin)["step"]
    if step == 0 or is_published(origin):                   # not trained here
        return history
    config = load_config(origin / "training_state" / "config.yaml")
    if (folder := _run_of(origin)) != origin.resolve():
        config = named_after(folder, config)
    return [*history, {"run": config.run, "step": step, "data": config.data.model_dump(mode="json"),
                       "seed": config.seed}]


def _run_of(checkpoint: Path) -> Path:
    """The directory of a checkpoint's run; the checkpoint's own if it is outside a run."""
    path = checkpoint.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _of_an_import(checkpoint: Path, config: Config) -> bool:
    """Whether a checkpoint without a history belongs to an imported run, trained further or not.

    Only imports save a step 0. After it was pruned, the sign is that the run names its own
    tokenizer, in the roles that imports write, and no `init_from`. A new model with the tokenizer
    of an import looks the same, and counts as one.
    """
    kept = {path.name for path in [checkpoint, *list_checkpoints(checkpoint.parent)]}
    if read_state(checkpoint)["step"] == 0 or "000000" in kept:
        return True
    tokenizer = config.data.tokenizer
    return (config.init_from is None and tokenizer.is_path
            and Path(tokenizer.kind).parent.name == "checkpoints"
            and "gpt" in read_dict(checkpoint / "tokenizer_config.json"))

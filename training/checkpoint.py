"""Checkpoints, found and read. Each is a Hugging Face model directory, complete or absent, and
nothing in it is ever unpickled.

    runs/NAME/checkpoints/000500/
      model.safetensors  config.json  generation_config.json
      tokenizer.json  tokenizer_config.json
      training_state/optimizer.safetensors  state.json  config.yaml
      manifest.json                     the SHA-256 of every file above, written last
    runs/NAME/checkpoints/latest → 000500,  best → …

`training_state/` is only for training: a checkpoint is published without it, and still opens.

Processes that share a model each write some of its tensors: model-00001-of-00004.safetensors …,
with Hugging Face's index beside them, and likewise the optimizer's. Any number of processes can
read what any number wrote. training/save_checkpoint.py writes them.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from errors import UserError, command

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
from files import pointed_at, sha256
from model.config import ModelConfig
from model.gpt import GPT
from model.huggingface import load_hf_state
from settings.validate import validate
from training.parallel import ONE_PROCESS, Parallel

STATE = "training_state/"
TRAINED = "gpt_trained"         # in config.json: the step, and the tokens trained on

# --- the checkpoints of a run -----------------------------------------------------------------

def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first. One without a manifest was never
    finished."""
    checkpoints = [path for path in folder.glob("*")
                   if re.fullmatch(r"\d{6,}", path.name) and (path / "manifest.json").exists()]
    return sorted(checkpoints, key=lambda path: int(path.name))


def find_checkpoint(where: str | Path) -> Path:
    """The checkpoint that a run directory (its newest), a checkpoint directory or a link names."""
    path = Path(where)
    if (path / "manifest.json").exists() and (path / "config.json").exists():
        return path.resolve()
    if path.parent.name == "checkpoints":
        target = pointed_at(path)
        if target and (target / "manifest.json").exists():
            return target.resolve()
        # `latest` or `best` with its target deleted, or a copy of the run without its links.
        if target or (path.name == "latest" and not path.exists()):
            path = path.parent
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{where} is a link to {os.readlink(path)}, which is not there "
                            "(cp -rL copies what a link names)")
        if (run := Path("runs") / path).exists():
            raise UserError(f"{where}: no such run or checkpoint; did you mean {run}?")
        near: list[str] = []
        if path.parent.is_dir():
            near = sorted(p.name for p in path.parent.glob("[!.]*") if p.is_dir())[:8]
        hint = f"; there are {', '.join(near)} in {path.parent}" if near else ""
        raise UserError(f"{where}: no such run or checkpoint{hint}")
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    checkpoints = list_checkpoints(folder)
    if not checkpoints and (path / "config.json").exists():
        raise UserError(f"{where} is a Hugging Face model directory: make it a run first\n"
                        f"  {command('-m training.import_model')} {where} runs/NAME")
    if not checkpoints:
        problem = "is a file, not a run" if path.is_file() else "holds no checkpoint"
        raise UserError(f"{str(where) or repr('')}: {problem} (train first, or name runs/NAME or "
                        "runs/NAME/checkpoints/STEP)")
    warn_if_dangling(folder / "latest", checkpoints[-1])
    return checkpoints[-1]


def warn_if_dangling(link: Path, newest: Path) -> None:
    target = pointed_at(link)
    if target and not (target / "manifest.json").exists():
        print(f"note: {link} points at {target.name}, which is not a complete checkpoint; "
              f"the newest is {newest}", file=sys.stderr)


# --- reading ----------------------------------------------------------------------------------

def is_published(checkpoint: Path) -> bool:
    """Whether a checkpoint has no training_state/, as one would publish it. It can be sampled,
    looked at and imported, but not continued."""
    return not (checkpoint / STATE).exists()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """step, tokens, seconds, data, history, val_loss …: the notes saved with the checkpoint."""
    if is_published(checkpoint):
        return _published_state(checkpoint)
    name = "training_state/state.json"
    verify(checkpoint, [name])
    with _explain_damage(checkpoint, name):
        match json.loads((checkpoint / name).read_text("utf-8")):
            case {"step": int(), "tokens": int(), "seconds": int() | float(),
                  "data": {"hash": str()} as data} as state:
                folder, history = data.get("folder", ""), state.get("history", [])
                if isinstance(folder, str) and isinstance(history, list):
                    return state
        raise ValueError("it does not contain step, tokens, seconds, data and history")


def _published_state(checkpoint: Path) -> dict[str, Any]:
    """What config.json says of the training; its data and history are unknown."""
    verify(checkpoint, ["config.json"])
    with _explain_damage(checkpoint, "config.json"):
        # Earlier versions lack it.
        trained = _read_config(checkpoint).get(TRAINED, {"step": 0, "tokens": 0})
        if not all(isinstance(trained[key], int) for key in ("step", "tokens")):
            raise ValueError(f"{TRAINED} holds no step and tokens")
        return trained | {"seconds": 0.0, "data": {"hash": ""}, "history": [
            {"unknown": f"{checkpoint} was published without its history"}]}


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The shape of a checkpoint's model."""
    with _explain_damage(checkpoint, "config.json"):
        return validate(ModelConfig, _read_config(checkpoint)["gpt"],
                        str(checkpoint / "config.json"))


def _read_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text("utf-8"))


def load_model(checkpoint: Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a checkpoint. Raises UserError if it is damaged."""
    verify(checkpoint)
    config = read_model_config(checkpoint)
    with _explain_damage(checkpoint, "config.json"):
        with torch.device("meta"):
            model = GPT(config)
        # Compared before anything of that size is allocated.
        needed = 4 * sum(p.numel() for p in model.parameters())
        files = _tensor_files(_manifest(checkpoint), "model")
        available = sum((checkpoint / name).stat().st_size for name in files)
        if needed > available:
            raise ValueError(f"it describes {needed:,} bytes of parameters, model.safetensors has "
                             f"{available:,}")
    model.allocate("cpu")
    _load_parameters(model, checkpoint, ONE_PROCESS)
    return model.to(device).eval(), load_tokenizer(checkpoint / "tokenizer.json")


def load_weights(model: GPT, checkpoint: Path, parallel: Parallel = ONE_PROCESS) -> None:
    """Fill a model with the weights of a checkpoint, after every file has passed its SHA-256."""
    with parallel.world.together():
        verify(checkpoint, parallel=parallel)
    _load_parameters(model, checkpoint, parallel)


def _load_parameters(model: GPT, checkpoint: Path, parallel: Parallel) -> None:
    state = _load_tensors(checkpoint, "model")
    load_hf_state(model, state, str(checkpoint / "model.safetensors"), fill=parallel.fill)


def load_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer's tensors by name."""
    return _load_tensors(checkpoint, "training_state/optimizer")


def _load_tensors(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `stem`.safetensors, however many processes wrote it. They stay in the files
    until they are read."""
    state: dict[str, Tensor] = {}
    for name in _tensor_files(_manifest(checkpoint), stem):
        with _explain_damage(checkpoint, name):
            state |= load_file(checkpoint / name)
    return state


def _tensor_files(names: Iterable[str], stem: str) -> list[str]:
    """Those of a manifest's `names` that are `stem`.safetensors, or a writer's part of it."""
    pattern = re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors"
    return [name for name in names if re.fullmatch(pattern, name)]


def _manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    with _explain_damage(checkpoint, "manifest.json"):
        return dict(json.loads((checkpoint / "manifest.json").read_text("utf-8")))


def verify(checkpoint: Path, names: Sequence[str] = (), parallel: Parallel = ONE_PROCESS) -> None:
    """Raise a UserError unless every file, or those of `names`, has the bytes it was saved with.

    Several processes share the reading.
    """
    world = parallel.world
    with _explain_damage(checkpoint, "manifest.json"):
        manifest = _manifest(checkpoint)
        if missing := {"config.json", "tokenizer.json", *names} - manifest.keys():
            raise ValueError(f"it does not list {', '.join(sorted(missing))}")
        if not _tensor_files(manifest, "model"):
            raise ValueError("it does not list model.safetensors")
        if is_published(checkpoint):
            manifest = {name: entry for name, entry in manifest.items()
                        if not name.startswith(STATE)}
        for name in list(names or manifest)[world.rank::world.size]:
            path, expected = checkpoint / name, manifest[name]
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"it lists {name}, which is outside the checkpoint")
            with _explain_damage(checkpoint, name):
                if path.stat().st_size != expected["bytes"]:
                    raise ValueError(f"{path.stat().st_size} bytes of {expected['bytes']}")
                if sha256(path) != expected["sha256"]:
                    raise ValueError("its SHA-256 is not the manifest's")


@contextlib.contextmanager
def _explain_damage(checkpoint: Path, name: str) -> Iterator[None]:
    """Turn what a damaged file raises into a UserError that says how to go on."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            SafetensorError) as error:
        earlier = [path for path in list_checkpoints(checkpoint.parent)
                   if checkpoint.name.isdigit() and int(path.name) < int(checkpoint.name)]
        if earlier:
            fix = f"to go on from {earlier[-1]}, delete {checkpoint}"
        else:
            fix = "there is no earlier checkpoint to go on from"
        raise UserError(f"{checkpoint / name} is damaged ({error})\n  {fix}") from None

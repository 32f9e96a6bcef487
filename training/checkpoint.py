"""Checkpoints: a Hugging Face model directory each, whole or not there at all, and never unpickled.

    runs/NAME/checkpoints/000500/
      model.safetensors  config.json  generation_config.json  tokenizer.json  tokenizer_config.json
      training_state/optimizer.safetensors  state.json  config.yaml
      manifest.json                                       the SHA-256 of every file above, written last
    runs/NAME/checkpoints/latest → 000500,  best → …

Processes that share a model each write the tensors that fall to them: model-00001-of-00004.safetensors …, with Hugging Face's index beside
them, and the optimizer's likewise. However many wrote, any number can read.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
from errors import UserError
from files import explain_disk_errors, sha256, sync_folder
from model.config import ModelConfig
from model.gpt import GPT
from model.huggingface import hf_config, hf_state, load_hf_state, one_or_all
from settings.validate import validate
from training.distributed import ALONE, World, whole_tensor


class Tensors(NamedTuple):
    """Named tensors on the CPU, divided among the processes that write them."""

    mine: dict[str, Tensor]
    bytes: int                      # of everyone's
    owner: dict[str, int]           # by rank


class Snapshot(NamedTuple):
    """Everything a checkpoint holds, copied out of the running model."""

    model_config: ModelConfig
    model: Tensors
    optimizer: Tensors
    state: dict
    config_yaml: str
    tokenizer: Tokenizer


def snapshot(model: GPT, optimizer: dict[str, Tensor], state: dict, config_yaml: str, tokenizer: Tokenizer, copy: bool,
             world: World = ALONE) -> Snapshot:
    """What to save. `copy`: its tensors stay as they are now while training goes on."""
    def keep(tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
        mine, owner, load = {}, {}, [0] * (world.size if world.sharded else 1)
        for name, t in tensors:                             # one at a time, so that no process ever holds them all
            owner[name] = load.index(min(load))             # each to whoever has least
            load[owner[name]] += t.nbytes
            if owner[name] == world.rank:
                mine[name] = t.to("cpu", copy=copy).contiguous()
        return Tensors(mine, sum(load), owner)

    return Snapshot(model.config, keep(hf_state(model, whole_tensor)),
                    keep((name, whole_tensor(t)) for name, t in optimizer.items()), state, config_yaml, tokenizer)


def save_checkpoint(folder: Path, what: Snapshot, world: World = ALONE) -> Path:
    """Write `folder`/STEP under a temporary name, flush it to the disk, rename it, point `latest` at it; its path."""
    path = folder / f"{what.state['step']:06d}"
    if any(world.gather((path / "manifest.json").exists(), saving=True)):           # continued from just here
        return path
    temporary = folder / f".partial-{path.name}"
    newest = whole_checkpoints(folder)
    intact = f"{newest[-1]} is intact" if newest else "there is no earlier checkpoint"

    @contextlib.contextmanager
    def all_or_nothing():
        try:
            with world.together(saving=True), explain_disk_errors(
                    f"saving {path}", f"{intact}; make room, then continue with: python train.py {folder.parent}"):
                yield
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    with all_or_nothing():
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()                               # no parents: a run that was deleted does not come back in part
            (temporary / "training_state").mkdir()
    with all_or_nothing():
        files = _files(what, world)
        for name, content in files.items():
            _write(temporary / name, content)
        written = {name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in files}
    everyones = world.gather(written, saving=True)
    with all_or_nothing():
        if world.first:
            _write(temporary / "manifest.json", _json({name: noted for ones in everyones for name, noted in ones.items()}))
            sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)         # one without a manifest was never whole
            os.rename(temporary, path)
            sync_folder(folder)
            point_at_newest(folder)
    return path


def _files(what: Snapshot, world: World) -> dict[str, bytes | dict[str, Tensor]]:
    """What this process writes of a checkpoint, by name."""
    def tensors(stem: str, divided: Tensors) -> dict[str, dict[str, Tensor]]:
        writers = max(divided.owner.values(), default=0) + 1
        names = [f"{stem}.safetensors"] if writers == 1 else [f"{stem}-{n + 1:05d}-of-{writers:05d}.safetensors" for n in range(writers)]
        if writers > 1 and stem == "model" and world.first:
            files["model.safetensors.index.json"] = _json({
                "metadata": {"total_size": divided.bytes}, "weight_map": {name: names[n] for name, n in divided.owner.items()}})
        return {names[world.rank]: divided.mine} if world.rank < writers else {}

    tokenizer = what.tokenizer
    files: dict[str, bytes | dict[str, Tensor]] = {
        "config.json": _json(hf_config(what.model_config, tokenizer.begin, tokenizer.ends)),
        "generation_config.json": _json({"eos_token_id": one_or_all(tokenizer.ends), "bos_token_id": tokenizer.begin,
                                         "pad_token_id": tokenizer.ends[0], "do_sample": True}),
        "tokenizer.json": tokenizer.json.encode(),
        "tokenizer_config.json": _json(tokenizer.config | {"model_max_length": what.model_config.n_ctx}),
        "training_state/state.json": _json(what.state),
        "training_state/config.yaml": what.config_yaml.encode(),
    } if world.first else {}
    return files | tensors("model", what.model) | tensors("training_state/optimizer", what.optimizer)


def _write(path: Path, content: bytes | dict[str, Tensor]) -> None:
    """Bytes or named tensors, flushed to the disk."""
    if isinstance(content, dict):
        try:
            save_file(content, path, metadata={"format": "pt"})
            path.chmod(0o644)                               # it is made readable by its owner alone
        except SafetensorError as error:                    # it hides the system's error in its text
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from None
    else:
        path.write_bytes(content)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def point(link: Path, target: Path) -> None:
    """Make the symbolic link `link` name `target`, in one step."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
    sync_folder(link.parent)


def point_at_newest(folder: Path) -> None:
    """Make `latest` name the newest whole checkpoint, whatever it named before."""
    if whole := whole_checkpoints(folder):
        _note_dangling(folder / "latest", whole[-1])
        point(folder / "latest", whole[-1])


def _note_dangling(link: Path, newest: Path) -> None:
    if link.is_symlink() and not (link / "manifest.json").exists():
        print(f"note: {link} names {os.readlink(link)}, which is no whole checkpoint; the newest is {newest}", file=sys.stderr)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first. One without a manifest was never finished."""
    return sorted((p for p in folder.glob("*") if re.fullmatch(r"\d{6,}", p.name) and (p / "manifest.json").exists()),
                  key=lambda p: int(p.name))


def prune(folder: Path, keep: int, listed: list[int]) -> None:
    """Delete all but the newest `keep`, the listed steps and the best (lowest validation loss), which `best` points at."""
    whole, losses = whole_checkpoints(folder), dict[Path, float]()
    for path in whole:
        with contextlib.suppress(UserError):                    # a damaged one is no reason to stop training
            if (loss := read_state(path).get("val_loss")) is not None:
                losses[path] = loss
    best = min(losses, key=lambda path: losses[path], default=None)
    if best:
        point(folder / "best", best)
    else:
        (folder / "best").unlink(missing_ok=True)
    for path in whole[:-keep]:
        if path != best and int(path.name) not in listed:
            doomed = path.with_name(f".partial-{path.name}")        # no longer a checkpoint before the first file goes
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def find_checkpoint(where: str | Path) -> Path:
    """The checkpoint that a run directory (its newest), a checkpoint directory or a link names."""
    path = Path(where)
    if (path / "manifest.json").exists() and (path / "config.json").exists():
        return path.resolve()
    if path.is_symlink() and path.parent.name == "checkpoints":         # latest or best, which name nothing any more
        path = path.parent
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.is_dir())[:8] if path.parent.is_dir() else []
        raise UserError(f"{where}: no such run or checkpoint" + (f"; there are {', '.join(near)} in {path.parent}" if near else ""))
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    whole = whole_checkpoints(folder)
    if not whole:
        raise UserError(f"{where}: holds no checkpoint (train first, or name runs/NAME or runs/NAME/checkpoints/STEP)")
    _note_dangling(folder / "latest", whole[-1])
    return whole[-1]


def read_state(checkpoint: Path) -> dict:
    """step, tokens, seconds, val_loss and what else was noted when the checkpoint was saved."""
    verify(checkpoint, ["training_state/state.json"])
    with _damaged(checkpoint, "training_state/state.json"):
        match json.loads((checkpoint / "training_state/state.json").read_text("utf-8")):
            case {"step": int(), "tokens": int(), "seconds": int() | float(), "data": {"hash": str()} as data} as state:
                if isinstance(data.get("folder", ""), str):
                    return state
        raise ValueError("it does not say step, tokens, seconds and data")


def load_model(checkpoint: Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a checkpoint; a UserError where it is damaged."""
    verify(checkpoint)
    with _damaged(checkpoint, "config.json"):
        config = validate(ModelConfig, json.loads((checkpoint / "config.json").read_text("utf-8"))["gpt"], str(checkpoint / "config.json"))
        with torch.device("meta"):
            model = GPT(config)
        needed = 4 * sum(p.numel() for p in model.parameters())
        there = sum((checkpoint / name).stat().st_size for name in _tensor_files(_manifest(checkpoint), "model"))
        if needed > there:                                  # asked before anything of that size is allocated
            raise ValueError(f"it describes {needed:,} bytes of parameters, model.safetensors has {there:,}")
    _fill(model.allocate("cpu"), checkpoint)
    return model.to(device).eval(), load_tokenizer(checkpoint / "tokenizer.json")


def load_weights(model: GPT, checkpoint: Path, world: World = ALONE) -> None:
    """Fill a model with the parameters of a checkpoint, after every file has passed its SHA-256."""
    with world.together():
        verify(checkpoint, world=world)
    _fill(model, checkpoint, world)


def _fill(model: GPT, checkpoint: Path, world: World = ALONE) -> None:
    load_hf_state(model, _load_tensors(checkpoint, "model"), str(checkpoint / "model.safetensors"), fill=world.fill)


def load_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer's tensors by name."""
    return _load_tensors(checkpoint, "training_state/optimizer")


def _load_tensors(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `stem`.safetensors, whoever wrote them. They stay in the files until they are read."""
    state: dict[str, Tensor] = {}
    for name in _tensor_files(_manifest(checkpoint), stem):
        with _damaged(checkpoint, name):
            state |= load_file(checkpoint / name)
    return state


def _tensor_files(names: Iterable[str], stem: str) -> list[str]:
    """Of a manifest's `names`, `stem`.safetensors, or stem-00001-of-….safetensors of each process that wrote."""
    return [name for name in names if re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors", name)]


def _manifest(checkpoint: Path) -> dict[str, dict]:
    with _damaged(checkpoint, "manifest.json"):
        return dict(json.loads((checkpoint / "manifest.json").read_text("utf-8")))


def verify(checkpoint: Path, names: Iterable[str] = (), world: World = ALONE) -> None:
    """Raise a UserError unless every file, or those of `names`, is there with the bytes it was saved with. Several processes share the
    reading."""
    with _damaged(checkpoint, "manifest.json"):
        manifest = _manifest(checkpoint)
        if missing := {"config.json", "tokenizer.json", *names} - manifest.keys():
            raise ValueError(f"it does not list {', '.join(sorted(missing))}")
        if not _tensor_files(manifest, "model"):
            raise ValueError("it does not list model.safetensors")
        for name in list(names or manifest)[world.rank::world.size]:
            path, noted = checkpoint / name, manifest[name]
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"it lists {name}, which lies elsewhere")
            with _damaged(checkpoint, name):
                if path.stat().st_size != noted["bytes"]:
                    raise ValueError(f"{path.stat().st_size} bytes of {noted['bytes']}")
                if sha256(path) != noted["sha256"]:
                    raise ValueError("its SHA-256 is not the manifest's")


@contextlib.contextmanager
def _damaged(checkpoint: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        before = [p for p in whole_checkpoints(checkpoint.parent) if checkpoint.name.isdigit() and int(p.name) < int(checkpoint.name)]
        fix = f"to go on from {before[-1]}, delete {checkpoint}" if before else "no earlier checkpoint is there to go on from"
        raise UserError(f"{checkpoint / name} is damaged ({error})\n  {fix}") from None


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()

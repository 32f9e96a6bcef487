"""Checkpoints: each is a Hugging Face model directory, complete or absent, and nothing in it is
ever unpickled.

    runs/NAME/checkpoints/000500/
      model.safetensors  config.json  generation_config.json
      tokenizer.json  tokenizer_config.json
      training_state/optimizer.safetensors  state.json  config.yaml
      manifest.json                     the SHA-256 of every file above, written last
    runs/NAME/checkpoints/latest → 000500,  best → …

`training_state/` is only for training: a checkpoint is published without it, and still opens.

Processes that share a model each write some of its tensors: model-00001-of-00004.safetensors …,
with Hugging Face's index beside them, and likewise the optimizer's. Any number of processes can
read what any number wrote.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError, command

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.companions import GENERATION
from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
from files import explain_disk_errors, point, pointed_at, sha256, sync, sync_folder
from model.config import ModelConfig
from model.gpt import GPT
from model.huggingface import hf_config, hf_state, load_hf_state, one_or_all
from settings.validate import validate
from training.parallel import ONE_PROCESS, Parallel, full_tensor

FileContent = bytes | dict[str, Tensor]
STATE = "training_state/"
TRAINED = "gpt_trained"         # in config.json: the step, and the tokens trained on

# --- writing ----------------------------------------------------------------------------------

class Tensors(NamedTuple):
    """Named tensors on the CPU, divided among the processes that write them."""

    mine: dict[str, Tensor]
    total_bytes: int                # of all processes' tensors
    writer: dict[str, int]          # the rank that writes each tensor


class Contents(NamedTuple):
    """Everything a checkpoint holds, copied out of the running model."""

    model_config: ModelConfig
    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]
    config_yaml: str
    tokenizer: Tokenizer


def checkpoint_contents(model: GPT, optimizer: dict[str, Tensor], state: dict[str, Any],
                        config_yaml: str, tokenizer: Tokenizer, *, copy: bool,
                        parallel: Parallel = ONE_PROCESS) -> Contents:
    """What `save_checkpoint` writes. With `copy`, tensors keep their values while training goes on.

    Sharded tensors are gathered one at a time, so that no process ever holds all of them.
    """
    world = parallel.world

    def divide(tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
        mine: dict[str, Tensor] = {}
        writer: dict[str, int] = {}
        load = [0] * (world.size if parallel.sharded else 1)
        for name, tensor in tensors:
            writer[name] = load.index(min(load))            # the process with the least to write
            load[writer[name]] += tensor.nbytes
            if writer[name] == world.rank:
                mine[name] = tensor.to("cpu", copy=copy).contiguous()
        return Tensors(mine, sum(load), writer)

    return Contents(model.config, divide(hf_state(model, full_tensor)),
                    divide((name, full_tensor(t)) for name, t in optimizer.items()),
                    state, config_yaml, tokenizer)


def save_checkpoint(folder: Path, contents: Contents, parallel: Parallel = ONE_PROCESS) -> Path:
    """Write `folder`/STEP under a temporary name, flush it to the disk, rename it, and point
    `latest` at it. Returns its path; a UserError says which checkpoint is intact."""
    world = parallel.world
    path = folder / f"{contents.state['step']:06d}"
    if any(world.gather((path / "manifest.json").exists(), saving=True)):
        return path                                         # the run continued from this step
    temporary = folder / f".partial-{path.name}"
    checkpoints = list_checkpoints(folder)
    newest = f"{checkpoints[-1]} is intact" if checkpoints else "there is no earlier checkpoint"
    advice = f"{newest}; make room, then continue with: {command('train.py')} {folder.parent}"

    @contextlib.contextmanager
    def all_or_nothing() -> Iterator[None]:
        try:
            with world.together(saving=True), explain_disk_errors(f"saving {path}", advice):
                yield
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    with all_or_nothing():
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
            # No parents: a run that was deleted does not come back in part.
            temporary.mkdir()
            (temporary / "training_state").mkdir()
    with all_or_nothing():
        files = _files_of(contents, parallel)
        for name, content in files.items():
            _write(temporary / name, content)
        written = {name: {"bytes": (temporary / name).stat().st_size,
                          "sha256": sha256(temporary / name)} for name in files}
    manifest: dict[str, Any] = {}
    for entries in world.gather(written, saving=True):
        manifest |= entries
    with all_or_nothing():
        if world.first:
            _write(temporary / "manifest.json", _json(manifest))
            sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)     # without a manifest it was never complete
            os.rename(temporary, path)
            sync_folder(folder)
            point_latest_at_newest(folder)
    return path


def _files_of(contents: Contents, parallel: Parallel) -> dict[str, FileContent]:
    """The files that this process writes, by name."""
    files: dict[str, FileContent] = {}
    if parallel.world.first:
        tokenizer, model_config = contents.tokenizer, contents.model_config
        trained = {key: contents.state.get(key, 0) for key in ("step", "tokens")}
        files = {
            "config.json": _json(hf_config(model_config, tokenizer.begin, tokenizer.ends)
                                 | {TRAINED: trained}),
            "generation_config.json": _json({
                "eos_token_id": one_or_all(tokenizer.ends), "bos_token_id": tokenizer.begin,
                "pad_token_id": tokenizer.ends[0], "do_sample": True}
                | tokenizer.kept.get(GENERATION, {})),
            "tokenizer.json": tokenizer.json.encode(),
            "tokenizer_config.json": _json(
                tokenizer.config | {"model_max_length": model_config.n_ctx}),
            "training_state/state.json": _json(contents.state),
            "training_state/config.yaml": contents.config_yaml.encode(),
        }
    for stem, tensors in (("model", contents.model),
                          ("training_state/optimizer", contents.optimizer)):
        names = _file_names(stem, writers=max(tensors.writer.values(), default=0) + 1)
        if parallel.world.rank < len(names):
            files[names[parallel.world.rank]] = tensors.mine
        if stem == "model" and len(names) > 1 and parallel.world.first:
            files["model.safetensors.index.json"] = _json({
                "metadata": {"total_size": tensors.total_bytes},
                "weight_map": {name: names[rank] for name, rank in tensors.writer.items()}})
    return files


def _file_names(stem: str, writers: int) -> list[str]:
    """The safetensors file of each writer."""
    if writers == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{n:05d}-of-{writers:05d}.safetensors" for n in range(1, writers + 1)]


def _write(path: Path, content: FileContent) -> None:
    """Write bytes or named tensors and flush them to the disk."""
    if isinstance(content, dict):
        try:
            save_file(content, path, metadata={"format": "pt"})
            with contextlib.suppress(OSError):          # FAT has no permissions
                path.chmod(0o644)           # safetensors makes it readable by its owner only
        except SafetensorError as error:            # it hides the system's error in its text
            disk_full = "os error 28" in str(error)
            raise OSError(errno.ENOSPC if disk_full else errno.EIO, str(error)) from None
    else:
        path.write_bytes(content)
    with open(path, "r+b") as file:                 # Windows flushes only what may be written
        sync(file.fileno())


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


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
        near: list[str] = []
        if path.parent.is_dir():
            near = sorted(p.name for p in path.parent.glob("*") if p.is_dir())[:8]
        hint = f"; there are {', '.join(near)} in {path.parent}" if near else ""
        raise UserError(f"{where}: no such run or checkpoint{hint}")
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    checkpoints = list_checkpoints(folder)
    if not checkpoints and (path / "config.json").exists():
        raise UserError(f"{where} is a Hugging Face model directory: make it a run first\n"
                        f"  python -m training.import_model {where} runs/NAME")
    if not checkpoints:
        problem = "is a file, not a run" if path.is_file() else "holds no checkpoint"
        raise UserError(f"{str(where) or repr('')}: {problem} (train first, or name runs/NAME or "
                        "runs/NAME/checkpoints/STEP)")
    _warn_if_dangling(folder / "latest", checkpoints[-1])
    return checkpoints[-1]


def point_latest_at_newest(folder: Path) -> None:
    """Make `latest` point at the newest complete checkpoint, whatever it pointed at before."""
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        _warn_if_dangling(folder / "latest", checkpoints[-1])
        _remove_copy(folder / "latest")
        point(folder / "latest", checkpoints[-1])


def _warn_if_dangling(link: Path, newest: Path) -> None:
    target = pointed_at(link)
    if target and not (target / "manifest.json").exists():
        print(f"note: {link} points at {target.name}, which is not a complete checkpoint; "
              f"the newest is {newest}", file=sys.stderr)


def _remove_copy(link: Path) -> None:
    """Remove the folder that a copy which follows links (`cp -rL`) made of `link`.

    Raises UserError if it is something else.
    """
    if link.is_symlink() or not link.is_dir():
        return
    manifests = [path / "manifest.json" for path in list_checkpoints(link.parent)]
    own = link / "manifest.json"
    if not own.exists() or own.read_bytes() not in [path.read_bytes() for path in manifests]:
        raise UserError(f"{link} is a folder, but none of {link.parent} has its contents\n"
                        "  move it out of the way: a link belongs there")
    shutil.rmtree(link)


def prune(folder: Path, keep: int, listed: list[int]) -> None:
    """Delete all checkpoints but the newest `keep`, the `listed` steps, and the best one (lowest
    validation loss), which `best` points at."""
    checkpoints = list_checkpoints(folder)
    losses: dict[Path, float] = {}
    for path in checkpoints:
        with contextlib.suppress(UserError):        # a damaged one is no reason to stop training
            loss = read_state(path).get("val_loss")
            if loss is not None:
                losses[path] = loss
    best = min(losses, key=lambda path: losses[path], default=None)
    _remove_copy(folder / "best")
    if best:
        point(folder / "best", best)
    else:
        (folder / "best").unlink(missing_ok=True)
    for path in checkpoints[:-keep]:
        if path != best and int(path.name) not in listed:
            # Renamed first: it is no checkpoint any more before its first file goes. NFS and
            # Windows keep a file that somebody reads: it is left to the next time.
            doomed = path.with_name(f".partial-{path.name}")
            with contextlib.suppress(PermissionError):
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


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
        described = json.loads((checkpoint / "config.json").read_text("utf-8"))
        trained = described.get(TRAINED, {"step": 0, "tokens": 0})      # earlier versions lack it
        if not all(isinstance(trained[key], int) for key in ("step", "tokens")):
            raise ValueError(f"{TRAINED} holds no step and tokens")
        return trained | {"seconds": 0.0, "data": {"hash": ""}, "history": [
            {"unknown": f"{checkpoint} was published without its history"}]}


def load_model(checkpoint: Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a checkpoint. Raises UserError if it is damaged."""
    verify(checkpoint)
    with _explain_damage(checkpoint, "config.json"):
        described = json.loads((checkpoint / "config.json").read_text("utf-8"))
        config = validate(ModelConfig, described["gpt"], str(checkpoint / "config.json"))
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

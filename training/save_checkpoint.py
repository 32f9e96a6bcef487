"""Writing checkpoints: complete or not at all. training/checkpoint.py says what they hold."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError, command

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.companions import GENERATION
from data.tokenizer import Tokenizer
from files import explain_disk_errors, point, sha256, sync, sync_folder
from model.config import ModelConfig
from model.gpt import GPT
from model.huggingface import hf_config, hf_state, one_or_all
from training.checkpoint import TRAINED, list_checkpoints, read_state, warn_if_dangling
from training.parallel import ONE_PROCESS, Parallel, full_tensor

FileContent = bytes | dict[str, Tensor]

# --- one checkpoint ---------------------------------------------------------------------------

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


# --- the links of a run, and what it keeps -----------------------------------------------------

def point_latest_at_newest(folder: Path) -> None:
    """Make `latest` point at the newest complete checkpoint, whatever it pointed at before."""
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        warn_if_dangling(folder / "latest", checkpoints[-1])
        _remove_copy(folder / "latest")
        point(folder / "latest", checkpoints[-1])


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

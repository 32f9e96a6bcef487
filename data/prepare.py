"""Corpus → token shards: `python -m data.prepare CONFIG [key.path=value …]`.

Documents are read in order and cut into parts of about 64 MB of text. Each part is encoded on every core and appears
whole: an interrupted run continues at the next part, and the result depends on neither cores nor interruptions.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command

import numpy as np
from tqdm import tqdm

from data.config import DataConfig
from data.corpus import TextCorpus
from data.encode import Encoded, encode_in_order, is_validation, usable_cores
from data.load_tokenizer import load_tokenizer, make_tokenizer
from data.shards import FORMAT, Shards
from files import atomic_write, exclusive_lock, explain_disk_errors, sha256
from settings.validate import Settings, validate
from settings.yaml12 import override, read_file

PART_BYTES = 64 * 2 ** 20
SMALL_BYTES = 2 ** 24           # a corpus up to here is encoded by the time other processes have started
BPE_BYTES = 32 * 2 ** 20        # text a tokenizer is trained on
OWN_FILES = ("train-[0-9]*.npy", "val-[0-9]*.npy", "tokenizer.json", "tokenizer_config.json", "journal.json", "manifest.json", ".lock",
             ".*.partial")


class DataPart(Settings):
    """The part of a config file that says what to prepare; training checks the rest."""

    model_config = Settings.model_config | {"extra": "ignore"}

    data: DataConfig = DataConfig()


def prepare(config: DataConfig, verify: bool = False) -> Path:
    """Tokenize the text corpus of `config`, all that is missing of it; the folder. A finished one is left as it is.

    Raises UserError where the corpus cannot be read or is empty, or the folder holds something else.
    """
    corpus = TextCorpus(config)
    relevant = config.model_dump(include={"tokenizer", "val_fraction"}) | {"corpus": corpus.name, "column": config.column}
    if "/" in config.tokenizer.kind:                # what lies there, not where it lies
        relevant["tokenizer"] = make_tokenizer(config.tokenizer, iter(())).hash
    key = hashlib.sha256(json.dumps([FORMAT, relevant, corpus.identity()]).encode()).hexdigest()
    folder = Path(config.folder or Path("prepared") / f"{corpus.name}-{key[:8]}")
    with explain_disk_errors(f"preparing {folder}", "make room or choose another data.folder; the next run continues here"):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        begun = _key_of(folder)
        if begun not in (None, key):
            raise UserError(f"data.folder={folder} holds another corpus, tokenizer or val_fraction, or its text has changed since\n"
                            "  delete it to prepare again, or name another data.folder")
        if begun is None and (others := [p.name for p in folder.iterdir() if not _is_own(p)]):
            raise UserError(f"data.folder={folder} holds other files ({', '.join(others[:3])}): name a folder of its own")
        if not (folder / "manifest.json").exists():
            with exclusive_lock(folder / ".lock", f"{folder} is being prepared by another process (wait for it)"):
                try:
                    if not (folder / "manifest.json").exists():         # another process may have finished just before
                        _prepare(corpus, config, folder, key)
                except UserError:
                    if new and _key_of(folder) is None:                 # nothing to continue from
                        for path in _own_files(folder):
                            path.unlink()
                        folder.rmdir()
                    raise
    if verify:
        Shards(folder, verify=True)
    return folder


def _is_own(path: Path) -> bool:
    """Whether this module may have written `path`: by its name, since another process may rename it this moment."""
    return any(path.match(pattern) for pattern in OWN_FILES)


def _own_files(folder: Path) -> list[Path]:
    """What this module writes into a folder, and all that it ever deletes."""
    return [path for path in folder.iterdir() if _is_own(path)]


def _key_of(folder: Path) -> str | None:
    """What a finished or an interrupted preparation in `folder` was of."""
    for name in ("manifest.json", "journal.json"):
        try:
            return json.loads((folder / name).read_text("utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _prepare(corpus: TextCorpus, config: DataConfig, folder: Path, key: str) -> None:
    journal = _read_journal(folder)
    if not journal:
        for stale in _own_files(folder):
            if stale.name != ".lock":
                stale.unlink(missing_ok=True)
        print(f"tokenizer  {config.tokenizer.kind}", file=sys.stderr)
        tokenizer = make_tokenizer(config.tokenizer, _training_texts(corpus, config.val_fraction))
        _write_json(folder / "tokenizer_config.json", tokenizer.config)
        with atomic_write(folder / "tokenizer.json", "w") as file:
            file.write(tokenizer.json)
    else:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    limit = config.hub.max_tokens if corpus.name == "hub" and config.hub else None

    pieces = corpus.pieces()
    skipped = sum(len(piece.text) for piece in islice(pieces, sum(part["pieces"] for part in journal)))
    done = sum(part["train"]["tokens"] + part["val"]["tokens"] for part in journal)
    cores = 1 if (corpus.size() or SMALL_BYTES) < SMALL_BYTES else usable_cores()
    encoded = encode_in_order(pieces, tokenizer, folder / "tokenizer.json", config.val_fraction, cores)
    with closing(encoded), _progress(corpus, skipped) as bar:
        while not (limit and done >= limit):
            previous = journal[-1]["ends_in"] if journal else None
            part = _gather_part(encoded, tokenizer.begin, previous, bar, limit and limit - done)
            if not part.pieces:
                break
            journal.append({"pieces": part.pieces, "ends_in": part.ends_in} | _write_shards(folder, len(journal), part.streams))
            done += sum(len(stream) for stream in part.streams.values())
            _write_json(folder / "journal.json", {"key": key, "parts": journal})
        bar.total = bar.n               # structured files and a hub's limit are longer than their text
        bar.refresh()

    shards = {split: [part[split] for part in journal if part[split]["tokens"]] for split in ("train", "val")}
    if not shards["train"] and not shards["val"]:
        raise UserError(f"data.corpus={corpus.name} is empty: no text was found in it")
    if not shards["train"] or not shards["val"]:        # too few documents for the hash to divide
        shards = _hold_out_the_end(folder, shards["train"] or shards["val"], config.val_fraction, tokenizer.begin)
    hashes = [shard["sha256"] for split in shards for shard in shards[split]]
    _write_json(folder / "manifest.json", {
        "format": FORMAT, "key": key, "corpus": corpus.name, "data": config.model_dump(), "tokenizer": tokenizer.hash,
        "hash": hashlib.sha256("".join([tokenizer.hash, *hashes]).encode()).hexdigest(), "shards": shards})
    (folder / "journal.json").unlink(missing_ok=True)
    print(f"prepared   {folder}: {_millions(shards['train'])} tokens to train on, {_millions(shards['val'])} held out",
          file=sys.stderr)


class Part(NamedTuple):
    pieces: int
    streams: dict[str, np.ndarray]      # train and val: (n,) tokens
    ends_in: str | None                 # the side that the last piece fell on


def _gather_part(encoded: Iterator[Encoded], begin: int, previous: str | None, bar, limit: int | None) -> Part:
    """The token streams of the next PART_BYTES of text. A document's pieces join seamlessly until one falls on the other side."""
    streams: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    read, size, count, ids = 0, 0, 0, np.empty(0, np.uint16)
    for piece, split, ids in encoded:
        if piece.starts_document or split != previous:
            streams[split].append(np.array([begin], ids.dtype))
        streams[split].append(ids)
        previous, read, size, count = split, read + 1, size + len(piece.text), count + len(ids)
        bar.update(len(piece.text))
        if size >= PART_BYTES or (limit is not None and count >= limit):
            break
    return Part(read, {split: np.concatenate([ids[:0], *parts]) for split, parts in streams.items()}, previous)


def _training_texts(corpus: TextCorpus, fraction: float) -> Iterator[str]:
    """The first BPE_BYTES of the training side for a tokenizer to learn from; of all text where that side has none."""
    total = 0
    for held_out_too in (False, True):
        for piece in corpus.pieces():
            if held_out_too or not is_validation(piece.text, fraction):
                total += len(piece.text)
                yield piece.text.decode("utf-8", "ignore")
            if total >= BPE_BYTES:
                break
        if total:
            return


def _write_shards(folder: Path, n: int, streams: dict[str, np.ndarray]) -> dict:
    written = {}
    for split, tokens in streams.items():
        path = folder / f"{split}-{n:05d}.npy"
        with atomic_write(path) as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
            file.write(tokens.data)             # np.save would not say that it was the disk that is full
        written[split] = {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}
    return written


def _hold_out_the_end(folder: Path, only: list[dict], fraction: float, begin: int) -> dict[str, list[dict]]:
    """Where all shards fell on one side, train on them but for the end of the last."""
    last = np.load(folder / only[-1]["file"], allow_pickle=False)
    cut = len(last) - max(1, int(len(last) * fraction))
    written = _write_shards(folder, len(only), {"train": last[:cut], "val": np.insert(last[cut:], 0, begin)})
    return {"train": [*only[:-1], written["train"]], "val": [written["val"]]}


def _read_journal(folder: Path) -> list[dict]:
    """The finished parts of an interrupted preparation, if they are whole."""
    try:
        parts = json.loads((folder / "journal.json").read_text("utf-8"))["parts"]
        listed = [part[split] for part in parts for split in ("train", "val")]
        whole = all(sha256(folder / Path(shard["file"]).name) == shard["sha256"] for shard in listed)
        return parts if whole else []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _write_json(path: Path, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1)


def _progress(corpus: TextCorpus, done: int) -> tqdm:
    return tqdm(total=corpus.size(), initial=done, unit="B", unit_scale=True, desc="encoding",
                mininterval=0.5 if sys.stderr.isatty() else 10)


def _millions(shards: list[dict]) -> str:
    tokens = sum(shard["tokens"] for shard in shards)
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e5 else f"{tokens:,}"


def main() -> None:
    parser = ArgumentParser("python -m data.prepare", description="Turn a config's corpus into token shards. "
                            "Interrupted, it continues; finished, it does nothing.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="change a value of the config")
    parser.add_argument("--verify", action="store_true", help="read every byte of finished shards and check it against the manifest")
    args = parser.parse_args()
    tree = read_file(args.config)
    config = validate(DataPart, tree, args.config, override(tree, args.overrides)).data
    if config.text_corpus is None:
        print("nothing to prepare: all rows of this config are synthetic")
    else:
        print(prepare(config, args.verify))


if __name__ == "__main__":
    run_command(main)

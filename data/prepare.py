"""Corpus → token shards: `python -m data.prepare CONFIG [key.path=value …]`.

Documents are read in order and divided into parts of about 64 MB of text. The shards of each part
are encoded on every core and written atomically. An interrupted run continues at the next part, and
the result depends neither on the number of cores nor on interruptions.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from errors import ArgumentParser, UserError, run_command

import numpy as np
from tqdm import tqdm

from data.config import DataConfig
from data.corpus import TextCorpus
from data.encode import Encoded, encode_in_order, is_validation, usable_cores
from data.find_files import NoFileError
from data.load_tokenizer import load_tokenizer, make_tokenizer
from data.round_trip import RoundTrip
from data.shards import FORMAT, Shards, folders_of_shards
from data.tokenizer import Tokenizer
from files import atomic_write, exclusive_lock, explain_disk_errors, sha256
from settings.validate import Settings, validate_file

PART_BYTES = 64 * 2 ** 20
SMALL_BYTES = 2 ** 24           # a smaller corpus is encoded before other processes have started
BPE_BYTES = 32 * 2 ** 20        # text that a tokenizer is trained on
SPLITS = ("train", "val")
OWN_FILES = ("train-[0-9]*.npy", "val-[0-9]*.npy", "tokenizer.json", "tokenizer_config.json",
             "journal.json", "manifest.json", ".lock", ".*.partial")


class DataPart(Settings):
    """The part of a config file that says what to prepare; training checks the rest."""

    model_config = Settings.model_config | {"extra": "ignore"}

    data: DataConfig = DataConfig()


def prepare(config: DataConfig, verify: bool = False) -> Path:
    """Tokenize the text corpus of `config`, as far as it is not done yet. Returns its folder.

    `verify`: compare every finished shard with its SHA-256. Raises UserError if the corpus cannot
    be read or is empty, or if the folder holds something else. If the files of the text are gone,
    finished shards that were made with the same config are used.
    """
    try:
        corpus = TextCorpus(config)
    except NoFileError as error:
        folder = _shards_without_text(config, error)
    else:
        folder = _prepared_folder(corpus, config)
    if verify:
        Shards(folder, verify=True)
    return folder


def _prepared_folder(corpus: TextCorpus, config: DataConfig) -> Path:
    """The folder of the shards of a corpus, prepared as far as it was not done yet."""
    key = _key_of_corpus(corpus, config)
    folder = Path(config.folder or Path("prepared") / f"{corpus.name}-{key[:8]}")
    manifest = folder / "manifest.json"
    with explain_disk_errors(f"preparing {folder}", "make room or choose another data.folder; "
                             "the next run continues here"):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _check_folder(folder, key)
        if not manifest.exists():
            with exclusive_lock(folder / ".lock", f"{folder} is being prepared", "wait for it"):
                try:
                    if not manifest.exists():       # another process may just have finished
                        _prepare(corpus, config, folder, key)
                except UserError:
                    if is_new and _key_of_folder(folder) is None:       # nothing to continue from
                        _delete_own_files(folder)
                        folder.rmdir()
                    raise
    return folder


# --- which corpus a folder holds ------------------------------------------------------------------

def _key_of_corpus(corpus: TextCorpus, config: DataConfig) -> str:
    """A hash of everything that decides what the shards hold."""
    relevant = config.model_dump(include={"tokenizer", "val_fraction"})
    relevant |= {"corpus": corpus.name, "column": config.column}
    if config.tokenizer.is_path:                    # the content of the file, not its place
        relevant["tokenizer"] = make_tokenizer(config.tokenizer, iter(())).hash
    return hashlib.sha256(json.dumps([FORMAT, relevant, corpus.identity()]).encode()).hexdigest()


def _key_of_folder(folder: Path) -> str | None:
    """The key of a finished or interrupted preparation in `folder`, if there is one."""
    for name in ("manifest.json", "journal.json"):
        try:
            return json.loads((folder / name).read_text("utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _shards_without_text(config: DataConfig, error: NoFileError) -> Path:
    """The folder of finished shards that were made with this config, whose text is gone.

    Raises `error` if there is none, and UserError if there are several.
    """
    wanted = config.model_dump(include={"files", "column", "tokenizer", "val_fraction"})
    folders = folders_of_shards(
        [Path(config.folder)] if config.folder else Path("prepared").glob("*"),
        lambda manifest: manifest["corpus"] == config.text_corpus and wanted == {
            name: manifest["data"][name] for name in wanted})
    if not folders:
        raise error
    if len(folders) > 1:            # the text had changed in between
        raise UserError(f"{error}\n  its shards are in {' and '.join(map(str, folders))}: choose "
                        "one with data.folder=")
    print(f"note       {error}\n           the finished shards of this text are used, in "
          f"{folders[0]}", file=sys.stderr)
    return folders[0]


def _check_folder(folder: Path, key: str) -> None:
    """Raise UserError if `folder` holds another corpus or somebody's files."""
    folder_key = _key_of_folder(folder)
    if folder_key is not None and folder_key != key:
        raise UserError(f"data.folder={folder} holds another corpus, tokenizer or val_fraction, or "
                        "its text has changed since\n"
                        "  delete it to prepare again, or name another data.folder")
    if folder_key is None:
        foreign = [path.name for path in folder.iterdir() if not _is_own(path)]
        if foreign:
            raise UserError(f"data.folder={folder} holds other files ({', '.join(foreign[:3])}): "
                            "name a folder of its own")


def _is_own(path: Path) -> bool:
    """Whether this module may have written `path`.

    By its name only: another process may be renaming it at this moment.
    """
    return any(path.match(pattern) for pattern in OWN_FILES)


def _delete_own_files(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Delete what this module writes into a folder. It never deletes anything else."""
    for path in list(folder.iterdir()):
        if _is_own(path) and path.name not in keep:
            path.unlink(missing_ok=True)


# --- preparing ------------------------------------------------------------------------------------

class Part(NamedTuple):
    pieces: int
    streams: dict[str, np.ndarray]      # train and val: (n,) tokens
    ends_in: str | None                 # the split of the last piece


def _prepare(corpus: TextCorpus, config: DataConfig, folder: Path, key: str) -> None:
    journal = _read_journal(folder)     # an entry for each finished part
    if journal:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    else:
        _delete_own_files(folder, keep=(".lock",))
        tokenizer = _make_tokenizer(corpus, config, folder)
    _write_parts(corpus, config, tokenizer, folder, key, journal)
    shards = {split: [part[split] for part in journal if part[split]["tokens"]] for split in SPLITS}
    if not shards["train"] and not shards["val"]:
        raise UserError(f"data.corpus={corpus.name} is empty: it contains no text")
    if not shards["train"] or not shards["val"]:        # too few documents for the hash to divide
        filled = shards["train"] or shards["val"]
        shards = _hold_out_the_end(folder, filled, config.val_fraction, tokenizer.begin)
    hashes = [tokenizer.hash, *(shard["sha256"] for split in SPLITS for shard in shards[split])]
    _write_json(folder / "manifest.json", {
        "format": FORMAT, "key": key, "corpus": corpus.name, "data": config.model_dump(),
        "tokenizer": tokenizer.hash, "hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "shards": shards})
    (folder / "journal.json").unlink(missing_ok=True)
    print(f"prepared   {folder}: {_count(shards['train'])} tokens to train on, "
          f"{_count(shards['val'])} held out", file=sys.stderr)


def _make_tokenizer(corpus: TextCorpus, config: DataConfig, folder: Path) -> Tokenizer:
    """The tokenizer of the config, also written into `folder`."""
    print(f"tokenizer  {config.tokenizer.kind}", file=sys.stderr)
    tokenizer = make_tokenizer(config.tokenizer, _training_texts(corpus, config.val_fraction))
    _write_json(folder / "tokenizer_config.json", tokenizer.config)
    with atomic_write(folder / "tokenizer.json", "w") as file:
        file.write(tokenizer.json)
    return tokenizer


def _training_texts(corpus: TextCorpus, val_fraction: float) -> Iterator[str]:
    """The first BPE_BYTES of the training split; of all text if that split is empty."""
    total = 0
    for held_out_too in (False, True):
        for piece in corpus.pieces():
            if held_out_too or not is_validation(piece.text, val_fraction):
                total += len(piece.text)
                yield piece.text.decode("utf-8", "ignore")
            if total >= BPE_BYTES:
                break
        if total:
            return


def _write_parts(corpus: TextCorpus, config: DataConfig, tokenizer: Tokenizer, folder: Path,
                 key: str, journal: list[dict[str, Any]]) -> None:
    """Write the shards of every part that `journal` does not list yet, and list it."""
    limit = config.hub.max_tokens if corpus.name == "hub" and config.hub else None
    tokens = sum(part[split]["tokens"] for part in journal for split in SPLITS)
    pieces = corpus.pieces()
    skipped = islice(pieces, sum(part["pieces"] for part in journal))
    bytes_skipped = sum(len(piece.text) for piece in skipped)
    small = (corpus.size() or SMALL_BYTES) < SMALL_BYTES
    encoded = encode_in_order(pieces, tokenizer, folder / "tokenizer.json", config.val_fraction,
                              cores=1 if small else usable_cores())
    round_trip = RoundTrip(tokenizer)
    watched = round_trip.watch(encoded)
    with closing(encoded), _progress_bar(corpus, bytes_skipped) as bar:
        while limit is None or tokens < limit:
            previous = journal[-1]["ends_in"] if journal else None
            remaining = None if limit is None else limit - tokens
            part = _next_part(watched, tokenizer.begin, previous, bar, remaining)
            if part.pieces == 0:
                break
            entries = _write_shards(folder, len(journal), part.streams)
            journal.append({"pieces": part.pieces, "ends_in": part.ends_in} | entries)
            tokens += sum(len(stream) for stream in part.streams.values())
            _write_json(folder / "journal.json", {"key": key, "parts": journal})
        bar.total = bar.n       # files with fields and a hub's limit have more bytes than text
        bar.refresh()
    if round_trip.warning:
        print(round_trip.warning, file=sys.stderr)


def _next_part(encoded: Iterator[Encoded], begin: int, previous: str | None, bar: tqdm,
               limit: int | None) -> Part:
    """The token streams of the next PART_BYTES of text, or of about `limit` tokens.

    The pieces of a document are joined without a separator as long as they are in the same split.
    `previous` is the split of the piece before.
    """
    streams: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    pieces, text_bytes, tokens, ids = 0, 0, 0, np.empty(0, np.uint16)
    for piece, split, ids in encoded:
        if piece.starts_document or split != previous:
            streams[split].append(np.array([begin], ids.dtype))
        streams[split].append(ids)
        previous = split
        pieces += 1
        text_bytes += len(piece.text)
        tokens += len(ids)
        bar.update(len(piece.text))
        if text_bytes >= PART_BYTES or (limit is not None and tokens >= limit):
            break
    empty = ids[:0]             # so that a stream without pieces has the same dtype
    joined = {split: np.concatenate([empty, *arrays]) for split, arrays in streams.items()}
    return Part(pieces, joined, previous)


def _hold_out_the_end(folder: Path, shards: list[dict[str, Any]], val_fraction: float,
                      begin: int) -> dict[str, list[dict[str, Any]]]:
    """Divide shards that are all in one split: train on all but the end of the last."""
    last = np.load(folder / shards[-1]["file"], allow_pickle=False)
    cut = len(last) - max(1, int(len(last) * val_fraction))
    streams = {"train": last[:cut], "val": np.insert(last[cut:], 0, begin)}
    entries = _write_shards(folder, len(shards), streams)
    return {"train": [*shards[:-1], entries["train"]], "val": [entries["val"]]}


# --- files ----------------------------------------------------------------------------------------

def _write_shards(folder: Path, n: int, streams: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write the shards of part n. Returns the manifest's entry for each, by split."""
    entries: dict[str, Any] = {}
    for split, tokens in streams.items():
        path = folder / f"{split}-{n:05d}.npy"
        with atomic_write(path) as file:
            header = np.lib.format.header_data_from_array_1_0(tokens)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(tokens.data)             # np.save would not say that the disk is full
        entries[split] = {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}
    return entries


def _read_journal(folder: Path) -> list[dict[str, Any]]:
    """The finished parts of an interrupted preparation; none if a shard of them is damaged."""
    try:
        parts = json.loads((folder / "journal.json").read_text("utf-8"))["parts"]
        shards = [part[split] for part in parts for split in SPLITS]
        intact = [sha256(folder / Path(shard["file"]).name) == shard["sha256"] for shard in shards]
        return parts if all(intact) else []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _write_json(path: Path, value: object) -> None:
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1)


def _progress_bar(corpus: TextCorpus, done: int) -> tqdm:
    return tqdm(total=corpus.size(), initial=done, unit="B", unit_scale=True, desc="encoding",
                mininterval=0.5 if sys.stderr.isatty() else 10)


def _count(shards: list[dict[str, Any]]) -> str:
    tokens = sum(shard["tokens"] for shard in shards)
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e5 else f"{tokens:,}"


def main() -> None:
    parser = ArgumentParser("python -m data.prepare", description=(
        "Turn a config's corpus into token shards. If it was interrupted, it continues; "
        "if it has finished, it does nothing."))
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change a value of the config")
    parser.add_argument("--verify", action="store_true",
                        help="read every byte of finished shards and check it against the manifest")
    args = parser.parse_intermixed_args()
    config = validate_file(DataPart, args.config, args.overrides).data
    if config.text_corpus is None:
        print("nothing to prepare: all rows of this config are synthetic")
    else:
        print(prepare(config, args.verify))


if __name__ == "__main__":
    run_command(main)

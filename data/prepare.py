"""Corpus → token shards: `python -m data.prepare CONFIG [key.path=value …]`.

Documents are read in order and cut into parts of about 128 MB of text. Each part is encoded on every core and appears
whole: an interrupted run continues at the next part, and the result depends on neither cores nor interruptions.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.corpus import Piece, TextCorpus
from data.shards import FORMAT, Shards
from data.tokenizer import Tokenizer, make_tokenizer
from errors import ArgumentParser, UserError, run_command
from files import explain_disk_errors, only_one, sha256, whole_file

PART_BYTES = 128 * 2 ** 20
BATCH_BYTES = 2 ** 18           # what one thread encodes at a time
BPE_BYTES = 32 * 2 ** 20        # text a tokenizer is trained on


def prepare(config: DataConfig, verify: bool = False) -> Path:
    """Tokenize the text corpus of `config`, all that is missing of it; the folder. A finished one is left as it is."""
    corpus = TextCorpus(config)
    relevant = config.model_dump(include={"tokenizer", "val_fraction"}) | {"corpus": corpus.name, "column": config.column}
    key = hashlib.sha256(json.dumps([FORMAT, relevant, corpus.identity()]).encode()).hexdigest()
    folder = Path(config.folder or Path("prepared") / f"{corpus.name}-{key[:8]}")
    if (folder / "manifest.json").exists():
        if Shards(folder, verify=verify or None).manifest["key"] != key:
            raise UserError(f"data.folder={folder} holds another corpus, tokenizer or val_fraction, or its text has changed since\n"
                            "  delete it to prepare again, or name another data.folder")
        return folder
    with explain_disk_errors(f"preparing {folder}", "make room or choose another data.folder; the next run continues here"):
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder / ".lock", f"{folder} is being prepared by another process (wait for it)"):
            if not (folder / "manifest.json").exists():         # another process may have finished just before
                try:
                    _prepare(corpus, config, folder, key)
                except UserError:
                    if not (folder / "journal.json").exists():  # nothing to continue from
                        shutil.rmtree(folder)
                    raise
    return folder


def _prepare(corpus: TextCorpus, config: DataConfig, folder: Path, key: str) -> None:
    journal = _read_journal(folder, key)
    if not journal:
        for stale in [*folder.glob("*.npy"), *folder.glob("*.json")]:
            stale.unlink()
    if (folder / "tokenizer.json").exists() and journal:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    else:
        print(f"tokenizer  {config.tokenizer.kind}", file=sys.stderr)
        tokenizer = make_tokenizer(config.tokenizer, _training_texts(corpus, config.val_fraction))
        with whole_file(folder / "tokenizer.json", "w") as file:
            file.write(tokenizer.json)
    limit = config.hub.max_tokens if corpus.name == "hub" else None

    pieces = corpus.pieces()
    skipped = sum(len(piece.text) for piece in islice(pieces, sum(part["pieces"] for part in journal)))
    done = sum(part["train"]["tokens"] + part["val"]["tokens"] for part in journal)
    with _progress(corpus, skipped) as bar:
        while not (limit and done >= limit):
            part = list(_until_bytes(pieces, PART_BYTES))
            if not part:
                break
            streams = _encode_part(part, tokenizer, config.val_fraction, bar, limit and limit - done)
            journal.append(_write_part(folder, len(journal), streams, len(part)))
            done += sum(len(stream) for stream in streams.values())
            _write_json(folder / "journal.json", {"key": key, "parts": journal})
        bar.total = bar.n               # structured files and a hub's limit are longer than their text
        bar.refresh()

    shards = {split: [part[split] for part in journal] for split in ("train", "val")}
    tokens = {split: sum(shard["tokens"] for shard in shards[split]) for split in shards}
    if not tokens["train"]:
        raise UserError(f"data.corpus={corpus.name} is empty: no text was found in it")
    if not tokens["val"]:                   # too few documents for the hash: the end of the text is held out instead
        shards = _hold_out_the_end(folder, shards["train"], config.val_fraction)
    hashes = [shard["sha256"] for split in shards for shard in shards[split]]
    _write_json(folder / "manifest.json", {
        "format": FORMAT, "key": key, "corpus": corpus.name, "data": config.model_dump(), "tokenizer": tokenizer.hash,
        "hash": hashlib.sha256("".join([tokenizer.hash, *hashes]).encode()).hexdigest(), "shards": shards})
    (folder / "journal.json").unlink(missing_ok=True)
    print(f"prepared   {folder}: {_millions(shards['train'])} tokens to train on, {_millions(shards['val'])} held out",
          file=sys.stderr)


def is_validation(text: bytes, fraction: float) -> bool:
    """Which side of the split a piece falls on: by its own hash, so that neither re-runs nor new documents move it."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2 ** 64


def _encode_part(part: list[Piece], tokenizer: Tokenizer, fraction: float, bar, limit: int | None) -> dict[str, np.ndarray]:
    """The token streams of one part. A document's pieces join seamlessly until one falls on the other side."""
    streams: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    end_of_text = np.array([tokenizer.end_of_text], np.uint32)
    previous, count = None, 0
    for piece, ids in _encode_in_order(part, tokenizer):
        bar.update(len(piece.text))
        split = "val" if is_validation(piece.text, fraction) else "train"
        if piece.starts_document or split != previous:
            streams[split].append(end_of_text)
        streams[split].append(ids)
        previous, count = split, count + len(ids)
        if limit is not None and count >= limit:
            break
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32
    return {split: np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype) for split, parts in streams.items()}


def _encode_in_order(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Encode on every core (tiktoken lets go of Python's lock), in order, a bounded way ahead."""
    threads = os.cpu_count() or 1
    pieces = iter(pieces)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        while True:
            while len(ahead) < 3 * threads and (batch := list(_until_bytes(pieces, BATCH_BYTES))):
                ahead.append((batch, pool.submit(lambda batch: [tokenizer.encode(piece.text) for piece in batch], batch)))
            if not ahead:
                return
            batch, future = ahead.popleft()
            yield from zip(batch, future.result())


def _until_bytes(pieces: Iterator[Piece], limit: int) -> Iterator[Piece]:
    """Pieces up to about `limit` bytes together."""
    total = 0
    for piece in pieces:
        yield piece
        total += len(piece.text)
        if total >= limit:
            return


def _training_texts(corpus: TextCorpus, fraction: float) -> Iterator[str]:
    """The first BPE_BYTES of the training side, for a tokenizer that has seen nothing held out."""
    total = 0
    for piece in corpus.pieces():
        if not is_validation(piece.text, fraction):
            total += len(piece.text)
            yield piece.text.decode("utf-8", "ignore")
        if total >= BPE_BYTES:
            return


def _write_part(folder: Path, n: int, streams: dict[str, np.ndarray], pieces: int) -> dict:
    written: dict = {"pieces": pieces}
    for split, tokens in streams.items():
        path = folder / f"{split}-{n:05d}.npy"
        with whole_file(path) as file:
            np.save(file, tokens, allow_pickle=False)
        written[split] = {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}
    return written


def _hold_out_the_end(folder: Path, train: list[dict], fraction: float) -> dict[str, list[dict]]:
    """Divide the last training shard in two, the second part for validation."""
    tokens = np.load(folder / train[-1]["file"], allow_pickle=False)
    cut = len(tokens) - max(1, int(len(tokens) * fraction))
    last = _write_part(folder, len(train) - 1, {"train": tokens[:cut], "val": tokens[cut:]}, 0)
    return {"train": [*train[:-1], last["train"]], "val": [last["val"]]}


def _read_journal(folder: Path, key: str) -> list[dict]:
    """The finished parts of an interrupted preparation of the same thing."""
    try:
        journal = json.loads((folder / "journal.json").read_text("utf-8"))
        whole = journal["key"] == key and all(
            sha256(folder / part[split]["file"]) == part[split]["sha256"] for part in journal["parts"] for split in ("train", "val"))
        return journal["parts"] if whole else []
    except (OSError, ValueError, KeyError):
        return []


def _write_json(path: Path, value: object) -> None:
    with whole_file(path, "w") as file:
        json.dump(value, file, indent=1)


def _progress(corpus: TextCorpus, done: int):
    from tqdm import tqdm
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
    from training.config import load_config  # the command reads the whole file; this module needs its data part alone
    config = load_config(args.config, args.overrides)
    if config.data.text_corpus is None:
        print("nothing to prepare: all rows of this config are synthetic")
    else:
        print(prepare(config.data, args.verify))


if __name__ == "__main__":
    run_command(main)

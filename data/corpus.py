"""Where text comes from: Python's own library, files, or the Hugging Face hub.

A corpus is a stream of pieces of documents. Long documents are cut at line ends, so that memory stays small and one
long file can still be divided into training and validation text.
"""

import bz2
import glob
import gzip
import hashlib
import lzma
import os
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from errors import UserError, first_line

from data.config import DataConfig, HubConfig

PIECE_BYTES = 16 * 1024
LARGEST_RATIO = 200             # of text to compressed text; prose has 3 to 5, logs some 20, a bomb 1000
COMPRESSED: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = {".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz", ".rar"}
STRUCTURED = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}


class Piece(NamedTuple):
    text: bytes
    starts_document: bool


class TextCorpus:
    """Pieces to read again from the start, something that changes when they do, and their size where it is known."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.name, self.hub = config.text_corpus, config.hub
        self.paths = stdlib_files() if self.name == "stdlib" else matching_files(config.files) if self.name == "files" else []

    def pieces(self) -> Iterator[Piece]:
        match self.name:
            case "stdlib":
                yield from _pieces_of_files(self.paths)
                yield from _pieces_of_documents(pydoc_topics())
            case "hub" if self.hub:
                yield from _pieces_of_documents(hub_documents(self.hub))
            case _:                     # files, and whatever else is a list of files
                for path in self.paths:
                    if loader := STRUCTURED.get(kind_of(path)):
                        if path.suffix.lower() in COMPRESSED:           # it is read by others, which inflate a line at once
                            deque(_pieces_of_files([path]), maxlen=0)
                        yield from _pieces_of_documents(_no_bomb(path, _rows(loader, path, self.config.column)))
                    else:
                        yield from _pieces_of_files([path])

    def identity(self) -> str:
        """Changes when the corpus does. The hub's is its name: what is behind it is only known by reading it."""
        if self.name == "hub" and self.hub:
            return self.hub.model_dump_json()
        seen = hashlib.sha256(sys.version.encode() if self.name == "stdlib" else b"")
        for path in self.paths:
            stat = path.stat()
            # the library belongs to the interpreter; a user's files may change under the same name and size
            name, changed = (path.name, "") if self.name == "stdlib" else (path.resolve(), stat.st_mtime_ns)
            seen.update(os.fsencode(name) + f"\0{stat.st_size}\0{changed}\n".encode())
        return seen.hexdigest()

    def size(self) -> int | None:
        """Bytes to read, for the progress bar; None where only reading tells."""
        if self.name == "hub":
            return None
        return sum(path.stat().st_size for path in self.paths) + (sum(map(len, pydoc_topics())) if self.name == "stdlib" else 0)


def stdlib_files() -> list[Path]:
    """The sources of Python's own library: on every machine, without a copy in the repository or a download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # tests repeat themselves, encodings are tables of numbers, pydoc_data comes as documents of its own
    left_out = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    files = [Path(folder) / name for folder, subfolders, names in os.walk(root)
             if not subfolders.__setitem__(slice(None), sorted(set(subfolders) - left_out))     # os.walk skips what is removed
             for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(f"data.corpus=stdlib: no Python sources under {root} (use data.corpus=files with your own text)")
    return files


def pydoc_topics() -> Iterator[bytes]:
    """The language reference that `help()` prints: English prose about Python."""
    return (topics[name].encode() for name in sorted(topics))


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that the globs name, sorted, each once; a UserError names a glob that matches none."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        matches = [Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
        matches = [path for path in matches if not is_ours(path.parent)]
        if not matches:
            advice = (f"it is a folder: try {pattern.rstrip('/')}/**/*.txt" if os.path.isdir(pattern) else
                      f"looked from {os.getcwd()}; your own text: data.files='[my.txt]'")
            raise UserError(f"data.files: no file matches {pattern!r} ({advice})")
        if packed := [path for path in matches if path.suffix.lower() in PACKED]:
            raise UserError(f"data.files: {packed[0]} is packed: unpack it first (.gz, .bz2 and .xz are read as they are)")
        found |= {path.resolve(): path for path in matches}
    return [found[path] for path in sorted(found)]


def is_ours(folder: Path) -> bool:
    """Whether a folder holds our own shards or a checkpoint, which are no text."""
    return (folder / "tokenizer.json").exists() and ((folder / "manifest.json").exists() or (folder / "journal.json").exists())


def hub_documents(hub: HubConfig) -> Iterator[bytes]:
    """The texts of a dataset on the Hugging Face hub, streamed by `datasets`."""
    # `datasets` retries for 24 s without a network; one plain question first makes that two.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    try:
        HfApi().dataset_info(hub.dataset, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"data.hub.dataset={hub.dataset}: the hub says {first_line(error)}\n"
                        "  check the name, or log in with `hf auth login` if it is private or gated") from None
    except Exception as error:          # of whichever HTTP library it uses
        raise UserError(f"data.hub.dataset={hub.dataset}: the Hugging Face hub cannot be reached ({type(error).__name__})\n"
                        "  connect, or use data.corpus=files with text on this machine") from None
    import datasets
    try:
        rows = datasets.load_dataset(hub.dataset, hub.config, split=hub.split, streaming=True)
        yield from _texts(rows, hub.column, f"data.hub.column={hub.column}")
    except UserError:
        raise
    except Exception as error:          # every builder and file format has its own
        raise UserError(f"data.hub.dataset={hub.dataset}: {first_line(error)}") from None


def kind_of(path: Path) -> str:
    """.jsonl for a.jsonl, A.JSONL and a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def _rows(loader: str, path: Path, column: str) -> Iterator[bytes]:
    import datasets
    options: dict = {}
    try:
        if loader == "csv":             # as text: 007 is no number, and NA is a word
            import pandas
            separator = "\t" if kind_of(path) == ".tsv" else ","
            columns = pandas.read_csv(path, sep=separator, nrows=0).columns
            options = {"sep": separator, "keep_default_na": False,
                       "features": datasets.Features({name: datasets.Value("string") for name in columns})}
        if loader == "parquet":         # row by row: `datasets` would expand a whole group of rows
            rows = _parquet_rows(path, column)
        else:
            rows = datasets.load_dataset(loader, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
        yield from _texts(rows, column, f"data.column={column}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:      # every format has its own exceptions for a broken file
        raise UserError(f"{path}: cannot be read as {loader} ({first_line(error)})") from None


def _parquet_rows(path: Path, column: str) -> Iterator[dict]:
    import pyarrow.parquet as pq
    if column not in (names := pq.read_schema(path).names):
        yield dict.fromkeys(names)
    file = pq.ParquetFile(path, read_dictionary=[column])       # equal texts stay one in memory
    for batch in file.iter_batches(1000, columns=[column]):
        yield from ({column: value.as_py()} for value in batch.column(0))


def _texts(rows: Iterable[dict], column: str, key: str) -> Iterator[bytes]:
    for row in rows:
        if column not in row:
            raise UserError(f"{key}: no such column; there are {', '.join(row)}")
        if row[column] is not None and not isinstance(row[column], str):
            raise UserError(f"{key}: holds {type(row[column]).__name__}, not text ({str(row[column])[:40]!r})")
        if row[column]:
            yield row[column].encode("utf-8", "surrogatepass")


def _pieces_of_documents(documents: Iterable[bytes]) -> Iterator[Piece]:
    for document in documents:
        yield from _pieces(document[n:n + PIECE_BYTES] for n in range(0, len(document), PIECE_BYTES))


def _pieces_of_files(paths: Iterable[Path]) -> Iterator[Piece]:
    for path in paths:
        try:
            with COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as file:
                yield from _pieces(_no_bomb(path, iter(lambda: file.read(PIECE_BYTES), b"")))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _no_bomb(path: Path, texts: Iterable[bytes]) -> Iterator[bytes]:
    """`texts` as they are, up to LARGEST_RATIO times what the file takes on the disk."""
    total, most = 0, max(2 ** 26, LARGEST_RATIO * path.stat().st_size)
    for text in texts:
        total += len(text)
        if total > most:
            raise UserError(f"{path}: holds more than {LARGEST_RATIO} times its size in text, so it is no corpus\n"
                            "  if it is, unpack it first")
        yield text


def _pieces(blocks: Iterable[bytes]) -> Iterator[Piece]:
    """One document that arrives in blocks, cut into pieces."""
    rest, starts = b"", True
    for block in blocks:
        rest += block
        while len(rest) > 2 * PIECE_BYTES:          # a document this short stays whole, and no rest is a scrap
            cut = _cut(rest)
            yield Piece(rest[:cut], starts)
            rest, starts = rest[cut:], False
    if rest:
        yield Piece(rest, starts)


def _cut(text: bytes) -> int:
    """Where to end the first piece of a long `text`: behind a line end, at worst between characters."""
    if (line_end := text.rfind(b"\n", PIECE_BYTES // 2, PIECE_BYTES)) >= 0:
        return line_end + 1
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 4 and text[cut] & 0xC0 == 0x80:       # inside a UTF-8 character
        cut -= 1
    return cut

"""The sources of text: Python's own library, files, or the Hugging Face hub.

A corpus is a stream of pieces of documents. Long documents are cut at line ends, so that memory use
stays small and one long file can be divided into training and validation text.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from errors import UserError, first_line

from data.config import DataConfig, HubConfig

PIECE_BYTES = 16 * 1024
LARGEST_RATIO = 200             # of text to compressed text: prose has 3 to 5, logs 20, a bomb 1000
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ARCHIVES = {".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz", ".rar"}
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
           ".arrow": "arrow"}           # of `datasets`, for files with fields
# Not part of the corpus: tests repeat themselves, encodings are tables of numbers, pydoc_data is
# read as documents of its own.
NOT_LIBRARY = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages",
               "dist-packages", "__pycache__", "lib2to3"}


class Piece(NamedTuple):
    text: bytes
    starts_document: bool


class TextCorpus:
    """The pieces of a text corpus, which can be read again from the start."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.name, self.hub = config.text_corpus, config.hub
        self.paths: list[Path] = []
        if self.name == "stdlib":
            self.paths = stdlib_files()
        elif self.name == "files":
            self.paths = matching_files(config.files)

    def pieces(self) -> Iterator[Piece]:
        match self.name:
            case "stdlib":
                yield from _pieces_of_files(self.paths)
                yield from _pieces_of_documents(pydoc_topics())
            case "hub" if self.hub:
                yield from _pieces_of_documents(hub_documents(self.hub))
            case _:                     # a list of files
                for path in self.paths:
                    if loader := LOADERS.get(text_suffix(path)):
                        yield from _pieces_of_documents(_rows(loader, path, self.config.column))
                    else:
                        yield from _pieces_of_files([path])

    def identity(self) -> str:
        """Changes when the corpus does.

        The hub's is its name only: a change of its content shows only by reading all of it.
        """
        if self.name == "hub" and self.hub:
            return self.hub.model_dump_json()
        digest = hashlib.sha256(sys.version.encode() if self.name == "stdlib" else b"")
        for path in self.paths:
            stat = path.stat()
            if self.name == "stdlib":           # it changes only with the interpreter
                name, changed = path.name, ""
            else:                               # a file may change and keep its name and size
                name, changed = str(path.resolve()), str(stat.st_mtime_ns)
            digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{changed}\n".encode())
        return digest.hexdigest()

    def size(self) -> int | None:
        """Bytes to read, for the progress bar; None if only reading tells."""
        if self.name == "hub":
            return None
        size = sum(path.stat().st_size for path in self.paths)
        if self.name == "stdlib":
            size += sum(len(topic) for topic in pydoc_topics())
        return size


# --- what each corpus consists of -----------------------------------------------------------------

def stdlib_files() -> list[Path]:
    """The sources of Python's own library: on every machine, without a copy or a download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - NOT_LIBRARY)       # os.walk visits what remains
        files += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(f"data.corpus=stdlib: no Python sources under {root} "
                        "(use data.corpus=files with your own text)")
    return files


def pydoc_topics() -> Iterator[bytes]:
    """The language reference that `help()` prints: English prose about Python."""
    return (topics[name].encode() for name in sorted(topics))


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that match the globs, sorted, each once.

    Raises UserError for a glob without a match and for an archive.
    """
    path_of: dict[Path, Path] = {}              # resolved → as given
    for pattern in patterns:
        paths = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        paths = [path for path in paths if os.path.isfile(path) and not is_our_output(path.parent)]
        if not paths:
            if os.path.isdir(pattern):
                advice = f"it is a folder: try {pattern.rstrip('/')}/**/*.txt"
            else:
                advice = f"searched from {os.getcwd()}; your own text: data.files='[my.txt]'"
            raise UserError(f"data.files: no file matches {pattern!r} ({advice})")
        for path in paths:
            if path.suffix.lower() in ARCHIVES:
                raise UserError(f"data.files: {path} is packed: unpack it first "
                                "(.gz, .bz2 and .xz are read as they are)")
            path_of[path.resolve()] = path
    return [path_of[path] for path in sorted(path_of)]


def is_our_output(folder: Path) -> bool:
    """Whether a folder holds our own shards or a checkpoint, which are not text."""
    return (folder / "tokenizer.json").exists() and (
        (folder / "manifest.json").exists() or (folder / "journal.json").exists())


def hub_documents(hub: HubConfig) -> Iterator[bytes]:
    """The texts of a dataset on the Hugging Face hub, streamed by `datasets`."""
    # Without a network `datasets` retries for 24 s. One plain request before it fails in 2 s.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    try:
        HfApi().dataset_info(hub.dataset, timeout=10)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"data.hub.dataset={hub.dataset}: the hub says {first_line(error)}\n"
                        "  check the name, or log in with `hf auth login` if it is private or gated"
                        ) from None
    except Exception as error:          # of the HTTP library that it uses
        raise UserError(f"data.hub.dataset={hub.dataset}: the Hugging Face hub cannot be reached "
                        f"({type(error).__name__})\n"
                        "  connect, or use data.corpus=files with text on this machine") from None
    import datasets
    try:
        rows = datasets.load_dataset(hub.dataset, hub.config, split=hub.split, streaming=True)
        yield from _texts(rows, hub.column, f"data.hub.column={hub.column}")
    except UserError:
        raise
    except Exception as error:          # every builder and file format raises its own
        raise UserError(f"data.hub.dataset={hub.dataset}: {first_line(error)}") from None


# --- files with fields ----------------------------------------------------------------------------

def text_suffix(path: Path) -> str:
    """The suffix that says the format: .jsonl for a.jsonl, A.JSONL and a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def _rows(loader: str, path: Path, column: str) -> Iterator[bytes]:
    """The texts in one column of a file."""
    if path.suffix.lower() in COMPRESSED:       # `datasets` inflates a whole line at once, so first
        for _ in _pieces_of_files([path]):      # see whether the file is a bomb
            pass
    yield from _limit_expansion(path, _texts_of_file(loader, path, column))


def _texts_of_file(loader: str, path: Path, column: str) -> Iterator[bytes]:
    import datasets
    try:
        if loader == "parquet":
            rows: Iterable[dict[str, Any]] = _parquet_rows(path, column)
        else:
            options = _csv_options(path) if loader == "csv" else {}
            rows = datasets.load_dataset(loader, data_files=glob.escape(str(path)), split="train",
                                         streaming=True, **options)
        yield from _texts(rows, column, f"data.column={column}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:          # every format raises its own for a broken file
        raise UserError(f"{path}: cannot be read as {loader} ({first_line(error)})") from None


def _csv_options(path: Path) -> dict[str, Any]:
    """Options to read every column as text: 007 is not a number, and NA is a word."""
    import datasets
    import pandas
    separator = "\t" if text_suffix(path) == ".tsv" else ","
    columns = pandas.read_csv(path, sep=separator, nrows=0).columns
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"sep": separator, "keep_default_na": False, "features": features}


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    """Row by row: `datasets` would expand a whole group of rows."""
    import pyarrow.parquet as pq
    columns = pq.read_schema(path).names
    if column not in columns:
        yield dict.fromkeys(columns)                            # for the error that lists them
    file = pq.ParquetFile(path, read_dictionary=[column])       # equal texts are in memory once
    for batch in file.iter_batches(1000, columns=[column]):
        yield from ({column: value.as_py()} for value in batch.column(0))


def _texts(rows: Iterable[dict[str, Any]], column: str, key: str) -> Iterator[bytes]:
    for row in rows:
        if column not in row:
            raise UserError(f"{key}: no such column; there are {', '.join(row)}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{key}: holds {type(text).__name__}, not text ({str(text)[:40]!r})")
        if text:
            yield text.encode("utf-8", "surrogatepass")


# --- pieces ---------------------------------------------------------------------------------------

def _pieces_of_documents(documents: Iterable[bytes]) -> Iterator[Piece]:
    for document in documents:
        starts = range(0, len(document), PIECE_BYTES)
        yield from _pieces(document[start:start + PIECE_BYTES] for start in starts)


def _pieces_of_files(paths: Iterable[Path]) -> Iterator[Piece]:
    for path in paths:
        try:
            with COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as file:
                yield from _pieces(_limit_expansion(path, _blocks(file)))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(PIECE_BYTES):
        yield block


def _limit_expansion(path: Path, texts: Iterable[bytes]) -> Iterator[bytes]:
    """`texts` unchanged; a UserError if they exceed LARGEST_RATIO times the file's size on disk."""
    total, most = 0, max(2 ** 26, LARGEST_RATIO * path.stat().st_size)
    for text in texts:
        total += len(text)
        if total > most:
            raise UserError(f"{path}: expands to more than {LARGEST_RATIO} times its size, "
                            "so it is not read as text\n  if it is text, unpack it first")
        yield text


def _pieces(blocks: Iterable[bytes]) -> Iterator[Piece]:
    """One document that arrives in blocks, cut into pieces."""
    rest, starts_document = b"", True
    for block in blocks:
        rest += block
        while len(rest) > 2 * PIECE_BYTES:      # so a short document stays whole, no piece is tiny
            cut = _piece_end(rest)
            yield Piece(rest[:cut], starts_document)
            rest, starts_document = rest[cut:], False
    if rest:
        yield Piece(rest, starts_document)


def _piece_end(text: bytes) -> int:
    """The end of the first piece of a long `text`: after a line end, or between two characters."""
    line_end = text.rfind(b"\n", PIECE_BYTES // 2, PIECE_BYTES)
    if line_end >= 0:
        return line_end + 1
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 4 and text[cut] & 0xC0 == 0x80:       # inside a UTF-8 character
        cut -= 1
    return cut

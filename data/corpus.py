"""The sources of text: Python's own library, files, or the Hugging Face hub.

A corpus is a stream of pieces of documents. Long documents are cut at line ends, so that memory use
stays small and one long file can be divided into training and validation text.
"""

import hashlib
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from errors import UserError, first_line

from data.config import DataConfig, HubConfig
from data.fields import COMPRESSED, READERS, open_bytes, text_suffix, texts_of_column
from data.find_files import matching_files
from data.text_encoding import utf8_blocks

PIECE_BYTES = 16 * 1024
LARGEST_RATIO = 200             # of text to compressed text: prose has 3 to 5, logs 20, a bomb 1000
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
                    if text_suffix(path) in READERS:
                        yield from _pieces_of_documents(_column(path, self.config.column))
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
        yield from _texts_of_rows(rows, hub.column)
    except UserError:
        raise
    except Exception as error:          # every builder and file format raises its own
        raise UserError(f"data.hub.dataset={hub.dataset}: {first_line(error)}") from None


def _texts_of_rows(rows: Iterable[dict[str, Any]], column: str) -> Iterator[bytes]:
    for row in rows:
        if column not in row:
            raise UserError(f"data.hub.column={column}: no such column; there are {', '.join(row)}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"data.hub.column={column}: holds {type(text).__name__}, not text "
                            f"({str(text)[:40]!r})")
        if text:
            yield text.encode("utf-8", "surrogatepass")


# --- pieces ---------------------------------------------------------------------------------------

def _pieces_of_documents(documents: Iterable[bytes]) -> Iterator[Piece]:
    for document in documents:
        starts = range(0, len(document), PIECE_BYTES)
        yield from _pieces(document[start:start + PIECE_BYTES] for start in starts)


def _column(path: Path, column: str) -> Iterator[bytes]:
    """The texts in one column of a file with fields."""
    if path.suffix.lower() in COMPRESSED:       # a line is inflated at once, so first see whether
        for _ in _pieces_of_files([path]):      # the file is a bomb
            pass
    yield from _limit_expansion(path, texts_of_column(path, column))


def _pieces_of_files(paths: Iterable[Path]) -> Iterator[Piece]:
    for path in paths:
        try:
            with open_bytes(path) as file:
                yield from _pieces(utf8_blocks(_limit_expansion(path, _blocks(file)), str(path)))
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

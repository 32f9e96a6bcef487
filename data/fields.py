"""One column of text from files with fields: .jsonl, .json, .csv, .tsv, .parquet, .arrow.

Read here and not by `datasets`, which guesses the types of all columns from the first rows, keeps a
cache in the home folder, and reads file names as patterns.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from errors import UserError, first_line

from tqdm import tqdm

from data.text_encoding import START_BYTES, encoding_of

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SPACE = " \t\r\n"


def text_suffix(path: Path) -> str:
    """The suffix that says the format: .jsonl for a.jsonl, A.JSONL and a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def open_bytes(path: Path) -> Any:
    """A file, decompressed."""
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")


def texts_of_column(path: Path, column: str) -> Iterator[bytes]:
    """The texts in one column of a file, in order, without empty ones. Raises UserError."""
    kind = text_suffix(path)
    try:
        yield from READERS[kind](path, column)
    except UserError:
        raise
    except Exception as error:          # every format raises its own for a broken file
        raise UserError(f"{path}: cannot be read as {kind[1:]} ({first_line(error)})") from None


def _no_such_column(path: Path, column: str, columns: list[str]) -> UserError:
    return UserError(f"{path}: data.column={column}: no such column; "
                     f"there are {', '.join(columns)}")


# --- .csv, .tsv -----------------------------------------------------------------------------------

def _csv_texts(path: Path, column: str) -> Iterator[bytes]:
    csv.field_size_limit(sys.maxsize)           # by default a field of 128 kB is an error
    header: list[str] = []
    with _open_text(path, newline="") as file:
        for line, row in _csv_rows(path, file):
            if not header:
                header = row
                if column not in header:
                    raise _no_such_column(path, column, header)
                index = header.index(column)
            elif len(row) != len(header):
                raise UserError(f"{path}, line {line}: a row of {len(row)} under a header of "
                                f"{len(header)} fields\n  quote fields that contain the separator")
            elif row[index]:
                yield row[index].encode()
    if not header:
        raise UserError(f"{path}: is empty, without a header")


def _csv_rows(path: Path, file: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the lines they begin in."""
    lines = _Lines(file, path)
    reader = csv.reader(lines, delimiter="\t" if text_suffix(path) == ".tsv" else ",")
    line = 1
    for row in reader:
        if lines.ended:                         # the reader looked further for the end of the row
            raise UserError(f'{path}, line {line}: a field that begins with " here never ends')
        if len(row) > 1 or lines.last.strip(SPACE):     # "  " in quotes is text
            yield line, row
        line = reader.line_num + 1


# --- lines of text --------------------------------------------------------------------------------

def _open_text(path: Path, newline: str) -> io.TextIOWrapper:
    file = open_bytes(path)
    codec = encoding_of(file.read(START_BYTES), str(path))
    file.seek(0)
    return io.TextIOWrapper(file, codec, "surrogateescape", newline)


class _Lines(Iterator[str]):
    """The lines of a file of `_open_text`. Raises UserError for one that is not valid.

    `ended`: whether another line was asked for than there are; `last`: the last line given.
    """

    def __init__(self, file: io.TextIOWrapper, path: Path):
        self.file, self.path = file, path
        self.number, self.last, self.ended = 0, "", False

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            self.ended = True
            raise StopIteration
        self.number, self.last = self.number + 1, line
        try:
            line.encode()
        except UnicodeEncodeError as error:     # what surrogateescape made of an invalid byte
            byte = ord(line[error.start]) - 0xDC00
            raise UserError(f"{self.path}, line {self.number}: is not valid UTF-8 "
                            f"(byte 0x{byte:02x})") from None
        return line

    def read(self, length: int) -> str:
        """One line or more, together at least `length` characters if there are so many."""
        lines, size = [], 0
        for line in self:
            lines.append(line)
            size += len(line)
            if size >= length:
                break
        return "".join(lines)


# --- .jsonl, .json --------------------------------------------------------------------------------

SPACES = re.compile(r"[ \t\r\n]*")
JSON_NAMES = {float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def _json_texts(path: Path, column: str) -> Iterator[bytes]:
    """The texts in a field of objects: one a line, one after another, or in a list.

    A list of strings is a column named text.
    """
    columns: dict[str, None] = {}               # in order, until `column` is among them
    values = 0
    for line, value in _json_values(path):
        values += 1
        for row in _rows(value):
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {line}: is not an object with a field {column}")
            if column not in columns:
                columns |= dict.fromkeys(row)
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise UserError(f"{path}, line {line}: data.column={column}: holds "
                                f"{JSON_NAMES[type(text)]}, not text")
            if text:
                yield _encode(text, path, line)
    if not values:
        raise UserError(f"{path}: is empty")
    if columns and column not in columns:
        raise _no_such_column(path, column, list(columns))


def _rows(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [{"text": row} if isinstance(row, str) else row for row in value]


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values in a file, with the lines they begin in. A value may span several lines."""
    # float: a number of any length in another column; int() refuses 5,000 digits.
    decoder = json.JSONDecoder(parse_int=float, object_pairs_hook=_fields)
    with _open_text(path, newline="\n") as file:
        lines = _Lines(file, path)
        line, text = 1, ""                      # what is not decoded yet, and where it begins
        while not lines.ended:
            text += lines.read(len(text))       # doubled, so that a long value takes few attempts
            start, last = _after_space(text, 0), len(text.rstrip(SPACE))
            line += text.count("\n", 0, start)
            while start < last:
                try:
                    value, end = decoder.raw_decode(text, start)
                except ValueError as error:
                    wrong = getattr(error, "pos", start)
                    if wrong >= last and not lines.ended:
                        break                   # it goes on in the next line
                    line += text.count("\n", start, wrong)
                    raise UserError(f"{path}, line {line}: is not JSON "
                                    f"({getattr(error, 'msg', error)})") from None
                yield line, value
                end = _after_space(text, end)
                line += text.count("\n", start, end)
                start = end
            text = text[start:]


def _after_space(text: str, start: int) -> int:
    spaces = SPACES.match(text, start)
    return spaces.end() if spaces else start


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):                # which is meant?
        raise ValueError("a field is there twice")
    return fields


def _encode(text: str, path: Path, line: int) -> bytes:
    """UTF-8. Half of a surrogate pair, as in "\\ud83d", is no character: � stands for it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        _note_half_pairs(path, line)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


NOTED: set[Path] = set()        # once for each file: a corpus may be read twice


def _note_half_pairs(path: Path, line: int) -> None:
    if path not in NOTED:
        NOTED.add(path)
        tqdm.write(f"note       {path}, line {line}: half of a surrogate pair (such as \\ud83d) is "
                   "not a character\n           it is read as \ufffd, here and later in this file",
                   file=sys.stderr)


# --- .parquet, .arrow -----------------------------------------------------------------------------

def _parquet_texts(path: Path, column: str) -> Iterator[bytes]:
    import pyarrow.parquet as pq
    with open_bytes(path) as file:
        _check_type(path, column, pq.read_schema(file))
        parquet = pq.ParquetFile(file, read_dictionary=[column])    # equal texts are in memory once
        for batch in parquet.iter_batches(1000, columns=[column]):
            yield from _texts_of_batch(batch, column)


def _arrow_texts(path: Path, column: str) -> Iterator[bytes]:
    import pyarrow as pa
    with open_bytes(path) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            file.seek(0)
            reader = pa.ipc.open_file(file)
        _check_type(path, column, reader.schema)
        batches = reader
        if isinstance(reader, pa.RecordBatchFileReader):
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            yield from _texts_of_batch(batch, column)


def _texts_of_batch(batch: Any, column: str) -> Iterator[bytes]:
    for value in batch.column(batch.schema.names.index(column)):
        if text := value.as_py():
            yield text.encode()


def _check_type(path: Path, column: str, schema: Any) -> None:
    import pyarrow as pa
    if column not in schema.names:
        raise _no_such_column(path, column, schema.names)
    type_ = schema.types[schema.names.index(column)]
    values = type_.value_type if pa.types.is_dictionary(type_) else type_
    if not (pa.types.is_string(values) or pa.types.is_large_string(values)
            or pa.types.is_string_view(values) or pa.types.is_null(values)):
        raise UserError(f"{path}: data.column={column}: holds {type_}, not text")


READERS = {".jsonl": _json_texts, ".json": _json_texts, ".csv": _csv_texts, ".tsv": _csv_texts,
           ".parquet": _parquet_texts, ".arrow": _arrow_texts}

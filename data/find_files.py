"""The files that globs name. Links cannot make the search endless, and existing names are literal.

Python's `glob` follows a link to a folder above it again and again, and reads [1] in the name of an
existing file as a pattern.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from errors import UserError

ARCHIVES = {".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz", ".rar"}


class NoFileError(UserError):
    """A glob matches nothing."""


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that match the globs, sorted, each once.

    Raises NoFileError for a glob without a match and UserError for an archive.
    """
    path_of: dict[Path, Path] = {}              # resolved → as given
    for pattern in patterns:
        paths = [path for path in _matches(pattern) if not is_our_output(path.parent)]
        if not paths:
            if os.path.isdir(pattern):
                advice = f"it is a folder: try {pattern.rstrip('/')}/**/*.txt"
            else:
                advice = f"searched from {os.getcwd()}; your own text: data.files='[my.txt]'"
            raise NoFileError(f"data.files: no file matches {pattern!r} ({advice})")
        for path in paths:
            if path.suffix.lower() in ARCHIVES:
                raise UserError(f"data.files: {path} is packed: unpack it first "
                                "(.gz, .bz2 and .xz are read as they are)")
            path_of.setdefault(path.resolve(), path)
    return [path_of[path] for path in sorted(path_of)]


def is_our_output(folder: Path) -> bool:
    """Whether a folder holds our own shards or a checkpoint, which are not text."""
    return (folder / "tokenizer.json").exists() and (
        (folder / "manifest.json").exists() or (folder / "journal.json").exists())


def _matches(pattern: str) -> list[Path]:
    """The files that a glob names: the one of exactly this name if it exists."""
    for name in (pattern, os.path.expanduser(pattern)):
        if os.path.isfile(name):
            return [Path(name)]
    names = _expand("", Path(os.path.expanduser(pattern)).parts)
    return [Path(name) for name in names if os.path.isfile(name)]


def _expand(folder: str, parts: tuple[str, ...]) -> Iterator[str]:
    """The paths below `folder` whose names match `parts`, one after another.

    As in `glob`, ** is any number of folders, and wildcards leave hidden names out.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    path = os.path.join(folder, part)
    if part == "**":
        while rest[:1] == ("**",):              # as good as one, and searched once
            rest = rest[1:]
        for below in _folders(folder):
            yield from _expand(below, rest or ("*",))
    elif part != "*" and os.path.lexists(path):
        yield from _expand(path, rest)
    else:
        for entry in _entries(folder):
            if fnmatchcase(entry.name, part) and (part[0] == "." or entry.name[0] != "."):
                yield from _expand(os.path.join(folder, entry.name), rest)


def _folders(top: str) -> Iterator[str]:
    """`top` and all folders below it that are not hidden, each once, however many links name it."""
    visited = set()
    folders, links = [top], list[str]()         # links last, so that a file keeps its own path
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            stat = os.stat(folder or ".")
        except OSError:                         # deleted meanwhile
            continue
        if (stat.st_dev, stat.st_ino) in visited:
            continue
        visited.add((stat.st_dev, stat.st_ino))
        yield folder
        for entry in _entries(folder):
            path = os.path.join(folder, entry.name)
            if entry.name[0] != "." and os.path.isdir(path):
                (links if entry.is_symlink() else folders).append(path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder contains, by name; nothing if it is no folder."""
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        _note_unreadable(folder)
    except OSError:                             # a file, or deleted meanwhile
        pass
    return []


@cache                                          # said once
def _note_unreadable(folder: str) -> None:
    print(f"note       {folder or '.'}: no permission to search it for data.files",
          file=sys.stderr)

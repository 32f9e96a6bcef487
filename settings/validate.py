"""From a dict of values to typed settings: all errors at once, each naming the key, the value and the fix."""

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import UserError

MOST_MISTAKES = 40              # listed of one file
Size = Annotated[int, Field(gt=0, le=2 ** 20)]              # of one dimension: beyond a million it is a slip of the pen


class Conflict(ValueError):
    """Values that are fine one by one and impossible together."""

    def __init__(self, conflicts: list[tuple[tuple[str, ...], str]]):
        super().__init__("; ".join(message for _, message in conflicts))
        self.conflicts = conflicts


class Settings(BaseModel):
    """A frozen part of a config: unknown keys, wrong types, nan and inf are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield (keys involved, message that names the fix) for each impossible combination."""
        return iter(())

    @model_validator(mode="after")
    def _check_conflicts(self):
        if found := list(self.conflicts()):
            raise Conflict(found)
        return self


S = TypeVar("S", bound=Settings)


def validate(kind: type[S], tree: dict, source: str, overridden: Sequence[str] = ()) -> S:
    """`tree` as a `kind`; a UserError lists every mistake in it, each with its key, its value and the fix."""
    lines: dict[str, str] = {}          # key → its message: one each
    wrong: list[str] = []
    while True:
        try:
            settings = kind.model_validate(tree)
            break
        except ValidationError as error:
            found = [mistake for e in error.errors() for mistake in _mistakes(e, kind)]
        fresh = [(keys, message) for keys, message in found if not any(_touches(key, w) for key in keys for w in wrong)]
        for keys, message in fresh:
            if not any(other.startswith(keys[0] + ".") for others, _ in fresh for other in others):     # a union's other branch
                lines.setdefault(keys[0], f"{_source(keys[0], source, overridden)}: {message}")
        if not fresh:
            break
        # Impossible combinations hide behind single mistakes: look again without those keys, at what they do not touch.
        wrong += [key for keys, _ in fresh for key in keys]
        tree = _without(tree, wrong)
    if lines:
        more = [f"… and {len(lines) - MOST_MISTAKES} more mistakes"] * (len(lines) > MOST_MISTAKES)
        raise UserError("\n".join([*list(lines.values())[:MOST_MISTAKES], *more]))
    return settings


_shown = reprlib.Repr()         # of a value that may be endless: aliases inside aliases, or text of a megabyte
_shown.maxlevel, _shown.maxlist, _shown.maxdict, _shown.maxtuple = 2, 8, 8, 8
_shown.maxstring = _shown.maxother = _shown.maxlong = 120


def _mistakes(e: Mapping[str, Any], kind: type[Settings]) -> Iterator[tuple[list[str], str]]:
    """(keys involved, message) of one of pydantic's errors."""
    key, cause = _key(e["loc"]), e.get("ctx", {}).get("error")
    if isinstance(cause, Conflict):
        inside = key + "." if key else ""
        yield from (([inside + k for k in keys], message) for keys, message in cause.conflicts)
    elif e["type"] == "extra_forbidden":
        known = list(_settings_at(kind, e["loc"][:-1]).model_fields)
        inside = key[:-len(str(e["loc"][-1]))]
        near = [inside + k for k in difflib.get_close_matches(str(e["loc"][-1]), known, 1, 0.5)]
        near = near or [path for path in key_paths(kind) if path.rsplit(".", 1)[-1] == e["loc"][-1]]
        yield [key], f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"keys here: {', '.join(known)}")
    elif e["type"] == "missing":
        yield [key], f"{key} is missing"
    elif e["type"] in ("model_type", "model_attributes_type"):
        yield [key], f"{key}={_shown.repr(e['input'])}: keys are expected here: {', '.join(_settings_at(kind, e['loc']).model_fields)}"
    elif e["type"] == "list_type":
        shown = _shown.repr(e["input"])
        yield [key], f"{key}={shown} must be a list (try {key}='[{shown.strip(chr(39))}]')"
    elif e["type"] == "string_pattern_mismatch":                # of a name
        yield [key], f"{key}={_shown.repr(e['input'])}: letters, digits, '.', '_' and '-' are allowed, the first a letter or digit"
    else:
        yield [key], f"{key}={_shown.repr(e['input'])}: {cause or e['msg'][0].lower() + e['msg'][1:]}"


def _touches(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _source(key: str, source: str, overridden: Sequence[str]) -> str:
    return "command line" if any(_touches(key, path) for path in overridden) else source


def _key(loc: Sequence[Any]) -> str:
    # pydantic adds the names of union members to the path ("window.int"); a user's keys have no such parts
    return ".".join(str(part) for part in loc if not re.fullmatch(r"int|list\[.*\]|constrained-int|function-.*|float|str|none", str(part)))


def key_paths(kind: type[Settings], inside: str = "") -> Iterator[str]:
    """Every key below `kind`, as a path."""
    for name, field in kind.model_fields.items():
        yield inside + name
        if below := settings_in(field.annotation):
            yield from key_paths(below, f"{inside}{name}.")


def _settings_at(kind: type[Settings], loc: Sequence[Any]) -> type[Settings]:
    for part in loc:
        if part in kind.model_fields:
            kind = settings_in(kind.model_fields[part].annotation) or kind
    return kind


def settings_in(annotation: Any) -> type[Settings] | None:
    """The Settings class inside Optional[…], list[…] and the like."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := settings_in(arg))), None)


def _without(tree: Any, keys: list[str], path: str = "") -> Any:
    """A copy of `tree` that lacks the values at `keys`."""
    if not isinstance(tree, dict):
        return tree
    return {k: _without(v, keys, f"{path}{k}.") for k, v in tree.items() if f"{path}{k}" not in keys}

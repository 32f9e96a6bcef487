"""From a dict of values to typed settings.

All errors come at once, each naming the key, the value and the fix.
"""

import difflib
import json
import re
import reprlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from errors import UserError

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from settings.yaml12 import override, read_file

MOST_MISTAKES = 40              # listed for one file
Size = Annotated[int, Field(gt=0, le=2 ** 20)]      # one dimension; over a million must be a typo


def _as_written(value: Any) -> Any:
    """A number as it was written: in run=001 the name is 001."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if is_number else value


AsWritten = BeforeValidator(_as_written)
Text = Annotated[str, AsWritten]
Mistake = tuple[tuple[str, ...], str]               # the keys involved, and what is wrong with them
Conflicts = Iterator[Mistake]                       # impossible combinations of values


class ConflictError(ValueError):
    """Values that are valid one by one and impossible together."""

    def __init__(self, conflicts: list[Mistake]):
        super().__init__("; ".join(message for _, message in conflicts))
        self.conflicts = conflicts


class Settings(BaseModel):
    """A frozen part of a config: unknown keys, wrong types, nan and inf are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True,
                              allow_inf_nan=False)

    def conflicts(self) -> Conflicts:
        """Yield (keys involved, message that names the fix) for each impossible combination."""
        return iter(())

    def __repr__(self) -> str:
        """What differs from the defaults, each with its path: ModelConfig(n_layers=2, mlp='none').
        """
        changed = flatten(self.model_dump(exclude_defaults=True))
        values = ", ".join(f"{key}={_short.repr(value)}" for key, value in changed.items())
        return "\n  ".join(textwrap.wrap(f"{type(self).__name__}({values})", 98))

    def __str__(self) -> str:
        return repr(self)

    @model_validator(mode="after")
    def _check_conflicts(self) -> Self:
        if conflicts := list(self.conflicts()):
            raise ConflictError(conflicts)
        return self


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict: key path → value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


S = TypeVar("S", bound=Settings)


def validate_file(settings_class: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The mapping in a YAML file with `key.path=value` overrides, as a `settings_class`. Raises
    UserError with all mistakes in it."""
    tree = read_file(path)
    return validate(settings_class, tree, str(path), override(tree, overrides))


def validate(settings_class: type[S], tree: dict[str, Any], source: str,
             overridden: Sequence[str] = ()) -> S:
    """`tree` as a `settings_class`.

    `source` names the file in errors, `overridden` lists the paths set on the command line. Raises
    UserError with every mistake, each with its key, its value and the fix.
    """
    messages: dict[str, str] = {}       # key → its message, one each
    wrong_keys: list[str] = []
    while True:
        try:
            settings = settings_class.model_validate(tree)
            break
        except ValidationError as error:
            mistakes = [mistake for e in error.errors() for mistake in _mistakes(e, settings_class)]
        mistakes = [(keys, message) for keys, message in mistakes
                    if not any(_overlap(key, wrong) for key in keys for wrong in wrong_keys)]
        if not mistakes:
            break
        new_keys = [key for keys, _ in mistakes for key in keys]
        for keys, message in mistakes:
            # A mistake at a key that has mistakes below it comes from the other branch of a union.
            if not any(key.startswith(keys[0] + ".") for key in new_keys):
                messages.setdefault(keys[0], f"{_source(keys[0], source, overridden)}: {message}")
        # Single mistakes hide impossible combinations: validate again without the wrong keys.
        wrong_keys += new_keys
        tree = _without(tree, wrong_keys)
    if messages:
        lines = list(messages.values())[:MOST_MISTAKES]
        if len(messages) > MOST_MISTAKES:
            lines.append(f"… and {len(messages) - MOST_MISTAKES} more mistakes")
        raise UserError("\n".join(lines))
    return settings


_short = reprlib.Repr()         # for values without end: aliases inside aliases, text of a megabyte
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 2, 8, 8, 8
_short.maxstring = _short.maxother = _short.maxlong = 120


def _mistakes(error: Mapping[str, Any], settings_class: type[Settings]) -> Iterator[Mistake]:
    """The mistakes behind one of pydantic's errors: one, or several conflicts."""
    location, cause = error["loc"], error.get("ctx", {}).get("error")
    key, value = _key(location), _short.repr(error["input"])
    match error["type"]:
        case _ if isinstance(cause, ConflictError):
            prefix = f"{key}." if key else ""
            for keys, message in cause.conflicts:
                yield tuple(prefix + name for name in keys), message
        case "extra_forbidden":
            *parents, name = location
            prefix = _key([*parents, ""])
            yield (prefix + str(name),), (f"unknown key {prefix}{name}; "
                                          f"{_suggestion(prefix, location, settings_class)}")
        case "missing":
            yield (key,), f"{key} is missing"
        case "model_type" | "model_attributes_type":
            keys_here = ", ".join(_settings_at(settings_class, location).model_fields)
            yield (key,), f"{key}={value}: keys are expected here: {keys_here}"
        case "list_type":
            item = value.strip("'") if error["input"] else "…"
            yield (key,), f"{_assigned(key, error)} must be a list (try {key}='[{item}]')"
        case "string_type" if isinstance(error["input"], bool):
            yield (key,), (f"{_assigned(key, error)} is not text (in quotes it is: "
                           f"{key}='\"{str(error['input']).lower()}\"')")
        case "string_pattern_mismatch":                     # of a name
            yield (key,), (f"{key}={value}: letters, digits, '.', '_' and '-' are allowed, "
                           "the first a letter or digit")
        case _:
            message = error["msg"]
            yield (key,), (f"{_assigned(key, error)}: "
                           f"{cause or message[0].lower() + message[1:]}")


def _assigned(key: str, error: Mapping[str, Any]) -> str:
    """KEY=VALUE, with null and booleans as YAML writes them."""
    value = error["input"]
    if value is None or isinstance(value, bool):
        return f"{key}={json.dumps(value)}"
    return f"{key}={_short.repr(value)}"


def _suggestion(prefix: str, location: Sequence[Any], settings_class: type[Settings]) -> str:
    """Which known key is meant: a similar one of the same settings, or the same name elsewhere."""
    name = location[-1]
    known = list(_settings_at(settings_class, location[:-1]).model_fields)
    if close := difflib.get_close_matches(str(name), known, 1, 0.5):
        return f"did you mean {prefix}{close[0]}?"
    for path in key_paths(settings_class):
        if path.rsplit(".", 1)[-1] == name:
            return f"did you mean {path}?"
    return f"keys here: {', '.join(known)}"


def _overlap(a: str, b: str) -> bool:
    """Whether the key paths are the same, or one contains the other."""
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _source(key: str, source: str, overridden: Sequence[str]) -> str:
    return "command line" if any(_overlap(key, path) for path in overridden) else source


def _key(location: Sequence[Any]) -> str:
    """The path of a key, without the names of union members that pydantic adds ("window.int")."""
    union_member = re.compile(r"int|list\[.*\]|constrained-int|function-.*|float|str|none")
    return ".".join(str(part) for part in location if not union_member.fullmatch(str(part)))


def key_paths(settings_class: type[Settings], prefix: str = "") -> Iterator[str]:
    """Every key of `settings_class` and of the settings in it, as a path."""
    for name, field in settings_class.model_fields.items():
        yield prefix + name
        if inner := settings_in(field.annotation):
            yield from key_paths(inner, f"{prefix}{name}.")


def _settings_at(settings_class: type[Settings], location: Sequence[Any]) -> type[Settings]:
    """The innermost Settings class on the way to `location`."""
    for part in location:
        if part in settings_class.model_fields:
            inner = settings_in(settings_class.model_fields[part].annotation)
            settings_class = inner or settings_class
    return settings_class


def settings_in(annotation: Any) -> type[Settings] | None:
    """The Settings class inside Optional[…], list[…] and the like."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if inner := settings_in(argument):
            return inner
    return None


def _without(tree: Any, paths: list[str], prefix: str = "") -> Any:
    """A copy of `tree` without the values at `paths`."""
    if not isinstance(tree, dict):
        return tree
    return {key: _without(value, paths, f"{prefix}{key}.") for key, value in tree.items()
            if f"{prefix}{key}" not in paths}

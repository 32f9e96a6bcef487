"""How YAML files become typed settings: YAML 1.2 values, `key.path=value` overrides, all errors at once, a schema for editors."""

import ast
import difflib
import inspect
import io
import re
import reprlib
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import UserError, first_line

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


LARGEST_FILE = 2 ** 16          # bytes of a config file
MOST_MISTAKES = 40              # listed of one file
LONGEST_MAPPING = 1000          # keys of one mapping

# --- YAML ----------------------------------------------------------------------------------------------------------

class _Yaml12(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where 3e-4 is text, `no` is false and 017 is 15. This reads YAML 1.2's core schema."""

    yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in resolvers if tag.rsplit(":", 1)[-1] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise yaml.constructor.ConstructorError(None, None, f"{value!r} is no text that a file could be named by", node.start_mark)
        return value

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > LONGEST_MAPPING:               # merges of merges grow without end
            raise yaml.constructor.ConstructorError(None, None, f"more than {LONGEST_MAPPING} keys", node.start_mark)

    def construct_mapping(self, node, deep=False):
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for key, key_node in zip(keys, nodes):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        text = node.value.replace("_", "")
        if len(text) > 100:
            raise ValueError(f"a number of {len(text)} digits")
        if text[:2] in ("0x", "0o"):
            return int(text, 0)
        try:
            return int(text)
        except ValueError:
            number = float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
            return int(number) if "e" in text.lower() and number.is_integer() else number   # 1e6 steps are a whole number


_Yaml12.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
    r"^(?:0x[0-9a-fA-F]+|0o[0-7]+|[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), list("-+.0123456789"))
_Yaml12.add_constructor("tag:yaml.org,2002:float", _Yaml12.construct_number)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML 1.2 `text`; `source` names it in errors."""
    try:
        return yaml.load(text, Loader=_Yaml12)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: {error.problem or error}") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:     # !!int x, !!bool x …
        raise UserError(f"{source}: not YAML ({first_line(error)})") from None


def read_file(path: str | Path) -> dict:
    """The mapping in a YAML file."""
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise UserError(f"{path}: {size:,} bytes are no config (at most {LARGEST_FILE:,})")
        tree = read_yaml(Path(path).read_text("utf-8"), str(path))
    except FileNotFoundError:
        folder = Path(path).parent
        here = {p.name: p for p in folder.glob("*") if p.is_dir() or p.suffix == ".yaml"}
        near = difflib.get_close_matches(Path(path).name, list(here), 1)
        found = [here[near[0]]] if near else sorted(Path("configs").glob(f"**/{Path(path).stem}.yaml"))
        fix = f"did you mean {found[0]}?" if found else "python train.py lists the configs"
        raise UserError(f"{path}: no such file; {fix}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is {type(tree).__name__}")
    return tree


def override(tree: dict, assignments: Sequence[str]) -> list[str]:
    """Set `key.path=value` assignments in `tree`, later ones winning; the paths that were set."""
    paths = []
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise UserError(f"{assignment!r} is not key.path=value (for example train.steps=100)")
        *parents, key = path.strip().split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"{assignment!r}: {parent} holds a value, not keys")
        node[key] = read_yaml(value, assignment)
        paths.append(path.strip())
    return paths


# --- from a tree of values to typed settings -------------------------------------------------------------------------

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
        near = near or [path for path in _paths(kind) if path.rsplit(".", 1)[-1] == e["loc"][-1]]
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


def _paths(kind: type[Settings], inside: str = "") -> Iterator[str]:
    """Every key below `kind`, as a path."""
    for name, field in kind.model_fields.items():
        yield inside + name
        if below := _settings_in(field.annotation):
            yield from _paths(below, f"{inside}{name}.")


def _settings_at(kind: type[Settings], loc: Sequence[Any]) -> type[Settings]:
    for part in loc:
        if part in kind.model_fields:
            kind = _settings_in(kind.model_fields[part].annotation) or kind
    return kind


def _settings_in(annotation: Any) -> type[Settings] | None:
    """The Settings class inside Optional[…], list[…] and the like."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := _settings_in(arg))), None)


def _without(tree: Any, keys: list[str], path: str = "") -> Any:
    """A copy of `tree` that lacks the values at `keys`."""
    if not isinstance(tree, dict):
        return tree
    return {k: _without(v, keys, f"{path}{k}.") for k, v in tree.items() if f"{path}{k}" not in keys}


# --- for editors -----------------------------------------------------------------------------------------------------

def json_schema(kind: type[Settings]) -> dict:
    """The JSON schema of `kind`; keys are described by the comments behind them in its source."""
    schema = kind.model_json_schema(mode="validation")
    for of in (kind, *_kinds_in(kind)):
        part = schema["$defs"].get(of.__name__, schema)
        part = next((one for one in part.get("anyOf", ()) if "properties" in one), part)
        for key, comment in _comments(of).items():
            keyed = part["properties"][key]
            keyed["description"] = "; ".join([comment, *filter(None, [keyed.get("description")])])      # of its type besides
    return _plain(schema)


def _plain(schema: Any) -> Any:
    """Without the titles that pydantic derives from names, and the defaults of whole parts, which stand at their keys."""
    match schema:
        case {"properties": dict(keys), **rest}:
            return _plain(rest) | {"properties": {key: _plain(value) for key, value in keys.items()}}
        case dict():
            return {k: _plain(v) for k, v in schema.items() if k != "title" and not (k == "default" and isinstance(v, dict))}
        case list():
            return [_plain(one) for one in schema]
    return schema


def _kinds_in(kind: type[Settings]) -> Iterator[type[Settings]]:
    for field in kind.model_fields.values():
        if below := _settings_in(field.annotation):
            yield below
            yield from _kinds_in(below)


def _comments(kind: type[Settings]) -> dict[str, str]:
    """Key → the comment behind it, with the lines below that hold nothing but more of it."""
    source = inspect.getsource(kind)
    keys = {node.end_lineno: node.target.id for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    found: dict[str, str] = {}
    last, line = None, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            key = keys.get(token.start[0]) or (last if token.start[0] == line + 1 else None)
            if key:
                found[key] = f"{found.get(key, '')} {token.string.removeprefix('#').strip()}".strip()
            last, line = key, token.start[0]
    return found

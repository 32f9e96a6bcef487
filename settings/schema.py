"""The JSON schema of a settings class, for editors: the comment behind each key is its description."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any

from settings.validate import Settings, settings_in


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
        if below := settings_in(field.annotation):
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

"""The JSON schema of a settings class, for editors: each key's comment is its description."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any

from settings.validate import Settings, settings_in


def json_schema(settings_class: type[Settings]) -> dict[str, Any]:
    """The JSON schema of `settings_class`, with the comments of its source as descriptions."""
    schema = settings_class.model_json_schema(mode="validation")
    for described in (settings_class, *_settings_below(settings_class)):
        definition = schema["$defs"].get(described.__name__, schema)
        for alternative in definition.get("anyOf", ()):
            if "properties" in alternative:
                definition = alternative
        for key, comment in _comments(described).items():
            entry = definition["properties"][key]
            if "description" in entry:                      # of its type
                comment = f"{comment}; {entry['description']}"
            entry["description"] = comment
    return _simplified(schema)


def _simplified(schema: Any) -> Any:
    """Without the titles that pydantic derives from names, and the defaults of whole parts.

    The defaults of a part are given at its keys.
    """
    match schema:
        case {"properties": dict(keys), **rest}:
            properties = {key: _simplified(value) for key, value in keys.items()}
            return _simplified(rest) | {"properties": properties}
        case dict():
            return {key: _simplified(value) for key, value in schema.items()
                    if key != "title" and not (key == "default" and isinstance(value, dict))}
        case list():
            return [_simplified(item) for item in schema]
    return schema


def _settings_below(settings_class: type[Settings]) -> Iterator[type[Settings]]:
    for field in settings_class.model_fields.values():
        if inner := settings_in(field.annotation):
            yield inner
            yield from _settings_below(inner)


def _comments(settings_class: type[Settings]) -> dict[str, str]:
    """Key → the comment behind it and on the lines below it that hold only a comment."""
    source = inspect.getsource(settings_class)
    key_at_line = {node.end_lineno: node.target.id for node in ast.walk(ast.parse(source))
                   if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_at_line = {token.start[0]: token.string.removeprefix("#").strip()
                       for token in tokens if token.type == tokenize.COMMENT}
    comments: dict[str, str] = {}
    key = None
    for line in range(1, source.count("\n") + 1):
        key = key_at_line.get(line, key)
        if line in comment_at_line and key:
            comments[key] = f"{comments.get(key, '')} {comment_at_line[line]}".strip()
        elif line not in key_at_line:
            key = None
    return comments

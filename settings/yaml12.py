"""YAML 1.2 files and `key.path=value` overrides, read into plain dicts and values."""

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from errors import UserError, command, first_line, path_of

import yaml

LARGEST_FILE = 2 ** 16          # bytes of a config file
LONGEST_MAPPING = 1000          # keys of one mapping
LONGEST_NUMBER = 100            # digits


class Written:
    """A number with the text it was written as: 001, 1e3, 0x10, 1.50. A key that expects text gets
    that text (Text in settings/validate.py)."""

    text: str

    def __repr__(self) -> str:
        return self.text


class WrittenInt(Written, int):
    pass


class WrittenFloat(Written, float):
    pass


class _Yaml12(yaml.SafeLoader):
    """Reads YAML 1.2's core schema.

    PyYAML itself reads YAML 1.1, where 3e-4 is text, `no` is false and 017 is 15.
    """

    # Of PyYAML's rules for plain values only null and merge keys stay; the others are added below.
    yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in resolvers
                if tag.rsplit(":", 1)[-1] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise _error(f"{value!r} contains characters that no file name can have", node)
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > LONGEST_MAPPING:               # nested merges grow exponentially
            raise _error(f"more than {LONGEST_MAPPING} keys", node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for key, key_node in zip(keys, nodes):
            if keys.count(key) > 1:
                raise _error(f"the key {key!r} appears twice", key_node)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        number = self._number(node)
        if repr(number) == node.value:
            return number
        written = WrittenInt(number) if isinstance(number, int) else WrittenFloat(number)
        written.text = node.value
        return written

    def _number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.replace("_", "")
        if len(text) > LONGEST_NUMBER:
            raise ValueError(f"a number of {len(text)} digits")
        if text[:2] in ("0x", "0o"):
            return int(text, 0)
        try:
            return int(text)
        except ValueError:
            number = float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
            if "e" in text.lower() and number.is_integer():
                return int(number)                          # 1e6 steps are a whole number
            return number


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Yaml12.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(
    r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
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
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError,
            TypeError) as error:                # `!!int x` and `!!bool x` raise the last four
        raise UserError(f"{source}: not YAML ({first_line(error)})") from None


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if there is none."""
    lists = f"{command('train.py')} lists the configs"
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise UserError(f"{path}: {size:,} bytes are too large for a config "
                            f"(at most {LARGEST_FILE:,})")
        tree = read_yaml(Path(path).read_text("utf-8"), str(path))
    except FileNotFoundError:
        if "=" in Path(path).name:
            raise UserError(f"{path}: no such file; the config comes first, for example "
                            f"{path_of('configs/quickstart.yaml')} {path}") from None
        neighbour = similar_file(Path(path))
        fix = f"did you mean {neighbour}?" if neighbour else lists
        raise UserError(f"{path}: no such file; {fix}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if tree is None:
        raise UserError(f"{path}: this config is empty; {lists}")
    if not isinstance(tree, dict):
        names: dict[type, str] = {str: "text", list: "a list"}
        held = names.get(type(tree), f"the value {tree!r}")
        raise UserError(f"{path}: a config is a mapping of keys to values, but this file holds "
                        f"{held}; {lists}")
    return tree


def similar_file(path: Path) -> Path | None:
    """A file or folder with a similar name beside `path`, or a config of the same name."""
    neighbours = {p.name: p for p in path.parent.glob("*") if p.is_dir() or p.suffix == ".yaml"}
    if close := difflib.get_close_matches(path.name, list(neighbours), 1):
        return neighbours[close[0]]
    return min(Path(path_of("configs")).glob(f"**/{path.stem}.yaml"), default=None)


def override(tree: dict[str, Any], assignments: Sequence[str]) -> list[str]:
    """Set `key.path=value` assignments in `tree`, later ones winning. Returns the paths set."""
    paths = []
    for assignment in assignments:
        if not isinstance(assignment, str):
            raise UserError(f"{assignment!r} is not an override; write each as its own text, "
                            "for example \"train.steps=100\"")
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

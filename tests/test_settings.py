"""Configs: YAML 1.2 values, overrides, all errors at once, the schema for editors."""

import json
import re
from collections.abc import Iterator

from errors import UserError

import pytest
import yaml
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from settings.schema import json_schema
from settings.validate import validate
from settings.yaml12 import override, read_file, read_yaml
from training.config import Config, differences, dump_config, load_config


@pytest.mark.parametrize(("text", "value"), [
    ("3e-4", 3e-4), ("1e6", 1_000_000), ("3e+4", 30_000), ("017", 17), ("0x10", 16),
    ("1_000", 1000), ("-2.5", -2.5), (".5", 0.5), ("no", "no"), ("on", "on"), ("1:30", "1:30"),
    ("true", True), ("null", None), ("~", None), ("'3'", "3"), ("2024-01-01", "2024-01-01"),
])
def test_values_are_yaml_1_2(text, value):
    parsed = read_yaml(text, "test")
    assert parsed == value and isinstance(parsed, type(value))


@pytest.mark.parametrize("text", ["001", "7", "1e3", "1.50", "3e-4", "0x10", "1_000", "2024-01-01"])
def test_a_name_is_the_text_as_written(text):
    tree = {"log": read_yaml(f"project: {text}", "x.yaml")}
    paths = override(tree, [f"run={text}", f"data.files=[{text}]", "data.corpus=files"])
    config = validate(Config, tree, "x.yaml", paths)
    assert (config.run, config.log.project, config.data.files) == (text, text, [text])
    assert validate(Config, yaml.safe_load(dump_config(config)), "dump") == config


def test_a_number_is_a_number_however_it_is_written():
    tree: dict = {}
    paths = override(tree, ["train.steps=1e3", "seed=007", "optimizer.lr=3e-4", "model.window=0x8"])
    config = validate(Config, tree, "x.yaml", paths)
    assert (config.train.steps, config.seed, config.model.window) == (1000, 7, 8)
    assert config.optimizer.lr == 3e-4
    numbers = (config.train.steps, config.seed, config.model.window, config.optimizer.lr)
    assert [type(number) for number in numbers] == [int, int, int, float]


def errors_of(tree: dict, *assignments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        validate(Config, tree, "x.yaml", override(tree, assignments))
    return str(caught.value).splitlines()


def test_all_mistakes_come_at_once_each_with_its_key_value_and_fix():
    tree = {"model": {"n_head": 4, "n_kv_heads": 3, "d_head": 7},
            "train": {"batch_tokens": 1000, "steps": "many"}}
    lines = errors_of(tree, "optimizer.lr=fast", "modle.n_ctx=4")
    assert len(lines) == 7
    for words in (["x.yaml", "model.n_head", "did you mean model.n_heads"],
                  ["n_kv_heads=3", "n_heads=4", "try 1, 2, 4"], ["d_head=7", "odd"],
                  ["batch_tokens=1000", "n_ctx=256", "try 1024"], ["train.steps='many'"],
                  ["command line", "optimizer.lr='fast'"], ["modle", "did you mean model"]):
        assert any(all(word in line for word in words) for line in lines), (words, lines)


@pytest.mark.parametrize(("assignment", "words"), [
    ("run=../elsewhere", "run="), ("run=.5", "run='.5'"),
    ("run=true", "quotes"), ("run=", "run=null"), ("train.steps=1.50", "train.steps=1.50:"),
    ("optimizer.lr=1e-46", "optimizer.lr=1e-46 is 0 in float32"),
    ("optimizer.adam_lr=1e-46", "optimizer.adam_lr=1e-46 is 0 in float32"),
    ("data.files=", "data.files=null must be a list"),
    ("seed=18446744073709551616", "seed="),
    ("train.steps=0", "greater than 0"), ("train.steps=1.5", "train.steps=1.5"),
    ("optimizer.lr=.nan", "optimizer.lr"), ("model.qk_norm=1", "model.qk_norm=1"),
    ("model.window=[8, 0]", "model.window.1=0"), ("data.tokenizer=gtp2", "did you mean gpt2"),
    ("data.tokenizer={kind: bytes, vocab_size: 9}", "vocab_size=9"),
    ("data.tokenizer={kind: bpe, vocab_size: 9}", "try 4096"),
    ("data.corpus=files", "data.files"), ("data.corpus=hub", "data.hub"),
    ("data.mixture=[{corpus: stdlib, weight: 1, until: 5}]", "until"),
    ("data={corpus: repeats, repeats: {period: [8, 200]}}", "longest: 128"),
    ("data.repeats={period: [8, 9], held_out_periods: [8, 9]}", "held_out_periods"),
    ("model=5", "keys are expected"), ("model={d_model: 100, n_heads: 3}", "try d_model=102"),
    ("data.files=a.txt", "try data.files='[a.txt]'"),
    ("data.files=[a.txt]", "set data.corpus=files"), ("lr=0.1", "did you mean optimizer.lr?"),
    ("modle.d_model=3", "command line: unknown key modle; did you mean model?"),
    ("model.int=3", "unknown key model.int; did you mean model."), ("train.micro_batch=5", "try 4"),
    ("model.n_heads=1152921504606846976", "less than or equal to 1048576"),
    ("seed=0x" + "f" * 200, "a number of 202 digits"),
    ("data.repeats={period: [8, 1000000000000]}", "less than or equal to 1048576"),
])
def test_one_mistake(assignment, words):
    lines = errors_of({}, assignment)
    assert len(lines) == 1 and words in lines[0], lines


def test_later_overrides_win_and_lists_and_mappings_can_be_given():
    tree = {"model": {"n_ctx": 64}}
    paths = override(tree, ["seed=1", "seed=2", "model.window=[null, 8]", "data.tokenizer=bytes"])
    config = validate(Config, tree, "x", paths)
    assert (config.seed, config.data.tokenizer.kind) == (2, "bytes")
    assert (config.model.n_ctx, config.model.window) == (64, [None, 8])


@pytest.mark.parametrize(("text", "words"), [
    ("seed: 1\nseed: 2", "twice"), ("a: [", "line"), ("- 1", "holds a list"), ("", "empty"),
    ("# a comment", "empty"), ("some words", "holds text"), ("5", "the value 5"),
    ("a: &x [*x]", ""),
    ("a: !!int x", ""), ("a: !!bool x", ""), ("a: !!timestamp x", ""),
    ("!!python/object/apply:os.system [ls]", ""),
])
def test_a_file_that_is_not_a_config_is_refused(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml") as caught:
        load_config(tmp_path / "x.yaml")
    assert words in str(caught.value)


def test_an_override_in_the_place_of_the_config_is_named():
    with pytest.raises(UserError, match=r"the config comes first, for example .* seed=3"):
        load_config("seed=3")


def test_merge_keys_work():
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "test")["d"] == {"b": 1, "c": 3}


def test_a_missing_file_names_a_similar_one():
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yaml"):
        load_config(ROOT / "configs" / "quickstrat.yaml")


KEYS = st.sampled_from(["model", "data", "train", "n_ctx", "tokenizer", "mixture", "window", "kind",
                        "repeats", "period"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(st.recursive(LEAVES, lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))))
def test_any_tree_is_a_config_or_a_clear_error(tree):
    if isinstance(tree, dict):
        try:
            validate(Config, tree, "x.yaml")
        except UserError as error:
            assert all(line.startswith("x.yaml: ") for line in str(error).splitlines())


def test_a_dumped_config_reads_back_the_same():
    for path in ROOT.glob("configs/**/*.yaml"):
        config = load_config(path)
        assert validate(Config, yaml.safe_load(dump_config(config)), "dump") == config


def test_differences_say_which_values_are_defaults():
    a = {"model": {"n_ctx": 64}, "data": {"hub": None}}
    b = {"model": {"n_ctx": 32, "n_heads": 2}, "data": {"hub": {"dataset": "a/b"}}}
    changes = differences(validate(Config, a, "a"), validate(Config, b, "b"))
    assert [str(change) for change in changes] == [
        "model.n_heads: 4 (by default) → 2", "model.n_ctx: 64 → 32",
        "data.hub.dataset: None → 'a/b'", "data.hub.split: None → 'train'",
        "data.hub.column: None → 'text'"]


# --- configs/schema.json ---

SCHEMA = json.loads((ROOT / "configs" / "schema.json").read_text("utf-8"))
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
         "number": (int, float), "null": type(None)}
BOUNDS = {"minimum": float.__ge__, "exclusiveMinimum": float.__gt__,
          "maximum": float.__le__, "exclusiveMaximum": float.__lt__}
WORDS = {"$defs", "$ref", "anyOf", "type", "enum", "const", "pattern", "maxLength", "properties",
         "required", "items", "additionalProperties", "default", "description", *BOUNDS}


def misfits(value: object, schema: dict = SCHEMA, path: str = "") -> Iterator[str]:
    """The paths at which `value` does not fit `schema`.

    A JSON schema validator for the words that our schema uses. Another word is an error.
    """
    assert schema.keys() <= WORDS
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema:
        if all(list(misfits(value, alternative, path)) for alternative in schema["anyOf"]):
            yield path
        return
    json_type = schema["type"]
    is_misplaced_bool = isinstance(value, bool) and json_type != "boolean"
    if is_misplaced_bool or not isinstance(value, TYPES[json_type]):
        yield path
    elif json_type == "object":
        assert schema["additionalProperties"] is False
        unknown = value.keys() - schema["properties"]
        missing = set(schema.get("required", ())) - value.keys()
        yield from (f"{path}.{key}" for key in [*unknown, *missing])
        for key in value.keys() & schema["properties"]:
            yield from misfits(value[key], schema["properties"][key], f"{path}.{key}")
    elif json_type == "array":
        for n, item in enumerate(value):
            yield from misfits(item, schema["items"], f"{path}.{n}")
    elif not fits_scalar(value, schema):
        yield path


def fits_scalar(value: object, schema: dict) -> bool:
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if schema["type"] == "string":
        matches = re.search(schema.get("pattern", ""), value)
        return bool(matches) and len(value) <= schema.get("maxLength", 1000)
    return all(within(float(value), float(schema[bound]))
               for bound, within in BOUNDS.items() if bound in schema)


def test_the_schema_is_what_its_command_writes():
    assert json_schema(Config) == SCHEMA, "run: python -m training.config > configs/schema.json"


def test_the_schema_describes_keys_by_their_comments():
    model, train, eval_ = (SCHEMA["$defs"][name]["properties"]
                           for name in ("ModelConfig", "TrainConfig", "EvalConfig"))
    assert train["batch_tokens"]["description"] == (
        "tokens per update, over all micro-batches and processes")
    assert model["zero_init"]["description"].startswith(            # a comment of several lines
        "every block starts as the identity: the matrices that write to the residual stream start")
    assert model["bias"]["description"].startswith("which matrices add one")    # below its key
    assert "description" not in model["position"] and model["position"]["default"] == "rope"
    assert eval_["every"]["description"] == "steps between two; 0: never"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_editors_find_the_schema_and_every_config_fits_it(path):
    prefix, schema = path.read_text("utf-8").splitlines()[0].split("$schema=")
    assert prefix == "# yaml-language-server: "
    assert (path.parent / schema).resolve() == ROOT / "configs" / "schema.json"
    assert not list(misfits(read_file(path)))


@pytest.mark.parametrize("assignment", [
    "data.tokenizer=gpt2", "data.tokenizer={kind: bpe, vocab_size: 300}",
    "data.tokenizer=runs/a/checkpoints/latest", "train.compile=auto", "train.compile=true",
    "train.compile=false", "train.micro_batch=null", "model.window=8", "model.window=[null, 8]",
    "model.window=null", "optimizer.lr=1", "heads.every=0",
    "data.mixture=[{corpus: stdlib, weight: 1}, {corpus: repeats, weight: 0.5, until: 9}]",
    "data={corpus: hub, hub: {dataset: a/b, max_tokens: 5}}",
    "model.rope_scaling={kind: linear, factor: 2}",
])
def test_the_schema_accepts_what_a_config_accepts(assignment):
    tree = {}
    validate(Config, tree, "x.yaml", override(tree, [assignment]))
    assert not list(misfits(tree))


@pytest.mark.parametrize(("assignment", "path"), [
    ("model.n_head=4", ".model.n_head"), ("model.n_heads=0", ".model.n_heads"),
    ("model.mlp=relu", ".model.mlp"), ("run=../x", ".run"), ("lr=1", ".lr"), ("model=5", ".model"),
    ("train.compile=yes", ".train.compile"), ("train.steps=many", ".train.steps"),
    ("model.qk_norm=1", ".model.qk_norm"), ("data.tokenizer={vocab_size: 300}", ".data.tokenizer"),
    ("data.val_fraction=1", ".data.val_fraction"),
    ("data.mixture=[{corpus: stdlib}]", ".data.mixture"),
    ("optimizer.betas=[0.9, 1]", ".optimizer.betas.1"),
])
def test_the_schema_refuses_what_a_config_refuses(assignment, path):
    tree = {}
    with pytest.raises(UserError):
        validate(Config, tree, "x.yaml", override(tree, [assignment]))
    assert list(misfits(tree)) == [path]

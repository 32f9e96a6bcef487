"""A config damaged in any way is a run or a clear error: never a traceback, never half a run."""

import os
import shutil
import time
from pathlib import Path

from errors import UserError

import pytest
import torch
import yaml
from commands import ROOT, command, fails
from conftest import TINY, make_workplace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.budget import parameters
from model.gpt import GPT
from train import train
from training.config import Config
from training.device import check_memory, choose_hardware, choose_micro_batch
from training.parallel import ONE_PROCESS
from training.resume import job_of

FILES = {"tiny": TINY}
for path in sorted(ROOT.glob("configs/**/*.yaml")):
    FILES[path.stem] = yaml.safe_load(path.read_text())
JUNK = [None, True, False, -1, 0, 1, 3, 7, 2 ** 20, 2 ** 31, 2 ** 40, 2 ** 63, 10 ** 30, -10 ** 30,
        0.5, -0.5, 1e-320, 1e300, -1e300, float("nan"), float("inf"),
        "", "x", "..", "../../x", "/", "a" * 300, "a" * 5000, "\0", "\ud800", "ü", "1e3", "~", "{}",
        [], {}, [[]], [None], [[[[1]]]], list(range(50)), {"a": {"b": [1]}}, {"kind": "bytes"},
        {1: 2}, ["x"] * 3]
# Each of these is 9 times as large as the one before.
LISTS = ["&b0 [x, x, x, x, x, x, x, x]"]
LISTS += [f"&b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 12)]
MERGES = ["&m0 {a: 1}"]
MERGES += [f"&m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12)]
LIST_BOMB = "".join(f"\nb{n}: {text}" for n, text in enumerate(LISTS))
KEY_BOMB = "".join(f", k{n}: {text}" for n, text in enumerate(LISTS[1:]))
MERGE_BOMB = "".join(f"\nm{n}: {text}" for n, text in enumerate(MERGES))
DAMAGE = [
    b"\xff\xfe", b"\x80", b"\0", b"\t", b"{", b"[", b"]}", b": ", b"- ", b"'", b'"', b"&a *a",
    b"*nothing", b"!!python/name:os.system ", b"!!binary x", b"!!set {a, b}", b"%YAML 9.9\n---\n",
    b"\n---\nrun: second\n", b"? ", b"|", b"<<: *x", b"0x" + b"f" * 9000, b"9" * 9000,
    b"\xef\xbb\xbf", b"\x1b[31m", b"[" * 3000, b"{a: " * 800, b"# " + b"x" * 70_000,
    f"{LIST_BOMB}\n".encode(), f"\nmodel: {{n_layers: {LISTS[0]}{KEY_BOMB}}}\n".encode(),
    f"{MERGE_BOMB}\n".encode(), b"\nmodel: &m {n_heads: *m, x: *m}\n",
]
GENTLE = st.integers(1, 64) | st.floats(0, 1) | st.booleans()       # often still a valid run


def paths(tree, prefix=()):
    """The path of every value."""
    items = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@st.composite
def damaged(draw, names=("tiny",) * len(FILES) + tuple(FILES)) -> bytes:
    """A config file changed in one to four places, in most cases so that it is invalid."""
    tree = yaml.safe_load(yaml.safe_dump(FILES[draw(st.sampled_from(names))]))
    changes = draw(st.sampled_from([0, 1, 1, 2]))
    for _ in range(changes):
        *parents, last = draw(st.sampled_from(sorted(paths(tree), key=str)))
        node = tree
        for key in parents:
            node = node[key]
        match draw(st.sampled_from(["replace", "replace", "delete", "unknown", "nest", "move"])):
            case "replace":
                node[last] = draw(st.one_of(GENTLE, st.sampled_from(JUNK), st.integers(),
                                            st.floats(), st.text(max_size=8)))
            case "delete":
                del node[last]
            case "unknown" if isinstance(node, dict):
                key = draw(st.sampled_from(["modle", "steps", "lr", "x", "__class__", 3]))
                node[key] = draw(st.sampled_from(JUNK))
            case "nest":
                node[last] = {last: node[last]}
            case "move":
                tree[str(last)] = node[last]
        if not tree:
            break
    text = yaml.safe_dump(tree).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1] if changes else [1, 2]))):
        at = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["insert", "append", "cut", "double", "flip"])):
            case "insert":
                text = text[:at] + draw(st.sampled_from(DAMAGE) | st.binary(max_size=4)) + text[at:]
            case "append":
                text += draw(st.sampled_from(DAMAGE))
            case "cut":
                text = text[:at] + text[at + draw(st.integers(1, 40)):]
            case "double":
                text += text[:at]
            case "flip" if at < len(text):
                flipped = text[at] ^ 1 << draw(st.integers(0, 7))
                text = text[:at] + bytes([flipped]) + text[at + 1:]
    return text


def small(config: Config) -> bool:
    """Whether a step takes no time.

    That is: the texts of the tests, a small vocabulary, a small model, nothing to compile.
    """
    data, vocab_size = config.data, config.model.vocab_size or 2000
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return (data.corpora in (["files"], ["files", "repeats"])
            and data.tokenizer.kind in ("bpe", "bytes") and (data.tokenizer.vocab_size or 0) < 2000
            and config.train.compile is not True and config.train.batch_tokens <= 4096
            and config.eval.tokens <= 2 ** 20
            and model.n_layers < 20 and model.n_ctx <= 1024
            and parameters(model).total() < 10 ** 6)


def check_before_training(config: Config) -> None:
    """The checks that come before anything is prepared or built."""
    hardware = choose_hardware(config)
    with torch.device("meta"):
        vocab_size = config.model.vocab_size or 2 ** 16
        model = GPT(config.model.model_copy(update={"vocab_size": vocab_size}))
    choose_micro_batch(config, model)
    check_memory(model, hardware.device)


def outcome(text: bytes) -> str:
    """Do what the command does: to an error, through a step if that is cheap, or up to training."""
    Path("damaged.yaml").write_bytes(text)
    shutil.rmtree("runs", ignore_errors=True)
    try:
        job = job_of("damaged.yaml", ["train.steps=1"])
        if not small(job.config):
            check_before_training(job.config)
            return "valid"
        train(job, ONE_PROCESS.world)
        assert (job.folder / "config.yaml").exists() and (job.folder / "metrics.jsonl").exists()
        return "trained"
    except OSError as error:                            # errors.run_command names the file
        assert error.filename
        return "refused"
    except UserError as error:
        message = str(error)
        assert message.strip() and all(len(line) < 2500 for line in message.splitlines()), message
        began = " became " in message                   # a loss that is not finite ends a run
        runs = list(Path("runs").iterdir()) if Path("runs").exists() else []
        assert began or not runs, (message, runs)
        return "refused"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("configs")
    make_workplace(place)
    before = os.getcwd()
    os.chdir(place)
    yield place
    os.chdir(before)


OPTIONS = {"suppress_health_check": list(HealthCheck)}


def go_through(fault, examples: int) -> dict[str, int]:
    seen = {"refused": 0, "valid": 0, "trained": 0}

    @settings(max_examples=examples, **OPTIONS)
    @given(damaged())
    def each(text: bytes) -> None:
        with fault("damaged config", "in the test's process"):
            began = time.process_time()
            seen[outcome(text)] += 1
            assert time.process_time() - began < 20

    each()
    return seen


@pytest.mark.parametrize("examples", [60, pytest.param(500, marks=pytest.mark.faults)])
def test_a_damaged_config_is_a_run_or_a_clear_error(folder, fault, examples):
    seen = go_through(fault, examples)
    assert all(seen.values()), seen                     # otherwise an outcome was not tested


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.faults)])
def test_each_damage_alone(folder, fault, every):
    intact = yaml.safe_dump(TINY).encode()
    replaced = [yaml.safe_dump(TINY | {key: junk}).encode()
                for key in ("run", "init_from", "seed") for junk in JUNK]
    for text in [*DAMAGE, *(intact + damage for damage in DAMAGE), *replaced][::every]:
        with fault("damaged config", "in the test's process"):
            outcome(text)


@pytest.mark.parametrize("examples", [3, pytest.param(25, marks=pytest.mark.faults)])
def test_the_command_behaves_the_same(folder, fault, examples):
    @settings(max_examples=examples, **OPTIONS)
    @given(damaged(("tiny",)))
    def each(text: bytes) -> None:
        with fault("damaged config", "in a process of its own"):
            if outcome(text) == "valid":                # too large to train in a test
                return
            shutil.rmtree("runs", ignore_errors=True)
            done = command("train.py", "damaged.yaml", "train.steps=1")
            assert "Traceback" not in done.stderr, (text, done.stderr)
            assert done.returncode in (0, 2), (text, done.stderr)
            if done.returncode == 2:
                assert done.stderr.lstrip().splitlines()[-1] and "error: " in done.stderr
            else:
                assert list(Path("runs").glob("*/metrics.jsonl"))

    each()


def test_run_names_and_targets_cannot_leave_their_folder(folder, fault):
    Path("damaged.yaml").write_text(yaml.safe_dump(TINY))
    shutil.rmtree("runs", ignore_errors=True)
    for name in ("../out", "/tmp/out", "..", "a/b", "."):
        with fault("damaged config", "in the test's process"):
            with pytest.raises(UserError, match="run="):
                job_of("damaged.yaml", [f"run={name}"])
    with fault("damaged config", "in a process of its own"):
        fails(command("train.py", "a" * 5000), "name too long")
    assert not Path("runs").exists()

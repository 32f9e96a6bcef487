"""Files from strangers are refused with a clear error.

In seconds, without running their code and without giving them the machine's memory.
"""

import ast
import bz2
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Done, command, fails

from faults.lab import Lab

full = pytest.mark.faults
SECONDS, GIGABYTES = 20, 1.2                # a command that does nothing takes 1 s and 0.4 GB


class Touch:
    """Code that a pickle carries."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def refused(lab: Lab, script: str, *arguments, words: tuple[str, ...] = ()) -> None:
    """Assert that the command ends with exit code 2 and a message of two lines.

    Within SECONDS and GIGABYTES, and without a file `pwned`.
    """
    done = command(script, *arguments, cwd=lab.folder)
    fails(done, *words)
    assert len(done.stderr[done.stderr.index("error: "):]) < 1500, done.stderr
    check_use(done)
    assert not (lab / "pwned").exists()


def check_use(done: Done) -> None:
    """Of processor time, so that other programs do not count, and of memory."""
    assert done.used.ru_utime + done.used.ru_stime < SECONDS, done.used
    assert done.used.ru_maxrss / 1e6 < GIGABYTES, done.used


def full_unless(names, short: set) -> list:
    """Parameters of a test: those in `short` always run, the others only with all faults."""
    return [pytest.param(name, marks=() if name in short else full) for name in names]


# --- checkpoints ----------------------------------------------------------------------------------

def copy_of_run(lab: Lab, name: str) -> Path:
    """The newest checkpoint of a copy of a run, to change it."""
    run = lab / f"runs/{name}"
    shutil.copytree(lab.undisturbed, run, symlinks=True)
    return run / "checkpoints/000012"


def sign(checkpoint: Path) -> None:
    """Make the manifest fit: a stranger who changes a checkpoint can do that too."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest:
        if (checkpoint / name).exists():
            digest = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
            manifest[name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def safetensors_of(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def with_gpt(**sizes):
    def change(checkpoint: Path) -> None:
        rewrite(checkpoint / "config.json", lambda config: config["gpt"].update(sizes))
    return change


def with_tokenizer(change):
    return lambda checkpoint: rewrite(checkpoint / "tokenizer.json", change)


def with_pattern(regex: str):
    def change(tokenizer: dict) -> None:
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    return with_tokenizer(change)


def large(name: str, size: int):
    return lambda checkpoint: os.truncate(checkpoint / name, size)


MODEL = "model.safetensors"
HUGE_WEIGHT = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [2 ** 30, 2 ** 30],
                                             "data_offsets": [0, 2 ** 62]}}


def with_weights(contents: bytes):
    return lambda checkpoint: (checkpoint / MODEL).write_bytes(contents + bytes(2 ** 20))


def with_pickled_weights(checkpoint: Path) -> None:
    with_weights(pickle.dumps(Touch(checkpoint.parents[3] / "pwned")))(checkpoint)


def with_pickled_bin(checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()
    path = checkpoint / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Touch(checkpoint.parents[3] / "pwned")))


CHANGES = {
    "a width of 2^40": with_gpt(d_model=2 ** 40),
    "a width of 2^20": with_gpt(d_model=2 ** 20),
    "4096 layers": with_gpt(n_layers=4096),
    "2^40 layers": with_gpt(n_layers=2 ** 40),
    "a context of 2^40": with_gpt(n_ctx=2 ** 40),
    "2^60 heads": with_gpt(n_heads=2 ** 60, n_kv_heads=7),
    "a width of text": with_gpt(d_model="x" * 100_000),
    "no description": lambda c: rewrite(c / "config.json", lambda config: config.pop("gpt")),
    "a config.json of brackets": lambda c: (c / "config.json").write_text("[" * 200_000),
    "a header of 2^60 weights": with_weights(safetensors_of(HUGE_WEIGHT)),
    "a header as long as 2^60": with_weights((2 ** 60).to_bytes(8, "little")),
    "a pickle for weights": with_pickled_weights,
    "weights of other shapes": with_weights(safetensors_of({})),
    "a pickle in a .bin": with_pickled_bin,
    "ids of 2^60": with_tokenizer(lambda t: t["added_tokens"][0].update(id=2 ** 60)),
    "ids of 2^31": with_tokenizer(lambda t: t["model"]["vocab"].update({"ab": 2 ** 31})),
    "negative ids": with_tokenizer(lambda t: t["model"]["vocab"].update({"ab": -5})),
    "no vocabulary": with_tokenizer(lambda t: t["model"].update(vocab=[])),
    "a pattern that explodes": with_pattern(r"(?:\w{1000}){1000}{1000}"),
    "a pattern that is none": with_pattern("("),
    "a tokenizer of brackets": lambda c: (c / "tokenizer.json").write_text("[" * 200_000),
    "a tokenizer of 300 MB": large("tokenizer.json", 300 * 2 ** 20),
}
SHORT = {"a width of 2^20", "a header of 2^60 weights", "a pickle for weights"}


@pytest.mark.parametrize("change", full_unless(CHANGES, SHORT))
def test_a_checkpoint_that_lies_is_refused(lab: Lab, fault, change):
    """Its manifest fits: the stranger made it so."""
    with fault("untrusted checkpoint", change):
        checkpoint = copy_of_run(lab, f"lies-{list(CHANGES).index(change)}")
        CHANGES[change](checkpoint)
        sign(checkpoint)
        refused(lab, "sample.py", checkpoint, "def ", words=(str(checkpoint),))


def test_a_pattern_that_backtracks_without_end_is_given_up(lab: Lab, fault):
    with fault("untrusted checkpoint", "a pattern that backtracks"):
        checkpoint = copy_of_run(lab, "backtracks")
        with_pattern(r"(?=(x+x+)+y)\1|(?:(x+)\2+)+y")(checkpoint)
        sign(checkpoint)
        refused(lab, "sample.py", checkpoint, "x" * 60)


ENTRY = {"bytes": 1, "sha256": "0"}
MANIFESTS = {
    "names outside the checkpoint": (
        lambda m: m.update({"../../../../etc/passwd": ENTRY}), "which is outside the checkpoint"),
    "an absolute name": (
        lambda m: m.update({"/etc/passwd": ENTRY}), "which is outside the checkpoint"),
    "weights that are not listed": (lambda m: m.pop(MODEL), "does not list model.safetensors"),
    "nothing": (lambda m: m.clear(), "does not list"),
    "numbers for entries": (lambda m: m.update({MODEL: 5}), MODEL),
}


@pytest.mark.parametrize("change", full_unless(MANIFESTS, {
    "names outside the checkpoint", "weights that are not listed"}))
def test_a_manifest_lists_what_is_loaded_and_nothing_outside(lab: Lab, fault, change):
    with fault("untrusted checkpoint", f"a manifest of {change}"):
        checkpoint = copy_of_run(lab, f"manifest-{list(MANIFESTS).index(change)}")
        function, word = MANIFESTS[change]
        rewrite(checkpoint / "manifest.json", function)
        refused(lab, "sample.py", checkpoint.parent.parent, "def ", words=(word,))


STATES = {
    "a step of text": lambda s: s.update(step="twelve"),
    "no data": lambda s: s.pop("data"),
    "data of a list": lambda s: s.update(data=[]),
    "no hash": lambda s: s["data"].pop("hash"),
    "a folder elsewhere": lambda s: s["data"].update(folder="../../../../etc", hash="0"),
    "a folder of numbers": lambda s: s["data"].update(folder=5),
}


@pytest.mark.parametrize("change", full_unless(STATES, {"no hash"}))
def test_a_state_that_lies_is_refused(lab: Lab, fault, change):
    with fault("untrusted checkpoint", f"a state with {change}"):
        checkpoint = copy_of_run(lab, f"state-{list(STATES).index(change)}")
        rewrite(checkpoint / "training_state/state.json", STATES[change])
        sign(checkpoint)
        refused(lab, "train.py", checkpoint.parent.parent, "train.steps=14")


def test_a_config_that_runs_code_is_refused(lab: Lab, fault):
    with fault("untrusted config", "!!python/object in a run"):
        checkpoint = copy_of_run(lab, "code")
        path = f"!!python/object/apply:pathlib.Path ['{lab / 'pwned'}']"
        code = f"run: !!python/object/apply:pathlib.Path.touch [{path}]\n"
        for folder in (checkpoint / "training_state", checkpoint.parents[1]):
            (folder / "config.yaml").write_text(code)
        sign(checkpoint)
        refused(lab, "heads.py", checkpoint.parents[1], words=("config.yaml",))
        refused(lab, "train.py", checkpoint.parents[1], words=("config.yaml",))


NINE = {n: ", ".join([f"*a{n - 1}"] * 9) for n in range(1, 30)}         # 9 times the one before
ALIASES = ["a0: &a0 [x, x, x, x, x, x, x, x, x]\n", *(f"a{n}: &a{n} [{NINE[n]}]\n" for n in NINE)]
MERGES = ["a0: &a0 {x: 1}\n", *(f"a{n}: &a{n} {{<<: [{NINE[n]}], k{n}: 1}}\n" for n in NINE)]
BOMBS = {
    "aliases": "".join(ALIASES) + "model: *a29\nrun: *a29\ndata: {files: *a29}\n",
    "merges": "".join(MERGES),
    "brackets": "a: " + "[" * 20_000,
    "keys": "".join(f"k{n}: 1\n" for n in range(9_000)),
    "digits": "seed: 0x" + "f" * 60_000,
    "a megabyte": "# " + "x" * 2 ** 20,
}


@pytest.mark.parametrize("bomb", full_unless(BOMBS, {"aliases"}))
def test_a_config_that_grows_without_end_is_refused(lab: Lab, fault, bomb):
    with fault("untrusted config", f"a bomb of {bomb}"):
        path = lab / f"bomb-{bomb.replace(' ', '-')}.yaml"
        path.write_text(BOMBS[bomb])
        done = command("train.py", path, cwd=lab.folder)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert len(done.stderr) < 50_000, done.stderr[-2000:]
        check_use(done)


# --- data -----------------------------------------------------------------------------------------

def gz(path: Path, block: bytes, times: int) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(times):
            file.write(block)


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    indices = pa.array(np.zeros(2_000_000, np.int32))
    texts = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 10_000]))
    texts = texts.cast(pa.dictionary(pa.int32(), pa.string()))
    pq.write_table(pa.table({"text": texts}), path)             # 20 GB of text in a few kB


PARQUET_WITHOUT_END = b"PAR1" + bytes(100) + (2 ** 31 - 1).to_bytes(4, "little") + b"PAR1"


CORPORA = {
    "bomb.txt.gz": lambda path: gz(path, bytes(2 ** 20), 400),
    "bomb.jsonl.gz": lambda path: gz(path, b"x" * 2 ** 20, 400),
    "bomb.parquet": parquet,
    "bomb.txt.bz2": lambda path: path.write_bytes(bz2.compress(bytes(2 ** 28))),
    "garbage.parquet": lambda path: path.write_bytes(PARQUET_WITHOUT_END),
    "garbage.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"\xff" * 1000)),
    "pickle.parquet": lambda path: path.write_bytes(pickle.dumps(Touch(path.parent / "pwned"))),
}


@pytest.mark.parametrize("name", full_unless(CORPORA, {"bomb.txt.gz", "bomb.parquet"}))
def test_a_corpus_that_inflates_without_end_is_refused(lab: Lab, fault, name):
    with fault("untrusted corpus", name):
        CORPORA[name](lab / name)
        refused(lab, "-m data.prepare", "tiny.yaml", f"data.files=[{name}]", "data.tokenizer=bytes",
                words=(name,))


def header(shape: tuple, descr: str = "<u2") -> bytes:
    file = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def pickled(folder: Path) -> np.ndarray:
    """An array whose pickle makes a file `pwned` in `folder`."""
    return np.array([Touch(folder / "pwned")], object)


CODE = b"{'descr': __import__('os').system('touch pwned'), 'shape': (1,)}"
SHARDS = {
    "a header of 2^60 tokens": lambda path, shard: path.write_bytes(
        header((2 ** 60,)) + bytes(1000)),
    "a pickle": lambda path, shard: np.save(path, pickled(path.parents[1]), allow_pickle=True),
    "code in its header": lambda path, shard: path.write_bytes(
        b"\x93NUMPY\x01\x00\x70\x00" + CODE.ljust(111) + b"\n"),
    "a name elsewhere": lambda path, shard: shard.update(file="../../../../etc/passwd"),
    "a count of text": lambda path, shard: shard.update(tokens="many"),
    "no entry": lambda path, shard: shard.clear(),
}


@pytest.mark.parametrize("change", full_unless(SHARDS, {"a header of 2^60 tokens"}))
def test_a_shard_that_lies_is_refused(lab: Lab, fault, change):
    with fault("untrusted shards", change):
        name = f"shards-{list(SHARDS).index(change)}"
        shard = lab / name / "train-00000.npy"
        done = command("-m data.prepare", "tiny.yaml", f"data.folder={name}", cwd=lab.folder)
        assert done.returncode == 0, done.stderr
        rewrite(lab / name / "manifest.json",
                lambda manifest: SHARDS[change](shard, manifest["shards"]["train"][0]))
        refused(lab, "train.py", "tiny.yaml", f"run=r{name}", f"data.folder={name}", words=(name,))
        assert not (lab / f"runs/r{name}").exists()


# --- what a run saves beside its checkpoints ------------------------------------------------------

def bomb_of_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", header(()) + bytes(2))
        with archive.open("pattern_0.npy", "w", force_zip64=True) as member:
            member.write(header((2 ** 29,), "|u1"))
            for _ in range(512):
                member.write(bytes(2 ** 20))


def false_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", header(()) + bytes(2))
        archive.writestr("pattern_0.npy", header((2 ** 60,), "|u1") + bytes(99))


SNAPSHOTS = {
    "a bomb of zeros": bomb_of_zeros,
    "a header of 2^60 bytes": false_header,
    "a pickle": lambda path: np.savez(path, tokens=pickled(path.parents[3]), pattern_0=1),
    "no archive": lambda path: path.write_bytes(b"PK\3\4" + bytes(99)),
    "half of it": lambda path: os.truncate(path, 2000),
}


@pytest.mark.parametrize("change", full_unless(SNAPSHOTS, {"a bomb of zeros"}))
def test_a_snapshot_that_lies_is_refused(lab: Lab, fault, change):
    with fault("untrusted snapshot", change):
        checkpoint = copy_of_run(lab, f"snapshot-{list(SNAPSHOTS).index(change)}")
        SNAPSHOTS[change](checkpoint.parents[1] / "heads/000008.npz")
        refused(lab, "heads.py", checkpoint.parents[1], words=("000008.npz", "delete"))


# --- the code -------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
EXECUTORS = {"eval", "exec", "compile", "torch.load", "os.system", "os.popen", "pickle.load"}


def test_no_code_of_ours_runs_what_it_reads(fault):
    """Nothing unpickles, evaluates or starts a shell."""
    files = [path for path in ROOT.rglob("*.py")
             if not path.relative_to(ROOT).parts[0].startswith((".", "tests", "bench", "gpu"))]
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {alias.name.split(".")[0] for alias in node.names} & UNPICKLERS, path
            if isinstance(node, ast.Call):
                check_call(path, node)


def check_call(path: Path, call: ast.Call) -> None:
    function = ast.unparse(call.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert function not in EXECUTORS, (path, function)
    assert options.get("shell", "False") == "False", (path, function)
    assert options.get("trust_remote_code", "False") == "False", (path, function)
    if function == "np.load":
        assert options["allow_pickle"] == "False", path
    if function.startswith("yaml.") and "load" in function:
        assert function == "yaml.safe_load" or options["Loader"] == "_Yaml12", path

"""Files from strangers: refused with a clear error, in seconds, without running their code and without giving them the machine's memory."""

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
    """The command ends with exit code 2 and a message of two lines, within SECONDS and GIGABYTES; no file `pwned` was made."""
    done = command(script, *arguments, cwd=lab.folder)
    fails(done, *words)
    assert len(done.stderr[done.stderr.index("error: "):]) < 1500, done.stderr
    check_use(done)
    assert not (lab / "pwned").exists()


def check_use(done: Done) -> None:
    """Of the processor, so that other programs do not count."""
    assert done.used.ru_utime + done.used.ru_stime < SECONDS and done.used.ru_maxrss / 1e6 < GIGABYTES, done.used


# --- checkpoints -------------------------------------------------------------------------------------------------------------

def stranger(lab: Lab, name: str) -> Path:
    """A copy of a run, whose newest checkpoint is to be changed."""
    run = lab / f"runs/{name}"
    shutil.copytree(lab.undisturbed, run, symlinks=True)
    return run / "checkpoints/000012"


def sign(checkpoint: Path) -> None:
    """Make the manifest fit: whoever changes a checkpoint can do that too."""
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
    return lambda checkpoint: rewrite(checkpoint / "config.json", lambda config: config["gpt"].update(sizes))


def with_tokenizer(change):
    return lambda checkpoint: rewrite(checkpoint / "tokenizer.json", change)


def large(name: str, size: int):
    return lambda checkpoint: os.truncate(checkpoint / name, size)


MODEL = "model.safetensors"
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
    "a header of 2^60 weights": lambda c: (c / MODEL).write_bytes(safetensors_of(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [2 ** 30, 2 ** 30], "data_offsets": [0, 2 ** 62]}}) + bytes(2 ** 20)),
    "a header as long as 2^60": lambda c: (c / MODEL).write_bytes((2 ** 60).to_bytes(8, "little") + bytes(2 ** 20)),
    "a pickle for weights": lambda c: (c / MODEL).write_bytes(pickle.dumps(Touch(c.parents[3] / "pwned")) + bytes(2 ** 20)),
    "weights of other shapes": lambda c: (c / MODEL).write_bytes(safetensors_of({}) + bytes(2 ** 20)),
    "a pickle in a .bin": lambda c: [(c / MODEL).rename(c / "pytorch_model.bin"),
                                     (c / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(c.parents[3] / "pwned")))],
    "ids of 2^60": with_tokenizer(lambda t: t["added_tokens"][0].update(id=2 ** 60)),
    "ids of 2^31": with_tokenizer(lambda t: t["model"]["vocab"].update({"ab": 2 ** 31})),
    "negative ids": with_tokenizer(lambda t: t["model"]["vocab"].update({"ab": -5})),
    "no vocabulary": with_tokenizer(lambda t: t["model"].update(vocab=[])),
    "a pattern that explodes": with_tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
        Regex=r"(?:\w{1000}){1000}{1000}")),
    "a pattern that is none": with_tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
    "a tokenizer of brackets": lambda c: (c / "tokenizer.json").write_text("[" * 200_000),
    "a tokenizer of 300 MB": large("tokenizer.json", 300 * 2 ** 20),
}
SHORT = {"a width of 2^20", "a header of 2^60 weights", "a pickle for weights"}


@pytest.mark.parametrize("change", [pytest.param(name, marks=[full] * (name not in SHORT)) for name in CHANGES])
def test_a_checkpoint_that_lies_is_refused(lab: Lab, fault, change):
    """Signed by its manifest: it came so from its maker."""
    with fault("untrusted checkpoint", change):
        checkpoint = stranger(lab, f"lies-{list(CHANGES).index(change)}")
        CHANGES[change](checkpoint)
        sign(checkpoint)
        refused(lab, "sample.py", checkpoint, "def ", words=(str(checkpoint),))


def test_a_pattern_that_backtracks_without_end_is_given_up(lab: Lab, fault):
    with fault("untrusted checkpoint", "a pattern that backtracks"):
        checkpoint = stranger(lab, "backtracks")
        pattern = r"(?=(x+x+)+y)\1|(?:(x+)\2+)+y"
        with_tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=pattern))(checkpoint)
        sign(checkpoint)
        refused(lab, "sample.py", checkpoint, "x" * 60)


MANIFESTS = {
    "names that lie elsewhere": (lambda m: m.update({"../../../../etc/passwd": {"bytes": 1, "sha256": "0"}}), "lies elsewhere"),
    "an absolute name": (lambda m: m.update({"/etc/passwd": {"bytes": 1, "sha256": "0"}}), "lies elsewhere"),
    "weights that are not listed": (lambda m: m.pop(MODEL), "does not list model.safetensors"),
    "nothing": (lambda m: m.clear(), "does not list"),
    "numbers for entries": (lambda m: m.update({MODEL: 5}), MODEL),
}


@pytest.mark.parametrize("change", [pytest.param(name, marks=[full] * (n not in (0, 2))) for n, name in enumerate(MANIFESTS)])
def test_a_manifest_lists_what_is_loaded_and_nothing_elsewhere(lab: Lab, fault, change):
    with fault("untrusted checkpoint", f"a manifest of {change}"):
        checkpoint = stranger(lab, f"manifest-{list(MANIFESTS).index(change)}")
        how, word = MANIFESTS[change]
        rewrite(checkpoint / "manifest.json", how)
        refused(lab, "sample.py", checkpoint.parent.parent, "def ", words=(word,))


STATES = {
    "a step of text": lambda s: s.update(step="twelve"), "no data": lambda s: s.pop("data"), "data of a list": lambda s: s.update(data=[]),
    "no hash": lambda s: s["data"].pop("hash"), "a folder elsewhere": lambda s: s["data"].update(folder="../../../../etc", hash="0"),
    "a folder of numbers": lambda s: s["data"].update(folder=5),
}


@pytest.mark.parametrize("change", [pytest.param(name, marks=[full] * (n != 3)) for n, name in enumerate(STATES)])
def test_a_state_that_lies_is_refused(lab: Lab, fault, change):
    with fault("untrusted checkpoint", f"a state with {change}"):
        checkpoint = stranger(lab, f"state-{list(STATES).index(change)}")
        rewrite(checkpoint / "training_state/state.json", STATES[change])
        sign(checkpoint)
        refused(lab, "train.py", checkpoint.parent.parent, "train.steps=14")


def test_a_config_that_runs_code_is_refused(lab: Lab, fault):
    with fault("untrusted config", "!!python/object in a run"):
        checkpoint = stranger(lab, "code")
        for path in (checkpoint / "training_state/config.yaml", checkpoint.parents[1] / "config.yaml"):
            path.write_text(f"run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{lab / 'pwned'}']]\n")
        sign(checkpoint)
        refused(lab, "heads.py", checkpoint.parents[1], words=("config.yaml",))
        refused(lab, "train.py", checkpoint.parents[1], words=("config.yaml",))


BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)) + "model: *a29\nrun: *a29\ndata: {files: *a29}\n",
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 30)),
    "brackets": "a: " + "[" * 20_000, "keys": "".join(f"k{n}: 1\n" for n in range(9_000)), "digits": "seed: 0x" + "f" * 60_000,
    "a megabyte": "# " + "x" * 2 ** 20,
}


@pytest.mark.parametrize("bomb", [pytest.param(name, marks=[full] * (n > 0)) for n, name in enumerate(BOMBS)])
def test_a_config_that_grows_without_end_is_refused(lab: Lab, fault, bomb):
    with fault("untrusted config", f"a bomb of {bomb}"):
        path = lab / f"bomb-{bomb.replace(' ', '-')}.yaml"
        path.write_text(BOMBS[bomb])
        done = command("train.py", path, cwd=lab.folder)
        assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr) < 50_000, done.stderr[-2000:]
        check_use(done)


# --- data ------------------------------------------------------------------------------------------------------------------

def gz(path: Path, block: bytes, times: int) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(times):
            file.write(block)


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    indices = pa.array(np.zeros(2_000_000, np.int32))
    pq.write_table(pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 10_000])).cast(
        pa.dictionary(pa.int32(), pa.string()))}), path)        # 20 GB of text in a few kB


CORPORA = {
    "bomb.txt.gz": lambda path: gz(path, bytes(2 ** 20), 400),
    "bomb.jsonl.gz": lambda path: gz(path, b"x" * 2 ** 20, 400),
    "bomb.parquet": parquet,
    "bomb.txt.bz2": lambda path: path.write_bytes(bz2.compress(bytes(2 ** 28))),
    "garbage.parquet": lambda path: path.write_bytes(b"PAR1" + bytes(100) + (2 ** 31 - 1).to_bytes(4, "little") + b"PAR1"),
    "garbage.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"\xff" * 1000)),
    "pickle.parquet": lambda path: path.write_bytes(pickle.dumps(Touch(path.parent / "pwned"))),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[full] * (n not in (0, 2))) for n, name in enumerate(CORPORA)])
def test_a_corpus_that_inflates_without_end_is_refused(lab: Lab, fault, name):
    with fault("untrusted corpus", name):
        CORPORA[name](lab / name)
        refused(lab, "-m data.prepare", "tiny.yaml", f"data.files=[{name}]", "data.tokenizer=bytes", words=(name,))


def header(shape: tuple, descr: str = "<u2") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


SHARDS = {
    "a header of 2^60 tokens": lambda path, shard: path.write_bytes(header((2 ** 60,)) + bytes(1000)),
    "a pickle": lambda path, shard: np.save(path, np.array([Touch(path.parents[1] / "pwned")], object), allow_pickle=True),
    "code in its header": lambda path, shard: path.write_bytes(
        b"\x93NUMPY\x01\x00\x70\x00" + b"{'descr': __import__('os').system('touch pwned'), 'shape': (1,)}".ljust(111) + b"\n"),
    "a name elsewhere": lambda path, shard: shard.update(file="../../../../etc/passwd"),
    "a count of text": lambda path, shard: shard.update(tokens="many"),
    "no entry": lambda path, shard: shard.clear(),
}


@pytest.mark.parametrize("change", [pytest.param(name, marks=[full] * (n > 0)) for n, name in enumerate(SHARDS)])
def test_a_shard_that_lies_is_refused(lab: Lab, fault, change):
    with fault("untrusted shards", change):
        folder = lab / f"shards-{list(SHARDS).index(change)}"
        done = command("-m data.prepare", "tiny.yaml", f"data.folder={folder.name}", cwd=lab.folder)
        assert done.returncode == 0, done.stderr
        rewrite(folder / "manifest.json", lambda manifest: SHARDS[change](folder / "train-00000.npy", manifest["shards"]["train"][0]))
        refused(lab, "train.py", "tiny.yaml", f"run=r{folder.name}", f"data.folder={folder.name}", words=(folder.name,))
        assert not (lab / f"runs/r{folder.name}").exists()


# --- what a run left beside its checkpoints ------------------------------------------------------------------------------------

def bomb_of_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", header(()) + bytes(2))
        with archive.open("pattern_0.npy", "w", force_zip64=True) as member:
            member.write(header((2 ** 29,), "|u1"))
            for _ in range(512):
                member.write(bytes(2 ** 20))


def liar(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", header(()) + bytes(2))
        archive.writestr("pattern_0.npy", header((2 ** 60,), "|u1") + bytes(99))


SNAPSHOTS = {
    "a bomb of zeros": bomb_of_zeros, "a header of 2^60 bytes": liar, "a pickle": lambda path: np.savez(
        path, tokens=np.array([Touch(path.parents[3] / "pwned")], object), pattern_0=1),
    "no archive": lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "half of it": lambda path: os.truncate(path, 2000),
}


@pytest.mark.parametrize("change", [pytest.param(name, marks=[full] * (n != 0)) for n, name in enumerate(SNAPSHOTS)])
def test_a_snapshot_that_lies_is_refused(lab: Lab, fault, change):
    with fault("untrusted snapshot", change):
        checkpoint = stranger(lab, f"snapshot-{list(SNAPSHOTS).index(change)}")
        SNAPSHOTS[change](checkpoint.parents[1] / "heads/000008.npz")
        refused(lab, "heads.py", checkpoint.parents[1], words=("000008.npz", "delete"))


# --- the code --------------------------------------------------------------------------------------------------------------

def test_no_code_of_ours_runs_what_it_reads(fault):
    """Nothing unpickles, evaluates or starts a shell."""
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "tests", "bench"} & set(path.relative_to(ROOT).parts[:1])]
    assert len(files) > 30
    for path in files:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}, path
            if isinstance(node, ast.Call):
                called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec", "compile", "torch.load", "os.system", "os.popen", "pickle.load"), (path, called)
                assert options.get("shell", "False") == "False" and options.get("trust_remote_code", "False") == "False", (path, called)
                if called == "np.load":
                    assert options["allow_pickle"] == "False", path
                if called.startswith("yaml.") and "load" in called:
                    assert called == "yaml.safe_load" or options["Loader"] == "_Yaml12", path

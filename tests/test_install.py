"""Only `pip install -e .` installs; what is said if another module has the name of one of ours."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from own_modules import COMMANDS, OUR_MODULES, PACKAGES, found_at

import pytest
from commands import ROOT, command, environment, fails


def python(*words: object, path: tuple[Path, ...] = (ROOT,), cwd: Path | None = None,
           ) -> subprocess.CompletedProcess[str]:
    """Run `python words…` with these folders on Python's path, before site-packages."""
    env = environment() | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, text=True,
                          capture_output=True)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def with_theirs(tmp_path) -> Path:
    """A site-packages with Hugging Face's kernels, as transformers sees it."""
    folder = tmp_path / "site-packages"
    info = folder / "kernels-0.17.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    return folder


# --- another module of the same name ----------------------------------------------------------

def test_our_modules_are_all_modules_of_the_repository():
    files = {path.stem for path in ROOT.glob("*.py")} - {"own_modules"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench"}
    assert set(OUR_MODULES) == files | packages and packages == set(PACKAGES)


@pytest.mark.parametrize("name", sorted(set(OUR_MODULES) - {"lab"}))
def test_a_file_in_the_working_directory_that_is_in_the_way(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")
    done = python("-c", "import lab", cwd=tmp_path)
    ours = ROOT / name if name in PACKAGES else ROOT / f"{name}.py"
    assert last_line(done) == (
        f"ImportError: {tmp_path / name}.py is in the way of {ours}, which has the same name "
        f"{name}: rename it, or work in another folder")
    if name not in COMMANDS:
        started = python("-m", "train", cwd=tmp_path)
        fails(started, f"{tmp_path / name}.py is in the way of {ours}")


def test_a_package_in_the_way_and_a_folder_that_is_not(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    assert python("-c", "import own_modules", cwd=tmp_path).returncode == 0
    (tmp_path / "model/__init__.py").touch()
    done = python("-c", "import own_modules", cwd=tmp_path)
    assert f"{tmp_path / 'model'} is in the way of {ROOT / 'model'}" in last_line(done)


def test_hugging_faces_kernels_first_says_what_to_uninstall(tmp_path, with_theirs):
    """As from any folder but ours, after `pip install -e .`."""
    done = python("-c", "import lab", path=(with_theirs, ROOT), cwd=tmp_path)
    assert last_line(done) == (
        f"ImportError: {with_theirs / 'kernels'} is in the way of {ROOT / 'kernels'}, which has "
        f"the same name kernels: pip uninstall kernels, or work in {ROOT}")
    fails(python("-m", "train", path=(with_theirs, ROOT), cwd=tmp_path), "pip uninstall kernels")


def test_our_kernels_first_says_what_to_uninstall_to_whoever_wants_the_other(tmp_path,
                                                                              with_theirs):
    """As in our folder: transformers takes ours for Hugging Face's."""
    both = (ROOT, with_theirs)
    ours = "import kernels; from kernels import planes; import kernels.problem; "
    done = python("-c", ours + "print(planes.__name__, hasattr(kernels, '__wrapped__'))",
                  path=both, cwd=tmp_path)
    assert done.stdout == "kernels.planes False\n", done.stderr
    done = python("-c", ours + "from kernels import get_kernel", path=both, cwd=tmp_path)
    assert last_line(done) == (
        f"ImportError: get_kernel is in Hugging Face's package kernels, and {ROOT / 'kernels'} "
        "hides it from Python here: pip uninstall kernels (transformers works without it), or work "
        f"in another folder than {ROOT}")
    # Without theirs it is a mistake as any other.
    done = python("-c", ours + "from kernels import get_kernel", cwd=tmp_path)
    assert "cannot import name 'get_kernel'" in last_line(done)


def test_modules_that_are_no_files_are_not_in_the_way(monkeypatch):
    """A notebook's `data` that somebody put into sys.modules by hand."""
    monkeypatch.setitem(sys.modules, "data", type(sys)("data"))
    assert found_at("data") is None and found_at("no_such_module") is None
    assert found_at("json") == Path(os.path.realpath(os.path.dirname(shutil.__file__))) / "json"


# --- building -------------------------------------------------------------------------------------

@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "build_wheel",
                                  "get_requires_for_build_sdist", "build_sdist"])
def test_a_copy_is_refused(tmp_path, hook):
    """pip and uv print what the hook prints."""
    pytest.importorskip("setuptools")
    done = python("-c", f"import editable_only; editable_only.{hook}({str(tmp_path)!r})",
                  path=(ROOT / "install",))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Hugging Face's kernels" in done.stderr and "pip install -e ." in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_editable_install_puts_our_folder_at_the_end_of_the_path(tmp_path):
    """So a folder data/ in the working directory, without an __init__.py, is not taken for ours."""
    pytest.importorskip("setuptools")
    clone, site, elsewhere = tmp_path / "clone", tmp_path / "site", tmp_path / "elsewhere"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("install", *PACKAGES):
        shutil.copytree(ROOT / name, clone / name, ignore=ignore)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(path, clone)
    (elsewhere / "data").mkdir(parents=True)
    site.mkdir()
    done = python("-c", f"import editable_only; editable_only.build_editable({str(site)!r})",
                  path=(clone / "install",), cwd=clone)
    assert done.returncode == 0, done.stderr
    wheel, = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(site)
    assert len(files) == 1 and files[0].endswith(".pth")
    done = python("-c", f"import site; site.addsitedir({str(site)!r}); import own_modules, data; "
                  "print(own_modules.__file__, *data.__path__)", path=(), cwd=elsewhere)
    assert done.stdout.split() == [str(clone / "own_modules.py"), str(clone / "data")], done.stderr


# --- from another folder --------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["-m train", "train.py"])
def test_what_train_suggests_in_another_folder_can_be_opened_from_there(workplace, trained, script):
    done = command(script)
    listed, _, usage = done.stdout.partition("\n\n")
    configs = [line.split()[0] for line in listed.splitlines()]
    assert len(configs) > 5 and all(Path(config).is_file() for config in configs)
    python_, *how, config = usage.splitlines()[0].removeprefix("start one").split()
    assert python_ == "python" and Path(config).samefile(ROOT / "configs/quickstart.yaml")
    assert how == ["-m", "train"] or Path(*how).samefile(ROOT / "train.py")
    suggested = f"python {' '.join(how)} "
    fails(command(script, "configs/quickstart.yaml"), f"did you mean {config}?")
    fails(command(script, "unlike_any_config.yaml"), f"{suggested}lists the configs")
    finished = command(script, trained)
    assert f"{suggested}{trained} train.steps=24" in finished.stdout
    fails(command(script, trained, "model.n_layers=3"), f"{suggested}CONFIG run=NEW")

"""Whether Python finds our modules, or others of the same name. Imported before them.

Their names are short: Hugging Face has a package `kernels`, and many a folder holds a `data.py`.
This module needs nothing but the standard library, and its own name is longer.
"""

import importlib.util
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGES = ("data", "induction", "kernels", "model", "report", "settings", "training")
COMMANDS = ("train", "sample", "heads")
OUR_MODULES = (*PACKAGES, *COMMANDS, "lab", "errors", "files", "console")


def found_at(name: str) -> Path | None:
    """The folder of a package, or the file of a module, that `import name` finds; None if there is
    none, or no file."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):           # ValueError: a module that was not made from a file
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        folders = list(spec.submodule_search_locations)
        return Path(folders[0]).resolve() if folders else None
    return Path(spec.origin).resolve() if spec.has_location and spec.origin else None


def in_the_way() -> str | None:
    """What to do about a module of another that has the name of one of ours, in one sentence; None
    if there is none."""
    for name in OUR_MODULES:
        path = found_at(name)
        ours = ROOT / name if name in PACKAGES else ROOT / f"{name}.py"
        if path is None or path == ours:
            continue
        distributions = packages_distributions().get(name, [])
        if distributions and "site-packages" in path.parts:
            fix = f"pip uninstall {distributions[0]}, or work in {ROOT}"
        else:
            fix = "rename it, or work in another folder"
        return f"{path} is in the way of {ours}, which has the same name {name}: {fix}"
    return None


def started_as_command() -> bool:
    """Whether this process is one of our commands: train.py, or -m training.plan."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent in [
        ROOT, *(ROOT / package for package in PACKAGES)]


if sentence := in_the_way():
    if started_as_command():                    # as errors.run_command does
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(sentence)

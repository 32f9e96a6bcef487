"""Attention as functions of tensors.

Hugging Face has a package of this name. transformers takes this folder for it if both are there and
this one is found first, which is so for Python started in the project's folder.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent


def __getattr__(name: str) -> NoReturn:
    """What nobody here has. If Hugging Face's package is installed, that is the one that is meant:
    raises ImportError, which says what to do."""
    theirs = not name.startswith("_") and not (HERE / f"{name}.py").exists()
    if theirs:
        try:
            version("kernels")
        except PackageNotFoundError:
            theirs = False
    if theirs:
        raise ImportError(f"{name} is in Hugging Face's package kernels, and {HERE} hides it from "
                          "Python here: pip uninstall kernels (transformers works without it), or "
                          f"work in another folder than {HERE.parent}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Builds this project for `pip install -e .`, and refuses to copy it into site-packages.

There its folders data/, model/ and kernels/ would be everybody's: that of `kernels` overwrites
Hugging Face's package of the same name.
"""

import sys
from typing import NoReturn

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

__all__ = ["build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable",
           "get_requires_for_build_sdist", "get_requires_for_build_wheel",
           "prepare_metadata_for_build_editable"]


def refuse(*_: object) -> NoReturn:
    """The last words of a build that must not be: pip and uv print them without a traceback."""
    sys.exit("\nThis project is not installed by copying: its folders data, model and kernels "
             "would overwrite or hide packages of those names, such as Hugging Face's kernels.\n"
             "Clone it, and in the clone run: pip install -e .\n")


# The first hooks that are called, before any dependency is downloaded, and those that build.
get_requires_for_build_wheel = get_requires_for_build_sdist = build_wheel = build_sdist = refuse

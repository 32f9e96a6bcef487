"""Triton's interpreter, with its bfloat16 repaired: import this first, and kernels run on the CPU.

Without this, the interpreter keeps bfloat16 numbers as 16-bit integers, multiplies those in
`tl.dot`, and truncates float32 where hardware rounds to nearest even. It does not know limits of
shared memory or the smallest sizes of a dot; tests/test_ahead_of_time.py checks these.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

if triton.__version__ < "3.7" and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
    raise ImportError(f"the interpreter of triton {triton.__version__} needs numpy < 2.4, and "
                      f"{np.__version__} is installed: pip install 'numpy<2.4', or triton 3.7")

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
dot, cast = Builder.create_dot, Builder.cast_impl


def widened(handle: Handle) -> Handle:
    """A bfloat16 tensor as float32 with the same numbers; any other tensor unchanged."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(handle: Handle) -> Handle:
    """float32 to the nearest bfloat16, ties to even, NaN kept."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    nearest = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), nearest), tl.bfloat16)


def cast_impl(self, source, dtype):
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return rounded(source)
    return cast(self, source, dtype)


Builder.create_dot = lambda self, a, b, acc, *rest: dot(self, widened(a), widened(b), acc, *rest)
Builder.cast_impl = cast_impl

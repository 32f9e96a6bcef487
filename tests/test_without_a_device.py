"""Launches without a GPU, in a process without the interpreter.

Up to triton's launcher, and through it up to the driver.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, command
from triton.backends import nvidia

CALLS = '''
import torch
from kernels import launch
from kernels.ahead_of_time import device
from kernels.decode import decode
from kernels.flash import flash_attention, flash_attention_backward
from kernels.flash_gluon import launch_gluon
from kernels.problem import Problem
from kernels.statistics_triton import statistics

def tensors(T, dtype, H=4, K=2, S=None, offset=0):
    def zeros(heads, length):
        memory = torch.zeros(2 * length * heads * 16 + 8, dtype=dtype)[offset:]
        return memory.as_strided((2, heads, length, 16), (length * heads * 16, 16, heads * 16, 1))
    return zeros(H, T), zeros(K, S or T), zeros(K, S or T)

def flash(q, k, v, window=None):
    return lambda: flash_attention(q, k, v, True, window, None, 0.25)

half, single = torch.bfloat16, torch.float32
q, k, v = tensors(130, half)
lse, ids = torch.zeros(2, 4, 130), torch.zeros(2, 130, dtype=torch.long)
problem = Problem(q, k, window=20, scale=0.25)
calls = {
    "130": flash(q, k, v),
    "97, with as many strides": flash(*tensors(97, half)),
    "the end of 130": flash(q[:, :, -40:], k, v),
    "one row": flash(q[:1, :1], k[:1, :1], v[:1, :1]),
    "a window": flash(q, k, v, 20),
    "another window": flash(q, k, v, 50),
    "float32": flash(*tensors(130, single)),
    "float32, off by 4 bytes": flash(*tensors(130, single, offset=1)),
    "strides that 16 does not divide": flash(*(t[..., ::2] for t in tensors(130, single))),
    "Gluon": lambda: launch_gluon(problem, v, torch.empty_like(q), lse),
    "backward": lambda: flash_attention_backward(q, q, k, v, q, lse, True, None, None, 0.25),
    "a cache": lambda: decode(q[:, :, :1], k, v, None, None, None, 0.25),
    "a longer cache": lambda: decode(q[:, :, :1], *tensors(0, half, S=500)[1:], None, None, None,
                                     0.25),
    "positions": lambda: decode(q[:, :, :1], k, v, ids[:, :1], None, None, 0.25),
    "statistics": lambda: statistics(q, k, lse, ids, ids, ids, None, None, 0.25),
}

def plain(value):
    """What a kernel sees of an argument, except for its address this time."""
    if hasattr(value, "block_shape"):           # a tensor descriptor, of Triton's or of Gluon's
        lists = map(list, (value.shape, value.strides, value.block_shape))
        return [plain(value.base), *lists, value.padding, getattr(value, "layout", None)]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.data_ptr() % 16
    return value

def launches(call):
    driver.launched.clear()
    call()
    return [tuple(map(plain, launched)) for launched in driver.launched]

with device("sm_90") as driver:
    by_triton = {}
    for name, call in calls.items():
        launch.plans.clear()
        by_triton[name] = launches(call)
        assert by_triton[name] and launch.plans
    launch.plans.clear()
    for turn in range(3):       # the first may use the plan of another call, the others their own
        for name, call in calls.items():
            planned = launches(call)
            assert planned == by_triton[name], (turn, name, planned, by_triton[name])
    kernels = {launched[:2] for launched_by_call in by_triton.values()
               for launched in launched_by_call}
    print(len(launch.plans), "plans", len(kernels), "kernels")
    # One kernel for any length.
    names = ("130", "97, with as many strides", "the end of 130")
    assert len({launched[1] for name in names for launched in by_triton[name]}) == 1
    assert by_triton["float32"][0][1] != by_triton["float32, off by 4 bytes"][0][1]

# AMD's compiler reads storages of less than 2 GB with offsets of 32 bits.
with device("gfx942") as driver:
    def tensor_in_storage(size):
        memory = torch.empty(size, dtype=half)  # never touched, so it takes no memory
        return memory.as_strided((1, 1, 64, 16), (1024, 1024, 16, 1))
    large, small = tensor_in_storage(2 ** 30), tensor_in_storage(2 ** 16)
    by_triton = []
    for k in (small, large):
        launch.plans.clear()
        by_triton += launches(flash(small, k, k))
    launch.plans.clear()
    planned = [launches(flash(small, k, k))[0][1] for k in (small, large)]
    assert planned == [launched[1] for launched in by_triton]
    assert by_triton[0][1] != by_triton[1][1]
'''


def test_a_planned_launch_is_the_one_that_triton_makes(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    done = command(str(tmp_path / "calls.py"), env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert "plans" in done.stdout


DRIVEN = '''
import ctypes
import sys
driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)      # before triton looks for NVIDIA's
import torch
import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from kernels.ahead_of_time import TARGETS, device
from kernels.arguments import kernel_arguments
from kernels.decode import decode
from kernels.flash import flash_attention, flash_attention_backward, forward
from kernels.flash_gluon import launch_gluon
from kernels.launch import launch
from kernels.problem import Problem
from kernels.statistics_triton import statistics

class Driver(CudaDriver):
    """triton's, without PyTorch's CUDA."""
    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    def get_current_target(self): return TARGETS["sm_90"].triton
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

launches = ctypes.c_long(), ctypes.c_long()
window, scale = 7, 0.25
with device("sm_90"):
    triton.runtime.driver.set_active(Driver())
    for T in (130, 130):                        # the second time as planned the first time
        q, k = (torch.zeros(2, T, heads, 128, dtype=torch.bfloat16).transpose(1, 2)
                for heads in (4, 2))
        ids = torch.zeros(2, T, dtype=torch.long)
        out, lse = flash_attention(q, k, k, True, window, None, scale)
        flash_attention_backward(q, q, k, k, out, lse, True, window, None, scale)
        launch_gluon(Problem(q, k, window=window, scale=scale), k, out, lse)
        statistics(q, k, lse, ids, ids, ids, window, None, scale)
        decode(q[:, :, :1], k, k, ids[:, :1], None, window, scale)
    driver.counts(*map(ctypes.byref, launches))
print(*(number.value for number in launches))

wrong = torch.zeros(1, 1, 130, 66, dtype=torch.bfloat16)[..., :64]      # 132 bytes apart
arguments = kernel_arguments(Problem(wrong, wrong, window=window, scale=scale))
try:
    with device("sm_90"):
        triton.runtime.driver.set_active(Driver())
        launch(forward, lambda tile: (2, 1, 1), wrong, rows={"q": wrong},
               columns={"k": wrong, "v": wrong}, out=wrong, out_strides=wrong.stride(), lse=lse,
               together=1, **arguments)
except RuntimeError as error:
    assert "descriptor" in str(error), error
else:
    raise AssertionError("this driver refuses nothing")
'''


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler for the tests' driver")
def test_tritons_own_launcher_takes_what_it_is_given(tmp_path):
    """Every kernel, by triton's launcher, to a driver that only refuses what NVIDIA's would."""
    headers = Path(nvidia.__file__).parent / "include"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1",
                    "-o", tmp_path / "libcuda.so.1", ROOT / "tests" / "driver.c"], check=True)
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")
    (tmp_path / "driven.py").write_text(DRIVEN)
    done = command(str(tmp_path / "driven.py"), tmp_path / "libcuda.so.1",
                   env={"TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    # Twice: forward 3 descriptors, backward 5 and 4, Gluon 3, statistics 2; and 7 kernels, or 8
    # if decoding is in parts.
    descriptors, launches = map(int, done.stdout.split())
    assert descriptors == 2 * 17 and 2 * 7 <= launches <= 2 * 8

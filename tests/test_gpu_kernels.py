"""What only a GPU can show of the kernels.

`python -m pytest -m gpu` runs these tests there, and the cases of the kernels on the device.
"""

import os
import shutil
import subprocess
import sys

import hypothesis
import pytest
import torch
from commands import ROOT, environment

from kernels.attention import attention

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Cases of every kernel, but few: the memory checker makes each take a hundred times as long.
CHECKED = ["-m", "gpu and not grid", "-k", "(test_cases and bf16) or test_in_half or test_decoding",
           "tests/test_flash.py", "tests/test_gluon.py", "tests/test_decode.py",
           "tests/test_head_statistics.py"]
# Packages that a GPU machine may lack. The tests of the kernels do without them.
OTHER_PACKAGES = ("pydantic", "yaml", "_yaml", "pyyaml", "wandb", "datasets", "tokenizers",
                  "transformers", "playwright", "pyarrow", "tiktoken", "safetensors", "_virtualenv",
                  "distutils")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"),
                    reason="needs NVIDIA's compute-sanitizer")
def test_no_kernel_reaches_outside_its_tensors():
    """memcheck, with an allocation of its own for every tensor."""
    # API errors are not reported: PyTorch asks the driver for features it may lack, and goes on.
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no",
                "--error-exitcode", "9"]
    done = subprocess.run([*memcheck, sys.executable, "-m", "pytest", "-q", *CHECKED], cwd=ROOT,
                          text=True, capture_output=True,
                          env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout and " passed" in done.stdout


@pytest.mark.gpu
@needs_gpu
def test_long_contexts_take_memory_by_the_token():
    """Forward and backward at 64k tokens, whose pattern would take 8 GB per head."""
    shapes = [(1, 65536, heads, 64) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
               .requires_grad_() for shape in shapes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, backend="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes


def collected(*options: str, python: tuple[str, ...] = (),
              env: dict[str, str] | None = None) -> list[str]:
    """The tests that pytest would run with these options."""
    done = subprocess.run([sys.executable, *python, "-m", "pytest", "--collect-only", "-q",
                           "-p", "no:cacheprovider", *options],
                          cwd=ROOT, text=True, capture_output=True, env=environment(**env or {}))
    assert done.returncode in (0, 5), done.stdout + done.stderr         # 5: there are none
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_the_memory_checker_has_tests_of_every_kernel():
    tests = collected(*CHECKED)
    for name in ("test_flash.py::test_cases", "test_gluon.py::test_cases",
                 "test_decode.py::test_decoding", "test_head_statistics.py::test_in_half"):
        assert any(name in test for test in tests), name
    assert len(tests) < 80


def test_a_gpu_with_little_installed_runs_the_kernels_tests(tmp_path):
    """No pydantic, wandb, datasets, playwright. The marker `gpu` does not select the grid."""
    modules = (torch, pytest, hypothesis)
    for folder in {os.path.dirname(os.path.dirname(module.__file__)) for module in modules}:
        for name in os.listdir(folder):
            if not name.lower().startswith(OTHER_PACKAGES):
                os.symlink(os.path.join(folder, name), tmp_path / name)
    alone = {"python": ("-S",), "env": {"PYTHONPATH": str(tmp_path)}}
    tests = collected("-m", "gpu", "-p", "no:randomly", **alone)
    assert {test.split("::")[0] for test in tests} == {f"tests/test_{name}.py" for name in (
        "flash", "gluon", "decode", "head_statistics", "gpu_kernels")}
    assert 60 < len(tests) < 150 and not any("test_grid" in test for test in tests)
    assert not collected("-m", "gpu and grid", **alone)
    assert len(collected("-m", "grid", **alone)) > 1000


def test_commands_keep_the_users_python_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/somewhere/else"]

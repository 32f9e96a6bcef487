"""What tests/commands.py starts behaves as if a user had started it."""

import json
import sys

import pytest
from commands import command, start, wait_until

REPORT = """
import atexit, json, os, sys
if __name__ == "__main__":
    ours = [name for name in ("model", "training", "data", "kernels", "induction", "settings", "conftest") if name in sys.modules]
    atexit.register(print, "the end")
    print(json.dumps([sys.argv, __file__, os.getcwd(), os.environ.get("COLOUR"), sys.stdin.read(), ours]))
    print("a word", file=sys.stderr)
    sys.exit(3)
"""


@pytest.mark.parametrize("env", [{"COLOUR": "red"}, {"COLOUR": "red", "OMP_NUM_THREADS": "1"}], ids=["fork", "interpreter"])
def test_a_command_is_a_process_of_its_own(tmp_path, env):
    (tmp_path / "report.py").write_text(REPORT)
    done = command(str(tmp_path / "report.py"), "a b", 7, cwd=tmp_path, env=env, input="typed")
    said, end = done.stdout.splitlines()
    script = str(tmp_path / "report.py")
    assert json.loads(said) == [[script, "a b", "7"], script, str(tmp_path), "red", "typed", []]
    assert done.returncode == 3 and done.stderr == "a word\n" and end == "the end"


@pytest.mark.parametrize(("deed", "code", "says"), [
    ("os.kill(os.getpid(), 9)", -9, ""), ("os.kill(os.getpid(), 15)", -15, ""), ("1 / 0", 1, "ZeroDivisionError"), ("pass", 0, "")])
def test_its_end_is_told(tmp_path, deed, code, says):
    (tmp_path / "end.py").write_text(f"import os\n{deed}\n")
    done = command(str(tmp_path / "end.py"))
    assert done.returncode == code and says in done.stderr and (code == 0 or not done.stdout)


def test_a_module_is_run_as_python_runs_it():
    done = command("-m json.tool", "--compact", input='{"a": [1, 2]}')
    assert done.returncode == 0 and done.stdout == '{"a":[1,2]}\n', done.stderr


def test_waiting_ends_with_the_process_that_is_waited_for():
    process = start("-c", "print('gone')")
    with pytest.raises(AssertionError, match="gone"):
        wait_until(lambda: False, process)
    assert sys.executable in process.args

"""The commands of tests/commands.py behave as if a user had started them."""

import json
import sys
from pathlib import Path

import pytest
from commands import command, start, succeeds, wait_until

REPORT = """
import atexit, json, os, sys
if __name__ == "__main__":
    OURS = ("model", "training", "data", "kernels", "induction", "report", "settings", "conftest")
    imported = [name for name in OURS if name in sys.modules]
    atexit.register(print, "the end")
    print(json.dumps([sys.argv, __file__, os.getcwd(), os.environ.get("COLOUR"), sys.stdin.read(),
                      imported]))
    print("a word", file=sys.stderr)
    sys.exit(3)
"""


@pytest.mark.parametrize("env", [{"COLOUR": "red"}, {"COLOUR": "red", "OMP_NUM_THREADS": "1"}],
                         ids=["fork", "interpreter"])
def test_a_command_runs_in_its_own_process(tmp_path, env):
    script = str(tmp_path / "report.py")
    Path(script).write_text(REPORT)
    done = command(script, "a b", 7, cwd=tmp_path, env=env, input="typed")
    report, end = done.stdout.splitlines()
    assert json.loads(report) == [
        [script, "a b", "7"], script, str(tmp_path), "red", "typed", []]
    assert done.returncode == 3 and done.stderr == "a word\n" and end == "the end"


@pytest.mark.parametrize(("statement", "code", "message"), [
    ("os.kill(os.getpid(), 9)", -9, ""), ("os.kill(os.getpid(), 15)", -15, ""),
    ("1 / 0", 1, "ZeroDivisionError"), ("pass", 0, "")])
def test_exit_codes_signals_and_tracebacks_are_reported(tmp_path, statement, code, message):
    (tmp_path / "end.py").write_text(f"import os\n{statement}\n")
    done = command(str(tmp_path / "end.py"))
    assert done.returncode == code and message in done.stderr and (code == 0 or not done.stdout)


def test_a_module_runs_as_python_runs_it():
    done = succeeds(command("-m json.tool", "--compact", input='{"a": [1, 2]}'))
    assert done.stdout == '{"a":[1,2]}\n'


def test_waiting_ends_when_the_process_ends():
    process = start("-c", "print('gone')")
    with pytest.raises(AssertionError, match="gone"):
        wait_until(lambda: False, process)
    assert sys.executable in process.args

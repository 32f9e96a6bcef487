"""Windows, as far as Linux can show it: tests/as_on_windows.py says how."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment
from conftest import metrics

# Not in the name of a file, and neither a dot nor a space at its end.
FORBIDDEN = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ]$')


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="hides what only Linux has")
def test_windows_trains_resumes_samples_and_looks_at_heads(workplace, trained):
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-W", "ignore::EncodingWarning",
         ROOT / "tests/as_on_windows.py", "train.py tiny.yaml train.steps=8",
         "train.py runs/tiny train.steps=12", "sample.py runs/tiny 'def ' --max-tokens 5",
         "heads.py runs/tiny --json heads.json --csv heads.csv"],
        env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = Path("runs/tiny")
    assert "def " in done.stdout and "runs/tiny/report.html in a browser" in done.stdout
    assert (run / "checkpoints/latest").read_text() == "000012"
    kept = sorted(path.name for path in (run / "checkpoints").glob("0*"))
    assert kept == sorted(path.name for path in (trained / "checkpoints").glob("0*"))
    # The learning rate falls to the total of the steps, so only the first ones are the same.
    ours, theirs = metrics(run), metrics(trained)
    assert ours.keys() == theirs.keys() == set(range(1, 13))
    assert ours[1] == theirs[1]
    names = [path.name for path in Path().rglob("*")]
    assert len(names) > 30 and not any(map(FORBIDDEN.search, names))

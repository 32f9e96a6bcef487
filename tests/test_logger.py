"""wandb's own files, read back with its own tool; metrics.jsonl after a torn write."""

import json
import re
from pathlib import Path

import pytest
from commands import command
from conftest import metrics, wandb_history

from training.logger import Metrics


def test_wandb_holds_every_key_of_metrics_jsonl(workplace):
    done = command("train.py", "tiny.yaml", "log.wandb=offline", env={"WANDB_MODE": "offline"}, cwd=workplace)
    assert done.returncode == 0 and "wandb sync" in done.stdout, done.stderr
    records = metrics(Path("runs/tiny"))
    history = wandb_history(Path("runs/tiny"))
    assert sum("train/lr" in json.dumps(record) for record in history) == len(records)         # besides, pictures have lines of their own
    text = json.dumps(history)
    for key in set().union(*records.values()):
        assert f'"{key}"' in text or key in text
    assert str(records[12]["val/loss"])[:10] in text
    on_the_console = set(re.findall(r"(\w+/\w+) [\d.]+", done.stdout))           # the same names there
    written = Path("runs/tiny/metrics.jsonl").read_text()
    assert len(on_the_console) == 2 and all(f'"{name}":' in written for name in on_the_console), on_the_console


def test_the_limit_for_wandbs_server_is_none_for_an_offline_run(tmp_path):
    """On a busy machine wandb's own process takes long to start, and nothing else is waited for."""
    (tmp_path / "offline.py").write_text("""
from pathlib import Path
import training.logger
from training.config import LogConfig
training.logger.WANDB_SECONDS = -100          # has passed already
wandb = training.logger.Wandb(LogConfig(wandb="offline"), Path(), "offline", {}, print)
wandb.log({"step": 1, "loss": 2.5})
wandb.finish()
""")
    done = command(str(tmp_path / "offline.py"), cwd=tmp_path, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    assert "2.5" in json.dumps(wandb_history(tmp_path))


def test_a_line_the_disk_takes_a_part_of_is_taken_back(tmp_path, monkeypatch):
    log = Metrics(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})

    class Short:
        """A disk that fills up in the middle of a line."""
        def __init__(self, file): self.file = file
        def write(self, line): return self.file.write(line[:7])
        def __getattr__(self, name): return getattr(self.file, name)

    log.file = Short(log.file)
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_metrics_drop_what_lies_ahead_and_what_was_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n{"step": 3, "x": 3}\n{"step": 4, "x"')
    log = Metrics(path, 2)
    log.write({"step": 3, "x": float("nan"), "y": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": None, "y": 0.5}]

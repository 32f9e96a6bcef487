"""wandb's own files, read back with its own tool; metrics.jsonl after a torn write."""

import json
import re
from pathlib import Path

import pytest
from commands import command, succeeds
from conftest import metrics, wandb_history

from training.logger import Metrics


def test_wandb_holds_every_key_of_metrics_jsonl(workplace):
    done = succeeds(command("train.py", "tiny.yaml", "log.wandb=offline",
                            env={"WANDB_MODE": "offline"}))
    assert "wandb sync" in done.stdout
    run = Path("runs/tiny")
    records, history = metrics(run), wandb_history(run)
    # Pictures have records of their own.
    with_lr = [record for record in history if "train/lr" in json.dumps(record)]
    assert len(with_lr) == len(records)
    text = json.dumps(history)
    for key in set().union(*records.values()):
        assert key in text
    assert str(records[12]["val/loss"])[:10] in text
    # The console has the same names.
    names = set(re.findall(r"(\w+/\w+) [\d.]+", done.stdout))
    written = (run / "metrics.jsonl").read_text()
    assert len(names) == 2 and all(f'"{name}":' in written for name in names), names


def test_the_time_limit_for_wandbs_server_does_not_hold_for_an_offline_run(tmp_path):
    """On a busy machine wandb's own process starts slowly, and an offline run waits only for it."""
    (tmp_path / "offline.py").write_text("""
from pathlib import Path
import training.logger
from training.config import LogConfig
training.logger.WANDB_SECONDS = -100          # is over already
wandb = training.logger.Wandb(LogConfig(wandb="offline"), Path(), "offline", {}, print)
wandb.log({"step": 1, "loss": 2.5})
wandb.finish()
""")
    done = succeeds(command(str(tmp_path / "offline.py"), cwd=tmp_path,
                            env={"WANDB_MODE": "offline"}))
    assert not done.stdout
    assert "2.5" in json.dumps(wandb_history(tmp_path))


def test_a_line_of_which_only_a_part_fits_on_the_disk_is_removed(tmp_path):
    log = Metrics(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})

    class Short:
        """A file on a disk that fills up in the middle of a line."""

        def __init__(self, file):
            self.file = file

        def write(self, line: bytes) -> int:
            return self.file.write(line[:7])

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    log.file = Short(log.file)
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_later_steps_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n'
                    '{"step": 3, "x": 3}\n{"step": 4, "x"')
    log = Metrics(path, 2)
    log.write({"step": 3, "x": float("nan"), "y": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": None, "y": 0.5}]

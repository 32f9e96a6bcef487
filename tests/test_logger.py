"""metrics.jsonl after a torn write."""

import json

import pytest

from training.logger import Metrics


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

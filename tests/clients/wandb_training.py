"""Trains with the wandb of the environment it runs in, and reads back what it kept.

`python tests/clients/wandb_training.py`, in an environment of requirements/wandb_oldest.txt or
wandb_newest.txt.

Prints one line of JSON: {"client": "wandb", "version": …, "checks": {name: whether it holds}}. The
exit code is 0 if all hold.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from fake_wandb import FakeWandb, StoredRun  # noqa: E402  found by the line above

CONFIG = """
run: tiny
model: {n_layers: 2, n_heads: 4, d_model: 32, n_ctx: 32}
data: {corpus: files, files: ["*.txt"], tokenizer: bytes, val_fraction: 0.2}
train: {batch_tokens: 256}
eval: {every: 4, tokens: 1024}
checkpoint: {every: 4}
heads: {every: 4, images_every: 4}
log: {every: 1, group: clients}
"""
QUIET = {"WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def run(command: str, folder: Path, env: dict[str, str]) -> str:
    """The output of a command line that must succeed; it is shown if it does not."""
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True,
                          env=os.environ | QUIET | env)
    if done.returncode or "wandb      " in done.stdout:         # a line that begins so is a failure
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(1)
    return done.stdout


def train(folder: Path, words: str, env: dict[str, str]) -> str:
    return run(f"{shlex.quote(sys.executable)} {ROOT}/train.py {words}", folder, env)


def check_offline(folder: Path) -> dict[str, bool]:
    """A run in two parts, uploaded by the command that the second prints."""
    offline = {"WANDB_MODE": "offline"}
    train(folder, "tiny.yaml train.steps=6 log.wandb=offline", offline)
    out = train(folder, "runs/tiny train.steps=10 log.wandb=offline", offline)
    (upload,) = re.findall(r"^metrics .*, (for part in .*; do wandb sync .*)", out, re.MULTILINE)
    wandb = f"{shlex.quote(sys.executable)} -m wandb"
    with FakeWandb() as server:
        run(upload.replace("wandb sync ", f"{wandb} sync "), folder, server.env)
    (stored,) = server.runs.values()
    return {"trains offline": True, "one run out of two parts": len(server.runs) == 1,
            "group": stored.group == "clients",
            **check_rows("uploaded", folder / "runs/tiny", stored)}


def check_online(folder: Path) -> dict[str, bool]:
    """A run that is continued online; without tables, which our server cannot give back."""
    with FakeWandb() as server:
        for words in ("tiny.yaml run=online train.steps=6 log.wandb=online heads.images_every=0",
                      "runs/online train.steps=10"):
            train(folder, words, server.env)
    (stored,) = server.runs.values()
    return {"trains online": True, **check_rows("online", folder / "runs/online", stored)}


def check_rows(kind: str, folder: Path, stored: StoredRun) -> dict[str, bool]:
    """Whether the rows are those of metrics.jsonl, each once, and the axes the documented ones."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    axes, media = stored.axes, ["heads/report"]
    if kind == "uploaded":
        media += ["heads/table", "heads/strongest/1", "heads/patterns/random tokens"]
    by_step = {key for key, axis in axes.items() if axis.step_metric == "step"}
    return {
        f"{kind}: every step once": [row["step"] for row in stored.history] == [
            record["step"] for record in records],
        f"{kind}: numbers as in metrics.jsonl": all(
            row[key] == value for row, record in zip(stored.history, records)
            for key, value in record.items() if isinstance(value, float)),
        f"{kind}: lists, pictures, tables and pages": all(
            any(key in row for row in stored.history)
            for key in (*media, "heads/layers/copying", "heads/offset_profile/L1H3")),
        f"{kind}: axes": by_step == {key for key in axes if key.startswith(("train/", "val/"))},
        f"{kind}: single heads are hidden": all(
            axis.hidden == bool(re.search(r"/L\d+H\d+$", key)) for key, axis in axes.items()
            if key.startswith(("heads/copying/", "heads/offset_profile/", "heads/best/")))}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(CONFIG)
        for source in sorted(Path(os.__file__).parent.glob("a*.py"))[:8]:
            (folder / f"{source.stem}.txt").write_bytes(source.read_bytes()[:6000])
        checks = check_offline(folder) | check_online(folder)
    print(json.dumps({"client": "wandb", "version": version("wandb"), "checks": checks}))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

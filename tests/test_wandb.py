"""What wandb keeps of a run, read back with its own tool or by a server of ours; wandb that fails;
sweeps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT, command, environment, fails, start, succeeds, wait_until
from conftest import metrics, read_records, wandb_history
from fake_wandb import FakeWandb

from bench.study_runs import condition_named, finished
from training.config import LogConfig, load_config
from training.logger import read_metrics
from training.wandb_log import Wandb, _sync_command, as_wandb, panel_of

SCORES = ["prefix_matching", "latest_match", "current_token", "previous_token",
          "previous_token_later", "duplicate_token", "first_token", "entropy", "distance",
          "copying"]
SHOWN = {
    "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "val/loss", "val/bpb",
    "icl/score", "repeat/gain", "aperiodic/accuracy", "aperiodic/accuracy_without_begin",
    "heads/patterns/random tokens", "heads/patterns/held-out text", "heads/strongest/1",
    "heads/table", *(f"heads/{kind}/{score}" for kind in ("best", "layers")
                                     for score in SCORES)}
# Logged when there is something to log.
SHOWN_LATER = {"heads/report", "phase/onset_tokens", "knockout/gain_removed",
               "knockout/gain_removed_random", "heads/best/prefix_matching_visible",
               "heads/layers/prefix_matching_visible"}
BIG = ("run=big", "model.n_layers=12", "model.n_heads=12", "model.n_kv_heads=12",
       "model.d_model=48", "heads.every=4", "heads.images_every=8", "log.wandb=offline",
       "log.group=widths", "eval.every=8", "checkpoint.every=0", "checkpoint.steps=[4]")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}


def type_in(line: str, env: dict[str, str]) -> None:
    """Type a printed command with `wandb sync` into a shell."""
    assert line.count("wandb sync ") == 1
    line = line.replace("wandb sync ", f"{sys.executable} -m wandb sync ")
    done = subprocess.run(line, shell=True, env=environment(**env),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, which may be being written."""
    return max((record["step"] for record in read_metrics(run / "metrics.jsonl")), default=0)


def rows_by_step(history: list[dict]) -> dict[int, list[dict]]:
    """A run's rows, under the number of the training step they belong to."""
    rows: dict[int, list[dict]] = {}
    for row in history:
        rows.setdefault(row["step"], []).append(row)
    return rows


# --- a large model, killed and continued ------------------------------------------------------

@pytest.mark.long
def test_144_heads_killed_continued_and_uploaded_by_the_printed_command(workplace):
    """At most 40 panels, each with its axis, and one curve out of two parts."""
    process = start(ROOT / "train.py", "tiny.yaml", *BIG, "train.steps=1000", env=OFFLINE)
    run = Path("runs/big")

    def is_written() -> bool:
        """Whether wandb's file has the row of step 6: every row is there twice, with its summary,
        and the metric's definition once."""
        files = list(run.glob("wandb/offline-run-*/*.wandb"))
        return bool(files) and files[0].read_bytes().count(b"train/grad_norm") > 2 * 6

    wait_until(is_written, process)
    process.kill()
    process.communicate()
    reached = last_step(run)
    process = start(ROOT / "train.py", "runs/big", env=OFFLINE)
    wait_until(lambda: last_step(run) >= reached + 2, process)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    last = last_step(run)
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    (upload,) = re.findall(r"^metrics .*, (for part in .*; do wandb sync .*)", output, re.MULTILINE)

    with FakeWandb() as server:
        type_in(upload, server.env)
        (uploaded,) = server.runs.values()
        rows = rows_by_step(uploaded.history)
        assert sorted(rows) == list(range(1, last + 1))
        assert len(rows[5]) == len(rows[6]) == 2                    # made again after the kill
        for record in read_records(run):
            for row in rows[record["step"]]:
                for key in ("train/loss", "heads/best/copying", "repeat/gain"):
                    assert row.get(key) == record.get(key), (record["step"], key)
        numbers = [row["_step"] for row in uploaded.history]
        assert numbers == sorted(numbers)
        assert uploaded.group == "widths" and uploaded.config["seed"]["value"] == 1
        check_axes(uploaded.axes)
        type_in(upload, server.env)             # a second time: what was uploaded whole is skipped
        again = rows_by_step(uploaded.history)
        assert [len(again[step]) for step in range(reached + 1, last + 1)] == [1] * (last - reached)


def check_axes(axes: dict) -> None:
    shown = {key for key, axis in axes.items() if not axis.hidden}
    assert SHOWN <= shown <= SHOWN | SHOWN_LATER
    assert len(SHOWN | SHOWN_LATER) <= 40
    assert sum(bool(re.search(r"L\d+H\d+$", key)) for key in axes) == 11 * 144
    for key, axis in axes.items():
        by_step = key.startswith(("train/", "val/"))
        expected = None if key in ("step", "tokens") else "step" if by_step else "tokens"
        assert axis.step_metric == expected, key


def test_metrics_say_which_head_of_which_layer_is_best(trained):
    records = [record for record in read_records(trained) if "heads/best/copying" in record]
    assert len(records) == 3
    for record in records:
        for score in SCORES:
            layers = [[record[f"heads/{score}/L{layer}H{head}"] for head in range(4)]
                      for layer in range(2)]
            assert record[f"heads/layers/{score}"] == [max(heads) for heads in layers]
            assert record[f"heads/best/{score}"] == max(map(max, layers))
        assert record["repeat/gain"] == pytest.approx(
            record["repeat/loss_first"] - record["repeat/loss_second"])


def test_a_list_over_layers_has_a_bar_for_each_layer():
    layers = as_wandb("heads/layers/copying", [0.5, float("nan"), -0.1, 0.25])
    assert layers.histogram == [0.5, 0, 0, 0.25] and layers.bins == [-0.5, 0.5, 1.5, 2.5, 3.5]
    offsets = as_wandb("heads/offset_profile/L0H1", [0.5, 0.25, 0.125])
    assert offsets.histogram == [0.5, 0.25, 0.125] and offsets.bins == [-1.5, -0.5, 0.5, 1.5]


# --- online ------------------------------------------------------------------------------------

def test_an_online_run_that_continues_from_an_earlier_checkpoint_logs_no_step_twice(workplace):
    with FakeWandb() as server:
        arguments = ("tiny.yaml", "log.wandb=online", "heads.every=5", "train.steps=10")
        succeeds(command("train.py", *arguments, env=server.env))
        ((name, stored),) = server.runs.items()
        assert [row["_step"] for row in stored.history] == list(range(1, 11))
        shutil.rmtree("runs/tiny/checkpoints/000010")           # goes on from step 8
        done = succeeds(command("train.py", "runs/tiny", "train.steps=12", env=server.env))
        assert list(server.runs) == [name] and name in done.stdout      # the page's address
        assert [(row["_step"], row["step"]) for row in stored.history] == [
            (step, step) for step in range(1, 13)]
        assert {"heads/report", "val/loss", "verdict/formed"} <= stored.history[-1].keys()


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
import training.wandb_log
from training.config import LogConfig
training.wandb_log.WANDB_SECONDS = -100          # is over already
wandb = training.wandb_log.Wandb(LogConfig(wandb="offline"), Path(), "offline", {}, print)
wandb.log({"step": 1, "loss": 2.5})
wandb.finish()
""")
    done = succeeds(command(str(tmp_path / "offline.py"), cwd=tmp_path,
                            env={"WANDB_MODE": "offline"}))
    assert not done.stdout
    assert "2.5" in json.dumps(wandb_history(tmp_path))




# --- wandb fails -------------------------------------------------------------------------------

BROKEN = '''
class Settings:
    model_fields = {"console": None}

    def __init__(self, **values):
        fail("settings")
        assert values == {"console": "off"}, "an unknown setting is refused"


class Run:
    url = None

    def define_metric(self, **_):
        fail("define")

    def log(self, *_, **__):
        fail("log")

    def finish(self, **_):
        fail("finish")


def fail(moment):
    if moment == MOMENT:
        raise ValueError(moment + " fails\\nfor a reason of many lines")


def init(**_):
    fail("init")
    return Run()


def teardown():
    raise RuntimeError("this fails too")


__version__ = "0.99"
fail("import")
'''


@pytest.mark.parametrize("moment", ["import", "settings", "init", "define", "log", "finish", "no"])
def test_whatever_wandb_raises_ends_logging_only(tmp_path, monkeypatch, moment):
    (tmp_path / "wandb.py").write_text(f"MOMENT = {moment!r}\n{BROKEN}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    log = Wandb(LogConfig(wandb="offline"), tmp_path, "name", {}, said.append)
    for step in (1, 2):
        log.log({"step": step, "train/loss": 0.5})
    log.finish()
    sys.modules.pop("wandb", None)              # not for the tests behind this one
    assert len(said) == (moment != "no")
    for line in said:
        assert f"{moment} fails" in line and "metrics.jsonl has everything" in line
        assert "\n" not in line


# --- names, sweeps, groups ---------------------------------------------------------------------

def test_no_name_of_a_panel_matches_a_metric_of_another():
    numbers = ("step", "tokens", "train/loss", "heads/copying/L0H1", "heads/copying/L10H11",
               "heads/best/copying", "heads/table", "heads/strongest/1",
               "heads/prefix_matching/L0H0", "heads/prefix_matching_visible/L0H0")
    lists = ("heads/layers/copying", "heads/offset_profile/L1H3")
    names = {panel_of(metric, 0.5).name for metric in numbers}
    names |= {panel_of(metric, [0.5]).name for metric in lists}
    assert names >= set(lists)
    globs = {name[:-1] for name in names if name.endswith("*")}
    assert globs == {"heads/copying/", "heads/prefix_matching/", "heads/prefix_matching_visible/"}
    assert not any(name.startswith(glob) for glob in globs for name in names - {f"{glob}*"})


def test_the_command_that_uploads_is_whole():
    folder = Path("my runs") / "a"
    assert _sync_command("0.31.0", folder) == "wandb sync 'my runs/a/wandb'/offline-run-*"
    for old in ("0.21.0", "0.29.0rc1"):
        assert _sync_command(old, Path("runs/a")) == (
            "wandb sync --append runs/a/wandb/offline-run-*")
    assert "--append" not in _sync_command("1.0", folder)


@pytest.mark.long
def test_wandbs_agent_runs_the_documented_sweep(workplace):
    """Two runs by wandb's own agent; it names them, and one that it starts again is continued."""
    (document,) = re.findall(r"<<'END'\n(.*?)^END", (ROOT / "docs/wandb.md").read_text("utf-8"),
                             re.DOTALL | re.MULTILINE)
    sweep = document.replace("configs/quickstart.yaml", "tiny.yaml")
    assert set(yaml.safe_load(sweep)["parameters"]) == {"optimizer.lr", "seed"}
    commands = [{"type": "run", "run_id": run_id, "program": str(ROOT / "train.py"), "args": {
        "optimizer.lr": {"value": lr}, "seed": {"value": 3}, "train.steps": {"value": 4},
        "log.wandb": {"value": "online"}, "heads.every": {"value": 0}}}
        for run_id, lr in (("1a2b3c4d", 0.01), ("5e6f7a8b", 1e-05))]
    with FakeWandb([*commands, commands[0]], sweep) as server:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run([sys.executable, "-m", "wandb", "agent", "me/induction/abcd"],
                              env=environment(**server.env, PATH=path), capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        assert "train.py tiny.yaml --optimizer.lr=0.01 --seed=3" in done.stderr
        for run_id, lr in (("1a2b3c4d", 0.01), ("5e6f7a8b", 1e-05)):
            assert max(metrics(Path(f"runs/tiny-{run_id}"))) == 4
            stored = server.runs[run_id]
            assert stored.sweep == "abcd" and len(stored.history) == 4
            assert stored.config["optimizer"]["value"]["lr"] == lr
        assert "runs/tiny-1a2b3c4d is finished" in done.stdout
        assert len(server.runs) == len(list(Path("runs").iterdir())) == 2
    in_sweep = {"WANDB_SWEEP_ID": "abcd", "WANDB_RUN_ID": "99"}
    fails(command("train.py", "tiny.yaml", "--optimizer.lrr=1", env=in_sweep), "did you mean")


def test_runs_of_a_study_have_its_name_as_their_group(workplace, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    condition = condition_named("toy_1l")
    assert {"log.group=toy", "log.wandb=disabled"} <= set(condition.overrides(0))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "log.wandb=auto" in condition.overrides(0)
    assert "log.group=text" in condition_named("text_mixed_2l").overrides(1)
    # A run that an earlier version trained, without a group, is not refused.
    config = load_config(ROOT / "configs/induction/toy_1l.yaml",
                         [change for change in condition.overrides(0) if "log." not in change])
    run = condition.run(0)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    assert not finished(condition, 0)

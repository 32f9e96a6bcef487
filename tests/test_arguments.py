"""Command lines: keys as sweeps write them, options in any order, hints for mistakes."""

import pytest
import yaml
from commands import command, fails, succeeds
from conftest import metrics

DATA = ["--data.files=[texts/*.txt]", "--data.folder=shards", "--data.tokenizer=bytes"]


def test_train_understands_keys_as_a_sweep_writes_them(workplace):
    succeeds(command("train.py", "tiny.yaml", "--run=001", "train.steps=3", "--train.steps=2",
                     "--optimizer.lr=1e-05", "--train.compile=False", "--heads.every=0"))
    run = workplace / "runs" / "001"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["run"], config["train"]["steps"]) == ("001", 2)
    assert (config["optimizer"]["lr"], config["train"]["compile"]) == (1e-5, False)
    assert max(metrics(run)) == 2


def test_other_commands_understand_them_too_before_and_after_options(workplace):
    succeeds(command("-m data.prepare", "tiny.yaml", *DATA))
    succeeds(command("-m data.prepare", "tiny.yaml", "--verify", *DATA))
    assert (workplace / "shards" / "manifest.json").exists()
    report = succeeds(command("-m training.plan", "tiny.yaml", "--tflops=100", "--model.n_ctx=64"))
    assert "context 64" in report.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["train.py", "tiny.yaml", "--optimizer.lr", "0.1"], "is set by optimizer.lr=0.1"),
    (["train.py", "tiny.yaml", "--train.compile"], "is set by train.compile=VALUE"),
    (["train.py", "tiny.yaml", "--optimizer.lrr=0.1"], "did you mean optimizer.lr?"),
    (["train.py", "--config", "tiny.yaml"], "write it without --config"),
    (["train.py", "--seed=3", "tiny.yaml"], "the config comes first"),
    (["train.py", "tiny.yaml", "--halp"], "did you mean --help?"),
    (["-m training.plan", "tiny.yaml", "--world_size=2"], "did you mean --world-size?"),
    (["-m data.prepare", "tiny.yaml", "--verfy"], "did you mean --verify?"),
    (["heads.py", "runs/x", "--al-steps"], "did you mean --all-steps?"),
])
def test_a_mistaken_argument_gets_a_hint(workplace, arguments, words):
    fails(command(*arguments), words)

"""Every config under configs/ is listed and trains for three steps.

Text that would be downloaded is replaced by text of this machine.
"""

import ast
from pathlib import Path

import pytest
from commands import ROOT, command, succeeds
from conftest import metrics

from model.families import OWN_TYPE, family
from settings.validate import key_paths
from training.config import Config, load_config

TOO_LARGE = {"gpt3_175b"}           # an example for training.plan, not for training
CONFIGS = {path.stem: path for path in sorted(ROOT.glob("configs/**/*.yaml"))
           if path.stem not in TOO_LARGE}


@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps(name, workplace, made_once):
    config = load_config(CONFIGS[name])
    Path("prepared").symlink_to(made_once("corpora", lambda folder: None))  # many share a corpus
    n_ctx = min(config.model.n_ctx, 128)
    overrides = ["train.steps=3", f"model.n_ctx={n_ctx}", f"train.batch_tokens={4 * n_ctx}",
                 "eval.tokens=1024", "log.every=1", "log.wandb=disabled"]
    if config.model.n_layers > 2:
        overrides.append("model.n_layers=2")                    # the others are the same
    if config.model.d_model > 256:
        overrides.append(f"model.d_model={config.model.d_model // 4}")
        if config.model.d_mlp:
            overrides.append(f"model.d_mlp={config.model.d_mlp // 4}")
    if config.model.vocab_size:
        overrides.append("model.vocab_size=512")
    if config.data.text_corpus in ("hub", "files"):
        overrides += ["data.corpus=files", "data.files=[texts/*.txt]"]
        if config.data.tokenizer.kind not in ("bytes", "bpe"):
            overrides.append("data.tokenizer={kind: bpe, vocab_size: 300}")
        elif config.data.tokenizer.kind == "bpe":
            overrides.append("data.tokenizer.vocab_size=400")
    done = command("train.py", str(CONFIGS[name]), *overrides, cwd=workplace)
    assert done.returncode == 0, done.stderr
    records = metrics(Path("runs") / config.run)
    assert list(records) == [1, 2, 3] and records[3]["val/loss"] > 0
    assert config.run == name


def test_the_models_that_people_train_first_open_in_other_programs():
    """Only three controls of the studies have a model that transformers lacks."""
    types = {name: family(load_config(path).model) for name, path in CONFIGS.items()}
    own = {name for name, model_type in types.items() if model_type == OWN_TYPE}
    assert own == {"text_smear", "toy_1l_smear", "toy_fixed_period"}
    assert types["gpt2_small"] == "gpt2" and types["quickstart"] == "llama"


def test_without_arguments_train_lists_every_config_and_what_it_trains():
    done = succeeds(command("train.py", cwd=ROOT))
    listed, _, usage = done.stdout.partition("\n\n")
    descriptions = dict(line.split(maxsplit=1) for line in listed.splitlines())
    configs = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml")}
    assert set(descriptions) == configs
    assert all(10 < len(text) <= 90 for text in descriptions.values()), descriptions
    assert descriptions["configs/quickstart.yaml"].startswith("two attention-only layers")
    assert "python train.py configs/quickstart.yaml" in usage


def test_train_help_names_all_that_it_takes():
    done = succeeds(command("train.py", "--help", cwd=ROOT))
    for word in ("configs/NAME.yaml", "runs/NAME", "key.path=value", "Without arguments",
                 "training/config.py"):
        assert word in done.stdout


def test_every_key_of_a_config_is_read_somewhere():
    files = [ROOT / "train.py"]
    for folder in ("model", "kernels", "data", "training", "induction"):
        files += (ROOT / folder).glob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    attributes = {node.attr for node in nodes
                  if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    keys = list(key_paths(Config))
    assert len(keys) > 70
    assert [key for key in keys if key.rsplit(".", 1)[-1] not in attributes] == []

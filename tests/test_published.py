"""A checkpoint as one would publish it, without training_state/, and as transformers saves it
again."""

import json
import shutil
from pathlib import Path

from errors import UserError

import pytest
import torch
from commands import command, fails, succeeds
from small_models import checkpoint_of, perturbed_model

from data.load_tokenizer import load_tokenizer
from model.config import ModelConfig
from training.checkpoint import find_checkpoint, load_model
from training.import_model import import_model
from training.loaded_run import load_run

SHAPES = [{}, {"mlp": "none"}, {"bias": "qkv"}, {"window": [None, 6]},
          {"position": "learned", "mlp": "gelu", "smear": True}]       # the last is of our own type


def published(checkpoint: Path, folder: Path) -> Path:
    """What `hf upload --exclude "training_state/*"` would publish of a checkpoint."""
    return shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training_state"))


def test_it_is_sampled_and_looked_at(trained, tmp_path):
    newest = find_checkpoint(trained)
    copy = published(newest, tmp_path / "my-model")
    texts = [succeeds(command("sample.py", where, "def ", "--max-tokens", "12", "--temperature",
                              "0", cwd=tmp_path)).stdout for where in (newest, copy)]
    assert texts[0] == texts[1]
    original, opened = load_run(newest), load_run(copy)
    assert (opened.step, opened.state["tokens"]) == (original.step, original.state["tokens"])
    assert opened.config.run == "my-model" and opened.config.model == original.model.config
    looked = succeeds(command("heads.py", copy, "--json", "x.json", cwd=tmp_path)).stdout
    assert f"{copy} at step {original.step}, " in looked
    assert set(json.loads((tmp_path / "x.json").read_text())["heads"]) == {
        f"L{layer}H{head}" for layer in range(original.model.config.n_layers)
        for head in range(original.model.config.n_heads)}
    judged = succeeds(command("heads.py", "verdict", copy, cwd=tmp_path)).stdout
    assert "Did induction heads form?" in judged
    # Nothing is claimed about a training that is not known.
    assert "no repeats were trained here; what the weights were trained on before is " in looked
    assert "what the weights were trained on is unknown | " in judged
    assert opened.config.init_from == str(copy)             # what a run of this config starts from


def test_it_cannot_be_continued_but_another_run_starts_from_it(trained, workplace):
    shutil.copytree(trained, "runs/stripped", symlinks=True)
    shutil.rmtree(find_checkpoint("runs/stripped") / "training_state")
    newest = find_checkpoint("runs/stripped")
    fails(command("train.py", "runs/stripped", "train.steps=99"), "training_state", "init_from=",
          f"data.tokenizer=runs/stripped/checkpoints/{newest.name}")
    copy = published(newest, Path("my-model"))
    config = json.loads((copy / "config.json").read_text())["gpt"]
    shape = [f"model.{key}={json.dumps(value)}" for key, value in config.items()
             if value != ModelConfig().model_dump()[key]]
    Path("new.yaml").write_text("run: new\n")
    fails(command("train.py", "new.yaml", f"data.tokenizer={copy}"), "did you mean ./my-model?")
    succeeds(command("train.py", "new.yaml", f"init_from={copy}", f"data.tokenizer=./{copy}",
                     "data.corpus=files", "data.files=[texts/a*.txt]", "data.val_fraction=0.2",
                     f"train.batch_tokens={config['n_ctx']}", "train.steps=1",
                     "log.wandb=disabled", *shape))
    fails(command("train.py", "new.yaml", "run=wider", f"init_from={copy}",
                  f"data.tokenizer=./{copy}", *shape, "model.n_layers=1"),
          "init_from=my-model is a model of another shape",
          f"model.n_layers=1, there {config['n_layers']}")
    fails(command("train.py", copy), "init_from=my-model", "import_model my-model runs/NAME")
    state = json.loads(Path("runs/new/checkpoints/000001/training_state/state.json").read_text())
    assert "unknown" in state["history"][0]
    assert load_run("runs/new").step == 1


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_is_imported_as_the_model_that_it_was(shape, tmp_path):
    model = perturbed_model(vocab_size=257, **shape)
    checkpoint = checkpoint_of(model, tmp_path)
    with pytest.raises(UserError, match="a checkpoint of this project already"):
        import_model(checkpoint, tmp_path / "runs/x")
    copy = published(checkpoint, tmp_path / "copy")
    _, imported, tokenizer = import_model(copy, tmp_path / "runs/x")
    assert tokenizer.hash == load_tokenizer(checkpoint / "tokenizer.json").hash
    tokens = torch.randint(257, (2, 20))
    assert torch.equal(imported(tokens), model(tokens))
    assert imported.config.mlp == model.config.mlp
    again, _ = load_model(find_checkpoint(tmp_path / "runs/x"))
    assert torch.equal(again(tokens), model(tokens))


def test_a_link_that_was_copied_alone_and_names_that_are_nearly_right(trained, workplace):
    Path("copy").symlink_to("000300")                       # as `cp -r …/latest copy`
    fails(command("sample.py", "copy"), "copy is a link to 000300, which is not there", "cp -rL")
    shutil.copytree(trained, "runs/tiny", symlinks=True)
    fails(command("sample.py", "tiny"), "did you mean runs/tiny?")
    newest = find_checkpoint("runs/tiny")
    with pytest.raises(UserError, match="is one checkpoint: leave step 1 out"):
        load_run(newest, step=1)


def test_its_files_are_still_verified(tmp_path):
    copy = published(checkpoint_of(perturbed_model(vocab_size=257), tmp_path), tmp_path / "copy")
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    for opening in (load_model, load_run, lambda where: import_model(where, tmp_path / "runs/x")):
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            opening(copy)


@pytest.mark.parametrize("shape", [*SHAPES[:-1], {"mlp": "none", "bias": "qkv"}])
@torch.no_grad()
def test_what_transformers_saves_again_is_imported(shape, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = perturbed_model(vocab_size=257, **shape)
    checkpoint = checkpoint_of(model, tmp_path)
    saved = tmp_path / "saved"
    for part in (AutoModelForCausalLM, AutoTokenizer):
        part.from_pretrained(checkpoint).save_pretrained(saved)
    fails(command("sample.py", saved, "x", cwd=tmp_path),
          f"python -m training.import_model {saved} runs/NAME")
    _, imported, _ = import_model(saved, tmp_path / "runs/x")
    assert imported.config.mlp == model.config.mlp
    tokens = torch.randint(257, (2, 20))
    assert torch.allclose(imported(tokens), model(tokens), atol=1e-5)


@torch.no_grad()
def test_an_mlp_of_one_unit_that_does_something_stays(tmp_path):
    model = perturbed_model(vocab_size=257, d_mlp=1)
    copy = published(checkpoint_of(model, tmp_path), tmp_path / "copy")
    _, imported, _ = import_model(copy, tmp_path / "runs/x")
    assert (imported.config.mlp, imported.config.mlp_size) == ("swiglu", 1)

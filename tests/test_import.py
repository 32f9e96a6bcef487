"""Other people's models: logits are transformers', before and after they are saved again; what is not supported is named; and every
command works on what was imported."""

import errno
import json
import shutil
from pathlib import Path

from errors import UserError

import pytest
import torch
from commands import command, fails
from conftest import metrics
from theirs import LLAMA3, MODELS, YARN, save_hf_model

from model.families import family
from training.checkpoint import find_checkpoint, load_model
from training.import_model import import_model
from training.resume import job_of

# --- the same model --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_logits_are_theirs_before_and_after_saving(kind, tmp_path):
    from transformers import AutoModelForCausalLM
    theirs = save_hf_model(kind, tmp_path / "theirs", **({"max_shard_size": "60KB"} if kind in ("llama", "gpt2") else {}))
    _, model, _ = import_model(tmp_path / "theirs", tmp_path / "run")
    tokens = torch.randint(640, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    difference = (model(tokens) - expected).abs().max().item()
    print(f"\n{kind:30} {difference:.1e}")                                            # the table of docs/import.md
    assert difference < 1e-4 and expected.std() > 0.5
    checkpoint = find_checkpoint(tmp_path / "run")
    loaded, _ = load_model(checkpoint)
    assert torch.equal(loaded(tokens), model(tokens))
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    name = "llama" if kind == "mistral no window" else kind.split()[0]             # the same equations, and the first family that has them
    assert again.config.model_type == family(model.config) == name
    assert (again(tokens).logits - expected).abs().max() < 1e-4
    loaded.pack()                                                                   # decoding, from matrices joined with their biases
    assert torch.allclose(loaded(tokens), expected, atol=1e-4)


@torch.no_grad()
def test_other_spellings_of_the_same_model_are_read(tmp_path):
    """The files of before transformers 5: names without their first word, constants among the parameters, old rope keys; in bfloat16."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
    save_hf_model("gpt2", tmp_path / "gpt2")
    state = {name.removeprefix("transformer."): value.bfloat16() for name, value in load_file(tmp_path / "gpt2/model.safetensors").items()}
    mask = torch.ones(1, 1, 64, 64).tril()
    save_file(state | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": state["wte.weight"].clone()},
              tmp_path / "gpt2/model.safetensors")
    save_hf_model("gpt_neox", tmp_path / "gpt_neox")
    config = json.loads((tmp_path / "gpt_neox/config.json").read_text())
    del config["rope_parameters"], config["tie_word_embeddings"], config["hidden_act"], config["use_parallel_residual"]
    (tmp_path / "gpt_neox/config.json").write_text(json.dumps(config | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))
    save_hf_model("llama llama3 rope", tmp_path / "llama")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "llama/config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": LLAMA3}))
    tokens = torch.arange(64)[None] * 7
    for name in ("gpt2", "gpt_neox", "llama"):
        _, model, _ = import_model(tmp_path / name, tmp_path / f"run-{name}")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens).logits
        assert (model(tokens) - expected).abs().max() < 1e-4
    _, model, _ = import_model(tmp_path / "gpt2", tmp_path / "short", ["model.n_ctx=16"])           # learned positions: the first 16
    assert model.config.n_ctx == 16
    assert (model(tokens[:, :16]) - AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.float32)(tokens[:, :16]).logits
            ).abs().max() < 1e-4


# --- what is not supported ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with one model of some families. Tests must not change them."""
    folder = tmp_path_factory.mktemp("theirs") / "theirs"
    folder.mkdir()
    for kind in ("llama", "qwen3", "gpt2", "gpt_neox", "mistral"):
        save_hf_model(kind, folder / kind)
    return folder


@pytest.mark.parametrize("kind, changes, words", [
    ("llama", {"model_type": "mixtral"}, ["model_type='mixtral'", "gpt_neox"]), ("llama", {"model_type": None}, ["model_type=None"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "'llama3', 'yarn'"]),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
    ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, ["mscale=0.7"]),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["each kind of layer"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "None"]),
    ("llama", {"hidden_size": 2 ** 40}, ["hidden_size=1099511627776", "640"]),
    ("llama", {"num_hidden_layers": 2 ** 40}, ["num_hidden_layers"]),
    ("llama", {"num_attention_heads": 2 ** 40}, ["num_attention_heads"]), ("llama", {"head_dim": 2 ** 40}, ["head_dim"]),
    ("llama", {"max_position_embeddings": 2 ** 40}, ["model.n_ctx=1099511627776", "for example model.n_ctx=2048"]),
    ("llama", {"hidden_size": 64}, ["is (640, 48)", "(640, 64)"]), ("llama", {"num_hidden_layers": 2}, ["not those of its config"]),
    ("llama", {"num_hidden_layers": 4}, ["lack model.layers.3"]),
    ("llama", {"attention_bias": True}, ["lack model.layers.0.self_attn.q_proj.bias"]),
    ("llama", {"vocab_size": "many"}, ["vocab_size='many'"]), ("llama", {"rope_parameters": {"rope_theta": "x"}}, ["rope_theta='x'"]),
    ("llama", {"rms_norm_eps": None}, ["rms_norm_eps=None"]), ("llama", {"num_key_value_heads": 3}, ["must divide"]),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3, "use_sliding_window": True, "sliding_window": 7}, ["'chunked_attention'"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True", "False"]),
    ("gpt2", {"activation_function": "relu"}, ["activation_function='relu'", "'gelu_new'"]),
    ("gpt2", {"n_positions": 65}, ["transformer.wpe.weight is (64, 48)"]),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.2}}, ["rope_dims=3"]),
    ("gpt_neox", {"hidden_act": "gelu_fast"}, ["hidden_act='gelu_fast'"]),
])
def test_what_is_not_supported_is_named(kind, changes, words, shared, tmp_path):
    shutil.copytree(shared / kind, tmp_path / "theirs")
    described = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(described | changes))
    with pytest.raises(UserError) as caught:
        import_model(tmp_path / "theirs", tmp_path / "runs/x")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2 and not (tmp_path / "runs").exists()


def test_nothing_is_unpickled_and_nothing_outside_is_read(shared, tmp_path):
    def refused(*words: str) -> None:
        with pytest.raises(UserError) as caught:
            import_model(tmp_path / "theirs", tmp_path / "run")
        assert all(word in str(caught.value) for word in words), str(caught.value)

    shutil.copytree(shared / "llama", tmp_path / "theirs")
    index, weights = tmp_path / "theirs/model.safetensors.index.json", tmp_path / "theirs/model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    refused("holds no model.safetensors")
    (tmp_path / "theirs/pytorch_model.bin").write_bytes(b"\x80")
    refused("pytorch_model.bin is a pickle", "save_pretrained")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(f"{name!r} is not the name of a safetensors file")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    refused("model-1.safetensors: no such file")
    weights.write_bytes(b"garbage")
    refused("not a safetensors file")
    (tmp_path / "theirs/config.json").write_text("[]")
    refused("config.json")


# --- as a user would -----------------------------------------------------------------------------------------------------------------

@pytest.mark.long
def test_what_was_imported_is_sampled_looked_at_and_judged(shared, tmp_path):
    kinds = ("gpt2", "llama", "qwen3", "mistral")
    for kind in kinds:
        run = f"runs/{kind}"
        steps = [command("-m training.import_model", shared / kind, run, cwd=tmp_path),
                 command("sample.py", run, "the quick", "--max-tokens", "8", "--json", cwd=tmp_path),
                 command("heads.py", run, "--json", f"{kind}.json", cwd=tmp_path)]
        for done, says in zip(steps, (f"theirs/{kind}: {kind}, ", '"prompt": "the quick", "text": "',
                                      f"{run} at step 0, on random tokens")):
            assert done.returncode == 0 and says in done.stdout, done.stderr
        assert len(json.loads((tmp_path / f"{kind}.json").read_text())) == 12
    done = command("heads.py", "verdict", *(f"runs/{kind}" for kind in kinds), cwd=tmp_path)
    assert done.returncode == 0 and "Did induction heads form?" in done.stdout, done.stderr
    assert all(f"## {kind} (at step 0" in done.stdout for kind in kinds), done.stdout


def test_an_imported_run_is_trained_as_any_other(shared, workplace):
    made = command("-m training.import_model", shared / "gpt_neox", "runs/theirs", "eval.tokens=256", "heads.every=2",
                   "train.batch_tokens=256")
    assert made.returncode == 0, made.stderr
    assert all(f"python {words} runs/theirs" in made.stdout for words in ("sample.py", "heads.py", "train.py"))
    with pytest.raises(UserError, match="runs/theirs is there already"):
        import_model(shared / "gpt_neox", Path("runs/theirs"))
    trained = command("train.py", "runs/theirs", "data.corpus=files", "data.files=[texts/a*.txt]", "train.steps=2", "log.every=1",
                      "log.wandb=disabled", "data.val_fraction=0.2", "optimizer.lr=1e-9")
    assert trained.returncode == 0, trained.stderr
    before, _ = load_model(Path("runs/theirs/checkpoints/000000"))
    after, tokenizer = load_model(find_checkpoint("runs/theirs"))
    records = metrics(Path("runs/theirs"))
    tokens = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():                                   # steps of almost nothing: trained from the imported weights
        assert torch.allclose(before(tokens), after(tokens), atol=1e-3) and not torch.equal(before(tokens), after(tokens))
    assert "heads/prefix_matching/L1H3" in records[2] and records[1]["train/loss"] > 3
    with pytest.raises(UserError, match="cannot be continued with another data"):
        job_of("runs/theirs", ["data.files=[texts/b*.txt]", "train.steps=4"])
    went_on = command("train.py", "runs/theirs", "train.steps=4")
    assert went_on.returncode == 0 and max(metrics(Path("runs/theirs"))) == 4, went_on.stderr

    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(find_checkpoint("runs/theirs"))
    assert theirs.config.model_type == "gpt_neox"
    text = "the quick brown fox"
    ids = AutoTokenizer.from_pretrained(find_checkpoint("runs/theirs")).encode(text)
    assert ids == AutoTokenizer.from_pretrained(shared / "gpt_neox").encode(text) == tokenizer.encode_prompt(text)


def test_another_run_starts_from_an_imported_one(shared, workplace):
    import_model(shared / "gpt2", Path("runs/gpt2"))
    Path("next.yaml").write_text(Path("runs/gpt2/config.yaml").read_text())
    done = command("train.py", "next.yaml", "init_from=runs/gpt2", "run=next", "data.corpus=files", "data.files=[texts/a*.txt]",
                   "train.steps=1", "log.wandb=disabled", "data.val_fraction=0.2", "optimizer.lr=1e-9", "eval.every=0", "heads.every=0")
    assert done.returncode == 0, done.stderr
    (one, _), (two, _) = (load_model(find_checkpoint(run)) for run in ("runs/gpt2", "runs/next"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), two.parameters()))


def test_before_its_first_step_data_may_change_and_the_model_not(shared, workplace):
    import_model(shared / "gpt2", Path("runs/gpt2"))
    config, _, changed = job_of("runs/gpt2", ["data.corpus=repeats", "data.repeats.period=[4, 8]", "optimizer.kind=muon"])
    assert config.data.corpus == "repeats" and len(changed) == 3
    for change in ("data.tokenizer=bytes", "model.n_layers=2", "seed=1"):
        with pytest.raises(UserError, match=f"cannot be continued with another {change.split('=')[0]}"):
            job_of("runs/gpt2", [change])
    for change in ("model.rope_base=5.0", "model.n_ctx=65"):
        with pytest.raises(UserError, match=r"only model.n_ctx|too long: at most 64"):
            import_model(shared / "gpt2", Path("runs/other"), [change])
    assert not Path("runs/other").exists() and [path.name for path in Path("runs").iterdir()] == ["gpt2"]


def test_a_run_appears_whole_or_not_at_all(shared, workplace, monkeypatch):
    Path("runs").write_text("no folder")
    with pytest.raises(UserError, match=r"importing into runs/x: .*\n.*where you may write"):
        import_model(shared / "gpt2", Path("runs/x"))
    Path("runs").unlink()
    monkeypatch.setattr("training.checkpoint.os.fsync", no_room)
    with pytest.raises(UserError, match=r"importing into runs/x: .*No space left.*\n.*import again"):
        import_model(shared / "gpt2", Path("runs/x"))
    assert not list(Path("runs").iterdir())


def no_room(_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_help_and_usage_errors(tmp_path):
    done = command("-m training.import_model", "--help")
    assert done.returncode == 0 and "runs/NAME" in done.stdout and "gpt_neox" in done.stdout
    fails(command("-m training.import_model", tmp_path, "runs/x"), f"{tmp_path}/config.json: no such file")

"""Hugging Face models as runs: the logits of transformers, refusals by name, and our commands."""

import errno
import json
import shutil
from pathlib import Path

from errors import UserError

import pytest
import torch
from commands import command, fails, succeeds
from conftest import metrics
from safetensors.torch import load_file, save_file
from theirs import LLAMA3, MODELS, YARN, save_hf_model
from tokenizers import AddedToken, Tokenizer

from model.families import family
from training.checkpoint import find_checkpoint, load_model
from training.config import load_config
from training.import_model import import_model
from training.resume import job_of

MANY = 2 ** 40
NEW_DATA = ("data.corpus=files", "data.files=[texts/a*.txt]", "data.val_fraction=0.2",
            "log.wandb=disabled", "optimizer.lr=1e-9")


@pytest.fixture(scope="module")
def hf_models(tmp_path_factory) -> Path:
    """A folder with one model of each of five families. Tests must not change them."""
    folder = tmp_path_factory.mktemp("hub") / "hf"
    folder.mkdir()
    for name in ("llama", "qwen3", "gpt2", "gpt_neox", "mistral"):
        save_hf_model(name, folder / name)
    return folder


def edit_config(folder: Path, changes: dict, remove: tuple[str, ...] = ()) -> None:
    """Change the config.json of a model directory."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    for key in remove:
        del config[key]
    path.write_text(json.dumps(config))


# --- the same model ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers_before_and_after_saving(name, tmp_path):
    from transformers import AutoModelForCausalLM
    several_files = {"max_shard_size": "60KB"} if name in ("llama", "gpt2") else {}
    original = save_hf_model(name, tmp_path / "hf", **several_files)
    _, model, _ = import_model(tmp_path / "hf", tmp_path / "run")
    tokens = torch.randint(640, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = original(tokens).logits
    difference = (model(tokens) - expected).abs().max().item()
    print(f"\n{name:30} {difference:.1e}")                  # the table of docs/import.md
    assert difference < 1e-4 and expected.std() > 0.5
    checkpoint = find_checkpoint(tmp_path / "run")
    loaded, _ = load_model(checkpoint)
    assert torch.equal(loaded(tokens), model(tokens))
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    # Without windows Mistral and Qwen2 have Llama's equations, and Llama is the first family.
    expected_family = "llama" if name in ("mistral no window", "qwen2") else name.split()[0]
    assert saved.config.model_type == family(model.config) == expected_family
    assert (saved(tokens).logits - expected).abs().max() < 1e-4
    loaded.pack()                       # for decoding: joins matrices, and biases with them
    assert torch.allclose(loaded(tokens), expected, atol=1e-4)


@torch.no_grad()
def test_files_of_older_versions_are_read(tmp_path):
    """Files written before transformers 5.

    Tensor names without the first part, constants among the parameters, old RoPE keys, bfloat16.
    """
    from transformers import AutoModelForCausalLM

    def hf_logits(name: str, tokens: torch.Tensor) -> torch.Tensor:
        hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        return hf_model(tokens).logits

    save_hf_model("gpt2", tmp_path / "gpt2")
    weights_path = tmp_path / "gpt2/model.safetensors"
    state = {name.removeprefix("transformer."): tensor.bfloat16()
             for name, tensor in load_file(weights_path).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, weights_path)

    save_hf_model("gpt_neox", tmp_path / "gpt_neox")
    edit_config(tmp_path / "gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000},
                remove=("rope_parameters", "tie_word_embeddings", "hidden_act",
                        "use_parallel_residual"))

    save_hf_model("llama llama3 rope", tmp_path / "llama")
    theta = MODELS["llama llama3 rope"]["rope_parameters"]["rope_theta"]
    edit_config(tmp_path / "llama", {"rope_theta": theta, "rope_scaling": LLAMA3},
                remove=("rope_parameters",))

    tokens = torch.arange(64)[None] * 7
    for name in ("gpt2", "gpt_neox", "llama"):
        _, model, _ = import_model(tmp_path / name, tmp_path / f"run-{name}")
        assert (model(tokens) - hf_logits(name, tokens)).abs().max() < 1e-4
    # A shorter context keeps the first 16 of the learned positions.
    _, model, _ = import_model(tmp_path / "gpt2", tmp_path / "short", ["model.n_ctx=16"])
    assert model.config.n_ctx == 16
    tokens = tokens[:, :16]
    assert (model(tokens) - hf_logits("gpt2", tokens)).abs().max() < 1e-4


# --- what is not supported --------------------------------------------------------------------

def check_refused(source: Path, target: Path, *words: str) -> None:
    """Importing raises a UserError of one or two lines with each of `words`, and writes nothing."""
    with pytest.raises(UserError) as caught:
        import_model(source, target)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message.splitlines()) <= 2
    assert not target.parent.exists()


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("llama", {"model_type": "mixtral"}, ["model_type='mixtral'", "gpt_neox"]),
    ("llama", {"model_type": None}, ["model_type=None"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
     ["'dynamic'", "'llama3', 'yarn'"]),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
    ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, ["mscale=0.7"]),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["each kind of layer"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "None"]),
    ("llama", {"hidden_size": MANY}, ["hidden_size=1099511627776", "640"]),
    ("llama", {"num_hidden_layers": MANY}, ["num_hidden_layers"]),
    ("llama", {"num_attention_heads": MANY}, ["num_attention_heads"]),
    ("llama", {"head_dim": MANY}, ["head_dim"]),
    ("llama", {"max_position_embeddings": MANY},
     ["model.n_ctx=1099511627776", "for example model.n_ctx=2048"]),
    ("llama", {"hidden_size": 64}, ["is (640, 48)", "(640, 64)"]),
    ("llama", {"num_hidden_layers": 2}, ["not those of its config"]),
    ("llama", {"num_hidden_layers": 4}, ["lack model.layers.3"]),
    ("llama", {"attention_bias": True}, ["lack model.layers.0.self_attn.q_proj.bias"]),
    ("llama", {"vocab_size": "many"}, ["vocab_size='many'"]),
    ("llama", {"rope_parameters": {"rope_theta": "x"}}, ["rope_theta='x'"]),
    ("llama", {"rms_norm_eps": None}, ["rms_norm_eps=None"]),
    ("llama", {"num_key_value_heads": 3}, ["must divide"]),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3, "use_sliding_window": True,
               "sliding_window": 7}, ["'chunked_attention'"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True},
     ["scale_attn_by_inverse_layer_idx=True", "False"]),
    ("gpt2", {"activation_function": "relu"}, ["activation_function='relu'", "'gelu_new'"]),
    ("gpt2", {"n_positions": 65}, ["transformer.wpe.weight is (64, 48)"]),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.2}}, ["rope_dims=3"]),
    ("gpt_neox", {"hidden_act": "gelu_fast"}, ["hidden_act='gelu_fast'"]),
])
def test_unsupported_settings_are_named(name, changes, words, hf_models, tmp_path):
    shutil.copytree(hf_models / name, tmp_path / "hf")
    edit_config(tmp_path / "hf", changes)
    check_refused(tmp_path / "hf", tmp_path / "runs/x", *words)


def test_nothing_is_unpickled_and_nothing_outside_is_read(hf_models, tmp_path):
    source, target = tmp_path / "hf", tmp_path / "runs/x"
    shutil.copytree(hf_models / "llama", source)
    index, weights = source / "model.safetensors.index.json", source / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    check_refused(source, target, "holds no model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    check_refused(source, target, "pytorch_model.bin is a pickle", "save_pretrained")
    outside = str(tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", outside, "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        check_refused(source, target, f"{name!r} is not the name of a safetensors file")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    check_refused(source, target, "model-1.safetensors: no such file")
    weights.write_bytes(b"garbage")
    check_refused(source, target, "not a safetensors file")
    (source / "config.json").write_text("[]")
    check_refused(source, target, "config.json")


# --- imported runs in our commands ------------------------------------------------------------

@pytest.mark.long
def test_imported_models_are_sampled_measured_and_judged(hf_models, tmp_path):
    names = ("gpt2", "llama", "qwen3", "mistral")
    for name in names:
        run = f"runs/{name}"
        imported = succeeds(command("-m training.import_model", hf_models / name, run,
                                    cwd=tmp_path))
        assert f"hf/{name}: {name}, " in imported.stdout
        sampled = succeeds(command("sample.py", run, "the quick", "--max-tokens", "8", "--json",
                                   cwd=tmp_path))
        assert '"prompt": "the quick", "text": "' in sampled.stdout
        measured = succeeds(command("heads.py", run, "--json", f"{name}.json", cwd=tmp_path))
        assert f"{run} at step 0, on random tokens" in measured.stdout
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["heads"]) == 12
    verdict = succeeds(command("heads.py", "verdict", *(f"runs/{name}" for name in names),
                               cwd=tmp_path))
    assert "Did induction heads form?" in verdict.stdout
    for name in names:
        assert f"## {name} (at step 0" in verdict.stdout


def test_an_imported_run_is_trained_like_any_other(hf_models, workplace):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run = Path("runs/imported")
    imported = succeeds(command("-m training.import_model", hf_models / "gpt_neox", run,
                                "eval.tokens=256", "heads.every=2", "train.batch_tokens=256"))
    for script in ("sample", "heads", "train"):
        assert f"python -m {script} runs/imported" in imported.stdout
    with pytest.raises(UserError, match="runs/imported is there already"):
        import_model(hf_models / "gpt_neox", run)

    succeeds(command("train.py", run, *NEW_DATA, "train.steps=2", "log.every=1"))
    before, _ = load_model(run / "checkpoints/000000")
    after, tokenizer = load_model(find_checkpoint(run))
    tokens = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_before, logits_after = before(tokens), after(tokens)
    # A tiny learning rate: training began at the imported weights and changed them.
    assert torch.allclose(logits_before, logits_after, atol=1e-3)
    assert not torch.equal(logits_before, logits_after)
    records = metrics(run)
    assert "heads/prefix_matching/L1H3" in records[2] and records[1]["train/loss"] > 3

    with pytest.raises(UserError, match="cannot be continued with another data"):
        job_of(str(run), ["data.files=[texts/b*.txt]", "train.steps=4"])
    succeeds(command("train.py", run, "train.steps=4"))
    assert max(metrics(run)) == 4

    checkpoint = find_checkpoint(run)
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.model_type == "gpt_neox"
    text = "the quick brown fox"
    ids = AutoTokenizer.from_pretrained(checkpoint).encode(text)
    assert ids == AutoTokenizer.from_pretrained(hf_models / "gpt_neox").encode(text)
    assert ids == tokenizer.encode_prompt(text)


def test_another_run_starts_from_an_imported_one(hf_models, workplace):
    import_model(hf_models / "gpt2", Path("runs/gpt2"))
    Path("next.yaml").write_text(Path("runs/gpt2/config.yaml").read_text())
    succeeds(command("train.py", "next.yaml", "init_from=runs/gpt2", "run=next", *NEW_DATA,
                     "train.steps=1", "eval.every=0", "heads.every=0"))
    source, _ = load_model(find_checkpoint("runs/gpt2"))
    tuned, _ = load_model(find_checkpoint("runs/next"))
    torch.testing.assert_close(tuned.state_dict(), source.state_dict(), rtol=1e-5, atol=1e-6)


def test_before_its_first_step_a_run_may_change_its_data_but_not_its_model(hf_models, workplace):
    import_model(hf_models / "gpt2", Path("runs/gpt2"))
    config, _, changed = job_of("runs/gpt2", ["data.corpus=repeats", "data.repeats.period=[4, 8]",
                                              "optimizer.kind=muon"])
    assert config.data.corpus == "repeats" and len(changed) == 3
    for key, value in (("data.tokenizer", "bytes"), ("model.n_layers", "2"), ("seed", "1")):
        with pytest.raises(UserError, match=f"cannot be continued with another {key}"):
            job_of("runs/gpt2", [f"{key}={value}"])
    for change, message in (("model.rope_base=5.0", "only model.n_ctx"),
                            ("model.n_ctx=65", "too long: at most 64"),
                            ("model=5", "keys are expected here")):
        with pytest.raises(UserError, match=message):
            import_model(hf_models / "gpt2", Path("runs/other"), [change])
    assert [path.name for path in Path("runs").iterdir()] == ["gpt2"]


def test_a_run_appears_complete_or_not_at_all(hf_models, workplace, monkeypatch):
    Path("runs").write_text("no folder")
    with pytest.raises(UserError, match=r"importing into runs/x: .*\n.*where you may write"):
        import_model(hf_models / "gpt2", Path("runs/x"))
    Path("runs").unlink()

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.save_checkpoint.os.fsync", full_disk)
    with pytest.raises(UserError, match=r"into runs/x: .*No space left.*\n.*import again"):
        import_model(hf_models / "gpt2", Path("runs/x"))
    assert not list(Path("runs").iterdir())


# --- what belongs to a model and not to us ----------------------------------------------------

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def edit_json(path: Path, changes: dict) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def check_companions(checkpoint: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "hi"
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|padding|>", "<|endoftext|>")
    generation = GenerationConfig.from_pretrained(checkpoint)
    assert (generation.temperature, generation.do_sample) == (0.25, False)
    assert (generation.pad_token_id, generation.eos_token_id) == (1, 0)


@pytest.mark.parametrize("in_files", [False, True], ids=["in tokenizer_config", "in files"])
def test_chat_template_roles_and_generation_config_are_in_every_checkpoint(
        in_files, hf_models, workplace):
    shutil.copytree(hf_models / "gpt_neox", "hf")
    roles = {"pad_token": "<|padding|>", "unk_token": "<|endoftext|>"}
    if in_files:
        edit_json(Path("hf/special_tokens_map.json"), roles)
        Path("hf/chat_template.jinja").write_text(CHAT)
    else:
        edit_json(Path("hf/tokenizer_config.json"), roles | {"chat_template": CHAT})
    edit_json(Path("hf/generation_config.json"),
              {"temperature": 0.25, "do_sample": False, "pad_token_id": 1, "eos_token_id": 0})
    run = Path("runs/m")
    import_model(hf_models / "gpt_neox", Path("runs/bare"))     # the same ids, the same shards
    arguments = (*NEW_DATA, "eval.every=0", "heads.every=0")
    succeeds(command("train.py", "runs/bare", *arguments, "train.steps=1"))
    import_model(Path("hf"), run)
    check_companions(run / "checkpoints/000000")
    succeeds(command("train.py", run, *arguments, "train.steps=1"))
    check_companions(run / "checkpoints/000001")
    succeeds(command("train.py", run, "train.steps=2"))
    check_companions(run / "checkpoints/000002")
    Path("next.yaml").write_text((run / "config.yaml").read_text())
    succeeds(command("train.py", "next.yaml", f"init_from={run}", "run=next", *arguments,
                     "train.steps=1"))
    check_companions(Path("runs/next/checkpoints/000001"))
    assert "chat_template" not in Path("runs/bare/checkpoints/000001/tokenizer_config.json"
                                       ).read_text()


def test_special_ids_past_the_embedding_are_no_text(hf_models, workplace):
    shutil.copytree(hf_models / "gpt2", "hf")
    path = Path("hf/tokenizer.json")
    bare = Tokenizer.from_file(str(path))
    edit_config(Path("hf"), {"vocab_size": bare.get_vocab_size()})      # as small as it can be
    state = load_file("hf/model.safetensors")
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:bare.get_vocab_size()]
    state.pop("lm_head.weight", None)
    save_file(state, "hf/model.safetensors", metadata={"format": "pt"})
    padded = Tokenizer.from_file(str(path))
    padded.add_special_tokens([AddedToken("<pad>", special=True)])
    padded.save(str(path))
    size = bare.get_vocab_size()
    _, _, tokenizer = import_model(Path("hf"), Path("runs/m"))
    loaded = load_model(find_checkpoint("runs/m"))[1]
    for ours in (tokenizer, loaded):
        assert (ours.n_vocab, ours.special["<pad>"]) == (size, size)
        assert max(ours.encode("a<pad>b the quick")) < size
        assert len(ours.byte_lengths) == size and ours.hash == tokenizer.hash
    succeeds(command("train.py", "runs/m", *NEW_DATA, "train.steps=1", "eval.every=0",
                     "heads.every=0"))
    succeeds(command("sample.py", "runs/m", "a<pad>b", "--max-tokens", "3"))

    padded.add_tokens([AddedToken("quick")])                    # which a text can become
    padded.save(str(path))
    with pytest.raises(UserError, match=r"'quick', which has no embedding\n.*resize_token_emb"):
        import_model(Path("hf"), Path("runs/other"))
    Tokenizer.from_str(bare.to_str()).save(str(path))
    edit_json(Path("hf/tokenizer.json"), {"added_tokens": json.loads(padded.to_str())[
        "added_tokens"][:2]})
    edit_json(Path("hf/tokenizer_config.json"), {"eos_token": "<pad>"})     # must be generated
    with pytest.raises(UserError, match="'<pad>', which has no embedding"):
        import_model(Path("hf"), Path("runs/other"))


def test_saved_padding_and_truncation_change_no_prompt(hf_models, tmp_path):
    shutil.copytree(hf_models / "llama", tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    expected = tokenizer.encode("the quick brown fox").ids
    tokenizer.enable_padding(length=48)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    import_model(tmp_path / "hf", tmp_path / "run")
    _, loaded = load_model(find_checkpoint(tmp_path / "run"))
    assert loaded.encode_prompt("the quick brown fox") == expected


def test_an_imported_run_may_be_renamed_and_moved(hf_models, workplace):
    import_model(hf_models / "gpt2", Path("runs/m"))
    Path("elsewhere").mkdir()
    run = Path("runs/m").rename("elsewhere/renamed")
    config = load_config(run / "config.yaml")
    assert not Path(config.data.tokenizer.kind).exists()
    arguments = ("eval.every=0", "heads.every=0", "checkpoint.keep=1")
    succeeds(command("train.py", run, *NEW_DATA, *arguments, "train.steps=1"))
    run = run.rename("elsewhere/again")
    shutil.rmtree("prepared")                                   # so the text is encoded again
    succeeds(command("train.py", run, "train.steps=2"))
    assert (run / "checkpoints/000002").exists()
    succeeds(command("heads.py", run, "--json", "scores.json"))
    # A run of synthetic rows has no shards that hold the tokenizer.
    import_model(hf_models / "gpt2", Path("runs/m"))
    run = Path("runs/m").rename("elsewhere/rows")
    succeeds(command("train.py", run, "data.corpus=repeats", "data.repeats.period=[4, 8]",
                     *arguments, "log.wandb=disabled", "train.steps=1"))
    # Its config, copied, starts another run from its weights.
    Path("next.yaml").write_text((run / "config.yaml").read_text())
    succeeds(command("train.py", "next.yaml", f"init_from={run}", "run=next", "train.steps=1"))
    # Another model took its first name: the answer says what to do.
    import_model(hf_models / "gpt2", Path("runs/m"))
    run = Path("runs/m").rename("elsewhere/first")
    import_model(hf_models / "llama", Path("runs/m"))
    fails(command("train.py", run, *NEW_DATA, "train.steps=1"), "imported with another tokenizer",
          f"set data.tokenizer in {run}/config.yaml to {run}/checkpoints/000000")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("runs/m/checkpoints/latest",
                                                  f"{run}/checkpoints/000000"))
    succeeds(command("train.py", run, *NEW_DATA, *arguments, "train.steps=1"))


def test_help_and_usage_errors(tmp_path):
    usage = succeeds(command("-m training.import_model", "--help")).stdout
    assert "runs/NAME" in usage and "gpt_neox" in usage
    fails(command("-m training.import_model", tmp_path, "runs/x"),
          f"{tmp_path}/config.json: no such file")

"""python -m training.gguf with a stand-in for llama.cpp's sources, which has the functions that
training/gguf_converter.py replaces. make test-clients runs the real ones."""

import json
from pathlib import Path

import pytest
from commands import command, fails, succeeds
from small_models import checkpoint_of, perturbed_model
from theirs import save_hf_model

from data.byte_bpe import ByteBPE, train_bpe
from model.gpt import GPT
from training.checkpoint import load_model
from training.gguf import model_misfits, tokenizer_misfits
from training.import_model import import_model
from training.save_checkpoint import checkpoint_contents, save_checkpoint

GPT2 = {"n_kv_heads": None, "position": "learned", "norm": "layernorm", "bias": "all",
        "mlp": "gelu_tanh", "d_mlp": 40, "tied_embeddings": True}
NEOX = {"n_kv_heads": None, "norm": "layernorm", "bias": "all", "mlp": "gelu"}
SOURCES = {
    "conversion/__init__.py": "",
    "conversion/base.py": """
class ModelBase:
    @staticmethod
    def load_hparams(dir_model, is_mistral_format):
        raise KeyError("transformers 5 has renamed it")

class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

    def _set_vocab_gpt2(self):
        return self.get_vocab_base_pre(None)

    def _set_vocab_sentencepiece(self):
        import sentencepiece_that_is_not_installed
""",
    "gguf-py/gguf/__init__.py": """
class GGUFWriter:
    def add_feed_forward_length(self, length):
        self.d_mlp = length
""",
    "convert_hf_to_gguf.py": """
import json, sys
from pathlib import Path
import gguf
from conversion.base import TextModel

def main():
    checkpoint, target = Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
    with open(target, "w") as file:
        file.write("half")
        model, writer = TextModel(), gguf.GGUFWriter()
        config = model.load_hparams(checkpoint, False)
        if config["vocab_size"] == 301:
            raise ValueError("an error of the converter")
        writer.add_feed_forward_length(4 * config["n_embd"])
    with open(target, "w") as file:
        json.dump([model._set_vocab_sentencepiece(), writer.d_mlp, config["n_ctx"],
                   sys.argv[-1]], file)
""",
}


@pytest.fixture
def llama_cpp(tmp_path) -> Path:
    folder = tmp_path / "llama.cpp"
    for name, source in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder


def saved(model: GPT, folder: Path) -> Path:
    """A checkpoint with a BPE."""
    folder.mkdir()
    contents = checkpoint_contents(model, {}, {"step": 3}, "", bpe(), copy=False)
    return save_checkpoint(folder, contents)


def bpe() -> ByteBPE:
    return train_bpe(iter(["the cat that sat there"] * 9), 262)


def test_the_converter_is_told_what_it_cannot_know(tmp_path, llama_cpp):
    checkpoint = saved(perturbed_model(**GPT2, vocab_size=300), tmp_path / "run")
    done = succeeds(command("-m training.gguf", str(checkpoint), "model.gguf",
                            "--llama-cpp", str(llama_cpp), cwd=tmp_path))
    assert done.stdout.startswith("saved      model.gguf")
    assert json.loads((tmp_path / "model.gguf").read_text()) == ["gpt-2", 40, 32, "f32"]
    assert not list(tmp_path.glob(".*partial"))


def test_a_failing_converter_leaves_the_older_file(tmp_path, llama_cpp):
    checkpoint = saved(perturbed_model(**GPT2, vocab_size=301), tmp_path / "run")
    (tmp_path / "model.gguf").write_text("older")
    fails(command("-m training.gguf", str(checkpoint), "model.gguf", "--llama-cpp", str(llama_cpp),
                  cwd=tmp_path),
          "converter failed: ValueError: an error of the converter")
    assert (tmp_path / "model.gguf").read_text() == "older"
    assert not list(tmp_path.glob(".*partial"))


def test_what_does_not_fit_is_refused_before_the_work(tmp_path, llama_cpp):
    (tmp_path / "run").mkdir()
    checkpoint = checkpoint_of(perturbed_model(window=8, vocab_size=257), tmp_path / "run")
    save_hf_model("gpt2", tmp_path / "gpt2")
    import_model(tmp_path / "gpt2", tmp_path / "fits", [])
    # Nobody has to fetch llama.cpp to learn that it cannot help.
    for run, where, named in (
            (checkpoint, llama_cpp, ("model.window", "byte tokenizers")),
            (checkpoint, tmp_path, ("model.window", "byte tokenizers")),
            (tmp_path / "fits", tmp_path, ("no checkout of llama.cpp", "git clone"))):
        fails(command("-m training.gguf", str(run), "model.gguf",
                      "--llama-cpp", str(where), cwd=tmp_path), *named)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("changes", "named"), [
    ({"mlp": "gelu", "norm": "rmsnorm"}, "model.mlp="),
    ({"window": [8, None]}, "model.window"),
    ({"qk_norm": True, "bias": "attention"}, "biases in qwen3"),
    (NEOX | {"rope_base": 500000.0}, "model.rope_base"),
    (NEOX | {"tied_embeddings": True}, "tied embeddings"),
    (NEOX | {"bias": "mlp"}, "without attention biases"),
])
def test_models_that_llama_cpp_computes_otherwise(changes, named):
    reasons = model_misfits(perturbed_model(**changes).config)
    assert len(reasons) == 1 and named in reasons[0]


@pytest.mark.parametrize("changes", [
    {}, {"bias": "qkv"}, {"mlp": "none"}, {"tied_embeddings": True}, {"qk_norm": True}, GPT2, NEOX,
    {"rope_base": 500000.0}, {"d_head": 16},
])
def test_models_that_llama_cpp_has(changes):
    assert model_misfits(perturbed_model(**changes).config) == []


def test_tokenizers_that_cut_words_as_gpt2_does(tmp_path):
    assert tokenizer_misfits(bpe()) == []
    assert "byte" in tokenizer_misfits(ByteBPE(
        {bytes([n]): n for n in range(256)}, bpe().pattern, {"<|endoftext|>": 256}))[0]
    other = ByteBPE(bpe().ranks, r"\p{N}| ?\p{L}+|\s+", bpe().special)
    assert "cuts words otherwise" in tokenizer_misfits(other)[0]
    for family, fits in (("gpt2", True), ("llama", False), ("qwen2", False)):
        save_hf_model(family, tmp_path / family)
        import_model(tmp_path / family, tmp_path / f"run-{family}", [])
        _, tokenizer = load_model(tmp_path / f"run-{family}" / "checkpoints" / "000000")
        assert (tokenizer_misfits(tokenizer) == []) == fits


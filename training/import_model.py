"""Other people's models as runs of ours: `python -m training.import_model DIR runs/NAME
[key.path=value …]`."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from errors import ArgumentParser, UserError, command, first_line, run_command

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.companions import GENERATION, read_dict
from data.hf_tokenizer import read_hf_tokenizer
from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
from files import explain_disk_errors
from model.config import ModelConfig
from model.families import FAMILIES, OWN_TYPE, architecture_of, family
from model.gpt import GPT
from model.hf_config import read_description
from model.huggingface import (
    by_their_name,
    load_hf_state,
    to_theirs,
    without_first_word,
    zeros_for,
)
from settings.validate import validate
from settings.yaml12 import override
from training.checkpoint import is_published, verify
from training.config import Config, TrainConfig, dump_config
from training.save_checkpoint import checkpoint_contents, save_checkpoint

LONGEST = 2 ** 22           # positions: more would make position tables of gigabytes
# Tensors in older files that are no parameters: causal masks and RoPE's frequencies.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
             ".rotary_emb.inv_freq")


class ImportedModel(NamedTuple):
    """What an import has made a run of."""

    config: Config
    model: GPT
    tokenizer: Tokenizer


class Weights(Mapping[str, Tensor]):
    """The tensors of a model directory's safetensors files, by name. Each is read when it is asked
    for, as float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Any] = {}                     # by tensor
        for path in _weight_files(folder):
            try:
                file = safe_open(path, "pt")
                self.files |= dict.fromkeys(file.keys(), file)
            except FileNotFoundError:
                raise UserError(f"{path}: no such file (model.safetensors.index.json names it)"
                                ) from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a safetensors file ({first_line(error)})") from None
        self.shapes = {name: tuple(file.get_slice(name).get_shape())
                       for name, file in self.files.items()}
        self.rows: dict[str, int] = {}          # tensors of which only the first rows are wanted
        # A tensor's name in the family → its name in the file.
        self.names = {name: name for name in self.files if not name.endswith(CONSTANTS)}

    def match_names(self, expected: Sequence[str], tied: bool) -> None:
        """Find the name of each `expected` tensor in the files: some leave out the first word, and
        two names of the head are in use."""
        heads = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
        remaining = set(self.names)
        if tied:                                # a tied head may be stored a second time
            remaining -= set(heads)
        matches: dict[str, str] = {}
        for name in expected:
            for candidate in (name, without_first_word(name), heads.get(name)):
                if candidate in remaining:
                    matches[name] = candidate
                    break
        unmatched = remaining - set(matches.values())
        self.names = matches | {name: name for name in unmatched}

    def __getitem__(self, name: str) -> Tensor:
        name_in_file = self.names[name]
        value = self.files[name_in_file].get_tensor(name_in_file)
        if not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{self.folder}: {name} holds {dtype}, not floating-point numbers\n"
                            "  quantised models are not supported; save it as float32, float16 or "
                            "bfloat16")
        return value[:self.rows.get(name)].float()

    def __contains__(self, name: object) -> bool:
        return name in self.names               # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth")
                         for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder}: holds no model.safetensors, and {pickles[0]} is a pickle, which could "
                "run code and is never read\n  save it as safetensors: AutoModelForCausalLM"
                ".from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)")
        raise UserError(f"{folder}: holds no model.safetensors")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    for name in weight_map.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file in {folder}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (a Hugging Face model directory is expected)"
                        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values")
    return content


def read_model(folder: Path, config: ModelConfig, model_type: str, weights: Weights) -> GPT:
    """The model of that config and family, on the CPU.

    Its shapes are compared with those in the files before any memory is allocated.
    """
    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"{folder}/config.json: a model of that size cannot be made "
                        f"({first_line(error)})") from None
    architecture, parameters = architecture_of(model_type), dict(model.named_parameters())
    tensors = by_their_name(parameters, architecture)
    weights.match_names(list(tensors), config.tied_embeddings)
    for name, ours in tensors.items():
        parts = [parameters[p] for p in ours]
        expected = tuple(to_theirs(parts, ours[0], architecture, config.n_heads).shape)
        shape = weights.shapes.get(weights.names.get(name, ""))
        if shape is None:
            raise UserError(f"{folder}: its safetensors files lack {name}, which its config.json "
                            "asks for")
        if ours == ["embed_position.weight"] and shape[0] > config.n_ctx:
            weights.rows[name] = config.n_ctx           # model.n_ctx asks for a shorter context
        elif shape != expected:
            raise UserError(f"{folder}: {name} is {shape}, its config.json says {expected}")
    load_hf_state(model.allocate("cpu"), weights, str(folder), model_type)
    return model.eval()


def import_model(source: Path, target: Path, overrides: Sequence[str] = ()) -> ImportedModel:
    """Make the Hugging Face model directory `source` a run: `target`/config.yaml and
    `target`/checkpoints/000000, complete or not at all. A UserError says what is not supported."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} is there already (import under another name, or delete it)")
    if (source / "manifest.json").exists() and not is_published(source):
        raise UserError(f"{source} is a checkpoint of this project already\n"
                        f"  use it as it is: {command('sample.py')} {source}   "
                        f"or: init_from={source}")
    described, weights = _read_json(source / "config.json"), Weights(source)
    config = _config_of(source, described, weights, target, overrides)
    if (source / "manifest.json").exists():
        verify(source)
        tokenizer = load_tokenizer(source / "tokenizer.json")
    else:
        tokenizer = read_hf_tokenizer(source, described)
    assert config.model.vocab_size is not None          # every config.json has one
    if tokenizer.n_vocab > config.model.vocab_size:
        last = tokenizer.token_text(tokenizer.n_vocab - 1)
        raise UserError(f"{source}: its tokenizer has {tokenizer.n_vocab} tokens, its model "
                        f"{config.model.vocab_size}: a text can become {last!r}, which has no "
                        "embedding\n  they do not belong together, or the model needs "
                        f"resize_token_embeddings({tokenizer.n_vocab}) in transformers")
    if generation := _generation(source, described):
        tokenizer.kept |= {GENERATION: generation}
    model = read_model(source, config.model, described["model_type"], weights)
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "data": {"hash": tokenizer.hash},
             "val_loss": None, "history": [{"imported": str(source)}]}
    contents = checkpoint_contents(model, {}, state, dump_config(config), tokenizer, copy=False)
    unfinished = target.with_name(f".partial-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with explain_disk_errors(f"importing into {target}",
                                 "make room, or name a run where you may write"):
            (unfinished / "checkpoints").mkdir(parents=True)
            try:
                save_checkpoint(unfinished / "checkpoints", contents)
            except UserError as error:
                # It names the unfinished folder, and how a training would go on.
                raise UserError(f"importing into {target}: {str(error).splitlines()[0]}\n"
                                "  make room, then import again") from None
            config_yaml = f"# imported from {source}\n{dump_config(config)}"
            (unfinished / "config.yaml").write_text(config_yaml, "utf-8")
            os.rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return ImportedModel(config, model, tokenizer)


def _generation(source: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The generation_config.json of a model directory, but for what every checkpoint says itself:
    the tokens that begin and end a text."""
    settings = {"pad_token_id": described.get("pad_token_id")}
    settings |= read_dict(source / "generation_config.json")
    return {key: value for key, value in settings.items()
            if value is not None and not key.startswith("_")
            and key not in ("bos_token_id", "eos_token_id", "transformers_version")}


def _model_of(described: dict[str, Any], weights: Weights, path: str) -> dict[str, Any]:
    """ModelConfig's keys for the model that the config.json at `path` describes."""
    if described.get("model_type") == OWN_TYPE:         # published without training_state/
        return validate(ModelConfig, described.get("gpt", {}), path).model_dump()
    largest = max((size for shape in weights.shapes.values() for size in shape), default=0)
    try:
        model = read_description(described, path, len(weights), largest)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: cannot be understood ({first_line(error)})") from None
    # An attention-only model was saved with MLPs of zeros, which never learn: left out again.
    if model["d_mlp"] == 1:
        without = validate(ModelConfig, model | {"mlp": "none", "d_mlp": None}, path)
        zeros = zeros_for(without, FAMILIES[described["model_type"]])
        if all(name in weights and not weights[name].any() for name in zeros):
            return without.model_dump()
    return model


def _config_of(source: Path, described: dict[str, Any], weights: Weights, target: Path,
               overrides: Sequence[str]) -> Config:
    """The run's config: the model that config.json describes, and settings for fine-tuning it."""
    path = str(source / "config.json")
    model = _model_of(described, weights, path)
    tree: dict[str, Any] = {
        "run": target.name, "model": dict(model),
        "data": {"tokenizer": f"{target}/checkpoints/latest"},
        "train": {"steps": 200}, "optimizer": {"kind": "adamw", "lr": 2e-5, "warmup_steps": 20}}
    overridden = override(tree, overrides)
    shape = tree["model"] if isinstance(tree["model"], dict) else {}        # validate() says so
    changed = {key for key in shape if shape[key] != model.get(key)}
    if changed - {"n_ctx"}:
        keys = ", ".join(path for path in overridden if path.startswith("model."))
        raise UserError("an imported model stays as it is: of model.* only model.n_ctx can change\n"
                        f"  {keys}: leave out all but n_ctx")
    n_ctx = shape.get("n_ctx")
    if isinstance(n_ctx, int) and n_ctx > 0:
        longest = LONGEST
        if model["position"] == "learned":
            longest = min(LONGEST, model["n_ctx"])
        if n_ctx > longest:
            raise UserError(f"model.n_ctx={n_ctx} is too long: at most {longest} here "
                            f"(for example model.n_ctx={min(longest, 2048)})")
        if isinstance(tree["train"], dict):
            windows = max(1, TrainConfig().batch_tokens // n_ctx)
            tree["train"].setdefault("batch_tokens", windows * n_ctx)
    return validate(Config, tree, path, overridden)


def main() -> None:
    parser = ArgumentParser(
        "python -m training.import_model",
        description="Make somebody else's model a run, for sample.py and heads.py to open and for "
                    f"train.py to train further. Families: {', '.join(FAMILIES)}. The weights are "
                    "in safetensors files, with tokenizer.json beside them.",
        epilog="docs/import.md says what is supported.")
    parser.add_argument("source", metavar="DIR", help="a Hugging Face model directory")
    parser.add_argument("target", metavar="runs/NAME", help="the run to make; it must not exist")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change values of the run's config, for example model.n_ctx=2048 for "
                             "a shorter context")
    args = parser.parse_args()
    target = Path(args.target)
    config, model, tokenizer = import_model(Path(args.source), target, args.overrides)
    shape = config.model
    ends = " or ".join(map(tokenizer.token_text, tokenizer.ends))
    print(f"imported   {args.source}: {family(shape)}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {shape.n_layers} layers × "
          f"{shape.n_heads} heads, context {shape.n_ctx}\n"
          f"tokens     {tokenizer.n_vocab:,}; a text begins with "
          f"{tokenizer.token_text(tokenizer.begin)}, ends with {ends}\n"
          f"saved      {target}\n"
          f"sample     {command('sample.py')} {target} \"Once upon a time\"\n"
          f"look       {command('heads.py')} {target}\n"
          f"train      {command('train.py')} {target} data.corpus=files data.files='[my.txt]' "
          "train.steps=200")
    if shape.n_ctx > 4096:
        print("note       heads.py and train.py process whole contexts; if "
              f"{shape.n_ctx} tokens are too many, import with for example model.n_ctx=1024")


if __name__ == "__main__":
    run_command(main)

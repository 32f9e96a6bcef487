"""Other people's models as runs of ours: `python -m training.import_model DIR runs/NAME [key.path=value …]`."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.hf_tokenizer import read_hf_tokenizer
from errors import ArgumentParser, UserError, first_line, run_command
from files import explain_disk_errors
from model.config import ModelConfig
from model.families import FAMILIES, by_their_name, family, read_description, to_theirs
from model.gpt import GPT
from model.huggingface import load_hf_state
from settings.validate import validate
from settings.yaml12 import override
from training.checkpoint import save_checkpoint, snapshot
from training.config import Config, dump_config

LONGEST = 2 ** 22                   # positions: more would make position tables of gigabytes
# Tensors in older files that hold no parameter: causal masks and rope's frequencies.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


class Weights(Mapping[str, "Tensor"]):
    """The tensors of a model directory's safetensors files by name, each read when it is asked for, as float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Any] = {}                     # by tensor
        for path in _weight_files(folder):
            try:
                file = safe_open(path, "pt")
                self.files |= dict.fromkeys(file.keys(), file)
            except FileNotFoundError:
                raise UserError(f"{path}: no such file (model.safetensors.index.json names it)") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a safetensors file ({first_line(error)})") from None
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}
        self.rows: dict[str, int] = {}                          # of which only the first are wanted
        self.names = {name: name for name in self.files if not name.endswith(CONSTANTS)}       # as a family calls it → as the file does

    def call(self, expected: Sequence[str], tied: bool) -> None:
        """Settle what each `expected` tensor is called here: some files leave the first word out, and two head names are in use."""
        heads = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
        left = set(self.names)
        if tied:                                                # a head that is the embedding need not be told twice
            left -= {*heads}
        found = {}
        for name in expected:
            if here := next((n for n in (name, name.partition(".")[2], heads.get(name)) if n in left), None):
                found[name] = here
        self.names = found | {name: name for name in left - set(found.values())}

    def __getitem__(self, name: str) -> Tensor:
        value = self.files[self.names[name]].get_tensor(self.names[name])
        if not value.is_floating_point():
            raise UserError(f"{self.folder}: {name} holds {str(value.dtype).removeprefix('torch.')}, no floating-point numbers\n"
                            "  quantised models are not supported; save it as float32, float16 or bfloat16")
        return value[:self.rows.get(name)].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise UserError(f"{folder}: holds no model.safetensors" + (
            f", and {pickled[0]} is a pickle, which could run code and is never read\n  save it as safetensors: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)" if pickled else ""))
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    for name in files.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file in {folder}")
    return [folder / name for name in sorted(set(files.values()))]


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (a Hugging Face model directory is expected)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold keys and values")
    return found


def read_model(folder: Path, config: ModelConfig, model_type: str, weights: Weights) -> GPT:
    """The model of that config and family, on the CPU; its shapes are compared with the files' before memory is asked for."""

    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"{folder}/config.json: a model of that size cannot be made ({first_line(error)})") from None
    of, parameters = FAMILIES[model_type], dict(model.named_parameters())
    theirs = by_their_name(parameters, of)
    weights.call(list(theirs), config.tied_embeddings)
    for name, ours in theirs.items():
        expected = tuple(to_theirs([parameters[p] for p in ours], ours[0], of, config.n_heads).shape)
        here = weights.shapes.get(weights.names.get(name, ""))
        if here is None:
            raise UserError(f"{folder}: its safetensors files lack {name}, which its config.json asks for")
        if ours == ["embed_position.weight"] and here[0] > config.n_ctx:        # model.n_ctx asks for a shorter context
            weights.rows[name] = config.n_ctx
        elif here != expected:
            raise UserError(f"{folder}: {name} is {here}, its config.json says {expected}")
    load_hf_state(model.allocate("cpu"), weights, str(folder), model_type)
    return model.eval()


def import_model(source: Path, target: Path, overrides: Sequence[str] = ()):
    """Make the Hugging Face model directory `source` a run: `target`/config.yaml and `target`/checkpoints/000000, whole or not at all.
    Returns its Config, model and tokenizer; a UserError says what is not supported, and with what."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} is there already (import under another name, or delete it)")
    if (source / "manifest.json").exists():
        raise UserError(f"{source} is a checkpoint of this project already\n"
                        f"  use it as it is: python sample.py {source}   or: init_from={source}")
    given, weights = _read_json(source / "config.json"), Weights(source)
    config = _config_of(source, given, weights, target, overrides)
    tokenizer = read_hf_tokenizer(source, given)
    if tokenizer.n_vocab > config.model.vocab_size:
        raise UserError(f"{source}: its tokenizer has {tokenizer.n_vocab} tokens, its model {config.model.vocab_size}: "
                        "they do not belong together")
    model = read_model(source, config.model, given["model_type"], weights)
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "data": {"hash": tokenizer.hash}, "val_loss": None, "imported": str(source)}
    unfinished = target.with_name(f".partial-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with explain_disk_errors(f"importing into {target}", "make room, or name a run where you may write"):
            (unfinished / "checkpoints").mkdir(parents=True)
            try:
                save_checkpoint(unfinished / "checkpoints", snapshot(model, {}, state, dump_config(config), tokenizer, copy=False))
            except UserError as error:                          # it names the unfinished folder, and how a training goes on
                raise UserError(f"importing into {target}: {str(error).splitlines()[0]}\n  make room, then import again") from None
            (unfinished / "config.yaml").write_text(f"# imported from {source}\n{dump_config(config)}", "utf-8")
            os.rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return config, model, tokenizer


def _config_of(source: Path, given: dict, weights: Weights, target: Path, overrides: Sequence[str]):
    """The run's Config: the model that `given` (config.json) describes, and what suits its fine-tuning."""
    name, largest = str(source / "config.json"), max((size for shape in weights.shapes.values() for size in shape), default=0)
    try:
        model = read_description(given, name, len(weights), largest)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{name}: cannot be understood ({first_line(error)})") from None
    tree: dict[str, Any] = {"run": target.name, "model": dict(model), "data": {"tokenizer": f"{target}/checkpoints/latest"},
            "train": {"steps": 200}, "optimizer": {"kind": "adamw", "lr": 2e-5, "warmup_steps": 20}}
    overridden = override(tree, overrides)
    n_ctx = tree["model"].get("n_ctx") if isinstance(tree["model"], dict) else None
    if {key for key in tree["model"] if tree["model"][key] != model.get(key)} - {"n_ctx"}:
        raise UserError("an imported model stays as it is: of model.* only model.n_ctx can be another\n  "
                        f"{', '.join(path for path in overridden if path.startswith('model.'))}: leave out what is not n_ctx")
    if type(n_ctx) is int and n_ctx > 0:
        if n_ctx > LONGEST or (model["position"] == "learned" and n_ctx > model["n_ctx"]):
            most = model["n_ctx"] if model["position"] == "learned" else LONGEST
            raise UserError(f"model.n_ctx={n_ctx} is too long: at most {most} here (for example model.n_ctx={min(most, 2048)})")
        if isinstance(tree["train"], dict):
            tree["train"].setdefault("batch_tokens", n_ctx * max(1, 4096 // n_ctx))
    return validate(Config, tree, name, overridden)


def main() -> None:
    parser = ArgumentParser(
        "python -m training.import_model", description="Make somebody else's model a run that sample.py and heads.py look at and train.py "
        f"trains further. Families: {', '.join(FAMILIES)}; weights in safetensors files, tokenizer.json beside them.",
        epilog="docs/import.md says what is supported.")
    parser.add_argument("source", metavar="DIR", help="a Hugging Face model directory")
    parser.add_argument("target", metavar="runs/NAME", help="the run to make; it must not be there yet")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change values of the run's config, for example model.n_ctx=2048 for a shorter context")
    args = parser.parse_args()
    target = Path(args.target)
    config, model, tokenizer = import_model(Path(args.source), target, args.overrides)
    shape, kind = config.model, family(config.model)
    print(f"imported   {args.source}: {kind}, {sum(p.numel() for p in model.parameters()):,} parameters, {shape.n_layers} layers × "
          f"{shape.n_heads} heads, context {shape.n_ctx}\n"
          f"tokens     {tokenizer.n_vocab:,}; a text begins with {tokenizer.token_text(tokenizer.begin)}, ends with "
          f"{' or '.join(map(tokenizer.token_text, tokenizer.ends))}\n"
          f"saved      {target}\n"
          f"sample     python sample.py {target} \"Once upon a time\"\n"
          f"look       python heads.py {target}\n"
          f"train      python train.py {target} data.corpus=files data.files='[my.txt]' train.steps=200")
    if shape.n_ctx > 4096:
        print(f"note       heads.py and train.py work on whole contexts: import with model.n_ctx=1024, say, "
              f"where {shape.n_ctx} cost too much")


if __name__ == "__main__":
    run_command(main)

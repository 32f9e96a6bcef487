"""A checkpoint as a GGUF file, for llama.cpp and the programs that are built on it:

    python -m training.gguf runs/NAME NAME.gguf --llama-cpp path/to/llama.cpp

llama.cpp's own converter does the work. It is told the name of our pre-tokenizer, which it cannot
recognise (training/gguf_converter.py). Models that llama.cpp would refuse to load, or compute
wrongly without a warning, are refused here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from errors import ArgumentParser, UserError, run_command

from data.byte_bpe import WORDS, ByteBPE
from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
from files import atomic_write, explain_disk_errors, must_be_writable
from model.config import ModelConfig
from model.families import family, nearest_family
from training.checkpoint import find_checkpoint, read_model_config, verify

CONVERTER = Path(__file__).with_name("gguf_converter.py")


def write_gguf(checkpoint: Path, target: Path, llama_cpp: Path) -> None:
    """Write a checkpoint as a GGUF file in float32, complete or not at all.

    `llama_cpp` is a source checkout of llama.cpp. Raises UserError if it is not, if the model or
    its tokenizer does not fit llama.cpp, and if the converter fails.
    """
    verify(checkpoint)
    config = read_model_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    if reasons := model_misfits(config) + tokenizer_misfits(tokenizer):
        raise UserError(f"{checkpoint}: llama.cpp does not have {'; '.join(reasons)}\n"
                        "  docs/import.md, section Exporting, lists what it has")
    if not (llama_cpp / "conversion" / "base.py").exists():
        raise UserError(f"--llama-cpp {llama_cpp}: no checkout of llama.cpp, or an old one (it has "
                        "no conversion/base.py)\n"
                        "  git clone --depth 1 https://github.com/ggml-org/llama.cpp")
    paths = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with (explain_disk_errors(f"writing {target}", "make room, or write to another folder"),
          atomic_write(target) as file):
        # -P: otherwise the modules beside the script would hide others of the same name.
        done = subprocess.run(
            [sys.executable, "-P", CONVERTER, str(config.mlp_size or 1), checkpoint,
             "--outfile", file.name, "--outtype", "f32"],
            env=environment, capture_output=True, text=True)
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"llama.cpp's converter failed: {message[:150]}\n"
                            "  it needs the package transformers and the whole checkout; if both "
                            "are there, try a newer or older llama.cpp")


def model_misfits(config: ModelConfig) -> list[str]:
    """What of a model llama.cpp does not have, or drops without a warning. Empty if it fits."""
    nearest, changes = nearest_family(config)
    if changes:
        return [f"this shape (the nearest is {nearest}: {' '.join(changes)})"]
    reasons, model_type = [], family(config)
    if any(config.windows):
        reasons.append(f"model.window (it reads all keys in {model_type})")
    if model_type == "qwen3" and config.bias != "none":
        reasons.append("biases in qwen3")
    if model_type == "gpt_neox":
        if config.rope_base != 10000 or config.rope_scaling:
            reasons.append("model.rope_base and model.rope_scaling in gpt_neox")
        if config.tied_embeddings:
            reasons.append("tied embeddings in gpt_neox")
        if config.bias != "all":
            reasons.append("gpt_neox without attention biases")
    return reasons


def tokenizer_misfits(tokenizer: Tokenizer) -> list[str]:
    """Why llama.cpp's pre-tokenizer "gpt-2" would cut text otherwise. Empty if it fits."""
    if isinstance(tokenizer, ByteBPE):
        if not tokenizer.merges:
            return ["byte tokenizers (it needs merges: data.tokenizer={kind: bpe, …})"]
        cuts_like_gpt2 = tokenizer.pattern == WORDS
    else:
        contents = json.loads(tokenizer.json)
        pre_tokenizer = contents.get("pre_tokenizer") or {}
        cuts_like_gpt2 = (pre_tokenizer.get("type") == "ByteLevel"
                          and pre_tokenizer.get("use_regex", True)
                          and not pre_tokenizer.get("add_prefix_space")
                          and contents.get("normalizer") is None and not tokenizer.prefixed)
    return [] if cuts_like_gpt2 else ["this tokenizer under the name gpt-2 (it cuts words "
                                      "otherwise)"]


def main() -> None:
    parser = ArgumentParser(
        "python -m training.gguf",
        description="Write a checkpoint as a GGUF file, for llama.cpp.",
        epilog="docs/import.md, section Exporting, says which models llama.cpp has.")
    parser.add_argument("run", help="runs/NAME, or one of its checkpoints")
    parser.add_argument("target", metavar="FILE.gguf", help="the file to write, in float32")
    parser.add_argument("--llama-cpp", metavar="DIR", required=True,
                        help="a source checkout of llama.cpp, whose converter does the work")
    args = parser.parse_args()
    must_be_writable(args.target, "FILE.gguf:")
    checkpoint = find_checkpoint(args.run)
    write_gguf(checkpoint, Path(args.target), Path(args.llama_cpp).resolve())
    print(f"saved      {args.target}: {checkpoint} in float32\n"
          f"run        llama-completion -m {args.target} -no-cnv -p \"Once upon a time\"\n"
          f"smaller    llama-quantize {args.target} smaller.gguf q8_0")


if __name__ == "__main__":
    run_command(main)

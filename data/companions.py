"""What a tokenizer's folder holds for other programs: chat templates, and which tokens pad a batch,
stand for the unknown or separate parts of a dialogue.

We use none of it. It is kept with the tokenizer, in its tokenizer_config.json, so that every
checkpoint of an imported model has it. This older place for it is read by all versions of
transformers.
"""

import json
from pathlib import Path
from typing import Any

from errors import UserError, first_line

GENERATION = "generation_config"        # the model's generation_config.json, kept by an import
KEPT = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token",
        "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
        "chat_template", "padding_side", "truncation_side", "model_input_names", GENERATION)
DEFAULT = "default"                     # the name of the template that is used unless one is named


def read_dict(path: Path) -> dict[str, Any]:
    """The dict in a JSON file; empty if there is no file, or something else in it."""
    try:
        contents = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    return contents if isinstance(contents, dict) else {}


def read_companions(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What to keep of a folder with the tokenizer_config.json `config`."""
    older = read_dict(folder / "special_tokens_map.json")       # transformers 4 wrote it as well
    named = {key: config.get(key, older.get(key)) for key in KEPT}
    kept = {key: value for key, value in named.items() if value is not None}
    templates = _templates(folder)
    if list(templates) == [DEFAULT]:
        kept["chat_template"] = templates[DEFAULT]
    elif templates:
        kept["chat_template"] = [{"name": name, "template": text}
                                 for name, text in templates.items()]
    return kept


def _templates(folder: Path) -> dict[str, str]:
    """The chat templates in files of their own, by name. They win over tokenizer_config.json."""
    paths = {DEFAULT: folder / "chat_template.jinja"}
    paths |= {path.stem: path
              for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    try:
        return {name: path.read_text("utf-8") for name, path in paths.items() if path.exists()}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its chat template cannot be read ({first_line(error)})"
                        ) from None

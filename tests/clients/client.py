"""What every client script uses. It imports only numpy and the standard library, so it works in the
environment of any client (tests/clients/README.md)."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Result = str | float            # "equal", "works", or the largest difference from our numbers


# Limits that several clients share; the notes below the table in docs/import.md say more.
OTHER_TYPE = "not opened"
QWEN2 = "`AutoTokenizer` gives other ids: see the notes"


class Reference(NamedTuple):
    """What our own code says of a checkpoint. Letters as in CONTRIBUTING.md."""

    folder: Path
    facts: dict[str, Any]       # reference.json
    logits: np.ndarray          # (T, V) of the prompt, float32
    patterns: np.ndarray        # (L, H, T, T) of the prompt
    z: np.ndarray               # (L, H, T, D) of the prompt
    silenced_logits: np.ndarray     # (T, V), with the z of layer 0's last head set to 0

    @property
    def model_type(self) -> str:
        return self.facts["model_type"]

    @property
    def prompt(self) -> str:
        return self.facts["prompt"]["text"]

    @property
    def ids(self) -> list[int]:
        """The prompt's ids."""
        return self.facts["prompt"]["ids"]

    @property
    def greedy(self) -> list[int]:
        """The 20 ids that follow the prompt, each the most probable."""
        return self.facts["greedy"]

    @property
    def texts(self) -> dict[str, dict[str, Any]]:
        """Tricky texts by name: {"text": …, "ids": […]}."""
        return self.facts["texts"]


def read_reference(folder: Path) -> Reference:
    """The reference that tests/clients/reference.py has written to `folder`."""
    facts = json.loads((folder / "reference.json").read_text("utf-8"))
    arrays = [np.load(folder / f"{name}.npy")
              for name in ("logits", "patterns", "z", "silenced_logits")]
    return Reference(folder, facts, *arrays)


def run(client: str, version: str, check: Callable[[Path, Reference], dict[str, Any]]) -> None:
    """The main function of a client script: `NAME_client.py CHECKPOINT REFERENCE …`, any number of
    pairs.

    Calls check(checkpoint, reference) for each pair, which returns {"checks": {name: Result}} and
    perhaps "limit": a sentence, and prints a line of JSON for each. Exits with 1 if one of them has
    raised an exception.
    """
    failed = False
    for checkpoint, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        reference = read_reference(Path(folder))
        line = {"client": client, "version": version, "shape": reference.facts["shape"],
                "model_type": reference.model_type, "checks": {}, "limit": None}
        try:
            line |= check(Path(checkpoint), reference)
        except Exception as error:
            traceback.print_exc()
            line["error"], failed = f"{type(error).__name__}: {error}"[:500], True
        print(json.dumps(line), flush=True)
    sys.exit(1 if failed else 0)


# --- comparing ------------------------------------------------------------------------------------

def equal(theirs: Any, ours: Any, what: str = "") -> str:
    """ "equal", or AssertionError that shows both."""
    assert theirs == ours, f"{what} theirs {theirs!r}, ours {ours!r}"
    return "equal"


def difference(theirs: Any, ours: np.ndarray) -> float:
    """The largest difference between arrays of the same shape. The frame compares it with the bound
    of the check (tests/clients/run.py)."""
    theirs = np.asarray(theirs, np.float64)
    assert theirs.shape == ours.shape, f"theirs has the shape {theirs.shape}, ours {ours.shape}"
    assert np.isfinite(theirs).all(), "not all of their numbers are finite"
    return float(np.abs(theirs - ours).max())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities that logits (T, V) give."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def same_ids(reference: Reference, encode: Callable[[str], list[int]],
             skip: tuple[str, ...] = ()) -> str:
    """Compare the ids of every tricky text; `skip` names those that the client cannot take at
    all."""
    for name, text in reference.texts.items():
        if name not in skip:
            equal(list(encode(text["text"])), text["ids"], f"ids of {name}:")
    return "equal"


def open_tokenizer(checkpoint: Path, reference: Reference) -> tuple[Any, str | None]:
    """transformers' tokenizer of a checkpoint, and the limit that keeps AutoTokenizer from opening
    it."""
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    if reference.model_type != "qwen2" or transformers.__version__ < "5":
        return tokenizer, None
    refused(lambda: same_ids(reference, lambda text: tokenizer(text).input_ids), "ids of plain")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(checkpoint)), QWEN2


def refused_type(attempt: Callable[[], Any]) -> dict[str, Any]:
    """The result for a model_type that transformers does not know: `attempt` must fail with
    transformers' sentence that names it."""
    refused(attempt, "induction_gpt", "Transformers does not recognize this architecture")
    return {"limit": OTHER_TYPE}


def refused(attempt: Callable[[], Any], *words: str) -> str:
    """The message of the error that `attempt` must raise; it must contain all of `words`.

    Raises AssertionError if there is no error: then the limit has gone, and the page should say
    so.
    """
    try:
        attempt()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        for word in words:
            assert word in message, f"expected an error that names {word!r}, got: {message}"
        return message
    raise AssertionError("the documented limit has gone: this works now")

"""What chosen heads compute on the probe, or on the user's rows, as one safetensors file.

    tokens           (B, T) int64
    real             (B, T) bool: False for padding
    loss             (B, T − 1) float32, nats for each next token; NaN for padding
    L1H3.q .k .v .z  (B, T, D) float32: q and k after position encoding, z before W_O
    L1H3.lse         (B, T) float32, the natural log of each row's softmax denominator
    L1H3.pattern     (B, T, T) float32
"""

from pathlib import Path

from errors import UserError

import torch
from safetensors.torch import save
from torch import Tensor

from files import atomic_write
from model.cross_entropy import cross_entropies
from model.gpt import GPT
from model.taps import Head, taps

PARTS = ("q", "k", "v", "z", "lse", "pattern")
BATCH = 16                  # rows in one forward pass
MOST_BYTES = 4 * 10 ** 9    # a file is made in memory


def check_size(path: Path, model: GPT, heads: list[Head], tokens: Tensor) -> None:
    """Raise UserError if what `heads` compute on tokens (B, T) has more than MOST_BYTES."""
    B, T = tokens.shape
    size = 4 * len(heads) * B * T * (4 * model.config.head_size + T + 1)
    if size > MOST_BYTES:
        raise UserError(f"--export {path}: {len(heads)} heads on {B} rows of {T} tokens are "
                        f"{size / 1e9:.1f} GB, at most {MOST_BYTES / 1e9:.0f} are written\n"
                        "  choose heads: --heads L1H3")


@torch.no_grad()
def write_activations(path: Path, model: GPT, tokens: Tensor, real: Tensor, heads: list[Head],
                      about: dict[str, str]) -> None:
    """Write what `heads` compute on tokens (B, T), `real` (B, T) bool; `about` goes into the
    file's metadata. Losses of padding are NaN."""
    parts: dict[str, list[Tensor]] = {"loss": []}
    for rows in tokens.to(model.embed.weight.device).split(BATCH):
        add_rows(parts, model, rows, heads)
    tensors = {name: torch.cat(part) for name, part in parts.items()}
    tensors["loss"] = tensors["loss"].masked_fill(~real[:, 1:].cpu(), torch.nan)
    content = save({"tokens": tokens.cpu(), "real": real.cpu()} | tensors, about)
    with atomic_write(path) as file:
        file.write(content)


def add_rows(parts: dict[str, list[Tensor]], model: GPT, rows: Tensor, heads: list[Head]) -> None:
    """Add what some heads compute on a few rows (b, T) to the parts of the file."""
    layers = sorted({head.layer for head in heads})
    with taps(model, [f"L{layer}.{part}" for layer in layers for part in PARTS]) as acts:
        final = model.hidden(rows)                                              # (b, T, E)
    targets = rows[:, 1:]
    losses = cross_entropies(final[:, :-1].flatten(0, 1), model.unembedding, targets.flatten())
    parts["loss"].append(losses.view(targets.shape).float().cpu())
    for head in heads:
        for part in PARTS:
            index = head.key_head(model.config) if part in ("k", "v") else head.index
            values = acts[f"L{head.layer}.{part}"][:, index].float().cpu()
            parts.setdefault(f"{head}.{part}", []).append(values.contiguous())

"""Patterns as pictures: pixels for wandb and for the movie, in milliseconds (a matplotlib figure takes a third of a second)."""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.taps import Head

RAMP = np.array([(255, 255, 255), (203, 221, 240), (120, 170, 217), (44, 105, 176), (16, 46, 96)])          # light is little, at any hue
INK, LINE, ABOVE = (40, 44, 52), (222, 225, 230), (246, 247, 249)
SMALLEST = 96           # pixels of a pattern's side
AXES = "down: query, across: key; darker: more attention"


def shade(pattern: np.ndarray) -> np.ndarray:
    """A pattern (T, T) uint8 → (T, T, 3) uint8. By its square root: attention spread over ten tokens is still to be seen."""
    at = np.sqrt(pattern / 255.0) * (len(RAMP) - 1)
    colour = np.stack([np.interp(at, np.arange(len(RAMP)), RAMP[:, c]) for c in range(3)], axis=-1)
    colour[np.triu_indices(len(pattern), 1)] = ABOVE                                # keys that lie ahead
    return colour.astype(np.uint8)


def drawn(pattern: np.ndarray, side: int = SMALLEST) -> Image.Image:
    """A pattern as an image of at least `side` pixels, every entry a square of whole ones; a larger one by its own size."""
    factor = max(1, round(side / len(pattern)))
    return Image.fromarray(shade(pattern)).resize((factor * len(pattern),) * 2, Image.Resampling.NEAREST)


def mosaic(patterns: np.ndarray) -> np.ndarray:
    """The patterns (L, H, T, T) uint8 of all heads, a row a layer, layer 0 below, each named: (height, width, 3) uint8."""
    L, H = patterns.shape[:2]
    size, gap, label = drawn(patterns[0, 0]).width, 8, 16
    picture = Image.new("RGB", (max(300, gap + H * (size + gap)), gap + L * (size + label + gap) + label), "white")
    write = ImageDraw.Draw(picture)
    write.text((gap, picture.height - label - 2), AXES, INK, ImageFont.load_default(11))
    for layer in range(L):
        for index in range(H):
            x, y = gap + index * (size + gap), gap + (L - 1 - layer) * (size + label + gap)
            write.text((x, y), str(Head(layer, index)), INK, ImageFont.load_default(11))
            picture.paste(drawn(patterns[layer, index]), (x, y + label))
            write.rectangle((x - 1, y + label - 1, x + size, y + label + size), outline=LINE)
    return np.asarray(picture)


def portrait(pattern: np.ndarray, title: str, side: int = 320) -> np.ndarray:
    """One head's pattern with a line of text above: (height, width, 3) uint8."""
    image = drawn(pattern, side)
    picture = Image.new("RGB", (image.width + 24, image.height + 60), "white")
    write = ImageDraw.Draw(picture)
    write.text((12, 10), title, INK, ImageFont.load_default(13))
    write.text((12, image.height + 37), AXES, INK, ImageFont.load_default(11))
    picture.paste(image, (12, 32))
    write.rectangle((11, 31, 12 + image.width, 32 + image.height), outline=LINE)
    return np.asarray(picture)


def movie(file: BinaryIO, frames: Sequence[np.ndarray], seconds: float = 8.0) -> None:
    """Frames of one size → an endless GIF of about so many seconds, its last frame held for two."""
    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    times = [max(40, int(1000 * seconds / len(images)))] * (len(images) - 1) + [2000]
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)

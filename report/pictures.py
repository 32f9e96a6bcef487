"""Patterns as pixels, for wandb and the movie: in milliseconds, where a matplotlib figure takes a
third of a second."""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.taps import Head

# From no attention (white) to 1; lightness falls evenly.
RAMP = np.array([(255, 255, 255), (203, 221, 240), (120, 170, 217), (44, 105, 176), (16, 46, 96)])
INK, LINE, FUTURE = (40, 44, 52), (222, 225, 230), (246, 247, 249)
SMALLEST = 96           # pixels of a pattern's side
AXES = "rows: queries, columns: keys; darker: more attention"


def colours() -> np.ndarray:
    """The colour of each weight 0 … 255, by its square root: attention spread over ten tokens stays
    visible. (256, 3) uint8."""
    level = np.sqrt(np.arange(256) / 255) * (len(RAMP) - 1)
    steps = np.arange(len(RAMP))
    return np.stack([np.interp(level, steps, RAMP[:, c]) for c in range(3)], -1).astype(np.uint8)


COLOURS = colours()


def shade(patterns: np.ndarray) -> np.ndarray:
    """Patterns (…, T, T) uint8 as colours (…, T, T, 3) uint8."""
    colour = COLOURS.take(patterns, axis=0)
    colour[..., ~np.tri(patterns.shape[-1], dtype=bool), :] = FUTURE    # unseen by their queries
    return colour


def enlarged(colour: np.ndarray, side: int = SMALLEST) -> Image.Image:
    """Colours (T, T, 3) as an image of about `side` pixels, each entry a square of whole pixels; a
    pattern with more entries than that keeps its own size."""
    factor = max(1, round(side / len(colour)))
    size = factor * len(colour)
    return Image.fromarray(colour).resize((size, size), Image.Resampling.NEAREST)


def mosaic(patterns: np.ndarray) -> np.ndarray:
    """The patterns (L, H, T, T) uint8 of all heads with their names, one row per layer, layer 0 at
    the bottom: (height, width, 3) uint8."""
    L, H = patterns.shape[:2]
    shaded = shade(patterns)
    size, gap, label = enlarged(shaded[0, 0]).width, 8, 16
    width, height = gap + H * (size + gap), gap + L * (size + label + gap) + label
    picture = Image.new("RGB", (max(300, width), height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    draw.text((gap, height - label - 2), AXES, INK, font)
    for layer in range(L):
        for index in range(H):
            x, y = gap + index * (size + gap), gap + (L - 1 - layer) * (size + label + gap)
            draw.text((x, y), str(Head(layer, index)), INK, font)
            picture.paste(enlarged(shaded[layer, index]), (x, y + label))
            draw.rectangle((x - 1, y + label - 1, x + size, y + label + size), outline=LINE)
    return np.asarray(picture)


def portrait(pattern: np.ndarray, title: str, side: int = 320) -> np.ndarray:
    """One head's pattern with a line of text above: (height, width, 3) uint8."""
    image = enlarged(shade(pattern), side)
    picture = Image.new("RGB", (image.width + 24, image.height + 60), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((12, 10), title, INK, ImageFont.load_default(13))
    draw.text((12, image.height + 37), AXES, INK, ImageFont.load_default(11))
    picture.paste(image, (12, 32))
    draw.rectangle((11, 31, 12 + image.width, 32 + image.height), outline=LINE)
    return np.asarray(picture)


def write_gif(file: BinaryIO, frames: Sequence[np.ndarray], seconds: float = 8.0) -> None:
    """Frames of one size as an endless GIF of about `seconds` seconds; its last frame stays for two
    more."""
    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    milliseconds = max(40, int(1000 * seconds / len(images)))
    durations = [milliseconds] * (len(images) - 1) + [2000]
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:],
                   duration=durations, loop=0, optimize=True)

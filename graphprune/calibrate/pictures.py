"""Synthesised pictures: float32 [n, channels, height, width] in 0..1, a pixel over 255.

Every kind is a function of (count, channels, height, width, rng). A fourth channel is opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pictures = NDArray[np.float32]
Paint = Callable[[int, int, int, int, np.random.Generator], Pictures]

CHROMA = 0.35  # deviation of a colour from its grey, over the deviation of the grey
LEAVES_PER_AREA = 2.5  # area of all leaves over that of the picture: few gaps remain
SMALLEST_LEAF = 0.03, 2.0  # radius: over the picture's shorter side, and at least in pixels
LARGEST_LEAF = 0.7  # radius over the picture's shorter side
BRIGHTNESS = 0.5, 0.15  # mean and deviation of a picture's middle grey
CONTRAST = 0.15, 0.35  # deviation of its greys, least and most
SMALLEST_CROP = 0.35  # side over that of the largest crop that fits the photograph


def white_noise(
    count: int, channels: int, height: int, width: int, rng: np.random.Generator
) -> Pictures:
    """Independent Gaussian pixels around middle grey."""
    noise = rng.standard_normal((count, channels, height, width), dtype=np.float32)
    return _opaque(np.clip(0.5 + 0.25 * noise, 0, 1))


def pink_noise(
    count: int, channels: int, height: int, width: int, rng: np.random.Generator
) -> Pictures:
    """Noise whose amplitude falls as 1/frequency, as natural pictures' does; mostly grey."""
    noise = _coloured(rng.standard_normal((count, 1 + channels, height, width), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(noise) / frequency
    field = np.fft.irfft2(spectrum, s=(height, width)).astype(np.float32)
    field /= field.std(axis=(1, 2, 3), keepdims=True) + 1e-9
    mean = rng.normal(0.5, 0.15, (count, 1, 1, 1)).astype(np.float32)
    return _opaque(np.clip(mean + 0.22 * field, 0, 1))


def dead_leaves(
    count: int, channels: int, height: int, width: int, rng: np.random.Generator
) -> Pictures:
    """Discs and boxes of power-law sizes that hide one another: the edges of natural pictures.

    Dead leaves model of Lee, Mumford, Huang, "Occlusion Models for Natural Images", 2001: radii
    with density r^-3 make the statistics scale invariant.
    """
    pictures = np.empty((count, channels, height, width), np.float32)
    for picture in pictures:
        _paint_leaves(picture, rng)
    return _opaque(pictures)


def crops(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> Pictures:
    """Random crops, scales and mirror images of the photographs that ship with the package."""
    pictures = np.empty((count, channels, height, width), np.float32)
    photographs = _photographs()
    for picture in pictures:
        photograph = photographs[rng.integers(len(photographs))]
        photograph = photograph.convert("L" if channels == 1 else "RGB")
        most = min(photograph.width / width, photograph.height / height)
        unit = rng.uniform(max(SMALLEST_CROP * most, min(1.0, most)), most)  # enlarge if need be
        across, down = unit * width, unit * height
        left = rng.uniform(0, photograph.width - across)
        top = rng.uniform(0, photograph.height - down)
        box = (left, top, left + across, top + down)
        cut = photograph.resize((width, height), Image.Resampling.BILINEAR, box)
        pixels = np.asarray(cut, np.float32).reshape(height, width, -1)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        picture[: pixels.shape[2]] = np.moveaxis(pixels, 2, 0) / 255
    return _opaque(pictures)


def mixture(
    count: int, channels: int, height: int, width: int, rng: np.random.Generator
) -> Pictures:
    """Dead leaves and crops in turn, so that every stretch holds both."""
    pictures = np.empty((count, channels, height, width), np.float32)
    pictures[0::2] = dead_leaves(len(pictures[0::2]), channels, height, width, rng)
    pictures[1::2] = crops(len(pictures[1::2]), channels, height, width, rng)
    return pictures


KINDS: dict[str, Paint] = {
    "mixture": mixture,
    "dead-leaves": dead_leaves,
    "crops": crops,
    "pink": pink_noise,
    "white": white_noise,
}


def _paint_leaves(picture: Pictures, rng: np.random.Generator) -> None:
    """Fill one picture [channels, height, width], the leaf farthest behind first."""
    channels, height, width = picture.shape
    side = min(height, width)
    smallest, largest = max(SMALLEST_LEAF[0] * side, SMALLEST_LEAF[1]), LARGEST_LEAF * side
    # r^-3 between the bounds has the mean area 2·ln(largest/smallest)·smallest² (times a shape's
    # own factor of about 3.5), so this many leaves cover the picture LEAVES_PER_AREA times.
    mean_area = 7 * np.log(largest / smallest) * smallest**2
    count = int(np.ceil(LEAVES_PER_AREA * height * width / mean_area)) + 2
    quantile = rng.random(count)
    radii = (smallest**-2 - quantile * (smallest**-2 - largest**-2)) ** -0.5
    centres = rng.random((count, 2)) * (height, width)
    stretch = rng.uniform(0.5, 1.0, (count, 2))
    discs = rng.random(count) < 0.5
    colours = _leaf_colours(count, channels, rng)
    picture[:] = colours[0][:, None, None]
    for (y, x), radius, shape, disc, colour in zip(
        centres, radii, stretch, discs, colours, strict=True
    ):
        tall, wide = (radius, radius) if disc else radius * shape
        top, bottom = max(0, int(y - tall)), min(height, int(y + tall) + 1)
        left, right = max(0, int(x - wide)), min(width, int(x + wide) + 1)
        patch = picture[:, top:bottom, left:right]
        if not disc:
            patch[:] = colour[:, None, None]
            continue
        rows = (np.arange(top, bottom) - y) ** 2
        columns = (np.arange(left, right) - x) ** 2
        patch[:, rows[:, None] + columns[None] <= radius**2] = colour[:, None]


def _leaf_colours(count: int, channels: int, rng: np.random.Generator) -> Pictures:
    """Colours [count, channels] in 0..1: greys around the picture's own, and a little colour."""
    contrast = rng.uniform(*CONTRAST)
    grey = rng.normal(*BRIGHTNESS) + contrast * rng.standard_normal((count, 1))
    colour = CHROMA * contrast * rng.standard_normal((count, channels)) if channels > 1 else 0.0
    return np.clip(grey + colour, 0, 1).astype(np.float32)


def _coloured(planes: Pictures) -> Pictures:
    """Grey plane 0 with a little of each further plane: [n, 1 + c, …] → [n, c, …]."""
    grey, colour = planes[:, :1], planes[:, 1:]
    return grey + CHROMA * colour if colour.shape[1] > 1 else grey


def _opaque(pictures: Pictures) -> Pictures:
    if pictures.shape[1] == 4:
        pictures[:, 3] = 1
    return pictures.astype(np.float32, copy=False)


@cache
def _photographs() -> tuple[Image.Image, ...]:
    """The shipped photographs, decoded, by name."""
    folder = resources.files("graphprune.calibrate").joinpath("photographs")
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not entry.name.endswith(".jpg"):
            continue
        with entry.open("rb") as stream, Image.open(stream) as picture:
            picture.load()
            found.append(picture.copy())
    return tuple(found)

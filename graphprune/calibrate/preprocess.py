"""From pictures to a model's input: value = (pixel · scale − mean) / std, size and layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image

from graphprune.errors import UsageError
from graphprune.model import Array, Model
from graphprune.runtime import input_dtype
from graphprune.shapes import Shapes
from graphprune.sizes import declared
from graphprune.wording import counted, shape_text

LAYOUTS = ("auto", "nchw", "nhwc")
ORDERS = ("rgb", "bgr")
CHANNELS = (1, 3, 4)
LEAST_SIDE = 8  # pixels: a rank 4 input with shorter sides is no picture
EXAMPLE = "mean=0.485,0.456,0.406;std=0.229,0.224,0.225;scale=1/255;layout=nchw;size=224"


@dataclass(frozen=True)
class PictureInput:
    """A graph input that takes pictures: its name, layout and sizes."""

    name: str
    layout: str  # "nchw" or "nhwc"
    channels: int
    height: int
    width: int
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Preprocess:
    """How a picture (pixels 0..255) becomes a model's input."""

    mean: tuple[float, ...] = (0.0,)  # one, or one per channel in the model's order
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    layout: str = "auto"  # auto: the one that the model's declared input shows
    order: str = "rgb"
    size: tuple[int, int] | None = None  # height, width; None: the model's
    resize: int | None = None  # shorter side before the centre crop; None: as ``size`` needs

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """``mean=0.485,0.456,0.406;std=…;scale=1/255;layout=nchw;order=rgb;size=224;resize=256``.

        Raises ``UsageError`` that names the key at fault.
        """
        given: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(";"))):
            key, equals, value = (part.strip() for part in item.partition("="))
            if key not in _READERS or not equals:
                raise _wrong(key, f"there is no such key; known are {', '.join(_READERS)}")
            if key in given:
                raise _wrong(key, "given twice")
            given[key] = _read(key, value)
        return cls(**given)

    def document(self) -> dict[str, Any]:
        """As plain values for a plan; ``from_document`` reads them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Preprocess:
        """The inverse of ``document``; raises ``UsageError`` that names the key at fault."""
        given: dict[str, Any] = {}
        for key, value in document.items():
            if key not in _READERS:
                raise _wrong(key, f"there is no such key; known are {', '.join(_READERS)}")
            if value is None and key in ("size", "resize"):
                continue
            parts = value if isinstance(value, list) else [value]
            given[key] = _read(key, ",".join(map(str, parts)))
        return cls(**given)

    def __str__(self) -> str:
        mean, std = (",".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        bgr = ", bgr" if self.order == "bgr" else ""
        return f"(pixel*{self.scale:.4g} - {mean}) / {std}{bgr}"

    def encode(self, pictures: NDArray[np.float32], to: PictureInput) -> Array:
        """Pictures [n, c, h, w] in 0..1 as the input's values, in its layout and type."""
        size = pictures.shape[1]
        if self.order == "bgr" and size >= 3:
            pictures = np.concatenate([pictures[:, 2::-1], pictures[:, 3:]], axis=1)
        mean, std = (_per_channel(values, size) for values in (self.mean, self.std))
        values = (pictures * np.float32(255 * self.scale) - mean) / std
        if to.layout == "nhwc":
            values = np.ascontiguousarray(np.moveaxis(values, 1, 3))
        if to.dtype.kind not in "iu":
            return np.asarray(values.astype(to.dtype))
        bounds = np.iinfo(to.dtype)
        return np.asarray(np.clip(np.rint(values), bounds.min, bounds.max).astype(to.dtype))

    def decode(self, picture: Image.Image, to: PictureInput) -> NDArray[np.float32]:
        """One picture resized and cropped around its centre: [c, h, w] in 0..1."""
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[to.channels]
        picture = picture.convert(mode)
        shorter = self.resize or 0
        factor = max(
            to.width / picture.width,
            to.height / picture.height,
            shorter / min(picture.width, picture.height),
        )
        across, down = to.width / factor, to.height / factor  # of the picture as it is
        left, top = (picture.width - across) / 2, (picture.height - down) / 2
        box = (left, top, left + across, top + down)
        cut = picture.resize((to.width, to.height), Image.Resampling.BILINEAR, box)
        pixels = np.asarray(cut, np.float32).reshape(to.height, to.width, to.channels)
        return np.ascontiguousarray(np.moveaxis(pixels, 2, 0)) / np.float32(255)


def picture_inputs(model: Model, shapes: Shapes, open_side: int = 0) -> list[PictureInput]:
    """The inputs that take pictures, by their types and sizes alone: floats or bytes of rank 4,
    an axis of 1, 3 or 4 channels after the batch or last, and at least 8 × 8 pixels.

    ``open_side``: pixels to count for a side that the model leaves open and that nobody gave.
    """
    found = (_as_picture(value, shapes, open_side) for value in model.inputs)
    return [picture for picture in found if picture is not None]


def picture_input(model: Model, shapes: Shapes, preprocess: Preprocess) -> PictureInput:
    """The one input of a model for pictures, as the user describes it where it is not clear.

    Raises ``UsageError`` where the model takes anything else beside one picture, or where layout,
    channels or size remain open or contradict what the model declares.
    """
    if len(model.inputs) != 1:
        raise UsageError(
            f"a folder of pictures feeds one input, and the model has {len(model.inputs)}",
            hint="Give an .npz file with one array for each input.",
        )
    value = model.inputs[0]
    where = f"input {value.name!r}"
    dims, dtype = declared(value), input_dtype(value)
    if dims is None or len(dims) != 4 or not _holds_pixels(dtype):
        raise UsageError(
            f"the model takes no pictures: {dtype} {shape_text(dims)}",
            where,
            "Give an .npz file (--calib), without --preprocess.",
        )
    sizes = shapes.inputs[value.name]
    known = _as_picture(value, shapes, LEAST_SIDE)
    layout = preprocess.layout
    if layout == "auto" and known is None:
        raise UsageError("the layout is not clear", where, "Give --preprocess layout=nchw or nhwc.")
    if layout == "auto" and known is not None:
        layout = known.layout
    channel_axis, *sides = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    channels = sizes[channel_axis]
    if dims[channel_axis] is None and channels not in CHANNELS[1:]:
        channels = 3
    if channels not in CHANNELS:
        raise UsageError(
            f"{channels} channels in layout {layout}", where, "Give another layout (--preprocess)."
        )
    size = preprocess.size or _known_size(value, shapes, sides)
    if size is None:
        raise UsageError("the size of pictures is open", where, "Give --preprocess size=224.")
    if any(dims[axis] not in (None, side) for axis, side in zip(sides, size, strict=True)):
        raise UsageError(
            f"size={size[0]}x{size[1]} does not fit the declared {shape_text(dims)}",
            where,
            "Leave size out.",
        )
    to = PictureInput(value.name, layout, channels, *size, dtype)
    check_channels(preprocess, to)
    return to


def check_channels(preprocess: Preprocess, to: PictureInput) -> None:
    """Raise ``UsageError`` where mean or std are neither one nor one for each channel."""
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in (1, to.channels):
            raise UsageError(
                f"--preprocess {name}: {counted(len(values), 'value')} for "
                f"{counted(to.channels, 'channel')}",
                f"input {to.name!r}",
                "Give one for all channels, or one for each.",
            )


def completed(preprocess: Preprocess, to: PictureInput) -> Preprocess:
    """What the user left to the model, filled in: the whole description, for a plan."""
    return replace(preprocess, layout=to.layout, size=(to.height, to.width))


def _known_size(
    value: onnx.ValueInfoProto, shapes: Shapes, sides: list[int]
) -> tuple[int, int] | None:
    if any(_is_open(value, shapes, axis) for axis in sides):
        return None
    sizes = shapes.inputs[value.name]
    return sizes[sides[0]], sizes[sides[1]]


def _is_open(value: onnx.ValueInfoProto, shapes: Shapes, axis: int) -> bool:
    """Neither the model nor the user, nor what fits the model, decides the size of this axis."""
    return value.name in shapes.assumed and axis in shapes.symbolic[value.name]


def _as_picture(value: onnx.ValueInfoProto, shapes: Shapes, open_side: int) -> PictureInput | None:
    dims, dtype, sizes = declared(value), input_dtype(value), shapes.inputs[value.name]
    if dims is None or len(dims) != 4 or not _holds_pixels(dtype):
        return None
    for layout, channel, sides in (("nchw", 1, (2, 3)), ("nhwc", 3, (1, 2))):
        if sizes[channel] not in CHANNELS:
            continue
        least = 0 if dims[channel] is None else open_side
        height, width = (least if _is_open(value, shapes, axis) else sizes[axis] for axis in sides)
        if min(height, width) >= LEAST_SIDE:
            return PictureInput(value.name, layout, sizes[channel], height, width, dtype)
    return None


def _holds_pixels(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == np.uint8


def _per_channel(values: tuple[float, ...], channels: int) -> NDArray[np.float32]:
    filled = values * channels if len(values) == 1 else values
    return np.array(filled, np.float32).reshape(1, -1, 1, 1)


def _wrong(key: str, problem: str) -> UsageError:
    return UsageError(f"--preprocess {key}: {problem}", hint=f"It reads like {EXAMPLE!r}.")


def _read(key: str, value: str) -> Any:
    try:
        return _READERS[key](value)
    except (ValueError, ZeroDivisionError) as error:
        raise _wrong(key, f"{value!r} is not valid ({error})") from error


def _number(text: str) -> float:
    above, _, below = text.partition("/")
    number = float(above) / (float(below) if below else 1.0)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _non_zero(text: str) -> tuple[float, ...]:
    numbers = _numbers(text)
    if 0.0 in numbers:
        raise ValueError("a deviation of zero divides nothing")
    return numbers


def _factor(text: str) -> float:
    number = _number(text)
    if number == 0:
        raise ValueError("a scale of zero leaves nothing")
    return number


def _size(text: str) -> tuple[int, int]:
    sides = [int(part) for part in text.lower().replace(",", "x").split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError("a size is one positive number, or HEIGHTxWIDTH")
    return sides[0], sides[-1]


def _side(text: str) -> int:
    side = int(text)
    if side < 1:
        raise ValueError("a side is positive")
    return side


def _one_of(words: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text.lower()

    return read


_READERS: dict[str, Callable[[str], Any]] = {
    "mean": _numbers,
    "std": _non_zero,
    "scale": _factor,
    "layout": _one_of(LAYOUTS),
    "order": _one_of(ORDERS),
    "size": _size,
    "resize": _side,
}

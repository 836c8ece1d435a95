"""Rows of a linear operator's inputs and outputs: a convolution unfolded, recurrent states one step
before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphprune.linear import CONVOLUTIONS, Linear
from graphprune.model import Array


def positions(linear: Linear, y_shape: Sequence[int], most: int, seed: Sequence[int]) -> Array:
    """At most ``most`` output positions of one chunk, ascending; all of them where they are fewer.

    For a convolution these are spatial positions (used for every sample), else rows of the chunk.
    """
    total = math.prod(y_shape[2:] if linear.kind in CONVOLUTIONS else y_shape[:-1])
    total //= max(1, len(linear.reverse))
    if total <= most:
        return np.arange(total)
    rng = np.random.default_rng(list(seed))
    return np.sort(rng.choice(total, max(1, most), replace=False))


def inputs_at(linear: Linear, x: Array, y_shape: Sequence[int], where: Array) -> Array:
    """X: [groups, rows, in], float32; rows are samples x positions."""
    if linear.reverse:
        before = _one_step_before(linear, x).swapaxes(0, 1)
        return before.reshape(linear.groups, -1, x.shape[-1])[:, where].astype(np.float32)
    if linear.kind not in CONVOLUTIONS:
        return x.reshape(-1, x.shape[-1])[where][None].astype(np.float32)
    samples, channels = x.shape[:2]
    source = _sources(linear, x.shape[2:], y_shape[2:], where)  # [positions, taps]
    flat = x.reshape(samples, channels, -1).astype(np.float32)
    flat = np.concatenate([flat, np.zeros((samples, channels, 1), np.float32)], axis=2)
    per_group = channels // linear.groups
    patches = flat[:, :, source]  # [samples, channels, positions, taps]; the last is the padding
    patches = patches.reshape(samples, linear.groups, per_group, len(where), -1)
    return np.ascontiguousarray(patches.transpose(1, 0, 3, 2, 4)).reshape(
        linear.groups, samples * len(where), -1
    )


def _one_step_before(linear: Linear, y: Array) -> Array:
    """The states that each step reads, from those that it writes: [seq, directions, batch, hidden].

    Zeros stand for a first state, whatever it is: any row will do that weights can be applied to.
    """
    before = np.zeros_like(y)
    for direction, reverse in enumerate(linear.reverse):
        if reverse:
            before[:-1, direction] = y[1:, direction]
        else:
            before[1:, direction] = y[:-1, direction]
    return before


def outputs_at(linear: Linear, y: Array, where: Array) -> Array:
    """Y: [groups, rows, out], float32, the rows as ``inputs_at`` gives them."""
    if linear.kind not in CONVOLUTIONS:
        return y.reshape(-1, y.shape[-1])[where][None].astype(np.float32)
    samples, channels = y.shape[:2]
    picked = y.reshape(samples, linear.groups, channels // linear.groups, -1)[..., where]
    picked = picked.astype(np.float32, copy=False)
    return picked.transpose(1, 0, 3, 2).reshape(linear.groups, -1, channels // linear.groups)


def _sources(linear: Linear, size: Sequence[int], out: Sequence[int], where: Array) -> Array:
    """Flat input position behind every (output position, tap); beyond the last where there is none.

    A tap of a Conv at output p reads p * stride - pad + tap * dilation; a ConvTranspose at p is
    reached from every i with i * stride - pad + tap * dilation = p.
    """
    nothing = math.prod(size)
    at = np.unravel_index(where, tuple(out))
    taps = np.unravel_index(np.arange(linear.taps), linear.kernel) if linear.kernel else ()
    flat = np.zeros((len(where), linear.taps), np.int64)
    inside = np.ones((len(where), linear.taps), bool)
    pads = _pads(linear, size, out)
    for axis, length in enumerate(size):
        offset = np.asarray(taps[axis]) * linear.dilations[axis] - pads[axis]
        if linear.kind == "Conv":
            place = np.asarray(at[axis])[:, None] * linear.strides[axis] + offset[None, :]
        else:
            place, rest = np.divmod(
                np.asarray(at[axis])[:, None] - offset[None, :], linear.strides[axis]
            )
            inside &= rest == 0
        inside &= (place >= 0) & (place < length)
        flat = flat * length + place
    return np.where(inside, flat, nothing)


def _pads(linear: Linear, size: Sequence[int], out: Sequence[int]) -> Sequence[int]:
    if linear.auto_pad in ("NOTSET", "VALID"):
        return linear.pads
    pads = []
    for i, length in enumerate(size):
        reach = (out[i] - 1) * linear.strides[i] + (linear.kernel[i] - 1) * linear.dilations[i] + 1
        both = max(0, reach - length)
        pads.append(both // 2 if linear.auto_pad == "SAME_UPPER" else both - both // 2)
    return pads

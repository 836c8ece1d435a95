"""Calibration inputs: the user's arrays or pictures, or synthesised ones."""

from __future__ import annotations

from pathlib import Path

from graphprune.calibrate.files import from_folder, from_npz
from graphprune.calibrate.preprocess import Preprocess
from graphprune.calibrate.samples import Samples, batches
from graphprune.calibrate.synthesise import synthesise
from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.shapes import Shapes

__all__ = ["Preprocess", "Samples", "batches", "from_folder", "from_npz", "open_samples"]
__all__ += ["synthesise"]


def open_samples(
    given: str | Path | None,
    model: Model,
    shapes: Shapes,
    count: int,
    seed: int,
    preprocess: Preprocess | None = None,
) -> Samples:
    """At most ``count`` samples: of an .npz file the first, of a folder of pictures a draw by
    ``seed``; synthesised ones where nothing (or "none") is given.

    Raises ``UsageError`` where the path is neither or what it holds does not fit the model.
    """
    if given is None or str(given) == "none":
        return synthesise(model, shapes, count, seed, preprocess=preprocess)
    path = Path(given)
    if path.is_dir():
        return from_folder(path, model, shapes, preprocess or Preprocess(), count, seed)
    if path.suffix.lower() == ".npz":
        return from_npz(path, model, count)
    raise UsageError(
        "calibration inputs are an .npz file or a folder of pictures",
        str(path),
        "Give --calib FILE.npz, --calib FOLDER or --calib none.",
    )

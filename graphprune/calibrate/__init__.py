"""Calibration inputs: the user's arrays or pictures, or synthesised ones."""

from __future__ import annotations

from pathlib import Path

from graphprune.calibrate.files import check_npz, from_folder, from_npz, pictures_of
from graphprune.calibrate.preprocess import Preprocess, picture_input
from graphprune.calibrate.ranges import infer_range
from graphprune.calibrate.samples import Samples, batches
from graphprune.calibrate.synthesise import synthesise
from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.shapes import Shapes

__all__ = ["Preprocess", "Samples", "batches", "from_folder", "from_npz", "open_samples"]
__all__ += ["check_samples", "synthesise"]


def open_samples(
    given: str | Path | None,
    model: Model,
    shapes: Shapes,
    count: int,
    seed: int,
    preprocess: Preprocess | None = None,
) -> Samples:
    """At most ``count`` samples: of an .npz file the first, of a folder of pictures a draw by
    ``seed``; synthesised ones where nothing (or "none") is given. The range of pictures is inferred
    from the model where ``preprocess`` is ``None``.

    Raises ``UsageError`` where the path is neither or what it holds does not fit the model.
    """
    if given is None or str(given) == "none":
        return synthesise(model, shapes, count, seed, preprocess=preprocess)
    path = Path(given)
    check_samples(path, model)
    if path.is_dir():
        return _pictures(path, model, shapes, count, seed, preprocess)
    return from_npz(path, model, count)


def check_samples(given: str | Path, model: Model) -> None:
    """Raise ``UsageError`` where the path is neither an .npz file nor a folder of pictures, or its
    names, types and shapes do not fit; nothing else is read of it."""
    path = Path(given)
    if path.is_dir():
        pictures_of(path, None, 0)
    elif path.suffix.lower() == ".npz":
        check_npz(path, model)
    else:
        raise UsageError(
            "calibration inputs are an .npz file or a folder of pictures"
            if path.exists()
            else "there is no such file or folder",
            f"--calib {path}",
            "Give --calib FILE.npz, --calib FOLDER or --calib none.",
        )


def _pictures(
    path: Path,
    model: Model,
    shapes: Shapes,
    count: int,
    seed: int,
    preprocess: Preprocess | None,
) -> Samples:
    if preprocess is None:
        to = picture_input(model, shapes, Preprocess())
        preprocess = infer_range(
            model,
            shapes,
            to,
            lambda option, rows: from_folder(path, model, shapes, option, rows, seed),
        )
    return from_folder(path, model, shapes, preprocess, count, seed)

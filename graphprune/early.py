"""What is wrong with the options themselves, said before the long work."""

from __future__ import annotations

from pathlib import Path

from graphprune.calibrate import Preprocess, check_samples
from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.options import Options
from graphprune.runtime import provider_of


def check_early(options: Options, model: Model) -> None:
    """Raise ``UsageError`` for an execution provider that is not there, text that says nothing of
    pictures, and files that are not there or do not fit the model by name, type and shape."""
    import onnxruntime as ort

    provider_of(options.provider, ort.get_available_providers())
    if options.preprocess is not None:
        Preprocess.parse(options.preprocess)
    if options.calib is not None:
        check_samples(options.calib, model)
    given = options.eval_data
    if given is not None and ":" not in str(given) and not Path(given).exists():
        raise UsageError(
            "there is no such file",
            f"--eval {given}",
            "Give FILE.npz, or MODULE:FUNCTION of a module that Python finds from this folder.",
        )

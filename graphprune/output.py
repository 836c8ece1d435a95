"""Where results go: checked before the work, written after it, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.result import Result
from graphprune.storage import save, through


def check_outputs(
    model: str | Path | onnx.ModelProto, output: str | Path | None, plan_out: str | Path | None
) -> None:
    """Fail before the work, not after it: folders must exist, the input must survive."""
    given = {"-o": output, "--plan-out": plan_out}
    named = {option: Path(path) for option, path in given.items() if path is not None}
    if len({os.path.realpath(path) for path in named.values()}) < len(named):
        raise UsageError("the model and the plan would be one file", str(output), "Name two files.")
    for option, given_path in named.items():
        where, path = f"{option} {given_path}", through(given_path)
        if path.is_symlink():
            raise UsageError("the output is a link that leads nowhere", where, "Name a file.")
        if not path.parent.is_dir():
            raise UsageError(
                "there is no such folder to write to", where, "Make it first, or name another."
            )
        if path.is_dir():
            raise UsageError("the output is a folder", where, "Name a file in it.")
        if path.exists() and not path.is_file():
            raise UsageError("the output is no regular file", where, "Name another.")
        if not os.access(path.parent, os.W_OK):
            raise UsageError("the output folder is not writable", where, "Name another folder.")
        if not isinstance(model, onnx.ModelProto) and _same(path, model):
            raise UsageError(
                "the output would overwrite the input", str(given_path), "Choose another -o OUT."
            )


def _same(path: str | Path, other: str | Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def check_data(original: Model, output: str | Path | None) -> None:
    """The result's data file must not be the one that holds the input's weights."""
    if output is None:
        return
    if original.data_files and Path(output).is_symlink():
        raise UsageError(
            "the output is a link, beside which nobody would find the weights kept outside it",
            f"-o {output}",
            "Name the file it leads to.",
        )
    written = {Path(output).resolve(), Path(f"{output}.data").resolve()}
    for path in original.data_files:
        if path in written:
            raise UsageError(
                "the output would overwrite the input's weights",
                str(path),
                "Choose another -o OUT.",
            )


def write_result(
    result: Result,
    done: Model,
    output: str | Path | None,
    plan_out: str | Path | None,
) -> bool:
    """Write plan and model, both or neither; whether an earlier model was replaced."""
    replaced = output is not None and Path(output).exists()
    if plan_out is not None and output is not None:
        with written_beside(Path(plan_out), result.plan.to_json()):
            save(done, output)
    elif plan_out is not None:
        with written_beside(Path(plan_out), result.plan.to_json()):
            pass
    elif output is not None:
        save(done, output)
    return replaced


@contextmanager
def written_beside(path: Path, text: str) -> Iterator[None]:
    """Write beside; what happens inside must succeed before the text takes its place."""
    path = through(path)
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text)
        yield
        beside.replace(path)
    except OSError as error:
        cause = f"cannot write: {error.strerror}"
        raise UsageError(cause, str(path), "Choose another place, or make room.") from error
    finally:
        beside.unlink(missing_ok=True)

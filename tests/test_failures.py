"""A failure as a program reads it, and results that are written through links."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from command_line import HALF, QUICK, Run, program, read_json, shapes
from refusals import contents

FAILURES = {
    "usage": ("MODEL --target-flops half", 2),
    "an option": ("MODEL --magic", 2),
    "a command": ("magic", 2),
    "no model": ("nothing.onnx --target-flops 0.5", 2),
    "no budget": ("MODEL --target-flops 0.0001 --criterion l1 --repair none", 4),
    "a gate": ("MODEL --target-flops 0.5 --fast --min-speedup 1000", 7),
    "nothing prunable": ("PINNED --target-flops 0.5", 8),
    "a sweep": ("sweep MODEL --targets 0.0001 --fast", 4),
    "a look": ("explain MODEL nothing", 2),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_document(run: Run, small: Path, pinned: Path, name: str) -> None:
    command, code = FAILURES[name]
    files = {"MODEL": small, "PINNED": pinned}
    words = [files.get(word, word) for word in command.split()]
    plain, told = run(*words), run(*words, "--json")
    document = read_json(told.out)
    assert (plain.code, plain.out) == (told.code, "") == (code, "")
    assert document["schema"] == "graphprune.error/1"
    error = document["error"]
    assert list(error) == ["what", "where", "hint", "code"]
    assert error["code"] == code
    assert error["what"] and error["what"] in told.err
    assert error["where"] in told.err
    assert error["hint"] in told.err.replace("\n  ", "\n  ")


def test_a_failure_that_nobody_reads(small: Path) -> None:
    ran = program(small, "--magic", "--json")
    assert ran.returncode == 2 and read_json(ran.stdout)["error"]["code"] == 2
    assert "Traceback" not in ran.stderr


# --- links


def test_a_link_is_written_through(run: Run, small: Path, tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    for folder in (store, links):
        folder.mkdir()
    for name in ("out.onnx", "plan.json"):
        (store / name).write_bytes(b"an earlier result")
        (links / name).symlink_to(store / name)
    ran = run(small, *HALF, *QUICK, "-o", links / "out.onnx", "--plan-out", links / "plan.json")
    assert ran.code == 0
    for name in ("out.onnx", "plan.json"):
        assert (links / name).is_symlink()
    assert sorted(contents(store)) == ["out.onnx", "plan.json"]
    assert shapes(store / "out.onnx") != shapes(small)


def test_a_link_to_what_is_not_there_yet(run: Run, small: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "link.onnx", tmp_path / "target.onnx"
    link.symlink_to(target)
    assert run(small, *HALF, *QUICK, "-o", link).code == 0
    assert link.is_symlink() and onnx.load(target)


def test_links_that_cannot_be_written_through(run: Run, small: Path, tmp_path: Path) -> None:
    itself, away, back = (tmp_path / name for name in ("itself", "away", "back"))
    itself.symlink_to(itself)
    away.symlink_to(tmp_path / "nowhere" / "out.onnx")
    back.symlink_to(small)
    before = small.read_bytes()
    for link, words in [
        (itself, "leads nowhere"),
        (away, "no such folder"),
        (back, "overwrite the input"),
    ]:
        ran = run(small, *HALF, *QUICK, "-o", link)
        assert (ran.code, ran.out) == (2, "")
        assert words in ran.err
    assert small.read_bytes() == before


def test_a_link_cannot_take_weights_beside_it(run: Run, small: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(small), outside, save_as_external_data=True, size_threshold=0)
    link = tmp_path / "link.onnx"
    link.symlink_to(tmp_path / "target.onnx")
    ran = run(outside, *HALF, *QUICK, "-o", link)
    assert (ran.code, ran.out) == (2, "")
    assert "-o" in ran.err and "link" in ran.err and not link.exists()


def test_sweeps_of_one_model_keep_apart(run: Run, small: Path) -> None:
    sweep = ("sweep", small, "--targets", "0.6", "--fast", "--no-measure", "--json")
    written = []
    for kind in ("flops", "params"):
        document = read_json(run(*sweep, "--by", kind).out)
        written += [*document["written"], *(point["output"] for point in document["points"])]
        assert not any(point["replaced"] for point in document["points"])
    assert len(set(written)) == len(written) == 6
    assert all(Path(path).exists() for path in written)


def test_each_input_gets_an_option_of_its_own(run: Run, tmp_path: Path) -> None:
    """Sizes that do not go together: the hint can be pasted."""
    from graphs import Builder

    b = Builder()
    y = b.add("MatMul", b.add("Add", "a", "b"), b.weight(8, 8))
    model = b.model({"a": [1, "s", 8], "b": [1, "t", 8]}, {y: [1, "u", 8]})
    onnx.save(model, tmp_path / "model.onnx")
    ran = run(
        tmp_path / "model.onnx",
        "--target-flops",
        "0.5",
        *("--input-shape", "a:1,3,8", "--input-shape", "b:1,4,8"),
    )
    assert ran.code == 3
    assert "--input-shape a:1,N,8 --input-shape b:1,N,8" in ran.err

"""Everything that runs ONNX Runtime: sessions, random inputs, interleaved timing."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from graphprune import external
from graphprune.errors import EndlessError, ModelError, UsageError
from graphprune.lookups import index_bounds
from graphprune.model import PROTOBUF_LIMIT, Array, Model
from graphprune.shapes import Shapes
from graphprune.storage import save

LARGE = 1 << 28  # bytes of weights from which a proof maps them instead of copying them
RUN_LIMIT = 1800.0  # seconds after which one run of a model is taken to be endless
Feeds = Mapping[str, Array]
# A product with weights of few bits may otherwise round its other input to 8 bits, in blocks.
IN_FLOATS = ("session.qdq_matmulnbits_accuracy_level", "1")


def session(
    model: Model,
    threads: int = 0,
    provider: str = "cpu",
    optimise: bool = True,
    precise: bool = False,
    profile: Path | None = None,
    spinning: bool = True,
) -> Any:
    """An ``InferenceSession``; 0 threads leaves the number to ONNX Runtime. ``precise`` ones round
    nothing that the model does not say. ``profile`` is how the profiler's file is to begin; it
    writes until ``end_profiling()``. Threads that are ``spinning`` wait for more work at full
    speed, at the expense of what runs between one call and the next.

    Raises ``ModelError`` with ONNX Runtime's own words where it refuses the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if precise:
        options.add_session_config_entry(*IN_FLOATS)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    # Sessions are timed in turn: one's threads must not still be waiting at full speed while
    # another's work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [provider_of(provider, ort.get_available_providers())]
    try:
        if not optimise and model.weight_bytes > LARGE:
            return _mapped_session(model, options, providers)
        if model.weight_bytes <= PROTOBUF_LIMIT:
            content = model.assemble().SerializeToString()
            return ort.InferenceSession(content, options, providers)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save(model, path)
            return ort.InferenceSession(str(path), options, providers)
    except UsageError:
        raise
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise refusal(error) from error


def refusal(error: Exception) -> ModelError:
    """ONNX Runtime's own words about a model that it makes no session of."""
    text = " ".join(str(error).split())
    return ModelError(
        f"ONNX Runtime refuses the model: {text[:400]}",
        hint="Check that it runs in ONNX Runtime; a custom operator needs its library.",
    )


def _mapped_session(model: Model, options: Any, providers: list[str]) -> Any:
    """A session whose weights stay in their files: ONNX Runtime maps them, and makes no copies."""
    import onnxruntime as ort

    options.add_session_config_entry("session.disable_prepacking", "1")
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # a weight that is cast: just then
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    folder = external.folder_of(model.initializers.values())
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / "model.onnx"
            save(replace(model, data_files=(path,)), path)
            return ort.InferenceSession(str(path), options, providers)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.closed.skeleton)
    for tensor in model.initializers.values():
        proto.graph.initializer.append(external.named_in(tensor, folder))
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(proto.SerializeToString(), options, providers)


def provider_of(name: str, available: Sequence[str]) -> str:
    wanted = {p.removesuffix("ExecutionProvider").lower(): p for p in available}
    if name.lower() not in wanted:
        raise UsageError(
            f"there is no execution provider {name!r}", hint=f"Available: {', '.join(wanted)}."
        )
    return wanted[name.lower()]


def opened(model: Model) -> Callable[[Feeds], list[Array]]:
    """The model as a function from inputs to outputs, for proofs."""
    runner = session(model, optimise=model.weight_bytes <= LARGE, precise=True)
    return lambda feeds: run_session(runner, feeds)


def _arrays(feeds: Feeds) -> dict[str, Any]:
    """What ONNX Runtime takes: numpy's scalars it does not; sequences are lists."""
    return {k: v if isinstance(v, list) else np.asarray(v) for k, v in feeds.items()}


def run_session(runner: Any, feeds: Feeds) -> list[Array]:
    """The outputs as arrays, also those that are sequences or maps."""
    return [_numbers(value) for value in run_values(runner, feeds)]


def run_values(runner: Any, feeds: Feeds) -> list[Any]:
    """The outputs as ONNX Runtime gives them: sequences are lists. Raises ``EndlessError`` where a
    run takes longer than ``RUN_LIMIT``.

    ONNX Runtime looks between any two operators, in loops too, whether it should stop.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    late = threading.Event()

    def stop() -> None:
        late.set()
        options.terminate = True

    timer = threading.Timer(RUN_LIMIT, stop)
    timer.daemon = True
    timer.start()
    try:
        return list(runner.run(None, _arrays(feeds), options))
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        if late.is_set():
            raise EndlessError(
                f"the model has run for {RUN_LIMIT:g} seconds and was stopped",
                hint="Does a Loop in it ever end? Smaller sizes (--input-shape) make runs shorter.",
            ) from error
        text = " ".join(str(error).split())
        raise ModelError(
            f"ONNX Runtime cannot run the model: {text[:400]}",
            hint=_size_hint(runner),
        ) from error
    finally:
        timer.cancel()


def _numbers(value: Any) -> Array:
    """A tensor as it is; of a sequence or a map (ZipMap's, say) the numbers in order."""
    if isinstance(value, dict):
        return np.asarray([number for _, number in sorted(value.items())], np.float32)
    if isinstance(value, list):
        parts = [_numbers(part).reshape(-1) for part in value]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)
    return np.empty(0) if value is None else np.asarray(value)


def _size_hint(runner: Any) -> str:
    """Name the inputs whose sizes the model leaves open."""
    open_inputs = [
        f"{value.name}:{','.join(str(d) if isinstance(d, int) else 'N' for d in value.shape)}"
        for value in runner.get_inputs()
        if any(not isinstance(d, int) for d in value.shape or ())
    ]
    if not open_inputs:
        return "Check that the original runs in ONNX Runtime on such inputs."
    given = " ".join(f"--input-shape {each}" for each in open_inputs)
    return f"Give sizes for the symbolic dimensions, a number for each N: {given}"


def random_inputs(model: Model, shapes: Shapes, seed: int = 0) -> dict[str, Array]:
    """Standard normal floats; bytes of any value; integers that the graph asks for, or below the
    size of the table that they index, as floats may; true."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.inputs:
        dtype = input_dtype(value)
        shape = shapes.inputs[value.name]
        bound = max(2, min(index_bounds(model, shapes, value.name), default=2))
        if dtype.kind == "f" and bound > 2:  # ids, declared as floats
            feeds[value.name] = rng.integers(0, bound, shape).astype(dtype)
        elif dtype.kind == "f":
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind in "iu" and dtype.itemsize == 1:  # pictures and quantised activations
            span = np.iinfo(dtype)
            feeds[value.name] = rng.integers(span.min, span.max, shape, dtype, endpoint=True)
        elif dtype.kind in "iu":
            feeds[value.name] = rng.integers(0, bound, shape).astype(dtype)
            if bound == 2:  # a mask, a type or a length rather than an index: ones are always safe
                feeds[value.name] = np.full(shape, asked_for(model, shapes, value.name), dtype)
        else:
            feeds[value.name] = np.ones(shape, dtype)
    return feeds


def input_dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    if not value.type.HasField("tensor_type"):
        raise ModelError(
            "an input is no tensor",
            f"input {value.name!r}",
            "Nothing can be made up for it; export the model with tensors as inputs.",
        )
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def asked_for(model: Model, shapes: Shapes, name: str) -> int:
    """The constant that an integer input is compared with (a rate, a mode), else one."""
    for i, position in model.consumers.get(name, ()):
        node = model.nodes[i]
        if node.op_type == "Equal" and not node.domain:
            constant = shapes.value.get(node.input[1 - position])
            if constant is not None and constant.size == 1:
                return int(constant.reshape(-1)[0])
    return 1


@dataclass(frozen=True)
class Timing:
    """Interleaved latencies in milliseconds, one row per round, one column per model."""

    rounds: Array  # [rounds, models]

    @property
    def median(self) -> Array:
        return np.asarray(np.median(self.rounds, axis=0))

    def ratio(self, index: int) -> tuple[float, float, float]:
        """Latency of a model over the first one's: median and quartiles of the rounds' ratios."""
        ratios = self.rounds[:, index] / self.rounds[:, 0]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        return float(middle), float(low), float(high)


def time_interleaved(
    runners: Sequence[Any], feeds: Sequence[Feeds], rounds: int = 21, budget_s: float = 10.0
) -> Timing:
    """Run the sessions in turn, round by round, so that noise meets all of them alike.

    Rounds end early (but not before five) once ``budget_s`` seconds are spent.
    """
    for runner, feed in zip(runners, feeds, strict=True):
        run_session(runner, feed)
        run_session(runner, feed)
    rows: list[list[float]] = []
    begin = time.perf_counter()
    while len(rows) < rounds and (len(rows) < 5 or time.perf_counter() - begin < budget_s):
        row = []
        for runner, feed in zip(runners, feeds, strict=True):
            start = time.perf_counter()
            runner.run(None, dict(feed))
            row.append((time.perf_counter() - start) * 1e3)
        rows.append(row)
    return Timing(np.array(rows))

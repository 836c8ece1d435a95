"""What the means of experts are worth: a trained mixture pruned with and without them.

    python -m tools.benchmark_experts FASHION.npz WORK

trains (PyTorch) small mixtures of 8 experts on pictures and labels of the file, of which all are
weighed, or the two with the largest logits, unless their weights are in the folder WORK; prunes
experts of both on 512 calibration inputs of their own (``--units experts``); and prints the squared
error of the outputs over their variance, and top-1, on inputs that neither has seen.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import numpy as np
import onnx
from onnx import numpy_helper

import graphprune
from graphprune.options import Options
from graphprune.runtime import opened
from graphprune.storage import load

EXPERTS, WIDTH, INNER, CLASSES = 8, 64, 64, 10
TRAINED, SEEN = 7000, 512  # of the file's rows; all others are held out
BUDGETS = (0.875, 0.74, 0.605)  # 2, 4 and 6 experts fewer
Arrays = dict[str, np.ndarray[Any, Any]]


def trained(images: Any, labels: Any, taken: int, seed: int) -> Arrays:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    parameters = {
        "stem": torch.randn(images.shape[1], WIDTH) / images.shape[1] ** 0.5,
        "router": torch.randn(WIDTH, EXPERTS) / 8,
        "up": torch.randn(EXPERTS, WIDTH, INNER) / 8,
        "up_bias": torch.zeros(EXPERTS, 1, INNER),
        "down": torch.randn(EXPERTS, INNER, WIDTH) / 8,
        "middle": torch.randn(WIDTH, WIDTH) / 8,
        "head": torch.randn(WIDTH, CLASSES) / 8,
    }
    p = {name: nn.Parameter(value) for name, value in parameters.items()}
    adam = torch.optim.Adam(p.values(), 1e-3)
    x, y = torch.tensor(images), torch.tensor(labels)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(100):
            h = torch.relu(x[rows] @ p["stem"])
            logits = h @ p["router"]
            if taken:
                values, numbers = logits.topk(taken, -1)
                shares = torch.zeros_like(logits).scatter(1, numbers, values.softmax(-1))
            else:
                shares = logits.softmax(-1)
            said = torch.relu(h[None] @ p["up"] + p["up_bias"]) @ p["down"]
            h = h + (shares.T[..., None] * said).sum(0)
            out = torch.relu(h @ p["middle"]) @ p["head"]
            even = EXPERTS * shares.mean(0).square().sum()
            loss = nn.functional.cross_entropy(out, y[rows]) + 0.01 * even
            adam.zero_grad()
            loss.backward()
            adam.step()
    return {name: value.detach().numpy() for name, value in p.items()}


def mixture(weights: Arrays, taken: int) -> onnx.ModelProto:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    mixture (float[n, {len(weights["stem"])}] x) => (float[n, {CLASSES}] y) {{
      h0 = MatMul(x, stem)
      h = Relu(h0)
      logits = MatMul(h, router)
      {"shares = Softmax(logits)" if not taken else ROUTED.replace("TAKEN", str(taken))}
      wide = Unsqueeze(h, zero)
      up0 = MatMul(wide, up)
      up1 = Add(up0, up_bias)
      up2 = Relu(up1)
      said = MatMul(up2, down)
      turned = Transpose<perm=[1, 0]>(shares)
      by_expert = Unsqueeze(turned, two)
      weighed = Mul(said, by_expert)
      sum = ReduceSum<keepdims=0>(weighed, zero)
      stream = Add(h, sum)
      m0 = MatMul(stream, middle)
      m = Relu(m0)
      y = MatMul(m, head)
    }}"""
    model = onnx.parser.parse_model(text)
    more = {"zero": np.array([0]), "two": np.array([2])}
    for name, value in {**weights, **more}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model)
    return model


ROUTED = """count = Constant<value = int64[1] {TAKEN}>()
      values, numbers = TopK(logits, count)
      some = Softmax(values)
      zeros = Sub(logits, logits)
      shares = ScatterElements<axis=1>(zeros, numbers, some)"""


def judged(model: onnx.ModelProto, images: Any, labels: Any, wanted: Any) -> tuple[float, float]:
    got = opened(load(model))({"x": images})[0]
    error = np.square(got - wanted).sum() / np.square(wanted - wanted.mean(axis=0)).sum()
    return float(error), float((got.argmax(axis=1) == labels).mean())


def main() -> None:
    data = np.load(sys.argv[1])
    images, labels = (data[name] for name in data.files[:2])
    images = images.reshape(len(images), -1).astype(np.float32)
    images = (images - images.mean()) / images.std()
    labels = labels.reshape(-1).astype(np.int64)
    first, last = TRAINED, TRAINED + SEEN
    work = Path(sys.argv[2])
    for taken in (0, 2):
        for seed in range(3):
            path = work / f"{taken}_{seed}.npz"
            if not path.exists():
                np.savez(path, **trained(images[:first], labels[:first], taken, seed))
    print("| experts | parameters | seed | router's place leaves | means stay |")
    print("|---|---|---|---|---|")
    for taken in (0, 2):
        for seed in range(3):
            model = mixture(dict(np.load(work / f"{taken}_{seed}.npz")), taken)
            held = images[last:], labels[last:]
            wanted = opened(load(model))({"x": held[0]})[0]
            dense = judged(model, *held, wanted)[1]
            for budget in BUDGETS:
                row = [
                    judged(pruned(model, images[first:last], budget, means), *held, wanted)
                    for means in (False, True)
                ]
                said = " | ".join(f"{error:.4f}, {100 * right:.1f}" for error, right in row)
                kind = f"{taken} of {EXPERTS}" if taken else f"all {EXPERTS}"
                print(f"| {kind}, {100 * dense:.1f} | {budget} | {seed} | {said} |", flush=True)


def pruned(model: onnx.ModelProto, inputs: Any, budget: float, means: bool) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        calib = Path(folder) / "calib.npz"
        np.savez(calib, x=inputs)
        options = {"units": ("experts",), "measure": False, "cache": False, "refine": 0}
        if means:
            return graphprune.prune(model, params=budget, calib=calib, **options).model
        with patch.object(Options, "keeps_means", PropertyMock(return_value=False)):
            return graphprune.prune(model, params=budget, calib=calib, **options).model


if __name__ == "__main__":
    main()

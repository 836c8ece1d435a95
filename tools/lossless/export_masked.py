"""Networks that torch.nn.utils.prune has masked, exported: run by an interpreter that has torch.

    python tools/lossless/export_masked.py FOLDER

Weights are random and BatchNormalization's statistics those of noise: what is shown is what becomes
of masks, not of accuracy.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

SHARE = 0.5


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.short = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks = []
        for i in range(4):
            blocks += [
                Block(widths[i], widths[i + 1], 1 + (i > 0)),
                Block(widths[i + 1], widths[i + 1], 1),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, width = x.shape
        q, k, v = (
            f(x).reshape(n, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        scores = torch.softmax(q @ k.transpose(2, 3) * (width // self.heads) ** -0.5, -1)
        x = self.norm1(x + self.o((scores @ v).transpose(1, 2).reshape(n, s, width)))
        return self.norm2(x + self.outer(nn.functional.gelu(self.inner(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int = 6, width: int = 384, heads: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def masked_resnet(permanent: bool) -> nn.Module:
    """Half of the filters of every block's first convolution, by their L2 norm."""
    model = ResNet18().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0, 0.2)
        for _ in range(3):
            model(torch.randn(4, 3, 96, 96))
    for block in model.blocks:
        prune.ln_structured(block.conv1, "weight", amount=SHARE, n=2, dim=0)
        if permanent:
            prune.remove(block.conv1, "weight")
    return model.eval()


def masked_transformer(permanent: bool) -> nn.Module:
    """Half of the heads (their values and what reads them) and of the feed-forward channels."""
    model = Transformer()
    for layer in model.layers:
        width = layer.q.in_features
        gone = torch.randperm(layer.heads)[: int(SHARE * layer.heads)]
        mask = torch.ones(layer.heads, width // layer.heads)
        mask[gone] = 0
        rows = mask.reshape(-1, 1).expand(width, width)
        _mask(layer.v, "weight", rows, permanent)
        _mask(layer.o, "weight", rows.T, permanent)
        prune.ln_structured(layer.inner, "weight", amount=SHARE, n=2, dim=0)
        if permanent:
            prune.remove(layer.inner, "weight")
    return model.eval()


def masked_recurrent(permanent: bool) -> nn.Module:
    """Half of the hidden units of both layers: all gates, weights and biases."""
    model = Recurrent()
    lstm = model.lstm
    for level in range(lstm.num_layers):
        keep = torch.ones(lstm.hidden_size)
        keep[torch.randperm(lstm.hidden_size)[: int(SHARE * lstm.hidden_size)]] = 0
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            tensor = getattr(lstm, f"{name}_l{level}")
            rows = keep.repeat(4).reshape(-1, *[1] * (tensor.dim() - 1))
            with torch.no_grad():  # what nn.LSTM runs on are its own flat weights
                tensor.mul_(rows.expand_as(tensor))
    return model.eval()


def _mask(module: nn.Module, name: str, mask: torch.Tensor, permanent: bool) -> None:
    prune.custom_from_mask(module, name, mask)
    if permanent:
        prune.remove(module, name)


def export(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    settings: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (example,), str(path), opset_version=17, do_constant_folding=False, **settings
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cases = {
        "resnet18": (masked_resnet, torch.randn(1, 3, 224, 224)),
        "transformer": (masked_transformer, torch.randn(1, 64, 384)),
    }
    for name, (make, example) in cases.items():
        for permanent in (True, False):
            torch.manual_seed(0)
            kind = "zeroed" if permanent else "masked"
            export(make(permanent), example, folder / f"{name}.{kind}.onnx")
    torch.manual_seed(0)
    export(masked_recurrent(True), torch.randn(1, 32, 64), folder / "lstm.zeroed.onnx")


if __name__ == "__main__":
    main()

"""Train the small residual network on Fashion-MNIST that the repository ships as an ONNX file.

    python tools/train_fashion.py --epochs 16 --seed 0 --out models

writes ``fashion_resnet.onnx`` (the network, opset 17, BatchNormalization kept as nodes) and
``fashion_test.npz`` (the first 1,000 test pictures with their labels) into ``--out``, then prints
the accuracy of both the PyTorch network and the exported file over all 10,000 test pictures.

The data is Fashion-MNIST (Zalando SE, MIT licence), read from the four gzipped IDX files of the
Debian package ``dataset-fashion-mnist``. The last epoch's weights are the ones exported: the test
pictures play no part in training or in choosing a network.

Only this script needs PyTorch (2.13.0, with onnx and onnxruntime); graphprune itself does not.
"""

import argparse
import gzip
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
SIDE = 28
PAD = 2
BATCH = 128
EVAL_BATCH = 500
SHIPPED_PICTURES = 1000


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class FashionResNet(nn.Module):
    """Three stages of residual blocks, global average pooling and one linear layer.

    The input is raw pixels, 0 to 255: the stem's BatchNorm absorbs their scale, so that no
    normalisation is needed in front of the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.stage1 = nn.Sequential(Block(32, 32, 1))
        self.stage2 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1))
        self.stage3 = nn.Sequential(Block(64, 128, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(image)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return logits


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array in a gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape.tolist())


def load(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The pictures [N,1,28,28] and labels [N] of one part, ``train`` or ``t10k``."""
    pictures = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return pictures.reshape(-1, 1, SIDE, SIDE), labels.astype(np.int64)


def augmented(pictures: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches, each picture cropped from its padding and maybe mirrored."""
    padded = functional.pad(pictures[:, 0], (PAD, PAD, PAD, PAD))
    window = torch.arange(SIDE)
    for chosen in torch.split(torch.randperm(len(pictures)), BATCH):
        top, left = torch.randint(2 * PAD + 1, (2, len(chosen), 1))
        mirrored = torch.rand(len(chosen), 1) < 0.5
        rows = top + window
        columns = left + torch.where(mirrored, window.flip(0), window)
        crop = padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        yield crop[:, None].float(), labels[chosen]


def train(net: FashionResNet, pictures: Tensor, labels: Tensor, epochs: int) -> None:
    """SGD on a one-cycle schedule with label smoothing, under bfloat16 autocast."""
    steps = epochs * -(-len(pictures) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    net.train()
    for epoch in range(1, epochs + 1):
        start, total = time.monotonic(), 0.0
        for image, label in augmented(pictures, labels):
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(image.to(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), label, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item() * len(label)
        seconds = time.monotonic() - start
        print(f"epoch {epoch:2d}  loss {total / len(pictures):.4f}  {seconds:.0f} s", flush=True)
    net.eval()


def export(net: FashionResNet, path: Path) -> None:
    """Write the network with its BatchNormalization nodes in place, in inference mode."""
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, SIDE, SIDE),),
        path,
        dynamo=False,
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    unshare_weights(path)


def unshare_weights(path: Path) -> None:
    """Store each weight as an initialiser, also those the exporter shares through an Identity.

    The last bias of a block and that of its 1x1 shortcut are added, so they train alike, and the
    exporter keeps only one of two equal tensors.
    """
    model = onnx.load(path)
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Identity" and n.input[0] in weights]:
        copy = graph.initializer.add()
        copy.CopyFrom(weights[node.input[0]])
        copy.name = node.output[0]
        graph.node.remove(node)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def torch_classes(net: FashionResNet, pictures: Tensor) -> npt.NDArray[np.int64]:
    """The class PyTorch gives each picture."""
    with torch.inference_mode():
        found = [net(batch.float()).argmax(1) for batch in torch.split(pictures, EVAL_BATCH)]
    return np.asarray(torch.cat(found).numpy(), np.int64)


def onnx_classes(path: Path, pictures: Tensor) -> npt.NDArray[np.int64]:
    """The class ONNX Runtime gives each picture."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = [batch.float().numpy() for batch in torch.split(pictures, EVAL_BATCH)]
    return np.concatenate([session.run(None, {"image": b})[0].argmax(1) for b in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the Fashion-MNIST network.")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to write into")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pictures, labels = load(args.data, "train")
    test_pictures, test_labels = load(args.data, "t10k")

    net = FashionResNet()
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
    start = time.monotonic()
    train(net, torch.tensor(pictures), torch.tensor(labels), args.epochs)
    print(f"trained in {(time.monotonic() - start) / 60:.1f} min")

    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / "fashion_resnet.onnx"
    export(net, model)
    np.savez_compressed(
        args.out / "fashion_test.npz",
        image=test_pictures[:SHIPPED_PICTURES],
        labels=test_labels[:SHIPPED_PICTURES],
    )

    images = torch.tensor(test_pictures)
    answers = {"torch": torch_classes(net, images), "onnx": onnx_classes(model, images)}
    for name, found in answers.items():
        right = found == test_labels
        print(
            f"{name:5s}  accuracy {right.mean():.2%} on all {len(right):,} test pictures, "
            f"{right[:SHIPPED_PICTURES].mean():.2%} on the first {SHIPPED_PICTURES:,}"
        )


if __name__ == "__main__":
    main()

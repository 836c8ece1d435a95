"""Write every data file and exported model of the accuracy table into a work folder.

    python -m tools.accuracy.prepare WORK [--shared ../shared] [--fashion FOLDER] [--only cifar,…]

Run from the repository, in an environment with PyTorch (tools/benchmark_accuracy.py makes
one). A part whose files all exist is left alone. Calibration and evaluation never share a sample:

| part | calibration | evaluation |
|---|---|---|
| cifar | the first 512 of `x_calib` (training pictures) | the 5,000 test pictures |
| fashion | 512 training pictures, drawn with seed 0 | the 10,000 test pictures |
| imagenet | 200 of 500 pictures: places 1 and 3 of every five | the other 300 |
| banking77 | 200 sentences of train, none of the 4,000 | fitted on 4,000 of train, all of test |

Every `.npz` of calibration inputs holds arrays named by graph input; the evaluation files hold
`labels` as well.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.accuracy.export_models import export_efficientnet, export_minilm, minilm_folder
from tools.train_fashion import load as load_fashion

Arrays = dict[str, npt.NDArray[np.generic]]

FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR_MEAN, CIFAR_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLES = 512  # calibration pictures of the small models
QUICK = 1000  # labelled samples of the files for a quick look
CALIBRATION_PLACES = (1, 3)  # of every five ImageNet pictures
FITTED, SENTENCES = 4000, 200
LENGTH = 64  # tokens; 99.7 % of the sentences are no longer
CALIBRATION_LENGTH = 32  # 93 % are no longer, and half of the tokens are padding already


def spread(rows: Any, count: int = QUICK) -> Any:
    """``count`` rows evenly over all of them, which may be sorted by class."""
    return rows[np.arange(count) * len(rows) // count]


@dataclass(frozen=True)
class Sources:
    """Where the samples come from."""

    shared: Path
    fashion: Path


def write_cifar(work: Path, sources: Sources) -> None:
    with np.load(sources.shared / "data" / "cifar10_jpeg.npz") as archive:
        pictures, labels = cifar_input(archive["x_test"]), archive["y_test"]
        calibration = cifar_input(spread(archive["x_calib"], SAMPLES))
    save(work / "cifar_calib.npz", {"x": calibration})
    save(work / "cifar_test_1000.npz", {"x": spread(pictures), "labels": spread(labels)})
    save(work / "cifar_test.npz", {"x": pictures, "labels": labels})


def cifar_input(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[N,32,32,3] bytes → [N,3,32,32], normalised as the networks were trained."""
    scaled = (pictures / 255 - CIFAR_MEAN) / CIFAR_DEVIATION
    return scaled.transpose(0, 3, 1, 2).astype(np.float32)


def write_fashion(work: Path, sources: Sources) -> None:
    training, _ = load_fashion(sources.fashion, "train")
    pictures, labels = load_fashion(sources.fashion, "t10k")
    chosen = np.sort(np.random.default_rng(0).choice(len(training), SAMPLES, replace=False))
    tested: Arrays = {"image": pictures.astype(np.float32), "labels": labels}
    save(work / "fashion_calib.npz", {"image": training[chosen].astype(np.float32)})
    save(work / "fashion_test_1000.npz", {name: spread(a) for name, a in tested.items()})
    save(work / "fashion_test.npz", tested)


def write_imagenet(work: Path, sources: Sources) -> None:
    paths = sorted((sources.shared / "data" / "imagenet-sample").glob("*.jpg"))
    pictures = np.stack([imagenet_input(path) for path in paths])
    labels = np.array([int(path.name[:4]) for path in paths])
    calibrating = np.isin(np.arange(len(paths)) % 5, CALIBRATION_PLACES)
    save(work / "imagenet_calib.npz", {"x": pictures[calibrating]})
    save(work / "imagenet_test.npz", {"x": pictures[~calibrating], "labels": labels[~calibrating]})


def imagenet_input(path: Path) -> npt.NDArray[np.float32]:
    """[3,224,224], (byte − 127) / 128: what EfficientNet-Lite was trained with."""
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), np.float32)
    return ((pixels - np.float32(127)) / np.float32(128)).transpose(2, 0, 1)


def write_banking77(work: Path, sources: Sources) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    texts, intents = read_intents(sources.shared / "data" / "banking77_train.csv")
    tested = read_intents(sources.shared / "data" / "banking77_test.csv")
    number = {name: i for i, name in enumerate(sorted(set(intents)))}
    order = np.random.default_rng(0).permutation(len(texts))
    calibrating = [texts[i] for i in order[FITTED : FITTED + SENTENCES]]
    fitted = [texts[i] for i in order[:FITTED]], [intents[i] for i in order[:FITTED]]

    tokens = token_input(tokenizer, calibrating, CALIBRATION_LENGTH)
    save(work / "banking77_calib.npz", tokens)
    for name, (sentences, kinds) in (("train", fitted), ("test", tested)):
        tokens = token_input(tokenizer, sentences, LENGTH)
        labels = np.array([number[kind] for kind in kinds])
        save(work / f"banking77_{name}.npz", {**tokens, "labels": labels})


def read_intents(path: Path) -> tuple[list[str], list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def token_input(tokenizer: Any, texts: list[str], length: int) -> Arrays:
    """The three int64 inputs [N, length] of a BERT, cut and padded."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }


def save(path: Path, arrays: Arrays) -> None:
    """Write all of the file or nothing: an interrupted run must not look like a finished one."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(path)
    print(f"{path.name}: " + ", ".join(f"{n} {list(a.shape)}" for n, a in arrays.items()))


def export_both_efficientnets(work: Path, sources: Sources) -> None:
    for name, kept in (("efficientnet_lite0", False), ("efficientnet_lite0_bn", True)):
        partial = work / f"{name}.partial.onnx"
        export_efficientnet(partial, keep_batch_norm=kept)
        partial.rename(work / f"{name}.onnx")


def export_text_model(work: Path, sources: Sources) -> None:
    partial = work / "minilm_l6.partial.onnx"
    export_minilm(partial, CALIBRATION_LENGTH)
    partial.rename(work / "minilm_l6.onnx")


@dataclass(frozen=True)
class Part:
    """One step: the files it leaves, the last one last."""

    name: str
    files: tuple[str, ...]
    write: Callable[[Path, Sources], None]


PARTS = (
    Part("cifar", ("cifar_calib.npz", "cifar_test_1000.npz", "cifar_test.npz"), write_cifar),
    Part(
        "fashion", ("fashion_calib.npz", "fashion_test_1000.npz", "fashion_test.npz"), write_fashion
    ),
    Part("imagenet", ("imagenet_calib.npz", "imagenet_test.npz"), write_imagenet),
    Part(
        "banking77",
        ("banking77_calib.npz", "banking77_train.npz", "banking77_test.npz"),
        write_banking77,
    ),
    Part(
        "efficientnet",
        ("efficientnet_lite0.onnx", "efficientnet_lite0_bn.onnx"),
        export_both_efficientnets,
    ),
    Part("minilm", ("minilm_l6.onnx",), export_text_model),
)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("work", type=Path, help="folder to write into")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--fashion", type=Path, default=FASHION)
    parser.add_argument("--only", default="", help="comma-separated parts")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    arguments.work.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if only and part.name not in only:
            continue
        if all((arguments.work / file).exists() for file in part.files):
            continue
        part.write(arguments.work, Sources(arguments.shared, arguments.fashion))


if __name__ == "__main__":
    main()

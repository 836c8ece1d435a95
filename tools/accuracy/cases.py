"""What the accuracy table holds: models, methods, peers and goals, in flat tables."""

from dataclasses import dataclass, replace

PLAIN, TUNED = ("--refine", "0"), ("--refine", "80")
PLOT_RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Case:
    """A model and its data. Paths may name {shared}, {root} and {work}.

    data: labelled .npz, or the work folder, which means Banking77; quick: a smaller one.
    shapes: sizes of symbolic inputs for graphprune; peer_shapes: for the peers, whose files are
    fixed to them. ratios: MACs kept in the table; plotted: in the plot.
    """

    name: str
    title: str
    model: str
    calibration: str
    data: str
    quick: str
    shapes: tuple[str, ...]
    peer_shapes: tuple[str, ...]
    ratios: tuple[float, ...]
    plotted: tuple[float, ...] = PLOT_RATIOS


@dataclass(frozen=True)
class Method:
    """A way to prune with graphprune: command-line arguments beside the budget."""

    name: str
    title: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """Another tool: a module that takes IN.onnx OUT.onnx --target-macs R."""

    name: str
    title: str
    module: str


@dataclass(frozen=True)
class Goal:
    """Top-1 in percent that a method must (floor) and should (goal) reach.

    Numbers below zero are points from the dense model.
    """

    cases: tuple[str, ...]
    ratio: float
    method: str
    floor: float
    goal: float


def _cifar(name: str, title: str, ratios: tuple[float, ...]) -> Case:
    return Case(
        name,
        title,
        f"{{shared}}/models/{name}.onnx",
        "{work}/cifar_calib.npz",
        "{work}/cifar_test.npz",
        "{work}/cifar_test_1000.npz",
        (),
        ("x:1,3,32,32",),
        ratios,
    )


def _imagenet(name: str, title: str) -> Case:
    return Case(
        name,
        title,
        f"{{work}}/{name}.onnx",
        "{work}/imagenet_calib.npz",
        "{work}/imagenet_test.npz",
        "{work}/imagenet_test.npz",
        (),
        ("x:1,3,224,224",),
        (0.8,),
        (0.5, 0.6, 0.7, 0.8, 0.9),
    )


def _tokens(length: int) -> tuple[str, ...]:
    return tuple(f"{name}:1,{length}" for name in ("input_ids", "attention_mask", "token_type_ids"))


CASES = (
    _cifar("resnet56_cifar10_bn", "ResNet-56 CIFAR-10, BN kept", (0.7, 0.5)),
    _cifar("resnet56_cifar10", "ResNet-56 CIFAR-10, BN folded", (0.7, 0.5)),
    _cifar("resnet20_cifar10_bn", "ResNet-20 CIFAR-10, BN kept", (0.7,)),
    _cifar("resnet20_cifar10", "ResNet-20 CIFAR-10, BN folded", (0.7,)),
    _imagenet("efficientnet_lite0_bn", "EfficientNet-Lite0, BN kept"),
    _imagenet("efficientnet_lite0", "EfficientNet-Lite0, BN folded"),
    Case(
        "minilm_l6",
        "MiniLM-L6, Banking77",
        "{work}/minilm_l6.onnx",
        "{work}/banking77_calib.npz",
        "{work}",
        "{work}",
        _tokens(32),
        _tokens(64),
        (0.7,),
        (0.5, 0.6, 0.7, 0.8, 0.9),
    ),
    Case(
        "fashion_resnet",
        "Fashion-MNIST ResNet, BN kept",
        "{root}/models/fashion_resnet.onnx",
        "{work}/fashion_calib.npz",
        "{work}/fashion_test.npz",
        "{work}/fashion_test_1000.npz",
        (),
        ("image:1,1,28,28",),
        (0.5,),
    ),
)

METHODS = (
    Method("obspa-real", "obspa, real data", ("--calib", "{calibration}")),
    Method("obspa-free", "obspa, no data", ()),
    Method("plain-real", "obspa, real data, --refine 0", ("--calib", "{calibration}", *PLAIN)),
    Method("tuned-free", "obspa, no data, --refine 80", TUNED),
    Method("fast", "fast (weights only)", ("--fast",)),
    Method("l1", "L1 without repair", ("--criterion", "l1", "--repair", "none")),
)

PEERS = (
    Peer("torch-pruning", "Torch-Pruning, L1", "tools.accuracy.run_torch_pruning"),
    Peer("onnxsim", "onnxsim, L1", "tools.peers.run_onnxsim"),
)

_R56 = ("resnet56_cifar10_bn", "resnet56_cifar10")
_R20 = ("resnet20_cifar10_bn", "resnet20_cifar10")
_LITE = ("efficientnet_lite0_bn", "efficientnet_lite0")

GOALS = (
    Goal(_R56, 0.7, "obspa-real", 81.5, 83),
    Goal(_R56[:1], 0.7, "obspa-free", 81, 83),
    Goal(_R56[1:], 0.7, "obspa-free", 80, 82),
    Goal(_R56, 0.5, "obspa-real", 77, 81),
    Goal(_R56[:1], 0.5, "obspa-free", 76, 81),
    Goal(_R56[1:], 0.5, "obspa-free", 69, 78),
    Goal(_R20, 0.7, "obspa-real", 77, 80),
    Goal(_R20[:1], 0.7, "obspa-free", 76, 80),
    Goal(_R20[1:], 0.7, "obspa-free", 74, 79),
    Goal(_LITE, 0.8, "obspa-real", 78, 85),
    Goal(_LITE[:1], 0.8, "obspa-free", 74, 84),
    Goal(_LITE[1:], 0.8, "obspa-free", 66, 80),
    Goal(("minilm_l6",), 0.7, "obspa-real", 89, 91.5),
    Goal(("minilm_l6",), 0.7, "obspa-free", 85, 90),
    Goal(("fashion_resnet",), 0.5, "obspa-real", -1.5, -0.3),
    Goal(("fashion_resnet",), 0.5, "obspa-free", -4, -1),
)

OTHERS = {"obspa-real": "plain-real", "obspa-free": "tuned-free"}
GOALS += tuple(replace(goal, method=OTHERS[goal.method]) for goal in GOALS)

TWINS = (_R56, _R20)  # BN kept and folded: with real data they must agree
TWINS_AGREE = 1.0  # points

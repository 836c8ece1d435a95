"""Small torch networks, one for each structure that model collections of transformers lack."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, BatchNorm, ReLU."""
    pad = size // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, pad, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def classifier(channels: int, *body: nn.Module) -> nn.Module:
    """Stem, body, pool, linear: [n, 3, h, w] → [n, 10]."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(conv(3, 64, stride=2), *body, pool, nn.Linear(channels, 10))


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Branches(nn.Module):
    """Outputs of several branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Shuffle(nn.Module):
    """Channels of all groups interleaved."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.view(n, self.groups, c // self.groups, h, w)
        return parts.transpose(1, 2).reshape(n, c, h, w)


class ShuffleSplit(nn.Module):
    """ShuffleNet v2: half of the channels pass by, then both are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.body = nn.Sequential(conv(half, half, 1), depthwise, conv(half, half, 1))
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.shuffle(torch.cat([a, self.body(b)], 1))


class SqueezeExcite(nn.Module):
    """Channels scaled by a small network on their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, channels // 4)
        self.up = nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        s = functional.silu(self.down(x.mean((2, 3))))
        return x * functional.hardsigmoid(self.up(s))[:, :, None, None]


class CRNN(nn.Module):
    """Convolutions, columns as a sequence, a two-way LSTM, a linear layer over each step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(1, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d((2, 1)), conv(64, 64)
        )
        self.lstm = nn.LSTM(64 * 4, 64, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x.permute(0, 3, 1, 2).flatten(2)
        return self.head(self.lstm(x)[0]).log_softmax(-1)


class UNet(nn.Module):
    """Down, up by transposed convolution, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 32), conv(32, 64, stride=2), conv(64, 128, stride=2)
        self.up = nn.ConvTranspose2d(128, 64, 2, 2)
        self.d = conv(128, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, 2, groups=4)
        self.e, self.head = conv(64, 32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        d = self.d(torch.cat([self.up(self.c(b)), b], 1))
        return self.head(self.e(torch.cat([self.up2(d), a], 1)))


class C2f(nn.Module):
    """Chunk in two, a growing list of bottlenecks, all concatenated."""

    def __init__(self, inputs: int, outputs: int, n: int = 2) -> None:
        super().__init__()
        half = outputs // 2
        self.first = nn.Conv2d(inputs, outputs, 1)
        self.last = nn.Conv2d((2 + n) * half, outputs, 1)
        self.body = nn.ModuleList(Residual(conv(half, half), conv(half, half)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        pieces = list(self.first(x).chunk(2, 1))
        for block in self.body:
            pieces.append(block(pieces[-1]))
        return self.last(torch.cat(pieces, 1))


class Yolo(nn.Module):
    """Two scales, a neck that goes up and down again, anchors decoded from a 5-D view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 32, stride=2), C2f(32, 64), conv(64, 64, stride=2)
        self.d, self.e = C2f(64, 96), C2f(160, 64)
        self.down, self.f = conv(64, 64, stride=2), C2f(160, 96)
        self.heads = nn.ModuleList([nn.Conv2d(64, 3 * 9, 1), nn.Conv2d(96, 3 * 9, 1)])
        self.up = nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        p = self.b(self.a(x))
        q = self.d(self.c(p))
        n1 = self.e(torch.cat([self.up(q), p], 1))
        n2 = self.f(torch.cat([self.down(n1), q], 1))
        return torch.cat(
            [self._decoded(h(y)) for h, y in zip(self.heads, (n1, n2), strict=True)], 1
        )

    def _decoded(self, y: Tensor) -> Tensor:
        n, _, h, w = y.shape
        y = y.view(n, 3, 9, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        xy, size, score = y.split((2, 2, 5), -1)
        return torch.cat([xy * 2 - 0.5, (size * 2) ** 2, score], -1).reshape(n, -1, 9)


class RMS(nn.Module):
    """Root-mean-square normalisation over the last axis, as decoders write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class SwiGLU(nn.Module):
    """Tokens, two gated feed-forward blocks (separate and packed gates) with RMS norms, logits."""

    def __init__(self, width: int = 64, inner: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, width)
        self.norm1, self.norm2 = RMS(width), RMS(width)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.both = nn.Linear(width, 2 * inner)
        self.down, self.down2 = nn.Linear(inner, width), nn.Linear(inner, width)
        self.head = nn.Linear(width, 200)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm1(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        g, u = self.both(self.norm2(x)).chunk(2, -1)
        return self.head(x + self.down2(functional.gelu(g) * u))


class PixelShuffler(nn.Module):
    """Super-resolution: convolutions, then channels become pixels, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 64), conv(64, 64), nn.Conv2d(64, 128, 3, padding=1))
        self.up, self.down = nn.PixelShuffle(2), nn.PixelUnshuffle(2)
        self.mid, self.last = conv(32, 32), nn.Conv2d(128, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.last(self.down(self.mid(self.up(self.body(x))))))


class Waves(nn.Module):
    """1-D convolutions with weight normalisation, a gated unit and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = weight_norm(nn.Conv1d(1, 64, 7, padding=3))
        self.b = weight_norm(nn.Conv1d(64, 128, 3, padding=2, dilation=2))
        self.c = weight_norm(nn.Conv1d(64, 64, 1))
        self.up = weight_norm(nn.ConvTranspose1d(64, 32, 4, 2, 1))
        self.last = nn.Conv1d(32, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.a(x), 0.1)
        gate, value = self.b(x).chunk(2, 1)
        x = x + self.c(torch.tanh(gate) * torch.sigmoid(value))
        return torch.tanh(self.last(functional.elu(self.up(x))))


def group_norm(channels: int) -> nn.Module:
    return Residual(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels),
    )


def inception() -> nn.Module:
    """Branches of several kernels, one of them factorised and one pooled."""
    tall = nn.Conv2d(32, 32, (7, 1), padding=(3, 0))
    return classifier(
        112,
        Branches(
            conv(64, 32, 1),
            nn.Sequential(conv(64, 32, 1), nn.Conv2d(32, 32, (1, 7), padding=(0, 3)), tall),
            nn.Sequential(conv(64, 16, 1), conv(16, 32), conv(32, 32)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(64, 16, 1)),
        ),
    )


def resnext() -> nn.Module:
    block = (conv(64, 128, 1), conv(128, 128, groups=16), nn.Conv2d(128, 64, 1))
    again = (conv(64, 128, 1), conv(128, 128, groups=16), nn.Conv2d(128, 64, 1))
    return classifier(64, Residual(*block), Residual(*again))


def shuffle_v1() -> nn.Module:
    def block() -> nn.Module:
        depthwise = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        return Residual(conv(96, 96, 1, groups=3), Shuffle(3), depthwise, conv(96, 96, 1, groups=3))

    return classifier(96, conv(64, 96), block(), block())


def volumes() -> nn.Module:
    """3-D convolutions on a short film."""
    return nn.Sequential(
        nn.Conv3d(3, 32, 3, padding=1),
        nn.BatchNorm3d(32),
        nn.ReLU(),
        nn.Conv3d(32, 64, (1, 3, 3), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0)),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Recurrent(nn.Module):
    """Stacked GRU and a plain RNN over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(32, 64, 2, batch_first=True)
        self.rnn = nn.RNN(64, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.gru(x)[0])[0][:, -1])


def torch_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(64, 10))


def upsampled() -> nn.Module:
    """Interpolations of each kind between convolutions, instance norm, PReLU."""
    return nn.Sequential(
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 48, 3),
        nn.InstanceNorm2d(48, affine=True),
        nn.PReLU(48),
        nn.Upsample(scale_factor=2.0, mode="bilinear"),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.Hardswish(),
        nn.Upsample(size=(24, 24), mode="bicubic"),
        nn.Conv2d(48, 3, 3, padding=1),
    )


def depthwise_twice() -> nn.Module:
    """Depthwise convolution with two filters per channel, and squeeze-and-excitation."""
    return classifier(
        64,
        conv(64, 64, 1),
        nn.Conv2d(64, 128, 3, padding=1, groups=64),
        nn.Hardswish(),
        SqueezeExcite(128),
        conv(128, 64, 1),
    )


PICTURE = (2, 3, 32, 32)
MODULES = {
    "resnext": (resnext, PICTURE),
    "inception": (inception, PICTURE),
    "groupnorm_resnet": (lambda: classifier(64, group_norm(64), group_norm(64)), PICTURE),
    "shufflenet_v1": (shuffle_v1, PICTURE),
    "shufflenet_v2": (lambda: classifier(64, ShuffleSplit(64), ShuffleSplit(64)), PICTURE),
    "crnn": (CRNN, (2, 1, 16, 64)),
    "unet": (UNet, PICTURE),
    "yolo_c2f": (Yolo, (2, 3, 64, 64)),
    "depthwise_twice": (depthwise_twice, PICTURE),
    "pixel_shuffle": (PixelShuffler, PICTURE),
    "waves": (Waves, (2, 1, 64)),
    "volumes": (volumes, (2, 3, 4, 16, 16)),
    "upsampled": (upsampled, (2, 3, 16, 16)),
    "recurrent": (Recurrent, (2, 12, 32)),
    "torch_transformer": (torch_transformer, (2, 12, 64)),
    "swiglu": (SwiGLU, (2, 12)),
}

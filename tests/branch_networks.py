"""Small networks whose layers get branches, and branches with random values in student and teacher alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from zoo import Tied, sample

import reparam
from reparam.coverage.weights import randomise
from reparam.ops.block import wide_tensors
from reparam.passes.blocks import around, path_of
from reparam.passes.teacher import Teacher


class Cnn(nn.Module):
    """Convolutions with a norm, with a bias, with both; a residual, a stride, 5 taps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.down_norm = nn.BatchNorm2d(12)
        self.large = nn.Conv2d(12, 12, 5, padding=2, bias=False)
        self.large_norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x))
        x = torch.relu(self.down_norm(self.down(x)))
        return self.head(torch.relu(self.large_norm(self.large(x))).mean((2, 3)))


class Depthwise(nn.Module):
    """MobileNet's blocks; a depthwise layer that doubles its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.point = nn.Conv2d(6, 6, 1)
        self.twice = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.point(torch.relu(self.norm(self.deep(x))))
        return self.head(torch.relu(self.twice(x)))


class Grouped(nn.Module):
    """A ResNeXt bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.reduce = nn.Conv2d(8, 16, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.groups = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.norm1(self.reduce(x)))
        y = torch.relu(self.norm2(self.groups(y)))
        return self.head(torch.relu(x + self.expand(y)).mean((2, 3)))


class Rvt(nn.Module):
    """A robust vision transformer's block: attention, and a depthwise convolution on the grid of tokens."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.bn1 = nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.deep, self.bn2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.BatchNorm2d(2 * width)
        self.fc2 = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        y = self.norm2(x).transpose(1, 2).reshape(b, c, n // side, side)
        y = nn.functional.gelu(self.bn1(self.fc1(y)))
        y = self.fc2(nn.functional.gelu(self.bn2(self.deep(y))))
        return self.head((x + y.flatten(2).transpose(1, 2)).mean(1))


class Signal(nn.Module):
    """1-D, dilated, with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, padding=1)
        self.wide = nn.Conv1d(6, 12, 3, padding=4, dilation=4, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Conv1d(6, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        a, b = self.norm(self.wide(x)).chunk(2, 1)
        return self.head(x + a * torch.sigmoid(b))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU())
        self.body = nn.Conv3d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3, 4)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)
        )


class Net(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    recipes: tuple[str, ...]
    """A recipe is written for all layers that it fits; ``pattern=recipe`` for those of the pattern."""


IMAGE = (4, 3, 8, 8)
NETS = {
    "cnn": Net(Cnn, IMAGE, ("orepa", "acb", "dbb", "repvgg", "mobileone", "expandnet:rate=2")),
    "depthwise": Net(Depthwise, IMAGE, ("orepa", "dbb", "mobileone")),
    "grouped": Net(Grouped, IMAGE, ("orepa:pointwise=released", "orepa", "dbb", "acb")),
    "rvt": Net(Rvt, (2, 3, 24, 24), ("orepa", "dbb", "repvgg")),
    "signal": Net(Signal, (2, 2, 16), ("orepa", "dbb")),
    "volume": Net(Volume, (2, 1, 5, 5, 5), ("orepa:branches=4", "acb", "repvgg")),
    "mlp": Net(Mlp, (8, 10), ("re:.*=expandnet", "re:.*=expandnet:rate=2")),
    "tied": Net(Tied, (2, 3, 8, 8), ("orepa", "repvgg", "dbb")),
}


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(NETS[name].build().to(dtype), seed).eval()


def batch(name: str, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return sample(NETS[name].shape, seed, dtype)


def branched(name: str, recipe: Any, ratio: Any = 2, dtype: torch.dtype = torch.float64, **more: Any) -> Teacher:
    torch.manual_seed(0)
    model = made(name, dtype)
    if isinstance(recipe, str) and recipe.startswith("re:"):
        pattern, _, recipe = recipe.partition("=")
        recipe = {pattern: recipe}
    return reparam.expand(model, ratio, branches=recipe, example_input=batch(name, dtype=dtype), **more)


def waken(teacher: Teacher, seed: int = 0) -> None:
    """Give all branches random values, the teacher the student's widened: both compute one function still."""
    generator = torch.Generator().manual_seed(seed)
    state = teacher.state_dict()
    torch.manual_seed(seed)
    for branch in teacher.plan.branches:
        expression, path = branch.recipe.expression(branch.site), path_of(branch)
        tensors = {}
        for name, slot in expression.slots():
            key = f"{path}.{name}"
            if slot.kind == "fixed" or not slot.shape:
                tensors[name] = torch.zeros(slot.shape)
                continue
            value = torch.randn(slot.shape, generator=generator, dtype=torch.float64)
            value = value / slot.shape[1] if value.dim() > 1 else 0.5 + value.abs()
            tensors[name] = value.to(state[key].dtype)
        for name, value in wide_tensors(expression, around(teacher.plan, branch), tensors, 0.25).items():
            slot = dict(expression.slots())[name]
            if slot.kind != "fixed" and slot.shape:
                state[f"{path}.{name}"].copy_(value)
            if slot.kind == "statistic" and slot.shape and teacher.plan.own_statistics:
                state[f"student_statistics.{path}.{name}"].copy_(tensors[name])

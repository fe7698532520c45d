"""Networks as users write them: in-place code that aliases, buffers that change, padding to the resolution."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame, GlobalContext, ScaledStdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import error, randomise, sample

import reparam
from reparam.errors import CaptureError


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)


class AliasInList(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        features = [x]
        x += self.b(torch.sigmoid(x))
        return self.head(x * features[0].tanh())


class AliasByView(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        half = x[:, :4]
        half *= 2
        half -= 1
        return self.head(torch.tanh(self.b(x)))


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x


class AliasInModule(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(torch.tanh(x))
        self.add(y, x)
        return self.head(y)


class CountsInPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        count += 5
        count *= 2
        return self.head(self.b(self.a(x))) * count


class MaskedWeight(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.register_buffer("mask", (torch.arange(9) < 5).view(3, 3).to(self.weight).expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class MaskedData(MaskedWeight):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return nn.Conv2d.forward(self, x)


class HandNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3), keepdim=True)
        return x - self.mean


class AssignsBuffer(HandNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3), keepdim=True)
        return x - self.mean


class Checkpointed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.b, self.a(x), use_reentrant=False))


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.Conv2d(8, 4, 1))


NETWORKS = {
    "alias-in-list": (AliasInList, True),
    "alias-by-view": (AliasByView, True),
    "alias-in-module": (AliasInModule, True),
    "counts-in-place": (CountsInPlace, True),
    "masked-weight": (lambda: between(MaskedWeight()), True),
    "masked-data": (lambda: between(MaskedData()), False),
    "hand-norm": (lambda: between(HandNorm()), False),
    "assigns-buffer": (lambda: between(AssignsBuffer()), False),
    "checkpoint": (Checkpointed, True),
    "global-context": (lambda: between(GlobalContext(8, fuse_add=True)), True),
    "same-padding": (lambda: between(Conv2dSame(8, 8, 3, stride=2)), True),
    "same-padding-depthwise": (lambda: between(Conv2dSame(8, 8, 3, stride=2, groups=8)), True),
    "same-padding-standardised": (lambda: between(ScaledStdConv2dSame(8, 8, 3, stride=2)), True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_as_users_write_it(name: str) -> None:
    build, widened = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build().double()).eval()
    x = sample((3, 3, 11, 12), seed=2)
    with torch.no_grad():
        model(x)  # some change a weight when they are called
        own = {key: value.clone() for key, value in model.state_dict().items()}
        teacher = reparam.expand(model, 2, example_input=sample((2, 3, 9, 8)))
        assert (teacher.plan.coverage == 1.0) == widened
        back = reparam.extract(teacher).state_dict()
        assert all(torch.equal(back[key], value) for key, value in own.items())
        found = teacher(x.clone())
        view = reparam.student_view(teacher)(x.clone()) if name != "assigns-buffer" else None
        expected = model(x.clone())
    assert error(expected, found) <= 1e-12
    assert view is None or error(expected, view) <= 1e-12


def test_a_root_that_assigns_its_buffer_is_refused() -> None:
    class Root(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.last = x.mean()
            return self.head(x)

    with pytest.raises(CaptureError, match="assigns a new tensor to its buffer last"):
        reparam.expand(Root(), 2, example_input=torch.randn(2, 3, 8, 8))


class Unused(Layers):
    """Computes values of its parameters for a fast path that it does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        torch.exp(self.scale.double()) * 2
        x = self.b(torch.sigmoid(self.a(x))) * self.scale.view(-1, 1, 1)
        return self.head(x)


def test_what_is_computed_from_parameters_and_not_used() -> None:
    model = randomise(Unused().double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 8, 8)))
    assert teacher.scale.shape == (16,)
    x = sample((2, 3, 6, 6), 3)
    with torch.no_grad():
        assert error(model(x), teacher(x)) < 1e-12


class Sampling(Layers):
    """Draws values in eval mode too, like one that lies in memory in another order than what it is contracted to."""

    def forward(self, x: Tensor) -> Tensor:
        like = self.a(x).transpose(2, 3)
        return self.head(self.b(self.a(x) * torch.randn_like(like)))


def test_random_values_in_eval_mode_are_verified() -> None:
    model = randomise(Sampling().double()).eval()
    x = sample((2, 3, 6, 6), 3)
    teacher = reparam.expand(model, 2, example_input=x)
    assert teacher.plan.coverage == 1.0


class Precise(Layers):
    """Leaves autocast, on whatever device it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = torch.sigmoid(self.a(x))
        return self.head(self.b(x))


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), Precise()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def test_autocast_of_the_device_of_an_input() -> None:
    model = randomise(Holding().double()).eval()
    x = sample((2, 3, 6, 6), 3)
    teacher = reparam.expand(model, 2, example_input=x)
    with torch.no_grad():
        assert error(model(x), teacher(x)) < 1e-12


class AsksAParameter(nn.Module):
    """Tokens with positions, as networks that ask their first parameter for its device and dtype add them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.tokens, self.positions, self.head = nn.Linear(6, 8), nn.Embedding(10, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.parameters())
        h = self.tokens(x)
        if self.way == "device":
            h = h + self.positions(torch.arange(x.shape[1], device=first.device))
        elif self.way == "constant":
            h = h + self.positions(torch.arange(5, device=first.device))
        elif self.way == "moved":
            h = h.to(first.device) + torch.ones(8).to(first.device, first.dtype)
        elif self.way == "compared" and x.device != first.device:
            h = h.to(first.device)
        elif self.way == "new":
            h = h.type_as(first) + first.new_ones(8) * next(self.buffers())
        elif self.way == "named":
            h = h.to(dict(self.named_parameters())["tokens.weight"].device)
        elif self.way == "summed":
            h = h * (1 + sum(p.square().mean() for p in self.positions.parameters()))
        return self.head(torch.tanh(h))


WAYS = ("device", "constant", "moved", "compared", "new", "named", "summed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "inside"])
def test_a_network_asks_its_first_parameter(way: str, inside: bool) -> None:
    torch.manual_seed(0)
    model = AsksAParameter(way).double()
    if inside:
        model = nn.Sequential(nn.Linear(4, 6).double(), nn.Tanh(), model)
    x = sample((2, 5, 4 if inside else 6))
    teacher = reparam.expand(model, 2, example_input=x)
    assert reparam.plan(model, 2, example_input=x).coverage == 1
    many = torch.cat([x, 2 * x, -x])
    with torch.no_grad():
        for network in (teacher, reparam.student_view(teacher), reparam.extract(teacher)):
            assert error(model(many), network(many)) <= 1e-14
    assert teacher.float()(x.float()).dtype == torch.float32

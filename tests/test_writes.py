"""Buffers that a forward changes in place: the teacher's follow the student's, whatever layout they are in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import error, randomise, sample

import reparam


class Codebook(nn.Module):
    """Vector quantisation whose codes follow their vectors by moving averages, as VQ-VAE-2 has them."""

    def __init__(self, codes: int = 6, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(-1, width)
        distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codes.t() + self.codes.pow(2).sum(1)
        chosen = distances.argmin(1)
        if self.training:
            with torch.no_grad():
                one_hot = F.one_hot(chosen, len(self.codes)).to(flat.dtype)
                self.counts.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(one_hot.t() @ flat, alpha=0.1)
                self.codes.copy_(self.sums / self.counts.unsqueeze(1))
        found = self.codes[chosen].view(batch, height, length, width).permute(0, 3, 1, 2)
        return x + (found - x).detach()


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.codebook, self.head = nn.Conv2d(3, 8, 3, padding=1), Codebook(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.codebook(self.stem(x)))


CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy": lambda kept, new: kept.copy_(new),
    "lerp": lambda kept, new: kept.lerp_(new, 0.2),
    "average": lambda kept, new: kept.mul_(0.9).add_(new, alpha=0.1),
    "item": lambda kept, new: kept.__setitem__(slice(None), 0.5 * new),
    "half": lambda kept, new: kept[:4].copy_(new[4:]),
    "rolled": lambda kept, new: kept.copy_(new.flip(0)),
    "sorted": lambda kept, new: kept.copy_(new.sort()[0]),
    "data": lambda kept, new: kept.data.mul_(0.5).add_(new),
    "larger": lambda kept, new: kept.clamp_(min=new),
}
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda x, kept: x + kept.view(-1, 1, 1),
    "scales": lambda x, kept: x * torch.sigmoid(kept).view(1, -1, 1, 1),
    "product": lambda x, kept: x + (x.mean((2, 3)) @ kept).view(-1, 1, 1, 1),
    "narrow": lambda x, kept: x * kept.sort()[0].mean(),
}


class Keeps(nn.Module):
    def __init__(self, change: str, use: str, early: bool) -> None:
        super().__init__()
        self.change, self.use, self.early = CHANGES[change], USES[use], early
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 1)
        self.register_buffer("kept", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        if self.early:
            x = self.use(x, self.kept)
        if self.training:
            with torch.no_grad():
                self.change(self.kept, x.mean((0, 2, 3)))
        return self.head(x if self.early else self.use(x, self.kept))


def follows(model: nn.Module) -> None:
    """Student, teacher and view compute the same for some steps in train mode, each with its own buffers."""
    model, x = randomise(model.double()), sample((2, 3, 6, 6), 3)
    teacher = reparam.expand(model, 2, example_input=x)
    assert teacher.plan.coverage == 1.0
    view = reparam.student_view(teacher)
    model.train(), teacher.train(), view.train()
    for step in range(3):
        y = torch.roll(x, step, 0) * (1 + step)
        expected = model(y).detach()
        assert error(expected, teacher(y).detach()) < 1e-10
        assert error(expected, view(y).detach()) < 1e-10
    with torch.no_grad():
        found = dict(reparam.extract(teacher).named_buffers())
        for name, buffer in model.named_buffers():
            assert error(buffer.double(), found[name].double()) < 1e-10, name
            assert name in teacher.plan.statistics


def test_a_codebook() -> None:
    follows(Quantised())


@settings(deadline=None, max_examples=8)
@given(change=st.sampled_from(sorted(CHANGES)), use=st.sampled_from(sorted(USES)), early=st.booleans())
def test_a_buffer_of_channels(change: str, use: str, early: bool) -> None:
    follows(Keeps(change, use, early))


@pytest.mark.parametrize("use", ["added", "scales"])
def test_a_buffer_of_channels_is_widened(use: str) -> None:
    model = randomise(Keeps("copy", use, early=True).double())
    plan = reparam.plan(model, 2, example_input=sample((2, 3, 6, 6), 3))
    assert plan.params["kept"].wide_shape == (16,)

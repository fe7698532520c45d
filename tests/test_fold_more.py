"""Folding around code that branches, sizes as numbers, layers with several norms, pads that repeat the border."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_fold import IMAGE, Net, conv, error, layers, norms, randomise
from torch import Tensor, nn

import reparam
from reparam.passes.fold import fold_with_report


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, norm: bool = True) -> Tensor:
        y = self.c(x)
        return self.n(y) if x.shape[-1] < 12 and norm else F.relu(y)


class OnArgument(Branching):
    def forward(self, x: Tensor, norm: bool = True) -> Tensor:
        return self.n(self.c(x)) if norm else F.relu(self.c(x))


class OnSize(Branching):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.c(x)
        return self.n(y) if x.shape[-1] < 12 else F.relu(y)


class Caller(nn.Module):
    """Calls a block, with an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = OnArgument(), True

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, norm=self.norm).sigmoid()


LARGE = torch.randn(1, 4, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize("block", [Branching, OnSize])
@pytest.mark.parametrize("inside", [False, True])
def test_another_size_than_a_branch_was_folded_for_is_refused(block: type[nn.Module], inside: bool) -> None:
    model = randomise(nn.Sequential(block(), nn.ReLU()) if inside else block())
    folded = reparam.fold(model, IMAGE)
    assert norms(folded) == 0
    assert error(model, folded, IMAGE) < 2e-15
    with pytest.raises(AssertionError, match=r"test_fold_more\.py:\d+: the network branches on a size"):
        folded(LARGE)


@pytest.mark.parametrize("block", [Branching, OnArgument])
def test_another_argument_than_a_branch_was_folded_for_is_refused(block: type[nn.Module]) -> None:
    model = randomise(block())
    folded = reparam.fold(model, IMAGE)
    with torch.no_grad():
        assert torch.allclose(folded(IMAGE, True), model(IMAGE))
        with pytest.raises(AssertionError, match="the network was folded for norm=True"):
            folded(IMAGE, norm=False)
        given = reparam.fold(model, {"x": IMAGE, "norm": False})  # where nothing folds
        for norm in (False, True):
            assert torch.equal(given(IMAGE, norm=norm), model(IMAGE, norm=norm))


def test_an_argument_inside_is_guarded_and_the_code_around_stays() -> None:
    model = randomise(Caller())
    folded = reparam.fold(model, IMAGE)
    assert type(folded) is Caller and norms(folded) == 0
    assert error(model, folded, IMAGE) < 2e-15
    folded.norm = False
    with pytest.raises(AssertionError, match="block was folded for norm=True"):
        folded(IMAGE)


class OnOptions(Branching):
    def forward(self, x: Tensor, options: list[str] | None = None) -> Tensor:  # type: ignore[override]
        return F.relu(self.c(x)) if options and "plain" in options else self.n(self.c(x))


def test_a_structure_as_an_argument_is_guarded() -> None:
    model = randomise(OnOptions())
    folded = reparam.fold(model, {"x": IMAGE, "options": ["fast"]})
    with torch.no_grad():
        assert torch.allclose(folded(IMAGE, ["fast"]), model(IMAGE, ["fast"]))
        with pytest.raises(AssertionError, match="folded for options="):
            folded(IMAGE, ["plain"])


class Between(nn.Module):
    """A module without layers between a convolution and its norm, whose code branches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2) if x.shape[-1] < 12 else x.flatten(2).relu()


def test_code_between_merged_layers_that_branches() -> None:
    model = randomise(nn.Sequential(conv(), Between(), nn.BatchNorm1d(4)))
    folded = reparam.fold(model, IMAGE)
    assert norms(folded) == 0
    assert error(model, folded, IMAGE) < 2e-15
    with pytest.raises(AssertionError, match="branches on a size"):
        folded(LARGE)


def test_a_branch_in_two_calls_of_different_sizes() -> None:
    model = randomise(Net(lambda m, x: m.block(m.block(x).relu()[..., :5, :5]), block=OnSize()))
    folded = reparam.fold(model, IMAGE)
    assert norms(folded) == 0
    assert error(model, folded, IMAGE) < 2e-15


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.n(m.c(x) * x.shape[-1] ** -0.5),
        lambda m, x: m.n(m.c(x) * x.size(2)),
        lambda m, x: m.n(m.c(x).mul(m.c(x).shape[1])),
        lambda m, x: m.n((lambda q: q / q.shape[1])(m.c(x))),
        lambda m, x: m.n(m.c(x) + x.shape[0]),
        lambda m, x: m.n(x.shape[3] - m.c(x)),
    ],
)
def test_sizes_are_no_constants(function: object) -> None:
    model = randomise(Net(function, c=conv(), n=nn.BatchNorm2d(4)))  # type: ignore[arg-type]
    folded = reparam.fold(model, IMAGE)
    assert error(model, folded, IMAGE) < 2e-15
    assert error(model, folded, LARGE) < 2e-15


# Layers with several norms -------------------------------------------------------------------------------------------


class Head(nn.Module):
    """One convolution for all levels, a norm for each."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(self.c(x[..., k:])).relu().mean((2, 3)) for k, norm in enumerate(self.n)])


def test_the_report_says_what_was_copied() -> None:
    model = randomise(Head())
    folded, report = fold_with_report(model, IMAGE)
    assert norms(folded) == 0 and layers(folded) == 5
    assert error(model, folded, IMAGE) < 2e-15
    assert report.parameters == (148 + 40, 5 * 148)
    assert report.copies == {"c": 5}
    assert "parameters: 188 -> 740" in str(report)
    assert "c is copied 5 times, for calls with different norms" in str(report)


def test_a_layer_that_is_also_called_without_a_norm_counts_as_a_copy() -> None:
    model = randomise(Net(lambda m, x: m.c(m.n(m.c(x)).relu()), c=conv(), n=nn.BatchNorm2d(4)))
    assert fold_with_report(model, IMAGE)[1].copies == {"c": 2}


def test_structure_does_not_depend_on_values() -> None:
    def make() -> nn.Module:
        return Net(lambda m, x: m.b(m.c(m.a(m.c(x)))).relu(), c=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))

    fresh, trained = make().double().eval(), randomise(make())
    folded = reparam.fold(fresh, IMAGE, allow_growth=False)
    folded.load_state_dict(reparam.fold(trained, IMAGE).state_dict())
    assert error(trained, folded, IMAGE) < 2e-15
    head, other = reparam.fold(Head().double().eval(), IMAGE), randomise(Head(), seed=3)
    head.load_state_dict(reparam.fold(other, IMAGE).state_dict())
    assert error(other, head, IMAGE) < 2e-15


# Without a batch, and pads that repeat the border --------------------------------------------------------------------


def test_an_example_without_a_batch_is_reported() -> None:
    model = randomise(Net(lambda m, x: m.b(m.a(x)), a=conv(4, 16, 1), b=conv(16, 4, 1)))
    folded, report = fold_with_report(model, IMAGE[0])
    assert error(model, folded, IMAGE[0]) < 2e-15
    assert report.linear == (2, 2)
    assert str(report).count("without a batch dimension") == 2


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_norm_in_front_of_a_pad_that_repeats_the_border(mode: str) -> None:
    model = randomise(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv(padding_mode=mode)))
    folded = reparam.fold(model, IMAGE)
    assert norms(folded) == 0 and layers(folded) == 1
    assert error(model, folded, IMAGE) < 2e-15
    assert error(model, folded, LARGE) < 2e-15


class BnAndPad(nn.Module):
    """DBB's own: pads with what the norm makes of zero."""

    def __init__(self, width: int, affine: bool = True, pad: int = 1, wrong: float = 0.0) -> None:
        super().__init__()
        self.bn, self.pad, self.wrong = nn.BatchNorm2d(width, affine=affine), pad, wrong

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        p, bn = self.pad, self.bn
        if bn.affine:
            value = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        else:
            value = -bn.running_mean / torch.sqrt(bn.running_var + bn.eps)
        y = F.pad(y, [p] * 4)
        value = value.view(1, -1, 1, 1) + self.wrong
        y[:, :, 0:p, :] = value
        y[:, :, -p:, :] = value
        y[:, :, :, 0:p] = value
        y[:, :, :, -p:] = value
        return y


class DbbBlock(nn.Module):
    """DBB as it is published."""

    def __init__(self, width: int, **options: float) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        self.dense = nn.Sequential(conv(width, width, bias=False), norm(width))
        self.point = nn.Sequential(conv(width, width, 1, bias=False), norm(width))
        first = conv(width, width, 1, bias=False)
        self.serial = nn.Sequential(
            first,
            BnAndPad(width, **options),
            conv(width, width, padding=0, bias=False),
            norm(width),  # type: ignore
        )
        self.pooled = nn.Sequential(
            conv(width, width, 1, bias=False), BnAndPad(width), nn.AvgPool2d(3, 1), norm(width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.serial(x) + self.pooled(x))


@pytest.mark.parametrize("affine", [True, False])
def test_dbb_as_published(affine: bool) -> None:
    model = randomise(nn.Sequential(DbbBlock(4, affine=affine), DbbBlock(4)))
    folded, report = fold_with_report(model, IMAGE)
    assert error(model, folded, IMAGE) < 2e-15
    assert error(model, folded, LARGE) < 2e-15
    assert report.norms == (12, 0) and report.linear == (10, 2)
    assert norms(folded) == 0 and layers(folded) == 2


def test_a_border_of_other_values_stays() -> None:
    model = randomise(DbbBlock(4, wrong=0.1))
    folded = reparam.fold(model, IMAGE)
    assert error(model, folded, IMAGE) < 2e-15
    assert layers(folded) > 1


class Regularised(nn.Module):
    """Returns a number, or one per sample, beside its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.c, self.n, self.function = conv(), nn.BatchNorm2d(4), function

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.n(self.c(x))
        return y.relu(), self.function(y)


_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "per sample": lambda y: y.sum((1, 2, 3)),
    "mean per sample": lambda y: y.mean((1, 2, 3)),
    "mean of sums": lambda y: y.sum((1, 2, 3)).mean(),
    "mean of shifted sums": lambda y: (y.sum((1, 2, 3)) + 0.5).mean(),
    "loss": lambda y: F.mse_loss(y, y.sigmoid()),
    "joined": lambda y: torch.cat([y.sum((1, 2, 3)), 2 * y.mean((1, 2, 3))]),
}
_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda v: 0.5 * v,
    "quotient": lambda v: v / 3,
    "shift": lambda v: v + 1,
    "difference": lambda v: 1 - v,
    "negative": lambda v: -v,
    "both": lambda v: 0.25 * (1 - 2 * v) + v,
}


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("number", _NUMBERS)
def test_a_loss_beside_the_output(number: str, change: str) -> None:
    """A value of fewer than two dimensions has no channels that a kernel could have; what is before it still folds."""
    model = randomise(Regularised(lambda y: _CHANGES[change](_NUMBERS[number](y))))
    folded = reparam.fold(model, IMAGE)
    assert norms(folded) == 0
    for x in (IMAGE, LARGE):
        with torch.no_grad():
            for mine, other in zip(model(x), folded(x), strict=True):
                assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


def test_a_norm_with_statistics_made_in_place() -> None:
    def function(y: Tensor) -> Tensor:
        return F.batch_norm(y, torch.zeros(4, dtype=y.dtype), 2 * torch.ones(4, dtype=y.dtype))

    model = randomise(Regularised(function))
    folded = reparam.fold(model, IMAGE)
    with torch.no_grad():
        for mine, other in zip(model(IMAGE), folded(IMAGE), strict=True):
            assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)

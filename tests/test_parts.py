"""Networks whose code has no graph: it runs as Python at student width, and the modules that it calls are widened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection, optical_flow
from zoo import error, randomise, sample

import reparam
from reparam.errors import CaptureError, InputError, VerificationError
from reparam.passes import parts as parts_module
from reparam.passes.teacher import Teacher
from reparam.passes.world import World

# Networks ------------------------------------------------------------------------------------------------------------


def block(inputs: int, outputs: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, outputs, 1)
    )


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3), block(8)
        self.head = mlp(8, 4)


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(8, 8), mlp(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x[x[:, 0] > -1e9])


class Masked(Images):
    """Keeps as many rows as the data say."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)).permute(0, 2, 3, 1).flatten(0, 2)
        return self.head(y[y[:, 0] > y[:, 0].mean()])


class Branching(Images):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.mean() > y.median():
            y = self.second(y)
        return self.head((y + self.second(-y)).mean((2, 3)))


class Looping(Images):
    """Calls a module as often as the data say."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for _step in range(int(x[0, 0, 0, 0].abs().ceil()) + 1):
            y = torch.tanh(self.second(y))
        return self.head(y.mean((2, 3)))


class ThroughNumpy(Images):
    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)).mean((2, 3))
        order = np.argsort(-y.detach().cpu().numpy()[:, 0])
        return self.head(y[torch.from_numpy(order.copy())])


class Pyramid(Images):
    """One module at several sizes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        assert float(y.abs().sum()) >= 0
        sizes = [y, F.max_pool2d(y, 2), y[:, :, :3]]
        return self.head(torch.stack([self.second(v).mean((2, 3)) for v in sizes]).sum(0))


class Modal(nn.Module):
    """Does something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.first(x)))
        if self.training:
            x = torch.cat([x[:, 8:], x[:, :8]], 1)
        return self.last(x)


class TwoModes(Vectors):
    def __init__(self) -> None:
        super().__init__()
        self.second = Modal()


class Inside(nn.Module):
    """Data-dependent code in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = mlp(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = x.clone()
        mask = x[:, 0] > x[:, 0].mean()
        if mask.any():
            z[mask] = self.mix(x[mask])
        return z


class InTracedRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.head = mlp(8, 8), Inside(), mlp(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(self.stem(x)))


class Shared(InTracedRoot):
    """A part that recorded code calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.inside.mix

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(self.again(self.stem(x))))


class SharedNorm(nn.Module):
    """A norm that is a leaf of recorded code, and is called by code without a graph as well."""

    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix = nn.BatchNorm1d(8), mlp(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mix(self.norm(x))
            return x[x[:, 0] > -1e9]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.head = mlp(8, 8), SharedNorm.Selecting(), mlp(8, 3)
        self.norm = self.inside.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(self.norm(self.stem(x))))


class Tied(Vectors):
    def __init__(self) -> None:
        super().__init__()
        for k in (0, 2):
            self.second[k].weight = self.first[k].weight


class TiedAcross(Vectors):
    """A wide dimension of one part is the narrow end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.second[4] = nn.Linear(16, 16)
        self.second[4].weight = self.first[2].weight


class Reads(Vectors):
    """The code outside of a part reads its weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(super().forward(x))
        return y + F.linear(y, self.second[0].weight, self.second[0].bias)[:, :8]


class ReadsInTrainMode(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.second[0].weight.std() if self.training else y


class Hooked(Vectors):
    """Hooks of a part, and inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.second.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
        self.second.register_forward_hook(lambda _module, _args, output: 2 * output)
        self.second[0].register_forward_hook(lambda _module, _args, output: 3 * output)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(8, 8)

    def forward(self, x: Tensor, factor: float, negate: bool = True, other: Tensor | None = None) -> Tensor:
        y = self.body(x) * factor
        return -y if negate else y


class Constants(Vectors):
    """Calls a part with numbers, flags and None."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x[x[:, 0] > -1e9], 3.0, negate=False, other=None)


class Structured(Vectors):
    """A part that takes and returns structures."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(8, 8)

        def forward(self, given: dict[str, Tensor]) -> dict[str, Any]:
            y = self.body(given["x"])
            return {"out": y, "list": [given["x"], y.mean(1)], "number": given["x"].shape[1]}

    def __init__(self) -> None:
        super().__init__()
        self.second = Structured.Inner()

    def forward(self, x: Tensor) -> Tensor:
        found = self.second({"x": self.first(x[x[:, 0] > -1e9])})
        return found["out"] * found["number"] + found["list"][0] + found["list"][1][:, None]


class ChangesItsInput(Vectors):
    """The code around looks at a value that a part changed in place."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x[:, 0] = 0
            return self.body(x)

    def __init__(self) -> None:
        super().__init__()
        self.second = ChangesItsInput.Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x[x[:, 0] > -1e9])
        return self.second(y) + y


class InList(Vectors):
    """Calls its modules through a plain list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [self.second, self.first]

    def forward(self, x: Tensor) -> Tensor:
        for module in self.order:
            x = module(x[x[:, 0] > -1e9])
        return x


class AverageNorm(Vectors):
    """A norm whose train mode has no graph (a cumulative average)."""

    def __init__(self) -> None:
        super().__init__()
        self.first.insert(1, nn.BatchNorm1d(16, momentum=None))
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class ScalarTemperature(Vectors):
    """Has a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature.exp()


IMAGE, VECTOR = ((2, 3, 8, 8), (3, 3, 9, 10)), ((4, 8), (7, 8))
NETWORKS: dict[str, tuple[type[nn.Module], Any, set[str]]] = {
    # class, sizes of the example and of another input, modules that run a program of their own
    "masked": (Masked, IMAGE, {"first", "second", "head"}),
    "branching": (Branching, IMAGE, {"first", "second", "head"}),
    "looping": (Looping, IMAGE, {"first", "second", "head"}),
    "numpy": (ThroughNumpy, IMAGE, {"first", "second", "head"}),
    "pyramid": (Pyramid, IMAGE, {"first", "second", "head"}),
    "two-modes": (TwoModes, VECTOR, {"first", "second"}),
    "in-traced-root": (InTracedRoot, VECTOR, {"inside.mix"}),
    "shared": (Shared, VECTOR, set()),
    "shared-norm": (SharedNorm, VECTOR, {"inside.mix"}),
    "tied": (Tied, VECTOR, {"first", "second"}),
    "tied-across": (TiedAcross, VECTOR, set()),
    "reads": (Reads, VECTOR, {"first"}),
    "reads-in-train-mode": (ReadsInTrainMode, VECTOR, {"first"}),
    "hooked": (Hooked, VECTOR, {"first", "second"}),
    "constants": (Constants, VECTOR, {"first", "second"}),
    "structured": (Structured, VECTOR, {"first", "second"}),
    "changes-its-input": (ChangesItsInput, VECTOR, {"first", "second.body"}),
    "in-list": (InList, VECTOR, {"first", "second"}),
    "average-norm": (AverageNorm, VECTOR, {"second"}),
    "scalar-temperature": (ScalarTemperature, VECTOR, {"first", "second"}),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETWORKS[name][0]().double()).eval()


def made(name: str, **options: Any) -> tuple[nn.Module, Teacher, Tensor]:
    model = built(name)
    example, other = NETWORKS[name][1]
    return model, reparam.expand(model, 2, example_input=sample(example), **options), sample(other, 3)


def bound(teacher: nn.Module) -> set[str]:
    return {name for name, module in teacher.named_modules() if "forward" in vars(module)}


# The same function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_teacher_view_and_student_are_one_function_in_both_modes(name: str) -> None:
    model, teacher, x = made(name)
    assert NETWORKS[name][2] <= bound(teacher)
    assert teacher.plan.wide_parameters > 1.3 * teacher.plan.parameters
    view, own = reparam.student_view(teacher), copy.deepcopy(model)
    for training in (False, True, False):
        for network in (own, teacher, view):
            network.train(training)
        with torch.no_grad():
            expected = own(x.clone())
            assert expected.numel()
            assert error(expected, teacher(x.clone())) <= 1e-11
            assert error(expected, view(x.clone())) <= 1e-11
    state = reparam.extract(teacher).state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    model, teacher, x = made(name)
    clone = copy.deepcopy(teacher)
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    loaded = reparam.load(tmp_path / "teacher.safetensors", built(name))
    assert bound(loaded) == bound(clone) == bound(teacher)
    with torch.no_grad():
        before = teacher(x.clone())
        assert error(model(x.clone()), before) <= 1e-11
        assert torch.equal(clone(x.clone()), before)
        assert torch.equal(loaded(x.clone()), before)
        for parameter in clone.parameters():
            parameter.mul_(0.5)
        assert torch.equal(teacher(x.clone()), before)
        changed = clone(x.clone())
        assert changed.shape != before.shape or error(before, changed) > 1e-6


def test_the_copies_modes_are_its_own() -> None:
    _model, teacher, x = made("two-modes")
    clone = copy.deepcopy(teacher).train()
    with torch.no_grad():
        assert not teacher.training and not teacher.second.training
        assert error(teacher(x), clone(x)) > 1e-3
        assert error(teacher(x), clone.eval()(x)) <= 1e-15


def test_one_part_can_be_in_another_mode() -> None:
    """A part follows its own module's mode, as it does in the student."""
    model, teacher, x = made("two-modes")
    for network in (model, teacher):
        network.second.train()
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= 1e-12


def test_statistics_are_the_students_own() -> None:
    _model, teacher, x = made("looping")
    assert "first.1.running_mean" in teacher.plan.statistics
    view = reparam.student_view(teacher).train()
    with torch.no_grad():
        before = {key: value.clone() for key, value in teacher.state_dict().items() if "running" in key}
        view(x)
    moved = {key for key, value in before.items() if not torch.equal(teacher.state_dict()[key], value)}
    assert moved == {f"student_statistics.{n}.1.running_{k}" for n in ("first", "second") for k in ("mean", "var")}
    teacher.train()
    with torch.no_grad():
        teacher(x)
    assert not torch.equal(teacher.first[1].running_mean, before["first.1.running_mean"])


def test_gradients_reach_every_parameter() -> None:
    model, teacher, x = made("masked", noise=0.25)
    for network in (model, teacher):
        network(x).square().sum().backward()
    lacking = [name for name, p in teacher.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert lacking == [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    teacher.zero_grad()
    reparam.student_view(teacher)(x).square().sum().backward()
    gradient = teacher.first[3].weight.grad
    torch.testing.assert_close(gradient[:, ::2], 2 * model.first[3].weight.grad)
    assert not bool(gradient[:, 1::2].any())


def test_dtypes() -> None:
    model, teacher, x = made("masked")
    teacher.float()
    with torch.no_grad():
        found = teacher(x.float())
        assert found.dtype == torch.float32
        assert error(model.float()(x.float()), found) < 1e-5


# Taps ----------------------------------------------------------------------------------------------------------------


def test_taps() -> None:
    model, teacher, x = made("masked")
    with torch.no_grad():
        _output, mine = reparam.tap(model, ["first", "head"])(x)
        output, wide = reparam.tap(teacher, ["first", "head"])(x)
        assert error(model(x), output) <= 1e-12
    assert error(mine, wide) <= 1e-12
    with pytest.raises(
        InputError, match=r"'first\.0' lies inside 'first', which runs as one graph; tap 'first' itself"
    ):
        reparam.tap(teacher, ["first.0"])
    _model, teacher, x = made("in-traced-root")
    with torch.no_grad():
        assert reparam.tap(teacher, ["inside"])(x)[1]["inside"].shape == (7, 8)
    with pytest.raises(InputError, match=r"'inside\.mix' is not called in this forward pass, or lies inside"):
        reparam.tap(teacher, ["inside.mix"])


# Errors --------------------------------------------------------------------------------------------------------------


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Nothing.Inner()
        self.head = nn.Linear(8, 3)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.head(y[y[:, 0] > 0])


def test_a_root_in_which_nothing_can_be_widened() -> None:
    match = r"Nothing: the forward pass cannot be recorded as a graph: \S+test_parts\.py:\d+: "
    for function in (reparam.plan, reparam.expand):
        with pytest.raises(CaptureError, match=match):
            function(Nothing(), 2, example_input=torch.randn(4, 8))


def test_what_keeps_code_without_a_graph_names_module_and_line() -> None:
    _model, teacher, _x = made("in-traced-root")
    assert list(teacher.plan.leaves) == ["inside"]
    assert "test_parts.py:" in teacher.plan.leaves["inside"]
    assert "control flow depends on the value of any" in teacher.plan.leaves["inside"]
    reasons = {layer.name: layer.reason for layer in teacher.plan.layers}
    assert reasons["inside.mix.4.weight"] == "its output goes to code without a graph"


class Counted(Constants):
    """The number that a part is called with comes from the data, in a way that no dry run shows."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 3.0 if x.abs().max() < 1e6 else 4.0
        return self.second(self.first(x), factor, negate=False, other=None)


def test_a_call_that_the_program_does_not_hold_for() -> None:
    torch.manual_seed(0)
    model = randomise(Counted().double()).eval()
    x = sample((4, 8))
    teacher = reparam.expand(model, 2, example_input=x)
    message = (
        r"second was recorded for the call \(float64\[4, 8\], 3\.0, negate=False, other=None\).*ignore=\['second\.\*"
    )
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= 1e-12
        with pytest.raises(RuntimeError, match=message):
            teacher(1e12 * x)
        other = reparam.expand(model, 2, example_input=x, ignore=["second.*"])
        assert bound(other) == {"first"}
        assert error(model(1e12 * x), other(1e12 * x)) <= 1e-12


class BySign(Constants):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x, 3.0, negate=bool(x.sum() > 0))


def test_a_part_that_is_called_with_what_the_data_say_is_no_part() -> None:
    torch.manual_seed(0)
    model = randomise(BySign().double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((4, 8)))
    assert "second" not in bound(teacher)
    with torch.no_grad():
        for seed in range(6):
            x = sample((5, 8), seed)
            assert error(model(x), teacher(x)) <= 1e-12


class LooksAtSizes(Vectors):
    """Code that reads a size off a part's weight, past every operator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.second[0].out_features


def test_verification_catches_what_no_one_sees_coming() -> None:
    with pytest.raises(VerificationError, match=r"relative error 1\.00e\+00"):
        reparam.expand(LooksAtSizes(), 2, example_input=torch.randn(4, 8))


# Single precision ----------------------------------------------------------------------------------------------------


class Grid(Images):
    """Makes numbers of its own in single precision."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.wrong = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        assert float(y.abs().sum()) >= 0
        grid = self.make(y.shape[3])
        y = self.second(y).flatten(0, 2) @ grid.unsqueeze(1)
        return self.head(y.view(x.shape[0], 8, -1).mean(2))


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "default": lambda n: torch.linspace(0, 1, n),
    "method": lambda n: torch.arange(n).float() / n,
    "dtype": lambda n: torch.arange(n, dtype=torch.float32) / n,
    "to": lambda n: torch.arange(n).to(torch.float32) / n,
    "numpy": lambda n: torch.from_numpy(np.arange(n, dtype=np.float32) / n),
}


@pytest.mark.parametrize("name", GRIDS)
def test_code_that_computes_in_single_precision_is_verified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = randomise(Grid(GRIDS[name])).eval()
    x = torch.randn(2, 3, 8, 8)
    teacher = reparam.expand(model, 2, example_input=x)
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        assert error(model(x), teacher(x)) < 1e-4
    # A part that is wrong by less than a hundredth is found, whatever the precision.
    tensors = parts_module.Given.tensors

    def off(self: Any, args: Any, kwargs: Any) -> Any:
        taken, named = tensors(self, args, kwargs)
        return [taken[0] * 1.01], named

    monkeypatch.setattr(parts_module.Given, "tensors", off)
    with pytest.raises(VerificationError):
        reparam.expand(model, 2, example_input=x)


class Quantized(nn.Module):
    """A weight that learns to be rounded: an operator that has no kernel for float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
        self.register_buffer("on", torch.ones(1, dtype=torch.long))
        self.register_buffer("lowest", torch.full((4,), -1.0))
        self.register_buffer("highest", torch.full((4,), 1.0))
        self.register_buffer("scale", torch.full((4,), 1 / 64))
        self.register_buffer("zero", torch.zeros(4, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        observed = (self.lowest, self.highest, self.scale, self.zero)
        weight = torch.fused_moving_avg_obs_fake_quant(
            self.middle.weight, 0 * self.on, self.on, *observed, 0.01, -128, 127, 0, True, True
        )
        return self.head(F.conv2d(self.first(x), weight, self.middle.bias).relu())


def test_an_operator_without_float64_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Quantized().eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        copy.deepcopy(model).double()(x.double())
    teacher = reparam.expand(model, 2, example_input=x)
    assert teacher.first.weight.shape[0] == 8 and teacher.middle.weight.shape == (4, 4, 3, 3)
    assert any("read by fused_moving_avg_obs_fake_quant, which has no rule" in note for note in teacher.plan.notes)
    with torch.no_grad():
        assert error(model(x), teacher(x)) < 1e-4
        assert error(model(x), reparam.student_view(teacher)(x)) < 1e-4
    # What is wrong behind it is found, in the precision that is left.
    monkeypatch.setattr(World, "call", _off_in_the_teacher(World.call, torch.fused_moving_avg_obs_fake_quant))
    with pytest.raises(VerificationError):
        reparam.expand(model, 2, example_input=x)


def _off_in_the_teacher(call: Callable[..., Any], target: Any) -> Callable[..., Any]:
    def changed(self: World, node: Any, args: Any, kwargs: Any) -> Any:
        found = call(self, node, args, kwargs)
        return found * 1.01 if node.target is target and self.attributes is not None else found

    return changed


# Networks of torchvision ---------------------------------------------------------------------------------------------


def detector(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"box_detections_per_img": 10, **options} if "rcnn" in name else {"detections_per_img": 10, **options}
    made = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5, **options)
    # In float64, and with weights that tell boxes apart: the order of equal scores would hang on rounding.
    return randomise(made.double()).eval()


def check_detector(model: nn.Module, least: float, expected: set[str]) -> None:
    images = [sample((3, 64, 80), 1), sample((3, 64, 80), 2)]
    teacher = reparam.expand(model, 2, example_input=(images,))
    assert expected <= bound(teacher)
    assert teacher.plan.wide_parameters > least * teacher.plan.parameters
    view = reparam.student_view(teacher)
    with torch.no_grad():
        for given in (images, [sample((3, 70, 64), 3)]):
            found, ours, compact = model(given), teacher(given), view(given)
            assert sum(len(f["boxes"]) for f in found) > 0
            assert error(found, ours) <= 1e-9
            assert error(found, compact) <= 1e-12
    state = reparam.extract(teacher).state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.thorough
def test_ssdlite() -> None:
    check_detector(detector("ssdlite320_mobilenet_v3_large", topk_candidates=20), 3.0, {"backbone"})


@pytest.mark.thorough
def test_faster_rcnn() -> None:
    options = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20}
    model = detector("fasterrcnn_mobilenet_v3_large_320_fpn", **options)
    check_detector(model, 2.0, {"backbone", "rpn.head", "roi_heads.box_head"})


@pytest.mark.thorough
def test_retinanet() -> None:
    check_detector(detector("retinanet_resnet50_fpn", min_size=64, max_size=96), 3.0, {"backbone", "head"})


@pytest.mark.thorough
def test_a_detector_trains() -> None:
    """Targets, which the example left out, reach the student's own code."""
    model = detector("ssdlite320_mobilenet_v3_large", topk_candidates=20)
    images = [sample((3, 64, 80), 1), sample((3, 64, 80), 2)]
    teacher = reparam.expand(model, 2, example_input=(images,), verify=False).train()
    box = torch.tensor([[4.0, 5.0, 40.0, 50.0]], dtype=torch.float64)
    targets = [{"boxes": box, "labels": torch.tensor([1])}] * 2
    losses, expected = teacher(images, targets), model.train()(images, targets)
    assert losses.keys() == expected.keys()
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in teacher.parameters())


@pytest.mark.thorough
def test_optical_flow() -> None:
    """Its code makes single precision grids: the network itself does not run in float64."""
    torch.manual_seed(0)
    model = optical_flow.raft_small(weights=None).eval()
    pair = (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    teacher = reparam.expand(model, 2, example_input=pair)
    assert bound(teacher) >= {"feature_encoder", "context_encoder", "update_block"}
    with torch.no_grad():
        assert error(model(*pair, num_flow_updates=2), teacher(*pair, num_flow_updates=2)) < 1e-4

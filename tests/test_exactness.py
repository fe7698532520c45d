"""Student and teacher compute the same function: every node, other sizes, float32, train mode, several ratios."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from zoo import BY_NAME, ZOO, Entry, built, error, sample, tensors

import reparam
from reparam.passes.expand import verify_plan
from reparam.passes.plan import Plan
from reparam.passes.search import prepare
from reparam.passes.teacher import Teacher
from reparam.passes.widen import build_teacher

EPS32 = torch.finfo(torch.float32).eps


def marked(entries: list[Entry]) -> list[Any]:
    return [pytest.param(e, id=e.name, marks=[pytest.mark.thorough] if e.slow else [pytest.mark.slow]) for e in entries]


class Case:
    """A student, its plan, and teachers made from it."""

    def __init__(self, entry: Entry, ratio: int = 2) -> None:
        self.entry, self.model = entry, built(entry)
        self.capture, self.inputs, plan = prepare(self.model, ratio, sample(entry.shape))
        self.plan: Plan = plan

    def node_error(self) -> float:
        return verify_plan(self.model, self.capture, self.plan, self.inputs, None)

    def teacher(self, model: nn.Module, seed: int = 0) -> Teacher:
        torch.manual_seed(seed)
        return build_teacher(model, self.capture, self.plan, 0.25)


@pytest.fixture(scope="module", params=marked(ZOO))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield Case(request.param)


def test_every_node(case: Case) -> None:
    assert case.node_error() <= 1e-12


def test_coverage(case: Case) -> None:
    entry = case.entry
    narrow = {layer.name: layer.reason for layer in case.plan.layers if not layer.widened}
    assert case.plan.coverage >= entry.coverage, narrow
    assert entry.coverage >= 0.95
    assert (entry.coverage == 1.0) == (entry.reason == "")
    assert all(narrow.values())


def test_another_batch_size_and_resolution(case: Case) -> None:
    teacher, x = case.teacher(case.model), sample(case.entry.other)
    with torch.no_grad():
        reference = case.model(x)
        assert error(reference, teacher(x)) <= 1e-12
        assert error(reference, reparam.student_view(teacher)(x)) <= 1e-12
    assert max(float(t.std()) for t in tensors(reference)) > 0


def test_the_weights_did_change(case: Case) -> None:
    one, two = (case.teacher(case.model, seed).state_dict() for seed in (0, 1))
    student = case.model.state_dict()
    assert any(one[name].shape != student[name].shape for name in student)
    changed = [name for name in student if not torch.equal(one[name], two[name])]
    linear = {layer.name for layer in case.plan.layers}
    # At ratio 2 noise needs replicas on both sides; a computed weight has none.
    assert changed or not any(m.noise and len(m.maps) > 1 for m in case.plan.params.values())
    assert set(changed) <= {*linear, *(n for n, m in case.plan.params.items() if m.noise)}


def test_float32(case: Case) -> None:
    single, x = copy.deepcopy(case.model).float(), sample(case.entry.shape, seed=2)
    teacher = case.teacher(single)
    with torch.no_grad():
        # The same float32 weights in float64.
        reference = copy.deepcopy(single).double()(x.float().double())
        own = error(reference, single(x.float()))
        assert error(reference, teacher(x.float())) <= 4 * max(own, 4 * EPS32)


# Ratios --------------------------------------------------------------------------------------------------------------

FEW = ["nfnet", "shufflenet_v2_x0_5", "resnetv2_bit", "ghostnet"]
"""Scaled weights, a shuffle, standardised weights, and parts of channels; the others run when asked for."""
SMALL = "net1d net3d unet mlp weight_norm hook_weight_norm spectral_norm tied".split()


@pytest.mark.parametrize("ratio", [3, 4])
@pytest.mark.parametrize("name", SMALL)
def test_ratios(name: str, ratio: int) -> None:
    check_ratio(name, ratio)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ratio"), [(name, 3 + k % 2) for k, name in enumerate(FEW)])
def test_ratios_of_whole_networks(name: str, ratio: int) -> None:
    check_ratio(name, ratio)


@pytest.mark.thorough
@pytest.mark.parametrize("ratio", [3, 4])
@pytest.mark.parametrize("name", [e.name for e in ZOO if e.name not in SMALL])
def test_ratios_of_all(name: str, ratio: int) -> None:
    check_ratio(name, ratio)


def check_ratio(name: str, ratio: int) -> None:
    case = Case(BY_NAME[name], ratio)
    assert case.node_error() <= 1e-12
    assert case.plan.coverage >= case.entry.coverage
    x = sample(case.entry.other)
    with torch.no_grad():
        assert error(case.model(x), case.teacher(case.model)(x)) <= 1e-12


def test_ratio_1_changes_nothing() -> None:
    case = Case(BY_NAME["unet"], ratio=1)
    teacher, x = case.teacher(case.model), sample(case.entry.shape)
    assert all(torch.equal(t, teacher.state_dict()[name]) for name, t in case.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(case.model(x), teacher(x))


# Train mode ----------------------------------------------------------------------------------------------------------


def without_drops(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate", "drop_path_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def check_train_mode(entry: Entry) -> None:
    """Outputs and running statistics after two training forwards, of the student, the teacher and the view."""
    model = without_drops(built(entry)).train()
    capture, _inputs, made = prepare(model, 2, sample(entry.shape))
    torch.manual_seed(0)
    teacher = build_teacher(model, capture, made, 0.25)
    view = reparam.student_view(teacher)
    assert teacher.training and view.training
    shape = (entry.batch, *entry.shape[1:])
    with torch.no_grad():
        for seed in (1, 2):
            x = sample(shape, seed)
            reference = model(x)
            assert error(reference, teacher(x)) <= 1e-10
            assert error(reference, view(x)) <= 1e-10
    # A power iteration draws on its own vectors; they are buffers as well.
    own = view.state_dict()
    wide = teacher.state_dict()
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            assert torch.equal(buffer, own[name]), name
            continue
        assert error(buffer, own[name]) <= 1e-10, name
        if name in made.statistics:
            expected = made.params[name].widen(buffer) if name in made.params else buffer
            assert error(expected, wide[name]) <= 1e-10, name


@pytest.mark.parametrize("name", SMALL)
def test_train_mode(name: str) -> None:
    check_train_mode(BY_NAME[name])


IN_TRAIN_MODE = [e.name for e in ZOO if e.batch and e.name not in SMALL]
FIRST = ("mobilenetv3_small_050", "shufflenet_v2_x0_5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.thorough) for n in IN_TRAIN_MODE]
)
def test_train_mode_of_whole_networks(name: str) -> None:
    check_train_mode(BY_NAME[name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [e.name for e in ZOO if not e.batch])
def test_train_mode_of_all(name: str) -> None:
    check_train_mode(BY_NAME[name]._replace(batch=64))


def test_a_wrong_weight_is_seen() -> None:
    """The comparison is not blind: one changed weight of the teacher is an error."""
    case = Case(BY_NAME["unet"])
    teacher, x = case.teacher(case.model), sample(case.entry.shape)
    with torch.no_grad():
        next(p for p in teacher.parameters() if p.dim() == 4)[0, 0, 0, 0] += 0.1
        assert error(case.model(x), teacher(x)) > 1e-6


# Things that stand beside the weights ---------------------------------------------------------------------------------


class Beside(nn.Module):
    """Constants made in the forward, tensors kept as plain attributes, functions kept as attributes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 1)
        self.number, self.vector = torch.tensor(0.5), torch.rand(8, 1, 1, dtype=torch.float64)
        self.function = lambda x: 2 * x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.kind == "constant":
            x = x * torch.tensor(2.0)
        elif self.kind == "number":
            x = x * self.number
        elif self.kind == "vector":
            x = x * self.vector
        elif self.kind == "function":
            x = self.function(x)
        elif self.kind == "channel ramp":
            x = x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
        elif self.kind == "column ramp":
            x = x * torch.arange(x.shape[-1]).to(x)
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize("kind", ["constant", "number", "vector", "function", "channel ramp", "column ramp"])
def test_constants_and_plain_attributes(kind: str) -> None:
    model, x = Beside(kind).double(), sample((3, 3, 14, 13))
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 12, 12)))
    assert teacher.plan.coverage == 1.0
    with torch.no_grad():
        for network in (teacher, copy.deepcopy(teacher), reparam.student_view(teacher), reparam.extract(teacher)):
            assert error(model(x), network(x)) <= 1e-12
    assert isinstance(model.vector, torch.Tensor) and model.vector.device.type == "cpu"


def test_outputs_that_differ_between_the_modes() -> None:
    """googlenet: auxiliary classifiers in train mode only; the teacher follows the mode, also after a copy."""
    entry = BY_NAME["googlenet"]
    model = built(entry)
    teacher = reparam.expand(model, 2, example_input=sample(entry.shape), verify=False)
    x = sample(entry.shape)
    with torch.no_grad():
        assert error(model(x), copy.deepcopy(teacher)(x)) <= 1e-12
        teacher.train()
        assert type(teacher(x)) is type(model.train()(x))
        clone = copy.deepcopy(teacher).eval()
        assert isinstance(clone(x), torch.Tensor)
        assert type(reparam.tap(teacher, ["inception4a"])(x)[0]) is type(model(x))

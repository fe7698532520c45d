"""Replicas part: exactly balanced noise at the start, and how far apart each layer's replicas are after training.

The distance of a layer is that of what it computes: the root mean square of (replica - mean of its replicas) over that
of the whole output.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, built, error, sample

import reparam
from reparam.ops.maps import ReplicaMap
from reparam.ops.params import Noise, ParamMap
from reparam.ops.steps import contract
from reparam.passes.teacher import Teacher

# The law of the noise ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "default": lambda n, r: ReplicaMap.repeat(n, r),
    "blocks": lambda n, r: ReplicaMap(torch.arange(n).repeat(r).numpy(), n),
    "mixed": lambda n, r: ReplicaMap(torch.randperm(n * r, generator=torch.Generator().manual_seed(0)).numpy() % n, n),
}


def weight_map(layout: str, ratio: int, outputs: int = 6, inputs: int = 5, narrow: bool = False) -> ParamMap:
    make = LAYOUTS[layout]
    maps = {1: make(inputs, ratio)} if narrow else {0: make(outputs, ratio), 1: make(inputs, ratio)}
    return ParamMap((outputs, inputs, 3, 3), maps, (1,), Noise(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("narrow", [False, True], ids=["hidden", "last"])
def test_noise_sums_to_zero_and_leaves_the_students_block(layout: str, ratio: int, narrow: bool) -> None:
    law = weight_map(layout, ratio, narrow=narrow)
    weight = sample(law.shape)
    clean = law.widen(weight)
    noisy = law.widen(weight, 0.25, torch.Generator().manual_seed(0))
    noise = noisy - clean
    columns = law.maps[1]
    total = torch.zeros(noise.shape[0], columns.size, 3, 3, dtype=noise.dtype)
    total.index_add_(1, torch.tensor(columns.index), noise)
    assert float(total.abs().max()) < 1e-15
    rows = law.maps.get(0, ReplicaMap.identity(6))
    block = noise[torch.tensor(rows.first)][:, torch.tensor(columns.first)]
    assert not bool(block.any())
    assert error(weight, law.narrow(noisy)) <= (0 if ratio != 3 else 1e-15)
    # Rows of first replicas are free on the other columns, where there are two of them to balance.
    firsts, others = noise[torch.tensor(rows.first)], noise[torch.tensor(rows.rank > 0)]
    assert bool(firsts.any()) == (ratio >= 3)
    assert others.numel() == 0 or bool((others != 0).all())


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("amplitude", [0.25, 1.0])
def test_size_of_the_noise(ratio: int, amplitude: float) -> None:
    """Relative to the rms of the undivided weight, with the divisor of the weight."""
    law = weight_map("default", ratio, 40, 40)
    weight = 7 * sample(law.shape)
    noise = law.widen(weight, amplitude, torch.Generator().manual_seed(0)) - law.widen(weight)
    wide = noise[torch.arange(len(noise)) % ratio > 0].movedim(1, 0).reshape(40, ratio, -1)
    scale = float(weight.square().mean().sqrt()) / ratio
    free = wide[:, :-1].std() / scale
    assert float(free) == pytest.approx(amplitude, rel=0.02)
    # The last replica balances the others.
    assert float(wide[:, -1].std() / scale) == pytest.approx(amplitude * (ratio - 1) ** 0.5, rel=0.02)


def test_noise_is_the_same_on_every_call_with_one_seed() -> None:
    law, weight = weight_map("default", 3), sample((6, 5, 3, 3))
    one, two, three = (law.widen(weight, 0.25, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_no_noise_where_nothing_may_differ() -> None:
    weight = sample((6, 5, 3, 3))
    plain = ParamMap(weight.shape, {0: ReplicaMap.repeat(6, 2)}, (), Noise(0, 1))
    assert torch.equal(plain.widen(weight, 1.0), plain.widen(weight))
    computed = ParamMap(weight.shape, {0: ReplicaMap.repeat(6, 2), 1: ReplicaMap.repeat(5, 2)})
    assert torch.equal(computed.widen(weight, 1.0), computed.widen(weight))


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("noise", [0.25, 1.0])
def test_noise_keeps_function_and_student(ratio: int, noise: float) -> None:
    entry = BY_NAME["unet"]
    model = built(entry)
    teacher = reparam.expand(model, ratio, example_input=sample(entry.shape), noise=noise, verify=False)
    x = sample(entry.shape)
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= 1e-12
    state = reparam.extract(teacher).state_dict()
    assert all(error(t, state[key]) <= (0 if ratio != 3 else 1e-15) for key, t in model.state_dict().items())


# After training ------------------------------------------------------------------------------------------------------


def distances(teacher: Teacher, x: Tensor) -> dict[str, float]:
    """Replica distance of what each widened layer computes."""
    names = [layer.name.removesuffix(".weight") for layer in teacher.plan.layers]
    with torch.no_grad():
        _out, values = reparam.tap(teacher, names)(x)
    result = {}
    for name in names:
        node = teacher._programs[0].outputs[name][-1]
        maps = dict(teacher.plan.value_maps.get(node, ((),))[0])
        if 1 not in maps:
            continue
        value = values[name]
        mean = contract(value, 1, maps[1]).index_select(1, torch.tensor(maps[1].index))
        result[name] = float((value - mean).square().mean().sqrt() / value.square().mean().sqrt())
    return result


class Chain(nn.Module):
    """Conv layers on an 8x8 image with a linear classifier."""

    def __init__(self, hidden: int, depthwise: bool = False, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        groups = width if depthwise else 1
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=groups) for _ in range(hidden))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.last(x.mean((2, 3)))


def trained(model: nn.Module, ratio: int, noise: float, student: bool = False, steps: int = 100) -> Teacher:
    """Train the teacher alone (or with its student) on a fixed task."""
    torch.manual_seed(0)
    teacher = reparam.expand(model.double(), ratio, example_input=DATA, noise=noise, verify=False).train()
    view = reparam.student_view(teacher).train()
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        loss = F.cross_entropy(teacher(DATA), LABELS)
        if student:
            loss = loss + F.cross_entropy(view(DATA), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.4 * (2 if student else 1)
    return teacher


LABELS = torch.arange(32) % 4
WAVES = torch.arange(8, dtype=torch.float64)
WAVES_OF = ((0.8, 0), (0, 0.8), (2, 1), (0, 3))
PATTERNS = torch.stack([torch.outer(torch.cos(a * WAVES), torch.cos(b * WAVES)) for a, b in WAVES_OF])
DATA = 0.5 * sample((32, 1, 8, 8)) + PATTERNS[LABELS][:, None]
"""Four patterns under noise: every layer has something to learn."""


def state(title: str, values: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.1e}" for name, value in values.items()))


@pytest.mark.parametrize("ratio", [2, 3])
def test_hidden_layers_part(ratio: int) -> None:
    torch.manual_seed(1)
    model = Chain(hidden=3)
    noisy = distances(trained(model, ratio, 0.25), DATA)
    exact = distances(trained(model, ratio, 0.0), DATA)
    state(f"r={ratio}, noise 0.25", noisy)
    state(f"r={ratio}, noise 0", exact)
    assert list(noisy) == ["first", "hidden.0", "hidden.1", "hidden.2"]
    # Without noise nothing ever parts; with it all hidden layers do, and the first follows the one behind it.
    assert max(exact.values()) < 1e-10
    assert min(noisy.values()) > 1e-3
    assert min(noisy[f"hidden.{k}"] for k in range(3)) > 1e-2


@pytest.mark.parametrize("ratio", [2, 3])
def test_tiny_noise_is_not_enough(ratio: int) -> None:
    torch.manual_seed(1)
    model = Chain(hidden=3)
    tiny, default = (distances(trained(model, ratio, noise), DATA) for noise in (1e-4, 0.25))
    state(f"r={ratio}, noise 1e-4", tiny)
    assert all(tiny[name] < 0.05 * default[name] for name in tiny)


@pytest.mark.parametrize("depthwise", [False, True], ids=["first and last", "depthwise chain"])
def test_chains_without_freedom(depthwise: bool) -> None:
    """At ratio 2 neither a first nor a last nor a depthwise layer has room for noise; at 3 the last one has."""
    torch.manual_seed(1)
    model = Chain(hidden=2, depthwise=True) if depthwise else Chain(hidden=0)
    two, three = (distances(trained(model, ratio, 0.25), DATA) for ratio in (2, 3))
    helped = distances(trained(model, 2, 0.25, student=True), DATA)
    state("r=2, teacher alone", two)
    state("r=3, teacher alone", three)
    state("r=2, with the student", helped)
    assert max(two.values()) < 1e-10
    assert min(three.values()) > 1e-3
    assert min(helped.values()) > 1e-3


def test_the_distance_sees_what_it_should() -> None:
    teacher = reparam.expand(Chain(hidden=1).double(), 2, example_input=DATA)
    assert max(distances(teacher, DATA).values()) < 1e-12
    with torch.no_grad():
        teacher.first.weight[0] += 0.1
    assert distances(teacher, DATA)["first"] > 1e-3

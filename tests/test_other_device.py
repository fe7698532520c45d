"""On a device that is not the CPU, without having one: see ``other_device``."""

from __future__ import annotations

import copy

import other_device
import pytest
import torch
from other_device import DEVICE, MixedDevicesError, unwaited, waits
from torch import nn
from training import facts, make_batch, one_teacher, small_net

import reparam
import reparam.distill.kdiffusion.steps
from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays
from reparam.distill.distributed import Group
from reparam.distill.engine import Engine
from reparam.distill.loaders import Shard, make_loader
from reparam.distill.meter import Meter
from reparam.distill.methods.base import Batch
from reparam.distill.networks import make_networks
from reparam.distill.runs import assemble
from reparam.distill.statics import StaticTeacher
from reparam.ops.params import ParamMap
from reparam.ops.recipes import names as recipes

MISSING = other_device.unavailable()
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.filterwarnings("ignore:.*capture:UserWarning"),
]
GROUP = Group(0, 0, 1, DEVICE)
CONSTANT = [1.0, 0.5, 2.0, 4.0]


class Small(nn.Module):
    """A convolution with a norm, constants that are made where the images are, a gate, and a classifier."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.gate = nn.Linear(4, 4)
        self.head = nn.Linear(4, num_classes)
        self.register_buffer("scale", torch.tensor(CONSTANT), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.constants(x + torch.arange(4, device=x.device)[:, None, None]).mean((2, 3)) * self.scale
        x = x + torch.ones(x.shape[1], device=self.head.weight.device)
        return self.head(x * torch.sigmoid(self.gate(x)))

    def constants(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Moving(Small):
    """The same with constants that its code makes on the CPU and moves."""

    def constants(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, torch.tensor([1, 0, 3, 2])] * torch.tensor(CONSTANT).to(x.device)[:, None, None]


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small()


def moved(batch: Batch) -> Batch:
    targets = None if batch.targets is None else batch.targets.to(DEVICE)
    return Batch(batch.images.to(DEVICE), batch.labels.to(DEVICE), targets, batch.indices.to(DEVICE))


def engine_for(student: nn.Module, config: TrainConfig, statics: int = 0) -> Engine:
    config, group = config.resolved(), Group(0, 0, 1, next(student.parameters()).device)
    example = make_batch(2, dtype=torch.float32).images.to(group.device)
    networks = make_networks(student, example, config)
    found = [
        StaticTeacher(small_net(9 + k, width=3).to(group.device), facts(mean=(0.4,)), ((0.5,), (0.5,)))
        for k in range(statics)
    ]
    engine = assemble(config, networks, found, example, torch.arange(100) % 10, 4, group)
    engine.learners.train()
    return engine


def steps(engine: Engine, count: int = 2) -> list[list[str]]:
    """Take steps and return which operators had to wait in each of them."""
    meter, found = Meter(engine.learners.names, engine.group), []
    for number in range(1, count + 1):
        torch.manual_seed(number)
        batch = make_batch(4, seed=number, dtype=torch.float32)
        batch = moved(batch) if engine.group.device == DEVICE else batch
        with waits() as waited:
            engine.step(batch, 1, number, meter)
        found.append(waited)
    assert meter.bad() is None and len(meter.averages(count)) == 2 * len(engine.learners.names)
    return found


def devices(*modules: nn.Module) -> set[str]:
    """Where the tensors of networks are, but for constants that code makes itself and moves."""
    tensors = [pair for m in modules for pair in [*m.named_parameters(), *m.named_buffers()]]
    return {t.device.type for name, t in tensors if "_tensor_constant" not in name}


def test_the_device_is_one_of_its_own():
    x = torch.ones(2, 3, device=DEVICE)
    for wrong in (
        lambda: x + torch.ones(2, 3),
        lambda: x.index_select(1, torch.tensor([0])),
        lambda: torch.cat([x, torch.ones(2, 3)]),
        lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(MixedDevicesError):
            wrong()
    assert (x + torch.tensor(1.0)).device == x[torch.tensor([0])].device == DEVICE
    with waits() as waited:
        assert float(x.sum().cpu()) == 6 and x.tolist() == [[1.0] * 3] * 2
    assert waited


@pytest.mark.parametrize("kind", [Small, Moving])
def test_expanded_networks(kind):
    torch.manual_seed(0)
    student = kind()
    x = torch.randn(2, 1, 8, 8)
    expected = student.eval()(x)
    student.to(DEVICE)
    torch.manual_seed(1)
    teacher = reparam.expand(student, 3, example_input=x.to(DEVICE))
    view = reparam.student_view(teacher)
    torch.manual_seed(1)
    on_cpu = reparam.expand(copy.deepcopy(student).cpu(), 3, example_input=x, verify=False)
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name].cpu(), value, msg=name)
    assert devices(teacher, reparam.extract(teacher)) == {DEVICE.type}
    for network in (teacher, view, reparam.extract(teacher), reparam.fold(student, x.to(DEVICE))):
        torch.testing.assert_close(network(x.to(DEVICE)).cpu(), expected)
    assert reparam.check(student, reparam.extract(teacher), x.to(DEVICE)).passed
    teacher.cpu()
    torch.testing.assert_close(view(x), expected)


def test_a_constant_that_stays_on_the_cpu_is_found(monkeypatch):
    def divisor(self, dim, counts, like):
        return torch.tensor(counts, dtype=like.dtype).view([-1 if d == dim else 1 for d in range(like.dim())])

    teacher = reparam.expand(small().to(DEVICE), 2, example_input=torch.zeros(2, 1, 8, 8, device=DEVICE), verify=False)
    monkeypatch.setattr(ParamMap, "_divisor", divisor)
    with pytest.raises(MixedDevicesError):
        reparam.student_view(teacher)(torch.zeros(2, 1, 8, 8, device=DEVICE))


@pytest.mark.parametrize("recipe", recipes())
def test_a_step_with_branches(recipe):
    engine = engine_for(small().to(DEVICE), TrainConfig(branches=recipe, method="gpd", clip_grad=1.0))
    assert devices(engine.learners) == {DEVICE.type}
    assert steps(engine)[1] == []
    x = make_batch(4, dtype=torch.float32).images.to(DEVICE)
    engine.networks.train(False)
    torch.testing.assert_close(
        engine.networks.extract()(x).cpu(), engine.networks.student(x).cpu(), rtol=1e-4, atol=1e-5
    )


class Joined(Small):
    """Widened channels beside others that stay as they are, and their number: replicas in pieces, unequal in number."""

    def __init__(self) -> None:
        super().__init__()
        self.grown = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(9, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.cat([x, y, x], 1)
        return self.head(torch.cat([y[:, :5], torch.relu(self.grown(y))], 1).mean((2, 3)))


def test_a_step_with_unequal_numbers_of_replicas():
    torch.manual_seed(0)
    engine = engine_for(Joined().to(DEVICE), TrainConfig(method="gpd", clip_grad=1.0))
    maps = [m for p in engine.learners.owner.plan.params.values() for m in p.maps.values()]
    assert any(len(m.pieces) > 1 for m in maps) and any(m.uniform is None for m in maps)
    assert steps(engine)[1] == []


SETTINGS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr_scale": "student"},
    "three replicas": {"ratio": 3, "accumulate": 2},
    "mixed precision": {"precision": "bf16"},
    "channels last": {"channels_last": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step(name):
    found = []
    for device in ("cpu", DEVICE):
        engine = engine_for(small().to(device), TrainConfig(clip_grad=1.0, **SETTINGS[name]))
        waited = steps(engine)
        assert device == "cpu" or waited[1] == []
        found.append({key: value.cpu() for key, value in engine.learners.owner.state_dict().items()})
    close = {"rtol": 0.1, "atol": 0.05} if name == "mixed precision" else {"rtol": 1e-4, "atol": 1e-5}
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, **close, msg=key)


@pytest.mark.parametrize("method", one_teacher())
def test_a_step_against_a_static_teacher(method, monkeypatch):
    # What goes to a GPU through pinned memory, without waiting.
    monkeypatch.setattr(reparam.distill.kdiffusion.steps, "on_device", lambda values, device: unwaited(values))
    engine = engine_for(small_net().to(DEVICE), TrainConfig(method=method, teacher="static", batch_size=4), statics=1)
    assert devices(engine.learners, engine.statics[0].network) == {DEVICE.type}
    assert steps(engine)[1] == []


@pytest.mark.parametrize("changes", [{"shift": 2, "flip": True}, {"mixup": 0.4, "cutmix": 1.0}, {"erase": 0.9}])
def test_batches(changes):
    made = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=made, dtype=torch.uint8)
    source = Arrays(
        "made up", ("a", "b", "c"), images[:16], torch.arange(16) % 3, images[16:], torch.arange(8) % 3, 0, False
    )
    config = TrainConfig(batch_size=4, **changes).resolved()
    here, there = (make_loader(source, config, nn.Identity(), torch.device(d), Shard()) for d in ("cpu", DEVICE))
    assert here.facts == there.facts
    for one, other in zip(here.train(1), there.train(1), strict=True):
        for name in ("images", "labels", "targets", "indices"):
            a, b = getattr(one, name), getattr(other, name)
            assert a is b is None or (b.device == DEVICE and torch.equal(a, b.cpu())), name

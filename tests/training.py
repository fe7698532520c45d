"""Small networks, engines and comparisons that the tests of training share."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from reparam.distill import checkpoints
from reparam.distill.config import TrainConfig
from reparam.distill.data import Facts, Source
from reparam.distill.distributed import Group
from reparam.distill.engine import Engine
from reparam.distill.meter import Meter
from reparam.distill.methods.base import Batch, distillers, get_distiller
from reparam.distill.models import CifarResNet
from reparam.distill.networks import make_learners, make_networks
from reparam.distill.optim import make_optimizer, make_scheduler
from reparam.distill.statics import StaticTeacher
from reparam.distill.trainer import train

GROUP = Group(0, 0, 1, torch.device("cpu"))


def one_teacher() -> list[str]:
    """Names of the losses that need a single static teacher, at one temperature."""
    kinds = {name: get_distiller(name) for name in distillers()}
    return [name for name, kind in kinds.items() if kind.assistants == 0 and kind.schedule is None]


NETS = '''
"""Networks for digits that are not in the library."""
import timm
import torch
from torch import nn


def vit(num_classes=10, in_chans=1, drop_path_rate=0.3):
    """A transformer with dropout and drop path."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=in_chans, num_classes=num_classes, embed_dim=16, depth=2, num_heads=2,
        drop_path_rate=drop_path_rate, proj_drop_rate=0.1, drop_rate=0.1,
    )


def convs(num_classes=10, in_chans=1):
    """Convolutions with dropout between them and no norms."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, num_classes),
    )


def normless(num_classes=10, in_chans=1):
    """Convolutions alone."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes),
    )
'''


class Mixed(nn.Module):
    """A residual network with a stem, a depthwise convolution, norms and a linear layer inside."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(4)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.wide = nn.Conv2d(4, 6, 3, stride=2)
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.pointwise(torch.relu(self.norm2(self.depthwise(x))))
        x = self.wide(x).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


def small_net(seed: int = 0, classes: int = 10, width: int = 2, in_chans: int = 1) -> nn.Module:
    """A residual network of a few hundred parameters."""
    torch.manual_seed(seed)
    return CifarResNet(8, width=width, num_classes=classes, in_chans=in_chans)


def mixed_net(seed: int = 0) -> nn.Module:
    """`Mixed` with norms that do something."""
    torch.manual_seed(seed)
    net = Mixed()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net


def vit(seed: int = 0) -> nn.Module:
    """A transformer for digits without anything random in it."""
    torch.manual_seed(seed)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2
    )


def facts(classes: int = 10, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)) -> Facts:
    """What a loader says about images 8 x 8."""
    return Facts("made up", classes, 100, 100, (len(mean), 8, 8), mean, std, 0, False)


def make_batch(count: int = 8, seed: int = 0, classes: int = 10, mixed: bool = False, dtype: Any = None) -> Batch:
    """A batch of noise."""
    made = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=made, dtype=dtype or torch.float64)
    labels = torch.randint(classes, (count,), generator=made)
    targets = torch.rand(count, classes, generator=made, dtype=images.dtype).softmax(1) if mixed else None
    if targets is not None:
        labels = targets.argmax(1)
    return Batch(images, labels, targets, torch.randperm(100, generator=made)[:count])


def static_teacher(seed: int = 9) -> StaticTeacher:
    """A static teacher in float64 that is trained for the images as they are."""
    net = small_net(seed, width=3).double()
    same = facts()
    return StaticTeacher(net, same, (same.mean, same.std))


FEWER_HEADS = {"heads": 2}
"""Of kdiffusion, which has 10 per stage: recording and running them takes longer than everything else."""


def settings(**changes: Any) -> TrainConfig:
    """Settings of a short run in float64 without clipping; methods with a static teacher get one."""
    base: dict[str, Any] = {"precision": "fp64", "clip_grad": 0.0, "epochs": 4, "batch_size": 8, "lr": 0.01}
    if "teacher" not in changes and set(changes.get("method", "gpd").split("+")) - {"gpd", "baseline"}:
        base["teacher"] = "static"
    return TrainConfig(**{**base, **changes}).resolved()


def make_engine(student: nn.Module, config: TrainConfig, static: StaticTeacher | None = None, steps: int = 4) -> Engine:
    """What a run makes of its settings, for one process on the CPU; float64 if the settings say so."""
    config = config.resolved()
    double = config.precision == "fp64"
    if double:
        student.double()
    example = make_batch(2, dtype=torch.float64 if double else torch.float32).images
    networks = make_networks(student, example, config)
    if config.channels_last:
        networks.owner.to(memory_format=torch.channels_last)
    labels = torch.arange(100) % 10
    statics = [] if static is None else [static]
    learners = make_learners(networks, statics, example, labels, config)
    exempt = frozenset(f"owner.{name}" for name in getattr(networks.owner, "no_weight_decay", set)())
    divisors: dict[str, float] = getattr(networks.student, "divisors", dict)()
    optimizer = make_optimizer(learners, config, exempt, {f"owner.{name}": by for name, by in divisors.items()})
    engine = Engine(learners, statics, optimizer, make_scheduler(optimizer, config, steps), config, GROUP)
    learners.train()
    return engine


def make_meter(engine: Engine) -> Meter:
    """An empty meter for an engine."""
    return Meter(engine.learners.names, GROUP)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the times."""
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "metrics.csv")
    ]


FREE = {"seconds", "config"}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Name everything in which two states differ, bit for bit; times and settings may."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(set(one) | set(other), key=str)
        return list(itertools.chain.from_iterable(
            differences(one.get(key), other.get(key), f"{place}/{key}") for key in keys if key not in FREE
        ))  # fmt: skip
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return list(itertools.chain.from_iterable(differences(a, b, f"{place}/{n}") for n, (a, b) in pairs))
    return [] if type(one) is type(other) and one == other else [f"{place}: {one!r} and {other!r}"]


def last_state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    found = checkpoints.latest(folder)
    assert found is not None and not found.damaged
    return found.state


def assert_same_run(one: Path, other: Path) -> None:
    """Two finished runs ended in the same state, with the same metrics and the same files, bit for bit."""
    state = last_state(one)
    assert state["owner"] and state["optimizer"]["state"] and state["rows"]
    found = differences(state, last_state(other))
    assert not found, found
    assert metrics(one) == metrics(other), (metrics(one), metrics(other))
    for file in sorted(one.glob("*.safetensors")):
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def trained_run(output: Path, model: str, source: Source) -> str:
    """Train ``model`` alone for an epoch, as the static teacher of other runs, and return its folder."""
    config = TrainConfig(model=model, method="baseline", epochs=1, batch_size=40, output=str(output), quiet=True)
    train(config, source=source)
    return str(output)

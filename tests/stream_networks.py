"""Random networks of residuals, gates, depthwise layers and concatenations, with an own account of their streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from random_networks import DrawnPick, randomise
from random_ops import Pick
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (4, 6, 8)
Origins = tuple[str | None, ...]
"""For each channel of a value the layer that it comes from; None: the network's input, or not known."""


@dataclass(frozen=True)
class Step:
    """One step; ``options`` has the module's arguments."""

    kind: str
    inputs: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class StreamProgram:
    """A network as data: step k computes value k + 1, value 0 is the input. A head reads every value that is left."""

    steps: tuple[Step, ...]
    inputs: int = 1

    def __str__(self) -> str:
        lines = [
            f"x{k} = {s.kind}({', '.join([*(f'x{i}' for i in s.inputs), *(f'{n}={v}' for n, v in s.options)])})"
            for k, s in enumerate(self.steps, 1)
        ]
        return "\n".join(lines)

    def sample(self, batch: int = 2, more: int = 0, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, 4, 5 + more, 5 + more, generator=generator, dtype=torch.float64),)

    def build(self) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            network = StreamNet(self)
            randomise(network)
        return network.double().eval()


class StreamNet(nn.Module):
    """The module of a program; layer k is ``layers.k``."""

    def __init__(self, program: StreamProgram) -> None:
        super().__init__()
        self.program = program
        widths = [4]
        self.layers = nn.ModuleDict()
        for k, step in enumerate(program.steps):
            channels = widths[step.inputs[0]]
            made = _module(step, channels)
            if made is not None:
                self.layers[str(k)] = made
            widths.append(_width(step, [widths[i] for i in step.inputs]))
        self.last = _unused(program)
        self.mix = nn.Conv2d(sum(widths[k] for k in self.last), 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for k, step in enumerate(self.program.steps):
            given = [values[i] for i in step.inputs]
            module = next((m for name, m in self.layers.items() if name == str(k)), None)
            values.append(_run(step.kind, module, given))
        x = F.silu(self.mix(torch.cat([values[k] for k in self.last], dim=1)))
        return self.head(x.mean((2, 3)))


class Standardised(nn.Conv2d):
    """A convolution whose weight is computed."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-4).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


def _unused(program: StreamProgram) -> list[int]:
    used = {i for step in program.steps for i in step.inputs}
    return [k for k in range(1, len(program.steps) + 1) if k not in used]


def _module(step: Step, channels: int) -> nn.Module | None:
    options = dict(step.options)
    if step.kind == "conv":
        return nn.Conv2d(channels, options["out"], 3, padding=1, groups=options["groups"])
    if step.kind == "standard":
        return Standardised(channels, options["out"], 3, padding=1)
    if step.kind == "depthwise":
        return nn.Conv2d(channels, channels * options["times"], 3, padding=1, groups=channels, bias=False)
    if step.kind == "norm":
        return nn.BatchNorm2d(channels)
    if step.kind == "gate":
        return nn.Conv2d(channels, channels, 1)
    if step.kind == "linear":
        return nn.Linear(channels, options["out"])
    return None


def _width(step: Step, given: list[int]) -> int:
    options = dict(step.options)
    if step.kind in ("conv", "standard", "linear"):
        return int(options["out"])
    if step.kind == "depthwise":
        return given[0] * int(options["times"])
    return {"cat": sum(given), "half": given[0] // 2}.get(step.kind, given[0])


def _run(kind: str, module: Any, given: list[Tensor]) -> Tensor:
    x = given[0]
    if kind in ("conv", "standard", "depthwise"):
        return module(x)
    if kind == "norm":
        return F.relu(module(x))
    if kind == "gate":
        return x * torch.sigmoid(module(x.mean((2, 3), keepdim=True)))
    if kind == "linear":
        return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if kind == "add":
        return x + given[1]
    if kind == "mul":
        return x * torch.tanh(given[1])
    if kind == "cat":
        return torch.cat(given, dim=1)
    assert kind == "half"
    return x.chunk(2, dim=1)[1]


# -- drawing -------------------------------------------------------------------------------------------------------

KINDS = (
    "conv", "conv", "conv", "standard", "add", "add", "add", "mul", "depthwise", "norm", "gate", "cat", "half",
    "linear",
)  # fmt: skip


def draw_program(pick: Pick) -> StreamProgram:
    steps = [Step("conv", (0,), (("out", pick.of(WIDTHS)), ("groups", 1)))]
    widths = [4, _width(steps[0], [4])]
    for _ in range(pick.of(range(2, 12))):
        step = _draw_step(pick, widths)
        if step is not None:
            steps.append(step)
            widths.append(_width(step, [widths[i] for i in step.inputs]))
    return StreamProgram(tuple(steps))


def _draw_step(pick: Pick, widths: list[int]) -> Step | None:
    kind, last = pick.of(KINDS), len(widths) - 1
    first = last if pick.of((True, True, False)) else pick.of(range(len(widths)))
    channels = widths[first]
    if kind == "conv":
        # Most are as wide as an earlier value, so that they can meet.
        groups = pick.of([g for g in (1, 1, 2) if channels % g == 0 and channels > g])
        out = pick.of([width for width in (*widths[1:], *WIDTHS) if width % groups == 0])
        return Step(kind, (first,), (("out", out), ("groups", groups)))
    if kind in ("linear", "standard"):
        return Step(kind, (first,), (("out", pick.of(widths[1:])),))
    if kind == "depthwise":
        return Step(kind, (first,), (("times", pick.of((1, 1, 2))),)) if 1 < channels <= 16 else None
    if kind in ("norm", "gate"):
        return Step(kind, (first,))
    if kind == "half":
        return Step(kind, (first,)) if channels % 2 == 0 and channels > 2 else None
    partners = [k for k, width in enumerate(widths) if k != first and (kind == "cat" or width == channels)]
    if not partners or (kind == "cat" and channels > 16):
        return None
    return Step(kind, (first, pick.of(partners[::-1])))


@st.composite
def stream_programs(draw: Any) -> StreamProgram:
    return draw_program(DrawnPick(draw))


# -- what should come out ------------------------------------------------------------------------------------------


@dataclass
class Account:
    """Which layers there are, and which meet: computed channel by channel, without reparam.

    Args:
        layers: weight names.
        meetings: pairs of layers.
        computed: layers with a computed weight: one that reads unequal numbers of replicas stays narrow.
        unsure: layers of whose ratio nothing is said: a depthwise one that also reads the network's input, a computed
            one that does; and the head.
    """

    layers: list[str] = field(default_factory=list)
    meetings: list[tuple[str, str]] = field(default_factory=list)
    computed: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)

    def streams(self) -> Iterator[set[str]]:
        left = {name: {name} for name in self.layers}
        for a, b in self.meetings:
            if left[a] is not left[b]:
                left[a] |= left[b]
                for name in left[b]:
                    left[name] = left[a]
        yield from {id(stream): stream for stream in left.values()}.values()

    def ratios(self, entries: Mapping[str, int]) -> dict[str, int] | None:
        """The ratio of every layer where ``entries`` names some of them; None where that is a contradiction."""
        result: dict[str, int] = {}
        for stream in self.streams():
            asked = {entries[name] for name in stream if name in entries}
            if len(asked) > 1:
                return None
            result |= dict.fromkeys(stream, asked.pop() if asked else 1)
        return result


def account_of(program: StreamProgram) -> Account:
    account = Account()
    values: list[Origins] = [(None,) * 4]

    def meet(one: Origins, two: Origins) -> Origins:
        account.meetings += [(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
        return tuple(a or b for a, b in zip(one, two, strict=True))

    for k, step in enumerate(program.steps):
        name, given, options = f"layers.{k}.weight", [values[i] for i in step.inputs], dict(step.options)
        found = given[0]
        mixed = None in found and set(found) != {None}
        if step.kind in ("conv", "standard", "depthwise", "gate", "linear"):
            account.layers.append(name)
        if step.kind == "standard" and mixed:
            account.unsure.add(name)
            found = (None,) * options["out"]
        elif step.kind in ("conv", "standard", "linear"):
            found = (name,) * options["out"]
            account.computed |= {name} if step.kind == "standard" else set()
        elif step.kind == "depthwise":
            meet((name,) * len(found), found)
            account.unsure |= {name} if None in found else set()
            found = tuple(origin for origin in found for _ in range(options["times"]))
        elif step.kind == "gate":
            found = meet(found, (name,) * len(found))
        elif step.kind in ("add", "mul"):
            found = meet(*given)
        elif step.kind == "cat":
            found = given[0] + given[1]
        elif step.kind == "half":
            found = found[len(found) // 2 :]
        values.append(found)
    account.layers += ["mix.weight", "head.weight"]
    account.unsure.add("head.weight")
    return account

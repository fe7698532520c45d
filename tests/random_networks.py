"""Random networks: whole networks drawn as data, by hypothesis or by a seed.

A :class:`Program` is a list of steps over numbered values; ``print(program)`` shows it, ``program.build()`` makes the
module with deterministic weights. The steps are in random_ops.py and random_ops_more.py.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import random_ops_more
import torch
from hypothesis import strategies as st
from random_ops import Pick, Value
from torch import Tensor, nn

OPS = random_ops_more.OPS
T = TypeVar("T")
LIMIT = 3000
"""Largest number of elements of a value per sample."""


class SeededPick(Pick):
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def of(self, options: Sequence[T]) -> T:
        return self.random.choice(options)


class DrawnPick(Pick):
    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def of(self, options: Sequence[T]) -> T:
        return options[self.draw(st.integers(0, len(options) - 1))]


@dataclass(frozen=True)
class Step:
    """One step: the operator's name, the numbers of its input values, its options.

    ``again`` is the number of an earlier step whose module is called a second time.
    """

    name: str
    inputs: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    again: int | None = None

    def __str__(self) -> str:
        words = [f"x{k}" for k in self.inputs] + [f"{key}={value!r}" for key, value in self.options]
        return f"{self.name if self.again is None else f'step {self.again} again'}({', '.join(words)})"


@dataclass(frozen=True)
class Program:
    """A network as data.

    Args:
        form: of the inputs.
        shape: of the inputs, without the batch.
        inputs: number of inputs (1 or 2).
        steps: step k computes value ``inputs + k``.
        outputs: numbers of the returned values.
        returns: one, tuple, list or dict.
        seed: of the weights.
    """

    form: str
    shape: tuple[int, ...]
    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    returns: str = "one"
    seed: int = 0

    def __str__(self) -> str:
        given = ", ".join(f"x{k}" for k in range(self.inputs))
        lines = [f"{given}: {self.form} [B, {', '.join(map(str, self.shape))}], weights of seed {self.seed}"]
        lines += [f"x{k} = {step}" for k, step in enumerate(self.steps, self.inputs)]
        return "\n".join([*lines, f"return {self.returns} of {', '.join(f'x{k}' for k in self.outputs)}"])

    def sample(self, batch: int = 2, more: int = 0, seed: int = 1) -> tuple[Tensor, ...]:
        """Return random inputs; ``more`` is added to every size behind the channels."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self.shape) - 1
        space = (0,) if self.form == "tokens" else range(1, last + 1)
        shape = [n + more if d in space else n for d, n in enumerate(self.shape)]
        if self.form == "tokens":
            shape[-1] = self.shape[-1]
        return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for _ in range(self.inputs))

    def build(self) -> Network:
        """Return the module in float64 and eval mode; norm statistics and constant parameters are randomised."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            network = (Network if self.inputs == 1 else TwoInputs)(self)
            randomise(network)
        return network.double().eval()

    def smaller(self) -> Iterator[Program]:
        """Yield programs with one step or one output less."""
        for k in reversed(range(len(self.steps))):
            gone, stand_in = self.inputs + k, self.steps[k].inputs[0]

            def move(n: int, gone: int = gone, stand_in: int = stand_in) -> int:
                return stand_in if n == gone else n - (n > gone)

            kept = [
                replace(
                    s, inputs=tuple(map(move, s.inputs)), again=None if s.again is None else s.again - (s.again > k)
                )
                for j, s in enumerate(self.steps)
                if j != k and s.again != k
            ]
            if len(kept) == len(self.steps) - 1:
                outputs = tuple(dict.fromkeys(map(move, self.outputs)))
                yield replace(self, steps=tuple(kept), outputs=outputs)
        if len(self.outputs) > 1:
            for k in range(len(self.outputs)):
                yield replace(self, outputs=self.outputs[:k] + self.outputs[k + 1 :])


class Network(nn.Module):
    """The module of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        values = [Value(program.form, x.float()) for x in program.sample()]
        for k, step in enumerate(program.steps):
            if step.again is None:
                torch.manual_seed(program.seed + 1000 * k)
                self.add_module(
                    f"{step.name}{k}", OPS[step.name](*(values[i] for i in step.inputs), **dict(step.options))
                )
            values.append(apply(self.step(k), step, values))

    def step(self, k: int) -> nn.Module:
        step = self.program.steps[k]
        return getattr(self, f"{step.name}{k if step.again is None else step.again}")

    def run(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for k, step in enumerate(self.program.steps):
            values.append(self.step(k)(*(values[i] for i in step.inputs)))
        outputs = [values[k] for k in self.program.outputs]
        returns = self.program.returns
        if returns == "one" and len(outputs) == 1:
            return outputs[0]
        if returns == "dict":
            return {f"out{k}": value for k, value in enumerate(outputs)}
        return outputs if returns == "list" else tuple(outputs)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(Network):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


def apply(module: nn.Module, step: Step, values: list[Value]) -> Value:
    """Run one step on the samples.

    Raises:
        ValueError: the result is empty, too large, not finite or of no known form.
    """
    with torch.no_grad(), torch.random.fork_rng([]):
        result = module.eval()(*(values[i].sample for i in step.inputs))
    module.train()
    form = OPS[step.name].gives or values[step.inputs[0]].form
    ranks = {"image": (3, 4, 5), "tokens": (3,), "vector": (2,)}[form]
    fits = isinstance(result, Tensor) and result.dim() in ranks and result.dtype == torch.float32
    if not fits or result.shape[0] != 2 or not 0 < result[0].numel() <= LIMIT:
        raise ValueError("the result does not fit")
    largest = float(result.abs().max())
    if not 1e-4 < largest < 1e4:
        raise ValueError("the result is out of range")
    if step.name == "norm" and (
        float(result.std()) < 1e-3 * largest or _rounding(module, step, values, result) > 1e-4 * largest
    ):
        raise ValueError("the step is ill-conditioned: it normalises values that are nearly equal")
    return Value(form, result)


def _rounding(module: nn.Module, step: Step, values: list[Value], result: Tensor) -> float:
    """Return how far the step in float32 is from the step in float64."""
    exact = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        wide = exact(*(values[i].sample.double() for i in step.inputs))
    return float((wide - result).abs().max())


def randomise(network: nn.Module) -> None:
    """Give norms statistics, and constant parameters values, that hide nothing."""
    for module in network.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase,)) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for parameter in network.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            nn.init.normal_(parameter, 1.0, 0.3)


# -- drawing -------------------------------------------------------------------------------------------------------

BODY = [name for name, kind in OPS.items() for _ in range(kind.often)]
STEMS = {"image": "conv", "tokens": "linear", "vector": "linear"}


class Builder:
    """Grows a program step by step, on real samples, so that every step fits."""

    def __init__(self, pick: Pick, form: str, shape: tuple[int, ...], inputs: int) -> None:
        self.pick = pick
        self.program = Program(form, shape, inputs, (), (0,))
        self.values = [Value(form, x.float()) for x in self.program.sample()]
        self.modules: list[nn.Module] = []

    def add(self, name: str, inputs: tuple[int, ...], again: int | None = None) -> bool:
        """Append a step; returns False where it does not fit."""
        values = [self.values[k] for k in inputs]
        kind = OPS[name]
        options: Any = {} if again is not None else kind.draw(self.pick, *values)
        if options is None:
            return False
        step = Step(name, inputs, tuple(options.items()), again)
        try:
            torch.manual_seed(1000 * len(self.modules))
            module = kind(*values, **options) if again is None else self.modules[again]
            value = apply(module, step, self.values)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, Warning):
            return False
        self.modules.append(module)
        self.values.append(value)
        self.program = replace(self.program, steps=(*self.program.steps, step))
        return True

    def grow(self) -> bool:
        """Append one step of a random kind."""
        pick, count = self.pick, len(self.values)
        first = count - 1 if pick.of((True, True, True, False)) else pick.of(range(count))
        form = self.values[first].form
        if self.modules and pick.of((False,) * 9 + (True,)):
            k = pick.of(range(len(self.modules)))
            step = self.program.steps[k]
            like = self.values[step.inputs[0]]
            fits = [n for n, v in enumerate(self.values) if v.form == like.form and v.channels == like.channels]
            if len(step.inputs) == 1 and step.again is None:
                return self.add(step.name, (pick.of(fits[::-1]),), again=k)
            return False
        name = pick.of([n for n in BODY if form in OPS[n].forms])
        if OPS[name].arity == 1:
            return self.add(name, (first,))
        partners = [
            n
            for n, v in enumerate(self.values)
            if (not OPS[name].same or (v.form == form and v.shape == self.values[first].shape))
            and (v.form == form or name == "modulate")
        ]
        return bool(partners) and self.add(name, (first, pick.of(partners)))


FORMS = ("image2", "image2", "image2", "image2", "image1", "image3", "tokens", "vector")


def draw_program(pick: Pick) -> Program:
    """Draw a network."""
    kind = pick.of(FORMS)
    channels, size = pick.of((3, 4, 1, 6, 5)), pick.of((6, 5, 7, 8, 9))
    if kind == "vector":
        form, shape = "vector", (channels,)
    elif kind == "tokens":
        form, shape = "tokens", (size, channels)
    else:
        form = "image"
        dims = int(kind[-1])
        shape = (channels, *[min(size, 6) if dims == 3 else size] * (dims - 1), pick.of((size, 6)))
    # A step that warns (a variance of one value) is a step that does not fit.
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("error")
        builder = Builder(pick, form, shape, pick.of((1,) * 7 + (2,)))
        if pick.of((True,) * 9 + (False,)):
            builder.add(STEMS[form], (0,))
        for name in ("linear", "learned", "learned"):  # a network needs a parameter
            if not any(True for module in builder.modules for _p in module.parameters()):
                builder.add(name, (0,))
        for _ in range(pick.of(range(2, 12))):
            builder.grow()
        if pick.of((True,) * 5 + (False,)):
            last = builder.values[-1].form
            builder.add(pick.of(("head", STEMS[last])), (len(builder.values) - 1,))
    return finish(pick, builder)


def finish(pick: Pick, builder: Builder) -> Program:
    """Choose outputs: the last value, sometimes others."""
    program, count = builder.program, len(builder.values)
    outputs = [count - 1]
    if pick.of((False,) * 3 + (True,)):
        outputs.append(pick.of(range(program.inputs if program.steps else 0, count)))
    return replace(program, outputs=tuple(dict.fromkeys(outputs)), returns=pick.of(("one", "tuple", "list", "dict")))


def program_of(seed: int) -> Program:
    """Return the network of a seed."""
    return draw_program(SeededPick(seed))


@st.composite
def programs(draw: Any) -> Program:
    """Hypothesis strategy of whole networks."""
    return draw_program(DrawnPick(draw))


def shrink(program: Program, fails: Any) -> Program:
    """Return a smaller program for which ``fails(program)`` still holds."""
    progress = True
    while progress:
        progress = False
        for candidate in program.smaller():
            try:
                candidate.build()
            except Exception:
                continue
            if fails(candidate):
                program, progress = candidate, True
                break
    return program

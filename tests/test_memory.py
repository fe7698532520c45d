"""Memory: what expand allocates, and what verification keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import randomise, sample

import reparam
from reparam.ops.params import ParamMap
from reparam.passes.world import World


class Live(TorchDispatchMode):
    """Counts the bytes of all living CPU tensors that were made while it is active, whatever allocator is used."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def linear(width: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(6)])


def convolutions(width: int) -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *layers)


LARGE = {"linear": (linear, 2048, (2, 2048)), "convolutions": (convolutions, 680, (2, 3, 4, 4))}


def size(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", LARGE)
def test_expand_allocates_student_and_teacher_and_little_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, width, shape = LARGE[name]

    def peak() -> float:
        with Live() as memory:
            model = build(width).eval()
            assert 90e6 < size(model) < 110e6
            assert memory.live == pytest.approx(size(model), rel=0.01)  # it does count
            memory.peak = memory.live
            teacher = reparam.expand(model, 2, example_input=torch.randn(shape), verify=False)
            return memory.peak / (size(model) + size(teacher))

    assert peak() < 1.25
    # The measurement sees it when each weight is held twice.
    widen, held = ParamMap.widen, []

    def keeps(self: ParamMap, value: Tensor, *args: Any, **options: Any) -> Tensor:
        held.append(widen(self, value, *args, **options))
        return held[-1].clone()

    monkeypatch.setattr(ParamMap, "widen", keeps)
    assert peak() > 1.25


class Kept:
    """Notes, after each node, the values of a world that nothing needs any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, frees: bool = True) -> None:
        self.most, self.needless = 0, 0
        self.worlds: dict[int, tuple[World, set[fx.Node]]] = {}
        run, free = World.run, World.free

        def watched_run(world: World, node: fx.Node, feeds: dict[str, Any]) -> None:
            run(world, node, feeds)
            self.worlds.setdefault(id(world), (world, set()))[1].add(node)

        def watched_free(world: World, node: fx.Node) -> None:
            if frees:
                free(world, node)
            done = self.worlds[id(world)][1]
            left = [n for n in world.env if all(user in done for user in n.users)]
            self.needless = max(self.needless, len(left))
            self.most = max(self.most, len(world.env))

        monkeypatch.setattr(World, "run", watched_run)
        monkeypatch.setattr(World, "free", watched_free)


def chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(10) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 4, 1))).eval()


def test_verification_keeps_only_what_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain(), sample((2, 3, 8, 8), dtype=torch.float32)
    watched = Kept(monkeypatch)
    reparam.expand(model, 2, example_input=x)
    assert len(watched.worlds) == 2
    assert watched.needless == 0
    assert 0 < watched.most <= 4  # a value, a weight, a bias and the result, of more than 50 nodes
    watched = Kept(monkeypatch, frees=False)
    reparam.expand(model, 2, example_input=x)
    assert watched.needless > 50  # without freeing, the test would fail


def test_verification_of_a_deep_network_needs_no_more_than_of_a_shallow_one() -> None:
    """Activations only: the weights are small."""
    peaks = []
    for depth in (2, 12):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(4, 4, 1), nn.Tanh())]
        model = nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Conv2d(4, 4, 1)).eval()
        x = sample((2, 3, 64, 64), dtype=torch.float32)
        with Live() as memory:
            reparam.expand(model, 2, example_input=x)
        peaks.append(memory.peak)
    assert peaks[1] < 1.2 * peaks[0]

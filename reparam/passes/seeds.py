"""Seeding for the time of a comparison, without a trace in the generators of the user.

``torch.manual_seed`` seeds those of all devices, also of devices that are not in use yet: a student that is expanded
on the CPU and then trained on a GPU would draw the same dropout with every seed of its user.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

_WITH_GENERATORS = ("cuda", "xpu")


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put torch's generators for the CPU and this device back to where they were."""
    known = device.type in _WITH_GENERATORS
    with torch.random.fork_rng([device] if known else [], device_type=device.type if known else "cuda"):
        yield


@contextlib.contextmanager
def seeded(number: int, device: torch.device) -> Iterator[None]:
    """Draw the numbers of a seed inside, and put the generators back to where they were."""
    with generators_kept(device):
        seed(number, device)
        yield


def seed(number: int, device: torch.device) -> None:
    """Seed torch's generators for the CPU and this device, and no others."""
    torch.default_generator.manual_seed(number)
    if device.type in _WITH_GENERATORS:
        module: Any = torch.get_device_module(device)
        index = module.current_device() if device.index is None else device.index
        module.default_generators[index].manual_seed(number)


def draws() -> tuple[Any, ...]:
    """Return the state of the CPU's generators, which tells whether code has drawn: Python's, NumPy's and torch's."""
    numpy: Any = sys.modules.get("numpy")
    name, key, *rest = numpy.random.get_state() if numpy is not None else ("", b"")
    state = torch.default_generator.get_state().numpy().tobytes()
    return random.getstate(), name, bytes(key), tuple(rest), state


@contextlib.contextmanager
def draws_kept() -> Iterator[None]:
    """Put the CPU's generators back to where they were: Python's, NumPy's and torch's."""
    numpy: Any = sys.modules.get("numpy")
    python, torchs = random.getstate(), torch.default_generator.get_state()
    numpys = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(torchs)
        if numpys is not None:
            numpy.random.set_state(numpys)

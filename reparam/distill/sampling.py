"""Which image stands at which position of an epoch, which positions a process gets, and the seed of every draw.

All of it is a function of numbers (seed, epoch, order, position). Nothing depends on what was drawn before, so a run
goes on in the middle of an epoch at no cost, and neither worker nor training processes change what is learned from.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reparam.distill.config import TrainConfig
from reparam.errors import InputError


@dataclass(frozen=True)
class Shard:
    """Which part of each batch this process gets.

    Attributes:
        rank: number of the process, from 0.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Refuse a rank out of range."""
        if not 0 <= self.rank < self.world:
            raise InputError(f"rank {self.rank} is not one of {self.world} processes, which count from 0")

    def part(self, count: int) -> slice:
        """Return the contiguous part of ``count`` things that is this process's; all parts have the same size."""
        size = count // self.world
        return slice(self.rank * size, (self.rank + 1) * size)


WHOLE = Shard()
"""The shard of a process that is alone."""


@dataclass(frozen=True)
class Positions:
    """The positions of an epoch: step ``s`` trains on positions ``s * batch`` to ``(s + 1) * batch - 1``.

    Attributes:
        images: size of the training set.
        batch: images per step over all processes.
        steps: steps per epoch.
        repeats: how often each chosen image appears in an epoch (repeated augmentation).
        seed: seed of the run.
        shard: which part of each batch is asked for.
    """

    images: int
    batch: int
    steps: int
    repeats: int
    seed: int
    shard: Shard

    @property
    def local(self) -> int:
        """Images per step of one process."""
        return self.batch // self.shard.world

    def sequence(self, epoch: int, order: int) -> Tensor:
        """Return the index of the image at each position of an epoch, ``[steps, batch]``.

        With repeats the copies of an image are in the same batch, ``batch // repeats`` positions or more apart: where
        there are at least as many processes as repeats, no process gets two copies (DeiT's repeated augmentation).
        """
        generator = torch.Generator().manual_seed(draw_seed("order", self.seed, epoch, order))
        chosen = torch.randperm(self.images, generator=generator)
        total = self.steps * self.batch
        chosen = chosen.repeat_interleave(self.repeats)[:total].view(self.steps, self.batch)
        if self.repeats == 1:
            return chosen
        copy = (torch.arange(total) % self.repeats).view(self.steps, self.batch)
        return chosen.gather(1, copy.argsort(dim=1, stable=True))

    def step_seed(self, what: str, epoch: int, order: int, step: int) -> int:
        """Return the seed of what is drawn for a whole step, over all processes."""
        return draw_seed(what, self.seed, epoch, order, step)

    def mix_seed(self, epoch: int, order: int, step: int) -> int:
        """Return the seed of the mixing of this process's part of a step."""
        return draw_seed("mix", self.seed, epoch, order, step, self.shard.rank)

    def image_seeds(self, epoch: int, order: int, step: int) -> list[int]:
        """Return the seed of each image in this process's part of a step."""
        part = self.shard.part(self.batch)
        first = step * self.batch
        return [draw_seed("image", self.seed, epoch, order, first + index) for index in range(part.start, part.stop)]


def make_positions(images: int, tests: int, config: TrainConfig, shard: Shard) -> Positions:
    """Work out the batches of a run.

    Args:
        images: size of the training set; a larger batch is cut down to it.
        tests: size of the test set.
        config: batch size, mixing, accumulation, repeats, limit and seed are read.
        shard: number of processes.

    Raises:
        InputError: the batch cannot be dealt out evenly, or there are fewer images than processes.
    """
    world, asked = shard.world, config.batch_size
    if asked % world:
        near = max(asked // world, 1) * world
        raise InputError(
            f"--batch-size {asked} is the size over all processes, and {world} processes cannot share it evenly; "
            f"change it to {near} or {near + world}, or change torchrun's --nproc-per-node"
        )
    mixing = config.mixup > 0 or config.cutmix > 0
    if mixing and asked // world % 2:
        raise InputError(
            f"--mixup and --cutmix mix pairs of images: --batch-size {asked} must give each process an even number, "
            f"not {asked // world}"
        )
    unit = world * math.lcm(2 if mixing else 1, config.accumulate)
    batch = asked if asked <= images else images // unit * unit
    if not batch or tests < world:
        raise InputError(
            f"{images} training and {tests} test images are too few for {world} processes"
            + (f" with --accumulate {config.accumulate}" if config.accumulate > 1 else "")
            + (", which mix pairs of images" if mixing else "")
        )
    steps = min(images // batch, config.limit_batches or images)
    return Positions(images, batch, steps, config.repeats, config.seed, shard)


def draw_seed(what: str, *numbers: int) -> int:
    """Return the seed that belongs to a purpose and some numbers; close numbers give unrelated seeds."""
    text = ",".join((what, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch of the run with that seed."""
    return seed * 1_000_003 + epoch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global CPU generators of Python, NumPy and torch back to where they were."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


def seed_cpu(seed: int) -> None:
    """Seed the global CPU generators; ``torch.manual_seed`` would seed those of all devices, for good."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)

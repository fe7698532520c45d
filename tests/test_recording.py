"""Steps that are recorded and repeated: as a CUDA graph has it, on a CPU (see ``recorded``)."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import recorded
import torch
from torch import nn
from training import (
    FEWER_HEADS,
    GROUP,
    make_batch,
    make_engine,
    make_meter,
    one_teacher,
    settings,
    small_net,
    static_teacher,
)

import reparam.distill.networks as networks_module
import reparam.distill.recording as recording
import reparam.distill.statics as statics
from reparam.distill.config import TrainConfig
from reparam.distill.distributed import Group
from reparam.distill.ranges import refuse_idle
from reparam.distill.recording import WARM, Recording, check_recordable
from reparam.distill.statics import asked
from reparam.errors import InputError

STEPS = WARM + 4


@pytest.fixture
def on_cpu(monkeypatch):
    """Count recordings; each of them is made by writing operators down."""
    made = []

    def counted(run, stream):
        made.append(run)
        return recorded.recorded(run, stream)

    monkeypatch.setattr(recording, "recorded", counted)
    return made


def trained(config, epochs=1, static=None, steps=STEPS, batches=make_batch, student=small_net):
    """Train, and return the engine and what was measured in each epoch."""
    torch.manual_seed(0)
    engine = make_engine(student(), config, static, steps=steps * epochs)
    measured, number = [], 0
    for epoch in range(1, epochs + 1):
        meter = make_meter(engine)
        for _ in range(steps):
            number += 1
            engine.step(batches(seed=number), epoch, number, meter)
        assert meter.bad() is None
        measured.append(meter.averages(steps))
    return engine, measured


def assert_alike(one, other):
    (first, measured), (second, again) = one, other
    for name, value in first.learners.state_dict().items():
        torch.testing.assert_close(second.learners.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for averages, others in zip(measured, again, strict=True):
        assert averages == pytest.approx(others, rel=1e-9)


SETTINGS = {
    "the student alone": {"method": "baseline"},
    "gpd": {},
    "branches": {"branches": "orepa"},
    "averaged weights, two parts": {"ema": 0.9, "ema_warmup": True, "accumulate": 2},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "one rate per layer": {"lr_scale": "student", "clip_grad": 0.0},
    "a later soft loss": {"kd_start_epoch": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recorded_step_is_the_step(on_cpu, name):
    config = settings(**SETTINGS[name])
    expected = trained(config, epochs=2)
    assert not on_cpu
    found = trained(settings(**SETTINGS[name], cuda_graph=True), epochs=2)
    assert_alike(expected, found)
    assert len(on_cpu) == (2 if "kd_start_epoch" in SETTINGS[name] else 1)
    if config.ema:
        for key, value in expected[0].ema.module.state_dict().items():
            torch.testing.assert_close(found[0].ema.module.state_dict()[key], value, rtol=1e-9, atol=1e-11)


DRAWS = {"kdiffusion", "crd"}
"""Losses that draw in each step: the order of the heads on the CPU, the others of a pair where the run is, here too."""


@pytest.mark.parametrize("method", one_teacher())
def test_a_recorded_step_against_a_static_teacher(on_cpu, method):
    given = {"method": method, **(FEWER_HEADS if "kdiffusion" in method else {})}
    if method in DRAWS:
        with pytest.raises(InputError, match=r"draws random numbers on the CPU.*leave out --cuda-graph"):
            trained(settings(**given, cuda_graph=True), static=static_teacher())
        return
    expected = trained(settings(**given), epochs=2, static=static_teacher())
    assert_alike(expected, trained(settings(**given, cuda_graph=True), epochs=2, static=static_teacher()))
    assert len(on_cpu) == 2  # weights and temperatures may follow the epoch


def test_soft_targets_and_batches_of_another_size(on_cpu):
    def batches(seed):
        return make_batch(4 if seed <= STEPS + 2 else 6, seed=seed, mixed=True)

    expected = trained(settings(), steps=2 * STEPS + 2, batches=batches)
    assert_alike(expected, trained(settings(cuda_graph=True), steps=2 * STEPS + 2, batches=batches))
    assert len(on_cpu) == 2


def test_a_state_that_is_loaded_is_recorded_anew(on_cpu):
    engine, _ = trained(settings(cuda_graph=True))
    state = copy.deepcopy(engine.state())
    ends = []
    for _ in range(2):
        engine.load(copy.deepcopy(state), STEPS)
        for number in range(STEPS + 1, 2 * STEPS + 1):
            engine.step(make_batch(seed=number), 1, number, make_meter(engine))
        ends.append(copy.deepcopy(engine.learners.state_dict()))
    assert len(on_cpu) == 3
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=0, msg=name)
    assert all(isinstance(group["lr"], float) for group in engine.state()["optimizer"]["param_groups"])


def test_nan_in_a_repetition_is_seen(on_cpu):
    engine, _ = trained(settings(cuda_graph=True))
    meter, bad = make_meter(engine), make_batch(seed=1)
    bad.images[0] = torch.nan
    engine.step(bad, 1, STEPS + 1, meter)
    assert "loss is nan" in meter.bad()


def test_the_check_would_find_a_number_that_was_recorded(on_cpu, monkeypatch):
    """Rates that stay numbers are those of the recording."""
    expected = trained(settings())
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: value)
    with pytest.raises(AssertionError, match=r"owner\."):
        assert_alike(expected, trained(settings(cuda_graph=True)))


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random, np.random.rand])
def test_random_numbers_of_the_cpu_are_refused(on_cpu, draw):
    values = torch.zeros(3)
    step = Recording(lambda: values.add_(draw()), GROUP.device, "it")
    for _ in range(WARM):
        step()
    with pytest.raises(InputError, match="it draws random numbers on the CPU, which a recording would repeat"):
        step()


def test_what_cannot_be_recorded_is_named(monkeypatch):
    class Capture:
        """The end of a capture that failed raises as well."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def fails(run, stream):
        with Capture():
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(recording, "recorded", fails)
    step = Recording(lambda: None, GROUP.device, "the training step")
    for _ in range(WARM):
        step()
    with pytest.raises(InputError, match=r"the training step cannot be recorded \(operation not .* capturing\); leave"):
        step()


class Replacing(nn.Module):
    """A network that keeps a mean of its inputs in a new tensor each time."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = small_net(), in_place
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        if self.in_place:
            self.mean.copy_(mean)
        else:
            self.mean = mean
        return self.inner(x - self.mean)


def test_a_buffer_that_is_replaced_is_refused(on_cpu):
    config = settings(method="baseline", cuda_graph=True)
    with pytest.raises(InputError, match=r"puts a new tensor in the place of owner\.mean.*in place, or leave out"):
        trained(config, student=lambda: Replacing(False))
    expected = trained(settings(method="baseline"), student=lambda: Replacing(False))
    assert_alike(expected, trained(config, student=lambda: Replacing(True)))


def test_where_nothing_can_be_recorded():
    config = TrainConfig(cuda_graph=True)
    with pytest.raises(InputError, match="--cuda-graph records work of a CUDA GPU, and this run is on cpu"):
        check_recordable(config, GROUP)
    with pytest.raises(InputError, match="records the steps of one process, and there are 2"):
        check_recordable(config, Group(0, 0, 2, torch.device("cuda")))
    check_recordable(config, Group(0, 0, 1, torch.device("cuda")))
    check_recordable(TrainConfig(), Group(0, 0, 2, torch.device("cpu")))
    with pytest.raises(InputError, match=r"fp16 asks after each step .* use --precision bf16"):
        TrainConfig(cuda_graph=True, precision="fp16")


def test_overlap_without_a_static_teacher_is_refused():
    with pytest.raises(InputError, match="--overlap would have no effect: no static teacher answers"):
        refuse_idle(TrainConfig(overlap=False), {"overlap"})
    refuse_idle(settings(method="kd", overlap=False), {"overlap"})


class Strided(nn.Module):
    """A network with a weight that is no dense piece of memory."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 128)[:, ::2])

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.weight)


def test_an_optimizer_that_reads_its_rate_on_the_cpu_is_refused(on_cpu):
    with pytest.raises(InputError, match="--cuda-graph needs torch's fused optimizers"):
        trained(settings(method="baseline", cuda_graph=True, precision="fp32"), student=Strided)


# The static teacher beside the learners ------------------------------------------------------------------------------


class Streams:
    """Streams that write down what is asked of them."""

    def __init__(self, monkeypatch):
        self.log, self.current = [], "main"
        monkeypatch.setattr(
            statics, "side_stream", lambda device, purpose: SimpleNamespace(wait_stream=self._wait("side"))
        )
        monkeypatch.setattr(
            torch.cuda,
            "current_stream",
            lambda device: SimpleNamespace(wait_stream=self._wait(self.current), name="main"),
        )
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self)

    def _wait(self, name):
        return lambda other: self.log.append(f"{name} waits")

    def __enter__(self):
        self.current = "side"

    def __exit__(self, *_):
        self.current = "main"


def test_the_static_teacher_answers_beside_the_first_learner(monkeypatch):
    streams = Streams(monkeypatch)
    static = static_teacher()
    forward = static.network.forward
    monkeypatch.setattr(
        static.network, "forward", lambda x: (streams.log.append(f"static on {streams.current}"), forward(x))[1]
    )
    engine = make_engine(small_net(), settings(method="gpd+kd"), static)
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda name, images: (streams.log.append(name), run(name, images))[1])
    losses = networks_module._against_static
    monkeypatch.setattr(networks_module, "_against_static", lambda *a: (streams.log.append("loss"), losses(*a))[1])
    streams.log.clear()
    engine.step(make_batch(), 1, 1, make_meter(engine))
    assert streams.log == [
        "side waits", "static on side", "teacher", "main waits", "loss", "student", "main waits", "loss",
    ]  # fmt: skip


def test_without_overlap_everything_is_on_one_stream(monkeypatch):
    streams = Streams(monkeypatch)
    images = make_batch().images
    expected = static_teacher()(images).logits
    assert torch.equal(asked([static_teacher()], images, overlap=False)()[0].logits, expected) and not streams.log
    assert torch.equal(asked([static_teacher()], images)()[0].logits, expected) and streams.log
    assert asked([], images)() == []

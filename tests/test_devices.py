"""What GPUs need and a CPU can show: switches of TF32, seeds, optimizers, which GPU is whose."""

import argparse

import pytest
import torch
from torch import nn
from training import small_net

import reparam
from reparam.bench import step, subjects
from reparam.distill import distributed
from reparam.distill.config import TrainConfig
from reparam.distill.distributed import Group
from reparam.distill.optim import make_optimizer
from reparam.errors import InputError
from reparam.passes.tf32 import tf32, uses_tf32

BACKENDS = torch.backends
SWITCHES = {
    "torch's default": lambda: None,
    "the switch for everything": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "the switch for products": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "the switch for convolutions": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "the older switches": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
}


def switches():
    new = (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
    return [place.fp32_precision for place in (*new, BACKENDS.mkldnn.matmul)]


def older_switches():
    """What the switches of old say; None for one that contradicts the new ones."""
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture
def switches_kept():
    before, precision = switches(), torch.get_float32_matmul_precision()
    yield
    BACKENDS.fp32_precision = before[0]
    torch.set_float32_matmul_precision(precision)
    BACKENDS.cudnn.allow_tf32 = True
    for place, value in zip((BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn,
                             BACKENDS.mkldnn.matmul), before[1:], strict=True):  # fmt: skip
        place.fp32_precision = value
    assert switches() == before


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", SWITCHES)
def test_tf32_whatever_switch_the_user_has_used(name, wanted, switches_kept):
    SWITCHES[name]()
    before, older = switches(), older_switches()
    with tf32(wanted):
        assert uses_tf32() == {"matmul": wanted, "cudnn": wanted}
        assert BACKENDS.cudnn.rnn.fp32_precision == ("tf32" if wanted else "ieee")
        assert older_switches() == ["high" if wanted else "highest", wanted, wanted]
    assert switches() == before
    assert [old for old, then in zip(older_switches(), older, strict=True) if then is not None] == [
        then for then in older if then is not None
    ]


def test_check_works_with_the_newer_switches(switches_kept):
    BACKENDS.fp32_precision = "tf32"
    model = nn.Linear(3, 4)
    assert reparam.check(model, model, torch.zeros(2, 3)).passed


def test_generators_of_other_devices_are_left_alone(monkeypatch):
    def refused(number):
        raise AssertionError("this seeds every device")

    monkeypatch.setattr(torch, "manual_seed", refused)
    student = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 2)).eval()
    example = torch.zeros(2, 1, 8, 8)
    reparam.expand(student, 2, branches="orepa", example_input=example, noise=0)
    assert reparam.check(student, student, example).passed


def test_where_nothing_is_fused_torch_chooses():
    model = nn.Linear(2, 2)
    assert make_optimizer(model, TrainConfig(precision="fp16").resolved()).defaults["fused"] is None
    assert make_optimizer(model, TrainConfig().resolved()).defaults["fused"] is True


def test_a_process_touches_no_gpu_but_its_own(monkeypatch):
    done = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"set {device}"))
    monkeypatch.setattr(torch, "empty", lambda *size, device: done.append(f"touched {device}"))
    assert distributed._local("cuda", 2) == distributed._local("auto", 2) == torch.device("cuda:1")
    assert done == ["set 1", "touched cuda", "set 1"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="more processes on this machine than it has GPUs"):
        distributed._local("auto", 3)


def test_adamw_is_told_of_cuda_graphs():
    options = argparse.Namespace(
        model="", ratio=2, batch=2, optimizer="adamw", clip_grad=1.0, precision="fp32", compile=False,
        channels_last=False, channels=1, size=8, classes=10, cuda_graph=True,
    )  # fmt: skip
    where = subjects.setting(options, Group(0, 0, 1, torch.device("cpu")))
    taken = subjects.PlainStep(small_net(), where), subjects.EngineStep(where, small_net(), "baseline")
    for optimizer in (taken[0].optimizer, taken[1].engine.optimizer):
        assert all(group["capturable"] for group in optimizer.param_groups)
    assert "memory of its own" in step._about_memory(torch.device("cuda"), True)

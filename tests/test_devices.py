"""What GPUs need and a CPU can show: switches of TF32, seeds."""

import pytest
import torch
from torch import nn

import reparam
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

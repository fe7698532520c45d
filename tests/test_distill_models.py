"""Parameter counts of the papers' networks, and what timm makes of them."""

import pytest
import timm
import torch

from reparam.distill.models import CifarResNet


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cifar_resnet8", 83_892), ("cifar_resnet20", 278_324)],
)
def test_parameter_counts_for_100_classes(name, parameters):
    model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_slim_variant_for_grey_digits():
    model = timm.create_model("cifar_resnet8_w8", num_classes=10, in_chans=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_810
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_depths_between_the_registered_ones():
    counts = {14: 181_108, 32: 472_756, 44: 667_188, 56: 861_620, 110: 1_736_564}
    for depth, count in counts.items():
        assert sum(parameter.numel() for parameter in CifarResNet(depth).parameters()) == count
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2 .* got 9"):
        CifarResNet(9)

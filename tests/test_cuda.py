"""On a CUDA device: exactness, devices and dtypes, one training step. Skipped where there is none."""

import argparse
import copy

import pytest
import timm
import torch

import reparam
from reparam.bench import step, subjects
from reparam.distill.distributed import Group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def student():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10).cuda()


def test_expand_on_the_device_is_exact(student):
    student.double().eval()
    teacher = reparam.expand(student, 2)
    assert {t.device.type for t in teacher.state_dict().values()} == {"cuda"}
    x = torch.randn(3, 3, 96, 64, dtype=torch.float64, device="cuda")
    with torch.no_grad():
        expected, found = student(x), teacher(x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(student, dtype):
    student.to(dtype)
    extracted = reparam.extract(reparam.expand(student, 2))
    for name, tensor in student.state_dict().items():
        assert torch.equal(extracted.state_dict()[name], tensor), name


def test_noise_is_the_same_as_on_the_cpu(student):
    torch.manual_seed(1)
    on_device = reparam.expand(student, 2, verify=False)
    torch.manual_seed(1)
    on_cpu = reparam.expand(copy.deepcopy(student).cpu(), 2, verify=False)
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(on_device.get_parameter(name).cpu(), on_cpu.get_parameter(name), rtol=0, atol=1e-7)


def test_moves_with_its_view(student):
    teacher = reparam.expand(student.cpu(), 3)
    view = reparam.student_view(teacher)
    teacher.cuda()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    assert teacher(x).device == view(x).device == x.device


def test_training_step_with_autocast(student):
    teacher = reparam.expand(student, 2).train()
    view = reparam.student_view(teacher).train()
    optimizer = torch.optim.SGD(teacher.parameters(), 0.01)
    x, y = torch.randn(8, 3, 64, 64, device="cuda"), torch.randint(0, 10, (8,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(teacher(x), y)
        loss = loss + torch.nn.functional.cross_entropy(view(x), y)
    loss.backward()
    optimizer.step()
    extracted, view = reparam.extract(teacher).eval(), view.eval()
    with torch.no_grad():
        torch.testing.assert_close(extracted(x), view(x))


@pytest.mark.parametrize("recipe", ["orepa", "dbb"])
def test_branches(student, recipe):
    student.eval()
    x = torch.randn(4, 3, 64, 64, device="cuda")
    teacher = reparam.expand(student, 2, branches=recipe, example_input=x)
    assert {t.device.type for t in teacher.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), student(x), rtol=1e-3, atol=1e-3)
    view = reparam.student_view(teacher.train()).train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = teacher(x).square().mean() + view(x).square().mean()
    loss.backward()
    torch.optim.SGD(teacher.parameters(), 0.01).step()
    extracted = reparam.extract(teacher).eval()
    with torch.no_grad():
        torch.testing.assert_close(extracted(x), view.eval()(x), rtol=1e-3, atol=1e-3)


def test_merging_under_autocast_is_in_single_precision(student):
    teacher = reparam.expand(student, 1, branches="orepa", init="scratch", verify=False)
    block = teacher.get_submodule("reparam_branches.layer1.0.conv1.weight")
    weight = teacher.get_parameter("layer1.0.conv1.weight")
    with torch.autocast("cuda", torch.bfloat16):
        merged = block(weight)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, block(weight), rtol=0, atol=0)


def test_the_generators_are_left_alone(student):
    example = torch.zeros(2, 3, 64, 64, device="cuda")
    state = torch.cuda.get_rng_state()
    teacher = reparam.expand(student, 2, branches="orepa", example_input=example)
    reparam.check(student, reparam.extract(teacher), example)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("branches", [None, "orepa"])
def test_a_step_waits_for_nothing_and_fits_a_graph(student, branches, optimizer):
    options = argparse.Namespace(
        model="", ratio=2, batch=8, optimizer=optimizer, clip_grad=1.0, precision="bf16", compile=False,
        channels_last=True, channels=3, size=64, classes=10, cuda_graph=True,
    )  # fmt: skip
    where = subjects.setting(options, Group(0, 0, 1, torch.device("cuda")))
    taken = subjects.EngineStep(where, student, "gpd", branches)
    for _ in range(3):
        taken()
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    weight = taken.engine.networks.owner.get_parameter("layer1.0.conv1.weight")
    replay = step._graph("GPD", taken)
    before = weight.detach().clone()
    replay()
    assert not torch.equal(weight, before) and bool(weight.isfinite().all())

"""``extract(expand(m))`` is ``m``: bit for bit where the ratio is a power of two, in every dtype."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, Net1d, Tied, UNet, built, error, mlp, randomise, sample

import reparam
from reparam.passes.teacher import Teacher

SMALL = "net1d net3d unet mlp weight_norm spectral_norm tied nfnet".split()
SOME = "mobilenetv3_small_050 shufflenet_v2_x0_5 squeezenet1_1 ghostnet".split()
MORE = "resnet18 regnetx_002 ghostnet_050".split()


def expanded(model: nn.Module, name: str, ratio: int, dtype: torch.dtype, noise: float = 0.25) -> Teacher:
    x = sample(BY_NAME[name].shape, dtype=dtype)
    return reparam.expand(model, ratio, example_input=x, noise=noise, verify=False)


def keys_of(model: nn.Module) -> list[str]:
    return [name for name, _tensor in [*model.named_parameters(), *model.named_buffers()]]


def check_bits(name: str, ratio: int, dtype: torch.dtype) -> None:
    model = built(BY_NAME[name], dtype)
    teacher = expanded(model, name, ratio, dtype)
    student = reparam.extract(teacher)
    assert type(student) is type(model)
    assert keys_of(student) == keys_of(model)
    for key, tensor in model.state_dict().items():
        found = student.state_dict()[key]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), key
    fresh = built(BY_NAME[name], dtype, seed=5)
    fresh.load_state_dict(student.state_dict(), strict=True)
    assert any(teacher.state_dict()[key].shape != t.shape for key, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("name", SMALL)
def test_bit_equal_for_powers_of_two(name: str, ratio: int, dtype: torch.dtype) -> None:
    if name == "spectral_norm" and dtype == torch.bfloat16:
        pytest.skip("torch has no power iteration in bfloat16")
    check_bits(name, ratio, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.thorough) for name in MORE)])
def test_bit_equal_for_whole_networks(name: str) -> None:
    check_bits(name, 2, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_two_ulp_for_three(name: str, dtype: torch.dtype) -> None:
    model = built(BY_NAME[name], dtype)
    student = reparam.extract(expanded(model, name, 3, dtype))
    for key, tensor in model.state_dict().items():
        found = student.state_dict()[key]
        if not tensor.is_floating_point():
            assert torch.equal(found, tensor)
            continue
        ulp = torch.nextafter(tensor.abs(), torch.full_like(tensor, torch.inf)) - tensor.abs()
        assert bool(((found - tensor).abs() <= 2 * ulp).all()), key


def test_the_student_is_a_fresh_copy() -> None:
    model = built(BY_NAME["unet"])
    teacher = expanded(model, "unet", 2, torch.float64)
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    student = reparam.extract(teacher)
    with torch.no_grad():
        for tensor in [*student.parameters(), *student.buffers()]:
            tensor.zero_()
    assert all(torch.equal(t, before[key]) for key, t in teacher.state_dict().items())
    assert all(p.grad_fn is None and p.is_leaf for p in student.parameters())


def test_the_input_model_is_untouched() -> None:
    model = built(BY_NAME["tied"]).train()
    model.stem.weight.requires_grad_(False)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    numbers = {name: dict(vars(m)) for name, m in model.named_modules()}
    teacher = expanded(model, "tied", 2, torch.float64)
    with torch.no_grad():
        for tensor in [*teacher.parameters(), *teacher.buffers()]:
            tensor.zero_()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert ids == {name: id(p) for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert numbers == {name: dict(vars(m)) for name, m in model.named_modules()}
    assert not model.stem.weight.requires_grad


def test_expanding_draws_no_random_numbers_without_noise() -> None:
    model = built(BY_NAME["unet"])
    before = torch.get_rng_state()
    reparam.expand(model, 2, example_input=sample((2, 3, 32, 32)), noise=0.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["net1d", "unet", "tied", "mlp", "nfnet"])
def test_state_dict_keys(name: str) -> None:
    model = built(BY_NAME[name])
    teacher = expanded(model, name, 2, torch.float64)
    student, wide = set(model.state_dict()), set(teacher.state_dict())
    own = {f"student_statistics.{key}" for key in teacher.plan.statistics}
    assert wide == student | own
    statistics = {key for key in student if key.rpartition(".")[2] in ("running_mean", "running_var")}
    assert statistics <= set(teacher.plan.statistics)


def test_requires_grad_dtype_mode_are_kept() -> None:
    model = UNet().to(torch.float64).train()
    model.down[0].eval()
    for parameter in model.middle.parameters():
        parameter.requires_grad_(False)
    teacher = expanded(model, "unet", 2, torch.float64)
    student = reparam.extract(teacher)
    for copy_ in (teacher, student):
        flags = dict(copy_.named_parameters())
        assert all(flags[name].requires_grad == p.requires_grad for name, p in model.named_parameters())
        assert all(flags[name].dtype == p.dtype for name, p in model.named_parameters())
        assert all(copy_.get_submodule(name).training == m.training for name, m in model.named_modules())
        assert {p.device for p in copy_.parameters()} == {torch.device("cpu")}


def test_mixed_dtypes_are_kept() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3).to(torch.float64)
            self.body = nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.body(torch.relu(self.stem(x)).float()))
            return self.head(x.mean((2, 3)))

    model = Mixed()
    teacher = reparam.expand(model, 2, example_input=torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert {n: p.dtype for n, p in teacher.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    student = reparam.extract(teacher)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in student.state_dict().items())
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    assert error(model(x).detach(), teacher(x).detach()) < 1e-5


@pytest.mark.parametrize("device", [d for d in ("cuda",) if torch.cuda.is_available()])
def test_device_is_kept(device: str) -> None:
    model = UNet().to(device).eval()
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 3, 32, 32, device=device))
    assert {t.device.type for t in teacher.state_dict().values()} == {device}
    assert {t.device.type for t in reparam.extract(teacher).state_dict().values()} == {device}


def test_a_meta_model_expands_to_a_meta_teacher() -> None:
    with torch.device("meta"):
        model = UNet()
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 3, 32, 32, device="meta"))
    assert {t.device.type for t in teacher.state_dict().values()} == {"meta"}
    assert reparam.extract(teacher).head.weight.shape == model.head.weight.shape


def test_tied_weights_stay_tied() -> None:
    model = built(BY_NAME["tied"])
    teacher = expanded(model, "tied", 2, torch.float64)
    assert teacher.encode.weight is teacher.decode.weight
    student = reparam.extract(teacher)
    assert student.encode.weight is student.decode.weight
    assert len(list(teacher.parameters())) == len(list(student.parameters())) == len(list(model.parameters()))


def test_tied_modules_stay_tied() -> None:
    shared = nn.Linear(12, 12)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(12, 3)).double()
    teacher = reparam.expand(model, 2, example_input=sample((3, 5)))
    assert teacher.get_submodule("2") is teacher.get_submodule("4")
    student = reparam.extract(teacher)
    assert student[2] is student[4]
    x = sample((7, 5))
    assert error(model(x).detach(), teacher(x).detach()) <= 1e-12


class Widths(nn.Module):
    """A network that keeps its width in its own attribute and carries things a user may add to a model."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 4
        self.pretrained_cfg = {"input_size": (3, 16, 16)}
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def no_weight_decay(self) -> set[str]:
        return {"stem.weight"}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stem(x)).mean((2, 3)))


def test_what_training_code_asks_a_model_is_kept() -> None:
    teacher = reparam.expand(Widths())
    assert teacher.num_classes == 4
    assert teacher.pretrained_cfg["input_size"] == (3, 16, 16)
    assert teacher.no_weight_decay() == {"stem.weight"}
    assert not hasattr(teacher, "no_such_thing")
    assert (teacher.stem.in_channels, teacher.stem.out_channels, teacher.head.in_features) == (3, 16, 16)


# After training ------------------------------------------------------------------------------------------------------


def train(teacher: nn.Module, shape: tuple[int, ...], steps: int = 4) -> None:
    """A few steps of teacher and student together, in train mode."""
    view = reparam.student_view(teacher)
    teacher.train()
    view.train()
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for seed in range(steps):
        x = sample(shape, seed)
        wide, compact = teacher(x), view(x)
        loss = wide.square().mean() + (compact - wide.detach()).square().mean() + compact.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("name", ["net1d", "net3d", "unet", "mlp", "weight_norm", "spectral_norm", "tied"])
def test_extract_equals_view_after_training(name: str, ratio: int) -> None:
    entry = BY_NAME[name]
    model = built(entry)
    teacher = expanded(model, name, ratio, torch.float64)
    train(teacher, (max(entry.batch, 2), *entry.shape[1:]))
    view = reparam.student_view(teacher)
    assert reparam.extract(teacher).training
    teacher.eval()
    view.eval()
    student = reparam.extract(teacher)
    assert not student.training
    x = sample(entry.other, 9)
    with torch.no_grad():
        assert error(student(x), view(x)) <= 1e-12
        # Teacher and student went different ways, and away from where they started.
        assert error(student(x), teacher(x)) > 1e-6
        assert error(model(x), student(x)) > 1e-6
    moved = student.state_dict()
    assert set(moved) == set(model.state_dict()) == set(view.state_dict())
    assert all(torch.equal(t, moved[key]) for key, t in view.state_dict().items())
    copy.deepcopy(model).load_state_dict(moved, strict=True)


def test_batch_norm_statistics_of_the_student_are_its_own() -> None:
    teacher = expanded(built(BY_NAME["unet"]), "unet", 2, torch.float64)
    view = reparam.student_view(teacher)
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    view.train()
    view(sample((2, 3, 32, 32)))
    changed = {key for key, t in teacher.state_dict().items() if not torch.equal(t, before[key])}
    assert changed == {f"student_statistics.{key}" for key in teacher.plan.statistics}
    teacher.train()
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    teacher(sample((2, 3, 32, 32)))
    changed = {key for key, t in teacher.state_dict().items() if not torch.equal(t, before[key])}
    assert changed == set(teacher.plan.statistics)
    assert reparam.extract(teacher).training


def test_several_expansions_in_a_row() -> None:
    model = randomise(mlp().double()).eval()
    for _ in range(3):
        model = reparam.extract(reparam.expand(model, 2, example_input=sample((4, 20))))
    first = randomise(mlp().double()).eval()
    first.load_state_dict(model.state_dict())
    x = sample((4, 20))
    assert torch.equal(model(x), first(x))


def test_no_hidden_state_in_the_class() -> None:
    """Two teachers of one model do not share tensors."""
    model = Net1d().double().eval()
    one, two = (reparam.expand(model, 2, example_input=sample((2, 2, 64))) for _ in range(2))
    mine = {t.data_ptr() for t in one.state_dict().values()}
    assert not mine & {t.data_ptr() for t in two.state_dict().values()}
    assert not mine & {t.data_ptr() for t in model.state_dict().values()}


def test_functional_use_of_one_weight_in_two_ways() -> None:
    """Linear and elementwise use of one parameter, in both orders."""

    class Both(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            if self.first:
                x = self.body(x)
            x = x * self.body.weight.abs().mean(0)
            x = F.linear(x, self.body.weight.t())
            if not self.first:
                x = self.body(x)
            return self.head(torch.relu(x))

    x = sample((6, 5))
    for first in (True, False):
        model = Both(first).double()
        teacher = reparam.expand(model, 2, example_input=x)
        assert error(model(x).detach(), teacher(x).detach()) <= 1e-12
        assert all(torch.equal(t, model.state_dict()[k]) for k, t in reparam.extract(teacher).state_dict().items())


def test_tied_is_what_it_says() -> None:
    model = Tied()
    assert model.encode.weight is model.decode.weight


def test_extract_warns_of_statistics_that_were_never_updated() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 8, 8)
    teacher = reparam.expand(student, 2, example_input=x).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparam.extract(teacher)  # nobody was trained
    teacher(x)
    with pytest.warns(UserWarning, match="statistics were never updated"):
        reparam.extract(teacher)
    reparam.student_view(teacher).train()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparam.extract(teacher)
        alone = reparam.expand(student, 1, example_input=x).train()
        alone(x)
        reparam.extract(alone)  # at ratio 1 the statistics are the teacher's

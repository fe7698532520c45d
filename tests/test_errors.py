"""Bad input: each mistake is met by a message that names where, why, and the way out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Net1d, UNet, mlp

import reparam
from reparam.errors import CaptureError, InputError, ModelError, ReparamError, VerificationError

X = torch.randn(2, 3, 16, 16)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def both(model: Any, match: str, kind: type[Exception] = InputError, **options: Any) -> None:
    """``plan`` and ``expand`` refuse in the same words, with an error of the library that is a ValueError."""
    options = {"ratio": 2, "example_input": X, **options}
    for function in (reparam.plan, reparam.expand):
        with pytest.raises(kind, match=match) as caught:
            function(model, **options)
        assert isinstance(caught.value, ReparamError)
        assert isinstance(caught.value, (ValueError, RuntimeError))


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "match"),
    [
        (0, r"ratio must be an int >= 1, not 0; ratio=2 doubles the channels"),
        (-1, r"ratio must be an int >= 1, not -1; ratio=2 doubles"),
        (1.5, r"ratio must be an int >= 1, not 1\.5 \(float\); for example ratio=2"),
        (2.0, r"not 2\.0 \(float\)"),
        ("2", r"ratio must be an int >= 1, not '2' \(str\); for example ratio=2"),
        (True, r"ratio must be an int >= 1, not True \(bool\)"),
        (None, r"not None \(NoneType\)"),
        ([2], r"not \[2\] \(list\)"),
    ],
)
def test_ratio(ratio: Any, match: str) -> None:
    both(net(), match, ratio=ratio)


@pytest.mark.parametrize("noise", [-0.1, 1.5, "0.25", True, None, float("nan"), float("inf")])
def test_noise(noise: Any) -> None:
    with pytest.raises(
        InputError, match=r"noise must be a number in \[0, 1\] \(relative to the rms of each weight\), not"
    ):
        reparam.expand(net(), 2, example_input=X, noise=noise)


def test_branches() -> None:
    both(
        net(),
        r"unknown branch recipe 'orpea'; did you mean 'orepa', 'orepa_small'\?; there are acb, ",
        branches="orpea",
    )
    both(net(), r"a branch recipe is a name or a Recipe, not int; there are acb, ", branches=6)
    both(
        net(),
        r"recipe 'orepa' has no option 'size=3'; its options and their defaults: branches=6",
        branches="orepa:size=3",
    )
    both(net(), r"recipe 'orepa': option branches is of type int, not 'six'", branches="orepa:branches=six")
    both(net(), r"init='scratch' says how branches start, and there are none; pass branches", init="scratch")
    both(net(), r"init must be one of 'student', 'scratch', not 'zero'", branches="orepa", init="zero")


def test_ignore_that_matches_nothing() -> None:
    model = UNet()
    both(
        model, r"ignore entry 'midle\.0' matches no module or parameter; did you mean .*'middle\.0'", ignore=["midle.0"]
    )
    both(model, r"ignore entry 'heads' matches no module or parameter; did you mean 'head'", ignore="heads")
    both(model, r"ignore entry 'zzz\.\*' matches no module or parameter$", ignore=["head", "zzz.*"])
    both(model, r"ignore entry <class .*Conv1d'> matches no .*; did you mean 'Conv2d'", ignore=[nn.Conv1d])
    both(model, r"an ignore entry is a name, a glob or a module type, not int", ignore=[3])
    both(model, r"an ignore entry is a name, a glob or a module type, not int", ignore=3)


# The model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("resnet18", r"model must be a torch\.nn\.Module, not str"),
        (None, "not NoneType"),
        (UNet, r"not the class UNet; make an instance of it"),
    ],
)
def test_not_a_module(model: Any, match: str) -> None:
    both(model, match)


def test_data_parallel() -> None:
    both(nn.DataParallel(net()), r"wrapped in DataParallel: pass model\.module", ModelError)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        both(wrapped, r"wrapped in DistributedDataParallel: pass model\.module", ModelError)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled() -> None:
    model = torch.compile(net(), backend="eager")
    both(
        model,
        r"wrapped in OptimizedModule: pass the model itself \(model\._orig_mod\) and compile the result",
        ModelError,
    )


def test_a_wrapper_inside_is_named_by_its_path() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.DataParallel(nn.Conv2d(8, 8, 3)))
    both(model, r"1: the module is wrapped in DataParallel: pass 1\.module", ModelError)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.compile(nn.Conv2d(8, 8, 3), backend="eager"))
    both(model, r"1: the module is wrapped in OptimizedModule: pass", ModelError)


def test_already_a_teacher() -> None:
    teacher = reparam.expand(net(), 2, example_input=X)
    match = r"is a teacher or a view of one already; reparam\.extract\(teacher\) gives its student"
    both(teacher, match, ModelError)
    both(reparam.student_view(teacher), match, ModelError)
    both(nn.Sequential(teacher, nn.ReLU()), "0: .*teacher", ModelError)


def test_float_networks_that_are_prepared_for_quantization() -> None:
    class Ready(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
            self.sum = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.c(self.sum.add_relu(x, self.b(x)))

    model = Ready().eval()
    teacher = reparam.expand(model, 2, example_input=X)
    assert teacher.plan.coverage == 1.0
    assert torch.allclose(model(X), teacher(X), atol=1e-5)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "plan", "recompile", "_programs"])
def test_names_that_a_teacher_has_itself(name: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.register_buffer(name, torch.rand(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x) * getattr(self, name))

    both(Network(), rf"named {name}, and a teacher.*rename them, or expand a module that holds", ModelError)
    model = nn.Sequential(Network())
    assert torch.allclose(model(X), reparam.expand(model, 2, example_input=X)(X), atol=1e-5)


def test_scripted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        model = torch.jit.script(net())
        both(model, "is a ScriptModule; pass the Python module it was made from", ModelError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = value
        model[3].weight[1, 1] = value
    with pytest.raises(ModelError, match=r"3\.weight holds 2 NaN or Inf values; load good weights first"):
        reparam.expand(model, 2, example_input=X)
    assert reparam.plan(model, 2, example_input=X).coverage == 1.0  # a plan reads no weights


def test_statistics_that_are_not_finite() -> None:
    model = net()
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"1\.running_var holds 8 NaN or Inf values"):
        reparam.expand(model, 2, example_input=X)


def test_large_finite_weights_are_fine() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(3e38).neg_()
        model[0].weight[::2].neg_()
    reparam.expand(model, 2, example_input=X, verify=False)


def test_infinite_buffers_of_the_design_are_fine() -> None:
    """An additive attention mask holds -inf on purpose; only parameters and statistics must be finite."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.softmax(x @ x.transpose(1, 2) + self.mask, dim=-1) @ x)

    teacher = reparam.expand(Masked(), 2, example_input=torch.randn(2, 5, 4))
    assert teacher.stem.weight.shape == (16, 4)


def test_without_parameters() -> None:
    both(
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
        r"\(Sequential\) has no parameters; there is nothing to expand",
        ModelError,
    )


def test_lazy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules warn that they may change
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(4, 3))
    both(model, r"1\.weight is not initialised \(a lazy module\); run the model once before expanding it", ModelError)


def test_quantized() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        model = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    both(
        model,
        r"0: Linear is quantized; expand the model before quantizing it",
        ModelError,
        example_input=torch.randn(4, 20),
    )


# The example input ---------------------------------------------------------------------------------------------------


def test_example_of_the_wrong_shape() -> None:
    match = (
        r"Sequential does not accept the example_input \(float32\[2, 5, 16, 16\]\): RuntimeError: .*; "
        r"give an input that model\(\.\.\.\) itself accepts"
    )
    both(net(), match, example_input=torch.randn(2, 5, 16, 16))
    both(net(), r"Sequential does not accept the example_input \(float32\[7\]\)", example_input=torch.randn(7))


def test_example_of_the_wrong_dtype() -> None:
    both(
        net(),
        r"dtype torch\.float64 and the model torch\.float32; convert it: \.to\(torch\.float32\)",
        example_input=X.double(),
    )
    both(net().double(), r"dtype torch\.float32 and the model torch\.float64", example_input=X)
    both(
        net(),
        r"Sequential does not accept the example_input \(uint8\[2, 3, 16, 16\]\)",
        example_input=X.to(torch.uint8),
    )


def test_example_on_another_device() -> None:
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:1")

    x = X.clone().as_subclass(Elsewhere)
    both(net(), r"on cuda:1 and the model on cpu; move it: example_input\.to\('cpu'\)", example_input=x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_example_on_a_gpu() -> None:
    both(net(), r"on cuda:0 and the model on cpu; move it: example_input\.to\('cpu'\)", example_input=X.cuda())


def test_example_of_the_wrong_kind() -> None:
    match = r"example_input is a {}; give a tensor, a tuple of positional inputs, or a dict of keyword inputs"
    both(net(), match.format("int"), example_input=224)
    both(net(), match.format("str"), example_input="x")
    both(net(), "example_input holds no tensor", example_input=())
    both(net(), "example_input holds no tensor", example_input=(3, 224))
    both(
        net(),
        r"does not accept the example_input .*takes 2 positional arguments but 3 were given",
        example_input=(X, X),
    )
    both(net(), r"does not accept the example_input .*unexpected keyword argument 'image'", example_input={"image": X})


def test_no_example_can_be_found() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left + right)

    match = (
        r"no example input can be found for Odd, whose forward takes 2 inputs; give one, for instance "
        r"example_input=\(left, right\)"
    )
    both(Odd(), match, example_input=None)


@pytest.mark.parametrize("model", [net(), Net1d(), mlp(), UNet()])
def test_an_example_is_found(model: nn.Module) -> None:
    assert reparam.plan(model.eval(), 2).coverage == 1.0


# Capture -------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Its own forward asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > 0:
            x = -x
        return self.head(x)


def test_untraceable() -> None:
    match = (
        r"Branches: the forward pass cannot be recorded as a graph: .*test_errors\.py:\d+.*"
        r"Its own forward branches on data.*Move that code into a submodule"
    )
    both(Branches(), match, CaptureError)


def test_untraceable_inside_is_kept_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Branches(), nn.Conv2d(4, 4, 1)).eval()
    made = reparam.plan(model, 2, example_input=X)
    assert list(made.leaves) == ["1"]
    assert {layer.reason.split(":")[0] for layer in made.layers if not layer.widened} >= {
        "inside 1, which is kept as it is"
    }
    teacher = reparam.expand(model, 2, example_input=X)
    torch.testing.assert_close(teacher(X), model(X), rtol=1e-4, atol=1e-5)


# Verification --------------------------------------------------------------------------------------------------------


def test_a_wrong_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mismatch names the first bad node, its module and source line."""
    from reparam.passes.registry import RULES, Rule

    good = RULES["softmax"]

    def wrong(call: Any, input: Any, dim: Any, dtype: Any = None) -> Any:
        return call.result(dict(call.pair("input").maps))

    monkeypatch.setitem(RULES, "softmax", Rule(wrong, good.family, good.mixing, good.signature))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).softmax(1))

    with pytest.raises(VerificationError) as caught:
        reparam.expand(Net(), 2, example_input=X)
    message = str(caught.value)
    assert "differ at node softmax (softmax in module 'the network itself'" in message
    assert "test_errors.py:" in message
    assert "relative error 5.0" in message
    assert "please report it" in message
    reparam.expand(Net(), 2, example_input=X, verify=False)


def test_nothing_is_half_done_after_an_error() -> None:
    model = Branches()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(CaptureError):
        reparam.expand(model, 2, example_input=X)
    assert before == {name: dict(vars(m)) for name, m in model.named_modules()}
    assert "training" not in vars(nn.Module)

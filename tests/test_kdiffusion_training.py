"""Kdiffusion as a method of the trainer: heads in training, the plain student behind it, stopping, errors."""

import copy
import dataclasses
import os
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from training import (
    assert_same_run,
    last_state,
    make_batch,
    make_engine,
    make_meter,
    small_net,
    static_teacher,
    trained_run,
)

from reparam.cli import main
from reparam.distill import finish, kdiffusion
from reparam.distill.config import TrainConfig
from reparam.distill.data import load_source
from reparam.distill.engine import Engine
from reparam.distill.features import Needs, Observed, continued
from reparam.distill.methods import Outputs, get_distiller
from reparam.distill.networks import make_networks
from reparam.distill.trainer import train
from reparam.errors import InputError, StoppedError
from reparam.passes.heads import Heads

TEACHER = "cifar_resnet14"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the training here."""
    monkeypatch.setattr(finish, "_draw", lambda folder: None)


@pytest.fixture(scope="module")
def source():
    return load_source("digits", limit_train=120)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, source):
    """The output folder of a run that trained the static teacher."""
    return trained_run(tmp_path_factory.mktemp("runs") / "teacher", TEACHER, source)


@pytest.fixture
def config(tmp_path, teacher):
    return TrainConfig(
        teacher=TEACHER,
        teacher_checkpoint=teacher,
        method="kdiffusion",
        heads=3,
        epochs=2,
        batch_size=40,
        output=str(tmp_path / "run"),
        quiet=True,
    )


def plain(name):
    return timm.create_model(name, num_classes=10, in_chans=1)


def settings(**changes):
    base = {"method": "kdiffusion", "teacher": TEACHER, "heads": 3, "precision": "fp64", "epochs": 2}
    return TrainConfig(**{**base, **changes})


def engine_of(student=None, steps=0, **changes):
    """Networks and losses of a run in float64, after some steps."""
    torch.manual_seed(0)
    engine = make_engine(small_net() if student is None else student, settings(**changes), static_teacher())
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        engine.step(make_batch(16, seed=step), 1, step, make_meter(engine))
    return engine


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("cifar_resnet8_w8", {"ema": 0.9}),
        ("cifar10_plain4", {"precision": "fp64", "accumulate": 2}),
        ("cifar_vgg8", {"head_stages": "2"}),
        ("cifar_resnet8_w8", {"method": "kdiffusion-average"}),
        ("cifar_resnet8_w8", {"method": "gpd+kdiffusion", "ema": 0.9}),
        ("cifar_resnet8_w8", {"branches": "orepa"}),
    ],
)
def test_a_run_ends_with_the_plain_student(config, source, tmp_path, model, changes):
    summary = train(dataclasses.replace(config, model=model, **changes), source=source)
    assert summary["epochs"] == 2 and summary["parity_passed"]
    fresh = plain(model)
    assert summary["parameters"]["student"] == sum(p.numel() for p in fresh.parameters())
    for name in ("student.safetensors", "student_ema.safetensors")[: 1 + ("ema" in changes)]:
        fresh.load_state_dict(load_file(tmp_path / "run" / name), strict=True)
    trained = next(row for row in summary["table"] if row["name"] == "student as trained")
    assert trained["parameters"] > summary["parameters"]["student"]
    if "branches" not in changes:
        assert any(".norms.2." in name for name in last_state(tmp_path / "run")["owner"])
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.thorough),
        {"head_combine": "random", "head_shuffle": "sample", "ema": 0.9},
    ],
)
def test_stop_in_an_epoch_and_go_on(config, source, tmp_path, monkeypatch, changes):
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"), **changes)
    train(whole, source=source)
    step, taken = Engine.step, iter(range(100))

    def interrupted(*arguments):
        step(*arguments)
        if next(taken) == 4:  # the second of three in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = dataclasses.replace(config, resume="auto", **changes)
    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(StoppedError, match="in epoch 2"):
        train(stopped, source=source)
    monkeypatch.setattr(Engine, "step", step)
    train(stopped, source=source)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_heads_follow_from_the_seed():
    x = torch.randn(2, 1, 8, 8)
    student = small_net()
    one, same, other = (make_networks(student, x, settings(seed=seed)).student.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    drawn = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert drawn and all(".operators." in name for name in drawn)


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "cifar10_plain4", "cifar_shufflenet_g3"])
def test_the_released_student_is_the_trained_one(name):
    student = small_net() if name == "small" else plain(name)
    keys, count = list(student.state_dict()), sum(p.numel() for p in student.parameters())
    engine = engine_of(copy.deepcopy(student), steps=2)
    engine.networks.train(False)
    before = {key: value.clone() for key, value in engine.networks.owner.state_dict().items()}
    released, x = engine.networks.extract(), make_batch(8, seed=7).images
    assert type(released) is type(student) and list(released.state_dict()) == keys
    assert sum(p.numel() for p in released.parameters()) == count
    with torch.no_grad():
        torch.testing.assert_close(released.eval()(x), engine.networks.student(x), rtol=1e-12, atol=1e-12)
    student.double().load_state_dict(released.state_dict(), strict=True)
    after = engine.networks.owner.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[key]) for key, value in before.items())
    assert any(isinstance(module, Heads) for module in engine.networks.owner.modules())


@pytest.mark.parametrize("method", ["kdiffusion", "kdiffusion-average", "gpd+kdiffusion"])
def test_gradients_reach_heads_and_connectors_only(method):
    engine = engine_of(steps=1, method=method, ce_weight=0.0, clip_grad=0.0)
    heads = [module for module in engine.networks.owner.modules() if "operators" in dict(module.named_children())]
    assert heads or "gpd" in method
    for name, parameter in engine.learners.named_parameters():
        if ".operators." in name or (".connector." in name and parameter.dim() > 1):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert sum(".operators." in name for name, _ in engine.learners.named_parameters()) == 9
    assert all(parameter.grad is None for parameter in engine.statics[0].network.parameters())
    held = [*engine.state()["owner"], *engine.state()["losses"]]
    assert not any("continued" in name for name in held)


# The loss ------------------------------------------------------------------------------------------------------------


def outputs_of(engine, batch):
    torch.manual_seed(3)
    return engine.learners("student", batch.images), engine.statics[0](batch.images)


def test_the_loss_by_hand():
    """The chain and the guided loss of every stage, from the pure functions and the teacher's own layers."""
    engine = engine_of(alpha=0.5, beta=2.0, head_shuffle="none", head_weights=(1.0, 2.0, 3.0))
    batch = make_batch(8, seed=5)
    learner, answer = outputs_of(engine, batch)
    method, net = engine.learners.losses["student"], engine.statics[0].network
    assert [len(heads) for heads in learner.heads] == [3, 3, 3] and method.pairs == [(0, 0), (1, 1), (2, 2)]
    value = method(learner, answer, batch)
    options, order, total = method.options, torch.arange(3), 0
    behind = [net.layer2, net.layer3, lambda x: net.fc(x.mean((2, 3)))]
    for k, layer in enumerate(method.layers):
        joined, target = layer.join(learner.heads[k], answer.features[k]), answer.features[k]
        total += 0.5 * (k + 1) * kdiffusion.chain(joined, target, options.diffusion(), order, options)
        estimate = kdiffusion.scaled(target).restore(joined.mean(0))
        total += 2.0 * F.mse_loss(behind[k](estimate), behind[k](target))
    torch.testing.assert_close(value, total, rtol=1e-10, atol=0)
    found = [torch.autograd.grad(loss, learner.heads[0][0], retain_graph=True)[0] for loss in (value, total)]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


def test_the_control_by_hand():
    engine = engine_of(method="kdiffusion-average", head_stages="last")
    batch = make_batch(8, seed=5)
    learner, answer = outputs_of(engine, batch)
    method = engine.learners.losses["student"]
    joined = method.layers[0].connector(torch.stack(learner.heads[2]).mean(0), (2, 2))
    target = answer.features[2]
    variance, mean = torch.var_mean(target, (0, 2, 3), correction=0, keepdim=True)
    method.eval()  # the statistics of the connector's norm would differ: all heads pass it at once
    expected = F.mse_loss(method.layers[0].connector(torch.stack(learner.heads[2]).mean(0), (2, 2)),
                          (target - mean) / variance.sqrt())  # fmt: skip
    assert joined.shape == target.shape and method.pairs == [(2, 2)]
    torch.testing.assert_close(method(learner, answer, batch), expected, rtol=1e-10, atol=0)


def test_without_the_guided_loss_the_teacher_runs_once(monkeypatch):
    for beta, runs in ((0.0, 1), (1.0, 4)):
        engine, batch = engine_of(beta=beta), make_batch(8)
        forward, calls = engine.statics[0].network.conv1.forward, []
        monkeypatch.setattr(
            engine.statics[0].network.conv1, "forward", lambda x, f=forward, c=calls: (c.append(len(x)), f(x))[1]
        )
        engine.step(batch, 1, 1, make_meter(engine))
        assert calls == [8, *[1] * (runs - 1)]  # one image is enough to run on from a feature


def test_settings_reach_the_options():
    config = settings(heads=4, head_shuffle="sample", head_connector_norm=False, head_standardise=False, alpha=0.3,
                      diffusion_schedule="cosine", diffusion_steps=50, diffusion_start="zero", beta=0.1,
                      diffusion_noise="gaussian", diffusion_detach=True, guide_from="last",
                      head_weights=(2.0,))  # fmt: skip
    expected = kdiffusion.Options(features=4, schedule="cosine", steps=50, start="zero", noise="gaussian", detach=True,
                                  standardise=False, layer_weights=(2.0,), middle=0.3, guide=0.1, guide_from="last",
                                  shuffle="sample", connector_norm=False)  # fmt: skip
    assert get_distiller("kdiffusion").read(config) == expected
    assert get_distiller("kdiffusion").read(settings(heads=None)) == kdiffusion.Options()


def test_more_stages_than_the_teacher():
    """A stage without a partner is compared with the nearest in size."""
    kind = get_distiller("kdiffusion")
    maps = [torch.randn(2, 4, side, side) for side in (32, 16, 8, 4)]
    learner = Outputs(torch.randn(2, 3), tuple(maps), None, tuple((value,) * 10 for value in maps))
    teacher = Outputs(torch.randn(2, 3), tuple(torch.randn(2, 5, side, side) for side in (32, 16, 8)))
    assert kind(learner, teacher, kind.defaults, torch.arange(3)).pairs == [(0, 0), (1, 1), (2, 2), (3, 2)]
    with pytest.raises(InputError, match="the student has no heads"):
        kind(teacher, teacher, kind.defaults, torch.arange(3))


def test_heads_of_tokens():
    torch.manual_seed(0)
    student = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depth=4, num_heads=2
    ).double()
    engine = engine_of(student, head_stages="last")
    learner, answer = outputs_of(engine, make_batch(8))
    found = [value for heads in learner.heads for value in heads]
    assert [list(value.shape) for value in found] == [[8, 16, 4, 4]] * 3
    assert engine.learners.losses["student"](learner, answer, make_batch(8)).isfinite()


class Counting(nn.Module):
    """Asks the images how many they are."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1))
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1))
        self.fc = nn.Linear(96, 10)

    def forward(self, x):
        count = x.shape[0] if self.strict else -1
        x = self.second(self.first(x).relu_()).relu_()
        return self.fc(x.reshape(count, 96))


@pytest.mark.parametrize("network", ["small", "lax", "strict", "vit"])
def test_a_teacher_goes_on_from_its_own_features(network):
    torch.manual_seed(0)
    net = small_net() if network == "small" else Counting(network == "strict")
    if network == "vit":
        net = timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depth=4, num_heads=2,
            global_pool="avg",
        )  # fmt: skip
    net = net.double().eval().requires_grad_(False)
    wanted = Needs(features=True).stages(net, make_batch(2).images)
    run = continued(net, wanted, lambda images: 2 * images, make_batch(2).images)
    images = make_batch(5, seed=3).images
    answer = Observed(net, wanted)(2 * images)
    for level, feature in enumerate(answer.features):
        expected = [*answer.features, answer.logits][level + 1]
        torch.testing.assert_close(run(images, level, feature), expected, rtol=1e-12, atol=1e-12)
        value = torch.randn_like(feature).requires_grad_()
        changed = run(images, level, value)
        assert not torch.allclose(changed, expected)
        changed.square().sum().backward()
        assert value.grad.abs().sum() > 0
    assert not any(module._forward_hooks for module in net.modules())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 1}, "--heads must be at least 2, got 1"),
        ({"teacher": None}, "compares with a static teacher; name it with --teacher"),
        ({"method": "kd"}, "--heads would have no effect: it belongs to --method kdiffusion and kdiffusion-average"),
        ({"method": "gpd", "teacher": None}, "--heads belongs to a loss against a static teacher"),
        ({"method": "gpd", "teacher": None, "heads": None, "head_standardise": False}, "--head-standardise belongs to"),
        ({"method": "dkd", "heads": None, "diffusion_detach": False}, "--diffusion-detach would have no effect"),
        ({"method": "kdiffusion-average", "diffusion_steps": 9}, "--diffusion-steps would have no effect"),
        ({"method": "kdiffusion-average", "alpha": 2.0}, "--alpha 2.0 would have no effect"),
        ({"temperature": 2.0}, "--temperature 2.0 would have no effect"),
        ({"diffusion_steps": 2}, "steps"),
        ({"head_weights": (1.0, 2.0)}, "2 weights for 3 layers"),
        ({"head_stages": "layer9"}, "no such stage of CifarResNet; did you mean .* it has layer1, layer2, layer3"),
        ({"head_stages": "4"}, "give 'last', 'all', names, or a number from 1 to 3"),
        ({"widen": 2}, "leave out --widen"),
        ({"compile": True}, "looks inside the networks, which --compile does not allow"),
        ({"diffusion_schedule": "cosin"}, "--diffusion-schedule must be one of linear, cosine"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        engine_of(**changes)


class Pooled(nn.Module):
    """Its second stage ends with a computed weight, which is no module to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU()), Functional()
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))


class Functional(nn.Module):
    """A convolution without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, 0.5 * self.kernel, stride=2, padding=1)


def test_a_stage_without_an_operator_to_replace():
    with pytest.raises(InputError, match=r"--method kdiffusion --head-stages last: 'second'"):
        engine_of(Pooled(), head_stages="last")


def test_features_that_cannot_be_joined():
    high, wide = torch.randn(2, 4, 8, 2), torch.randn(2, 4, 2, 8)
    learner = Outputs(torch.randn(2, 3), (high,), None, ((high,) * 10,))
    kind = get_distiller("kdiffusion")
    with pytest.raises(InputError, match="cannot be joined: one is higher, the other wider"):
        kind(learner, Outputs(torch.randn(2, 3), (wide,)), kind.defaults, torch.arange(3))

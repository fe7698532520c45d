"""One optimizer step against its formula, in one piece and in float64; averages, groups, precision, static teacher."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from training import (
    FEWER_HEADS,
    GROUP,
    facts,
    make_batch,
    make_engine,
    make_meter,
    mixed_net,
    one_teacher,
    settings,
    small_net,
    static_teacher,
    vit,
)

import reparam
from reparam.distill import runs
from reparam.distill.averages import Averages
from reparam.distill.config import TrainConfig
from reparam.distill.data import load_source
from reparam.distill.methods import get_distiller
from reparam.distill.networks import make_networks
from reparam.distill.optim import make_optimizer
from reparam.distill.statics import StaticTeacher, load_static_teachers
from reparam.distill.trainer import train
from reparam.errors import FormatError, InputError, ModelError

pytestmark = pytest.mark.usefixtures("no_curves")

# The formulas, written down once more ------------------------------------------------------------------------------


def kd(student, static, temperature):
    """T^2 times the mean of KL(softmax(Z / T) || softmax(S / T))."""
    p, q = (static / temperature).softmax(1), (student / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def dkd(student, static, labels, alpha, beta, temperature):
    """Target and other classes apart, both from probabilities."""
    target = F.one_hot(labels, student.shape[1]).bool()
    p, q = (static / temperature).softmax(1), (student / temperature).softmax(1)
    p_target, q_target = p[target], q[target]
    binary = p_target * (p_target / q_target).log() + (1 - p_target) * ((1 - p_target) / (1 - q_target)).log()
    count = len(labels)
    p_other = p[~target].view(count, -1) / (1 - p_target)[:, None]
    q_other = q[~target].view(count, -1) / (1 - q_target)[:, None]
    other = (p_other * (p_other / q_other).log()).sum(1)
    return temperature**2 * (alpha * binary.mean() + beta * other.mean())


def soft(student, teacher, smoothing=0.1):
    """Cross entropy with the smoothed distribution of the teacher."""
    target = (1 - smoothing) * teacher.detach().softmax(1) + smoothing / teacher.shape[1]
    return -(target * student.log_softmax(1)).sum(1).mean()


def against(name, logits, static, labels, config, epoch):
    """``ce_weight CE + ramp D`` with the defaults of the papers."""
    defaults = {"kd": (0.1, 0.9, 4.0, 0), "dkd": (1.0, 1.0, 4.0, 20)}
    ce, weight, temperature, warmup = defaults[name]
    ce = config.ce_weight if config.ce_weight is not None else ce
    weight = config.distill_weight if config.distill_weight is not None else weight
    temperature = config.temperature or temperature
    warmup = warmup if config.distill_warmup is None else config.distill_warmup
    weight *= min(epoch / warmup, 1) if warmup else 1
    if name == "kd":
        distance = kd(logits, static, temperature)
    else:
        alpha = 1.0 if config.alpha is None else config.alpha
        distance = dkd(logits, static, labels, alpha, 8.0 if config.beta is None else config.beta, temperature)
    return ce * F.cross_entropy(logits, labels) + weight * distance


def whole_loss(networks, static, batch, config, epoch):
    """The loss of a whole step as one expression."""
    labels = batch.labels

    def labelled(logits):
        if batch.targets is not None:
            return -(batch.targets * logits.log_softmax(1)).sum(1).mean()
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    answers = None if static is None else static.network(batch.images).detach()
    total = 0
    teacher = None
    if networks.teacher is not None:
        teacher = networks.teacher(batch.images)
        distilled = config.distiller is not None and config.teacher_distill
        total = against(config.distiller, teacher, answers, labels, config, epoch) if distilled else labelled(teacher)
    student = networks.student(batch.images)
    total = total + (
        against(config.distiller, student, answers, labels, config, epoch) if config.distiller else labelled(student)
    )
    if teacher is not None and epoch >= config.kd_start_epoch:
        total = total + config.kd_weight * soft(student, teacher, config.kd_smoothing)
    return total


def gradients(owner):
    return {name: parameter.grad for name, parameter in owner.named_parameters() if parameter.grad is not None}


CASES = {
    "baseline": {"method": "baseline"},
    "baseline, smoothing": {"method": "baseline", "label_smoothing": 0.1},
    "gpd": {},
    "gpd, ratio 3, weight": {"ratio": 3, "kd_weight": 0.7, "kd_smoothing": 0.3, "label_smoothing": 0.2},
    "gpd, orepa": {"branches": "orepa"},
    "gpd, later": {"kd_start_epoch": 3},
    "kd": {"method": "kd"},
    "kd, own weights": {"method": "kd", "ce_weight": 0.3, "distill_weight": 2.0, "temperature": 2.0},
    "dkd": {"method": "dkd"},
    "dkd, own weights": {"method": "dkd", "alpha": 0.5, "beta": 2.0, "temperature": 1.0, "distill_warmup": 3},
    "dkd, no ramp": {"method": "dkd", "distill_warmup": 0},
    "gpd+kd": {"method": "gpd+kd"},
    "gpd+dkd": {"method": "gpd+dkd"},
    "gpd+dkd, student only": {"method": "gpd+dkd", "teacher_distill": False},
    "gpd+dkd, later": {"method": "gpd+dkd", "kd_start_epoch": 3},
}


@pytest.mark.parametrize("epoch", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_gradient_of_a_step_is_that_of_the_formula(case, epoch):
    config = settings(**CASES[case])
    static = static_teacher() if config.distiller else None
    engine = make_engine(mixed_net(), config, static)
    networks = engine.networks.of(copy.deepcopy(engine.networks.owner))
    networks.train()
    batch = make_batch()
    whole_loss(networks, static, batch, config, epoch).backward()
    expected = gradients(networks.owner)
    engine.step(batch, epoch, 1, make_meter(engine))
    found = gradients(engine.networks.owner)
    assert set(found) == set(expected) and max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    # Running statistics, of both networks, are those of one pass.
    for (name, buffer), other in zip(engine.networks.owner.named_buffers(), networks.owner.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=name)


def test_cases_differ():
    """Each setting of the cases above changes the gradient: none of them compares nothing."""
    seen = {}
    for case in CASES:
        config = settings(**CASES[case])
        engine = make_engine(mixed_net(), config, static_teacher() if config.distiller else None)
        engine.step(make_batch(), 2, 1, make_meter(engine))
        seen[case] = round(sum(value.abs().sum().item() for value in gradients(engine.networks.owner).values()), 9)
    assert len(set(seen.values())) == len(seen), seen


@pytest.mark.parametrize("method", ["baseline", "gpd"])
def test_mixed_images_use_their_soft_targets(method):
    config = settings(method=method, mixup=0.5)
    engine = make_engine(mixed_net(), config)
    networks = engine.networks.of(copy.deepcopy(engine.networks.owner))
    networks.train()
    batch = make_batch(mixed=True)
    whole_loss(networks, None, batch, config, 1).backward()
    engine.step(batch, 1, 1, make_meter(engine))
    for name, value in gradients(networks.owner).items():
        torch.testing.assert_close(engine.networks.owner.get_parameter(name).grad, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["gpd", "gpd+dkd"])
def test_accumulated_step_is_the_mean_of_its_pieces(method):
    config = settings(method=method, accumulate=2)
    static = static_teacher() if config.distiller else None
    engine = make_engine(mixed_net(), config, static)
    networks = engine.networks.of(copy.deepcopy(engine.networks.owner))
    networks.train()
    batch = make_batch()
    for part in (slice(0, 4), slice(4, 8)):
        piece = dataclasses.replace(
            batch, images=batch.images[part], labels=batch.labels[part], indices=batch.indices[part]
        )
        (whole_loss(networks, static, piece, config, 1) / 2).backward()
    meter = make_meter(engine)
    engine.step(batch, 1, 1, meter)
    for name, value in gradients(networks.owner).items():
        torch.testing.assert_close(engine.networks.owner.get_parameter(name).grad, value, rtol=1e-10, atol=1e-12)
    assert meter.averages(1)["student_loss"] > 0 and meter.state()["sums"][:, 2].tolist() == [8, 8]


def test_clipping():
    """The norm over all trained parameters, connectors of losses among them."""
    batch = make_batch()
    free = make_engine(mixed_net(), settings())
    free.step(batch, 1, 1, make_meter(free))
    raw = gradients(free.networks.owner)
    norm = torch.stack([value.norm() for value in raw.values()]).norm()
    for limit, factor in ((0.1, 0.1 / norm), (1e6, 1.0)):
        clipped = make_engine(mixed_net(), settings(clip_grad=limit))
        clipped.step(batch, 1, 1, make_meter(clipped))
        for name, value in gradients(clipped.networks.owner).items():
            torch.testing.assert_close(value, raw[name] * factor, rtol=1e-5, atol=1e-9)


def test_teacher_is_detached_in_the_soft_loss():
    config = settings(kd_weight=1e3)
    engine = make_engine(mixed_net(), config)
    networks = engine.networks.of(copy.deepcopy(engine.networks.owner))
    networks.train()
    batch = make_batch()
    weight = networks.teacher.get_parameter("head.weight")
    (own,) = torch.autograd.grad(networks.student(batch.images).square().sum(), weight)
    (expected,) = torch.autograd.grad(F.cross_entropy(networks.teacher(batch.images), batch.labels), weight)
    outside = own.abs().sum(0) == 0  # columns that belong to the teacher alone
    assert outside.sum() == 5
    engine.step(batch, 1, 1, make_meter(engine))
    found = engine.networks.owner.get_parameter("head.weight").grad
    torch.testing.assert_close(found[:, outside], expected[:, outside], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[:, ~outside], expected[:, ~outside], rtol=1e-2)


# Every registered loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpd", [False, True])
@pytest.mark.parametrize("name", one_teacher())
def test_every_loss_has_a_finite_gradient_in_learners_only(name, gpd):
    config = settings(method=f"gpd+{name}" if gpd else name, **(FEWER_HEADS if "kdiffusion" in name else {}))
    static = static_teacher()
    before = {key: value.clone() for key, value in static.network.state_dict().items()}
    torch.manual_seed(0)
    engine = make_engine(small_net(), config, static)
    assert set(engine.learners.losses) == ({"student", "teacher"} if gpd else {"student"})
    meter = make_meter(engine)
    for step in range(1, 4):
        engine.step(make_batch(seed=step), 1, step, meter)
    assert meter.bad() is None
    found = [parameter.grad for parameter in engine.learners.parameters() if parameter.requires_grad]
    assert all(value is not None and bool(value.isfinite().all()) for value in found)
    assert not differing(static.network.state_dict(), before) and not static.network.training
    names = {id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]}
    assert names == {id(parameter) for parameter in engine.learners.parameters() if parameter.requires_grad}
    assert not names & {id(parameter) for parameter in static.network.parameters()}


@pytest.mark.parametrize("name", one_teacher())
def test_loss_against_the_static_teacher_falls(name):
    """Each loss pulls the learner towards the teacher: it falls on a batch that stays the same."""
    config = settings(method=name, ce_weight=0.0, distill_warmup=0, lr=0.002, optimizer="adamw", warmup_epochs=0)
    static = static_teacher()
    engine = make_engine(small_net(), config, static, steps=1000)
    batch, losses = make_batch(16), []
    for step in range(1, 31):
        meter = make_meter(engine)
        torch.manual_seed(0)  # of the negatives that CRD draws
        engine.step(batch, 1, step, meter)
        losses.append(meter.averages(1)["student_loss"])
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses


def test_losses_that_need_the_index_refuse_mixed_images():
    refusing = [name for name in one_teacher() if not get_distiller(name).allows_mixing]
    assert "kd" not in refusing
    for name in refusing:
        with pytest.raises(InputError, match="mixed images have no index; leave out --mixup and --cutmix"):
            make_engine(small_net(), settings(method=name, mixup=0.5), static_teacher())


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_standardised_logits_take_out_scale_and_shift(name):
    """Another scale and shift of the static teacher's logits changes nothing."""
    config = settings(method=name, standardise=True, ce_weight=0.0)
    found = []
    for scale, shift in ((1, 0), (3, 5)):
        static = static_teacher()
        with torch.no_grad():
            static.network.fc.weight.mul_(scale)
            static.network.fc.bias.mul_(scale).add_(shift)
        engine = make_engine(small_net(), config, static)
        engine.step(make_batch(), 1, 1, make_meter(engine))
        found.append(engine.networks.owner.fc.weight.grad.clone())
    assert found[0].abs().max() > 1e-3
    # Not exactly: the deviation has an epsilon of 1e-7.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


# The student's own pace ----------------------------------------------------------------------------------------------


def student_step(ratio, lr_scale, optimizer="sgd", decay=0.0):
    """One step with the student's loss alone, and one of the plain student."""
    config = settings(ratio=ratio, lr_scale=lr_scale, weight_decay=decay, lr=0.1, noise=0.25, optimizer=optimizer)
    batch = make_batch(16)
    plain = mixed_net().double()
    before = copy.deepcopy(plain.state_dict())
    engine = make_engine(copy.deepcopy(plain), config)
    assert not differing(engine.networks.extract().state_dict(), before, rtol=1e-12)
    alone = make_optimizer(plain, settings(method="baseline", weight_decay=decay, lr=0.1, optimizer=optimizer))
    for network, steps in ((engine.networks.student, engine.optimizer), (plain, alone)):
        for group in steps.param_groups:
            group["lr"] = 0.1 * group.get("lr_scale", 1.0)
        network.train()
        steps.zero_grad()
        F.cross_entropy(network(batch.images), batch.labels).backward()
        steps.step()
    return before, engine.networks.extract().state_dict(), plain.state_dict()


def differing(one, other, rtol=0.0):
    """Names of entries that differ."""
    assert set(one) == set(other)
    return [name for name, value in one.items() if not torch.allclose(value, other[name], rtol=rtol, atol=rtol * 1e-2)]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [2, 3])
def test_student_moves_as_if_alone_with_its_own_lr_scale(ratio, decay):
    before, found, expected = student_step(ratio, "student", decay=decay)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    still = [name for name in before if torch.allclose(before[name].double(), expected[name].double(), rtol=1e-9)]
    assert still == ([] if decay else ["depthwise.bias"])  # the norm after it takes it out again


@pytest.mark.parametrize("ratio", [2, 3])
def test_student_moves_the_square_of_the_ratio_without(ratio):
    before, found, expected = student_step(ratio, "none")
    moved = {}
    for name in before:
        if name.endswith("weight"):
            moved[name] = ((found[name] - before[name]).norm() / (expected[name] - before[name]).norm()).item()
    hidden = {"pointwise.weight", "wide.weight", "hidden.weight", "head.weight"}
    for name, factor in moved.items():
        assert factor == pytest.approx(ratio**2 if name in hidden else 1.0, rel=1e-9), name


def test_lr_scale_reaches_the_optimizer_of_a_run(tmp_path, monkeypatch):
    seen = {}

    def spy(model, config, exempt, divisors):
        made = make_optimizer(model, config, exempt, divisors)
        seen.update(names=dict(model.named_parameters()), divisors=divisors, made=made)
        return made

    monkeypatch.setattr(runs, "make_optimizer", spy)
    base = TrainConfig(epochs=1, limit_train=100, limit_batches=2, lr=0.1, quiet=True, lr_scale="student", ratio=2)
    train(dataclasses.replace(base, output=str(tmp_path / "run"), branches="orepa"), student=small_net())
    assert set(seen["divisors"]) <= set(seen["names"]) and set(seen["divisors"].values()) == {1.0, 2.0}
    scales = {group["lr_scale"] for group in seen["made"].param_groups}
    assert scales == {1.0, 0.25}
    for group in seen["made"].param_groups:
        assert group["lr"] == pytest.approx(group["lr_scale"] * max(g["lr"] for g in seen["made"].param_groups))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert float(rows[1].split(",")[2]) == 0.1  # what is reported is not scaled


# Weight decay --------------------------------------------------------------------------------------------------------


def decayed(engine):
    """Names of the parameters with weight decay."""
    names = {id(parameter): name for name, parameter in engine.learners.named_parameters()}
    groups = engine.optimizer.param_groups
    return {names[id(p)].removeprefix("owner.") for group in groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize("method", ["baseline", "gpd"])
def test_weight_decay_leaves_out_what_the_network_names(method):
    engine = make_engine(vit(), settings(method=method, optimizer="adamw"))
    every = {name for name, _ in engine.networks.owner.named_parameters()}
    assert engine.networks.owner.no_weight_decay() >= {"pos_embed", "cls_token"} and "pos_embed" in every
    assert decayed(engine) == {name for name in every if name.endswith("weight") and "norm" not in name}
    assert engine.optimizer.param_groups[0]["weight_decay"] != engine.optimizer.param_groups[-1]["weight_decay"]
    everything = make_engine(vit(), settings(method=method, optimizer="adamw", decay_norms=True))
    assert decayed(everything) == every


def test_sgd_decays_everything_unless_told_otherwise():
    engine = make_engine(mixed_net(), settings())
    every = {name for name, _ in engine.networks.owner.named_parameters()}
    assert decayed(engine) == every
    spared = decayed(make_engine(mixed_net(), settings(decay_norms=False)))
    assert spared == {name for name in every if name.endswith("weight") and "norm" not in name}


# Averaged weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "warmup"), [("gpd", False), ("gpd", True), ("baseline", False)])
def test_average_is_the_hand_written_one(method, warmup):
    engine = make_engine(mixed_net(), settings(method=method, ema=0.9, ema_warmup=warmup))
    owner = engine.networks.owner
    expected = {name: value.clone() for name, value in owner.state_dict().items()}
    for step in range(1, 6):
        engine.step(make_batch(seed=step), 1, step, make_meter(engine))
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3)) if warmup else 0.9
        for name, value in owner.state_dict().items():
            old = expected[name]
            expected[name] = decay * old + (1 - decay) * value if value.is_floating_point() else value.clone()
    found = engine.ema.module.state_dict()
    statistics = [name for name in expected if name.endswith("running_var")]
    assert len(statistics) == (4 if method == "gpd" else 2)  # those of the teacher and those of the student
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert differing(found, owner.state_dict())


class Masked(nn.Module):
    """A mask of -inf, a weight of two names, and complex numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.spectrum = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("count", torch.tensor(0))


def test_average_of_tensors_that_are_no_plain_numbers():
    torch.manual_seed(0)
    model = Masked()
    average = Averages(model, 0.9, warmup=False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
        model.count += 5
    average.update(model)
    for name, value in average.module.state_dict().items():
        if name in ("mask", "count"):
            assert torch.equal(value, getattr(model, name))
        else:
            expected = 0.9 * before[name] + 0.1 * model.state_dict()[name]
            torch.testing.assert_close(value, expected, msg=name)


def test_averaged_networks_are_a_view_on_the_average():
    engine = make_engine(mixed_net(), settings(ema=0.5))
    engine.step(make_batch(), 1, 1, make_meter(engine))
    averaged, images = engine.averaged(), make_batch(seed=3).images
    assert averaged.teacher is engine.ema.module and not averaged.student.training
    with torch.no_grad():
        torch.testing.assert_close(averaged.student(images), averaged.extract().eval()(images))
    assert make_engine(mixed_net(), settings()).averaged() is None


@pytest.mark.parametrize("branches", [None, "orepa"])
def test_file_of_the_averaged_student_is_read_from_the_averaged_teacher(tmp_path, branches):
    config = TrainConfig(
        epochs=2, batch_size=50, limit_train=100, ema=0.5, branches=branches, quiet=True, output=str(tmp_path / "run")
    )
    summary = train(config, student=small_net())
    teacher = reparam.load(tmp_path / "run" / "teacher_ema.safetensors", small_net())
    found = load_file(tmp_path / "run" / "student_ema.safetensors")
    assert not differing(found, reparam.extract(teacher).state_dict())
    assert differing(found, load_file(tmp_path / "run" / "student.safetensors"))
    assert summary["student_ema_top1"] is not None and summary["teacher_ema_top1"] is not None
    names = [row["name"] for row in summary["table"]]
    assert names[:4] == ["student as trained", "student extracted", "student folded", "teacher"]
    assert names[4:] == [f"{name} (EMA)" for name in names[:4]]


# The static teacher --------------------------------------------------------------------------------------------------


def test_static_teacher_answers_in_its_own_normalisation():
    net = small_net().eval()
    pixels = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        teacher = StaticTeacher(copy.deepcopy(net).to(dtype), facts(mean=(0.3,), std=(0.2,)), ((0.48,), (0.27,)))
        seen = ((pixels - 0.3) / 0.2).to(dtype)
        own = ((pixels - 0.48) / 0.27).to(dtype)
        with torch.no_grad():
            expected = teacher.network(own)
        torch.testing.assert_close(teacher(seen).logits, expected, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(teacher.network(seen), expected, atol=1e-2)


def test_static_teacher_is_frozen_whatever_it_was():
    teacher = StaticTeacher(small_net().train(), facts(), ((0.5,), (0.5,)))
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not teacher(make_batch(dtype=torch.float32).images).logits.requires_grad
    assert not isinstance(teacher, nn.Module)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A finished run that can be a static teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(TrainConfig(method="baseline", epochs=2, batch_size=50, limit_train=200, output=str(folder), quiet=True))
    return folder


def with_teacher(folder, output, **changes):
    base = {"method": "gpd+dkd", "teacher": "cifar_resnet8_w8", "teacher_checkpoint": str(folder), "epochs": 1}
    base |= {"batch_size": 50, "limit_train": 100, "quiet": True, "output": str(output)}
    return TrainConfig(**{**base, **changes})


LARGEST = ("dkd", "crd", "kdiffusion")
"""With a dynamic teacher: the default, and the losses with the largest state; the others run when asked for."""
RUNS = one_teacher() + [
    pytest.param(f"gpd+{name}", marks=() if name in LARGEST else pytest.mark.thorough) for name in one_teacher()
]


@pytest.mark.parametrize("method", RUNS)
def test_a_run_leaves_its_static_teacher_alone(tmp_path, teacher_run, monkeypatch, method):
    seen = []

    def spy(*arguments):
        seen.extend(load_static_teachers(*arguments))
        return seen

    monkeypatch.setattr(runs, "load_static_teachers", spy)
    changes = FEWER_HEADS if "kdiffusion" in method else {}
    train(with_teacher(teacher_run, tmp_path / "run", method=method, **changes), student=small_net())
    network, expected = seen[0].network, load_file(teacher_run / "student.safetensors")
    assert not differing(network.state_dict(), expected) and not network.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    from reparam.distill.checkpoints import latest

    state = latest(tmp_path / "run").state
    known = {value.data_ptr() for value in network.state_dict().values()}
    held = [*state["owner"].items(), *state["losses"].items()]
    assert held and not any(value.data_ptr() in known for _, value in held)
    assert not any(torch.equal(value, expected["conv1.weight"]) for _, value in held)


def test_run_folder_gives_weights_and_normalisation(teacher_run):
    config = with_teacher(teacher_run, "unused")
    written = json.loads((teacher_run / "config.json").read_text())["data"]
    other = facts(mean=(0.1,), std=(0.9,))
    (teacher,) = load_static_teachers(config, other, make_batch(2, dtype=torch.float32).images)
    pixels = torch.rand(4, 1, 8, 8)
    own = (pixels - written["mean"][0]) / written["std"][0]
    with torch.no_grad():
        expected = teacher.network(own)
    torch.testing.assert_close(teacher((pixels - 0.1) / 0.9).logits, expected, rtol=1e-4, atol=1e-4)
    assert not differing(teacher.network.state_dict(), load_file(teacher_run / "student.safetensors"))


def test_static_teacher_from_a_file_of_weights(tmp_path, teacher_run):
    config = with_teacher(teacher_run / "student.safetensors", "unused")
    (teacher,) = load_static_teachers(config, facts(), make_batch(2, dtype=torch.float64).images)
    assert {value.dtype for value in teacher.network.parameters()} == {torch.float64}
    images = make_batch(3).images
    torch.testing.assert_close(teacher.normalised(images), images)


def test_a_run_that_has_not_finished_is_no_static_teacher(tmp_path, teacher_run):
    """Its student may hold random weights; who means them names the file."""
    example = make_batch(2, dtype=torch.float32).images
    shutil.copytree(teacher_run, unfinished := tmp_path / "run")
    (unfinished / "summary.json").unlink()
    with pytest.raises(InputError, match=r"has not finished: .* Finish it with --resume auto, or name .*safetensors"):
        load_static_teachers(with_teacher(unfinished, "x"), facts(), example)
    load_static_teachers(with_teacher(unfinished / "student.safetensors", "x"), facts(), example)


def test_static_teachers_that_do_not_fit(tmp_path, teacher_run):
    example = make_batch(2, dtype=torch.float32).images
    with pytest.raises(InputError, match=r"is a run of cifar_resnet8_w8, but --teacher is cifar_resnet20"):
        load_static_teachers(with_teacher(teacher_run, "x", teacher="cifar_resnet20"), facts(), example)
    with pytest.raises(InputError, match=r"is no output folder of a run: it lacks config.json$"):
        load_static_teachers(with_teacher(tmp_path, "x"), facts(), example)
    with pytest.raises((FormatError, ModelError, InputError), match=r"fc|7|classes"):
        load_static_teachers(with_teacher(teacher_run, "x"), facts(classes=7), example)
    file = tmp_path / "other.safetensors"
    save_file(small_net(width=3).state_dict(), file)
    with pytest.raises((FormatError, InputError), match=r"conv1\.weight|shape"):
        load_static_teachers(with_teacher(file, "x"), facts(), example)
    with pytest.raises((FormatError, InputError), match="nowhere"):
        load_static_teachers(with_teacher(tmp_path / "nowhere.safetensors", "x"), facts(), example)


def test_static_teacher_with_other_classes(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    save_file(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)).state_dict(), tmp_path / "w.safetensors")
    spec = f"{tmp_path / 'net.py'}:build"
    config = with_teacher(tmp_path / "w.safetensors", tmp_path / "run", teacher=spec, method="kd")
    with pytest.raises(ModelError, match=r"--teacher .*net.py:build returns 7 logits, but digits has 10 classes"):
        train(config)
    assert not (tmp_path / "run" / "summary.json").exists()


# Precision and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["baseline", "gpd"])
def test_bf16_learns_and_keeps_float32_weights(tmp_path, method):
    config = TrainConfig(
        precision="bf16", method=method, epochs=5, batch_size=25, limit_train=300, quiet=True,
        output=str(tmp_path / "run"), lr=0.2, eval_epochs=5,
    )  # fmt: skip
    summary = train(config, student=small_net(width=4))
    from training import read_csv

    losses = [float(row["student_loss"]) for row in read_csv(tmp_path / "run" / "metrics.csv")]
    assert losses[-1] < 0.8 * losses[0] and summary["parity_passed"]
    state = load_file(tmp_path / "run" / "student.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_bf16_differs_from_fp32_by_rounding():
    found = {}
    for precision in ("fp32", "bf16"):
        engine = make_engine(mixed_net(), settings(precision=precision))
        engine.step(make_batch(dtype=torch.float32), 1, 1, make_meter(engine))
        found[precision] = engine.networks.owner.get_parameter("stem.weight").grad
    assert not torch.equal(found["fp32"], found["bf16"]) and found["bf16"].dtype == torch.float32
    assert (found["fp32"] - found["bf16"]).norm() < 0.1 * found["fp32"].norm()


def test_channels_last_changes_rounding_only():
    found = {}
    for layout in (False, True):
        engine = make_engine(mixed_net(), settings(precision="fp32", channels_last=layout))
        if layout:
            weight = engine.networks.owner.get_parameter("wide.weight")
            assert weight.is_contiguous(memory_format=torch.channels_last)
        for step in range(1, 4):
            engine.step(make_batch(seed=step, dtype=torch.float32), 1, step, make_meter(engine))
        found[layout] = engine.networks.owner.state_dict()
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_tf32_is_put_back():
    from reparam.distill.engine import precision

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    for name, wanted in (("tf32", True), ("bf16", True), ("fp32", False), ("fp64", False)):
        with precision(TrainConfig(precision=name)):
            assert matmul.allow_tf32 is wanted and torch.backends.cudnn.allow_tf32 is wanted
        assert matmul.allow_tf32 is before


def test_group_of_one():
    assert GROUP.main and GROUP.any(True, False) == (True, False)
    value = torch.ones(2)
    assert GROUP.sum(value) is value
    source = load_source("digits", limit_train=50)
    networks = make_networks(small_net(), source.x_train[:2].float(), TrainConfig())
    assert networks.owner is networks.teacher
    assert networks.student.parameters() is not None

"""Assistants between teacher and student: what each learns from, stopping between stages, errors."""

import dataclasses
import json
import os
import signal
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file
from training import trained_run
from two_processes import codes, two_processes

from reparam.distill import chain, losses, schedules, trainer
from reparam.distill.chain import train_all
from reparam.distill.config import TrainConfig
from reparam.distill.data import Facts, load_source
from reparam.distill.methods import Batch, Outputs, get_distiller, weights_of
from reparam.distill.networks import make_learners, make_networks, parts
from reparam.distill.statics import StaticTeacher
from reparam.errors import InputError, ReparamError, StoppedError

pytestmark = pytest.mark.usefixtures("no_curves")

TEACHER = "cifar_resnet14"


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
        method="gapkd",
        assistant="cifar_resnet8",
        epochs=2,
        batch_size=40,
        output=str(tmp_path / "run"),
        quiet=True,
    )


def settings(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def outputs(count, seed=0, names=("student", "teacher", "first", "second")):
    generator = torch.Generator().manual_seed(seed)
    return {name: Outputs(torch.randn(count, 7, generator=generator, dtype=torch.float64)) for name in names}


def loss_of(method, epoch=1, epochs=10, **changes):
    """A loss with the settings of a run, in a given epoch."""
    kind = get_distiller(method)
    needs = {"assistant": "cifar_resnet8"} if kind.assistants != 0 else {}
    config = TrainConfig(method=method, teacher=TEACHER, epochs=epochs, **needs, **changes)
    example = Outputs(torch.zeros(2, 7))
    loss = kind(example, example, weights_of(config, kind), torch.arange(7))
    loss.epoch = epoch
    return loss


def network(name):
    return timm.create_model(name, num_classes=10, in_chans=1)


def batch_of(count):
    images = torch.zeros(count, 1, 8, 8)
    return Batch(images, torch.arange(count) % 7, None, torch.arange(count))


# Formulas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 4, 10])
def test_gapkd_takes_the_target_from_the_teacher_and_the_rest_from_the_assistant(epoch):
    found, batch, loss = outputs(6), batch_of(6), loss_of("gapkd", epoch)
    temperature = 20 * (1 / 20) ** ((epoch - 1) / 9)
    expected = losses.double_decoupled(
        found["student"].logits, found["teacher"].logits, found["first"].logits, batch.labels, 8.3, 6.2, temperature
    )
    value = loss(found["student"], found["teacher"], batch, assistants=[found["first"]])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert loss.shares() == (0.68, min(epoch / 7, 1.0))
    swapped = loss(found["student"], found["first"], batch, assistants=[found["teacher"]])
    assert not torch.isclose(value, swapped)


def test_released_form_of_gapkd_has_a_constant_temperature():
    for changes in (
        {"student_temperature": 4.0},
        {"student_temperature": 4.0, "tau_max": 24.0, "tau_schedule": "linear"},
    ):
        assert [loss_of("gapkd", epoch, **changes).temperature for epoch in (1, 5, 10)] == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("prefactor", [None, False, True])
def test_prefactor_of_gapkd_is_a_setting(prefactor):
    found, batch = outputs(6), batch_of(6)
    loss = loss_of("gapkd", 10, prefactor=prefactor)
    value = loss(found["student"], found["teacher"], batch, assistants=[found["first"]])
    logits = (found[name].logits for name in ("student", "teacher", "first"))
    expected = losses.double_decoupled(*logits, batch.labels, 8.3, 6.2, 1.0, prefactor=bool(prefactor))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_takd_learns_from_the_last_assistant_alone():
    found, batch, loss = outputs(5), batch_of(5), loss_of("takd")
    value = loss(found["student"], found["teacher"], batch, assistants=[found["first"], found["second"]])
    torch.testing.assert_close(value, losses.kd(found["student"].logits, found["second"].logits, 4.0))


def test_dgkd_learns_from_all_but_one_drawn_in_each_step():
    found, batch, loss = outputs(5), batch_of(5), loss_of("dgkd")
    student = found["student"].logits
    each = [losses.kd(student, found[name].logits, 4.0).item() for name in ("teacher", "first", "second")]
    assistants = [found["first"], found["second"]]
    loss.eval()
    whole = loss(found["student"], found["teacher"], batch, assistants=assistants).item()
    assert whole == pytest.approx(sum(each), rel=1e-12)
    loss.train()
    torch.manual_seed(0)
    drawn = [loss(found["student"], found["teacher"], batch, assistants=assistants).item() for _ in range(300)]
    shares = [sum(abs(value - (sum(each) - one)) < 1e-9 for value in drawn) / 300 for one in each]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=0.08)
    alone = loss(found["student"], found["teacher"], batch)
    assert alone.item() == pytest.approx(each[0], rel=1e-12)


@pytest.mark.parametrize(("epoch", "scale"), [(1, 0.1), (2, 0.4), (4, 1.0)])
def test_annealing_scales_the_teacher_up_and_ends_with_the_labels(epoch, scale):
    found, batch, loss = outputs(5), batch_of(5), loss_of("annealing", epoch, epochs=6)
    value = loss(found["student"], found["teacher"], batch)
    expected = (found["student"].logits - scale * found["teacher"].logits).square().mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert loss.shares() == (0.0, 1.0)
    assert loss_of("annealing", 5, epochs=6).shares() == (1.0, 0.0)
    assert loss_of("annealing", 4, epochs=6, anneal_epochs=3).shares() == (1.0, 0.0)


def test_annealing_goes_down_ten_steps_of_equal_length():
    found, batch = outputs(1), batch_of(1)
    expected = [level / 10 for level in range(1, 11) for _ in range(3)]
    zero = Outputs(torch.zeros_like(found["teacher"].logits))
    size = found["teacher"].logits.square().mean()
    for epoch, scale in enumerate(expected, 1):
        value = loss_of("annealing", epoch, epochs=45)(zero, found["teacher"], batch)
        torch.testing.assert_close((value / size).sqrt().item(), scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_kd_follows_every_schedule(name):
    expected = schedules.temperature(name, 8.0, 2.0, 5)
    for epoch in range(1, 6):
        loss = loss_of("kd", epoch, epochs=5, tau_schedule=name, tau_max=8.0, tau_min=2.0)
        assert loss.temperature == expected[epoch - 1]


# Stages --------------------------------------------------------------------------------------------------------------


def test_gapkd_trains_the_assistant_first(config, source, tmp_path):
    summary = train_all(config, source=source)
    folder = tmp_path / "run" / "assistant-1-cifar_resnet8"
    stage, student = settings(folder), settings(tmp_path / "run")
    assert (stage["model"], stage["method"], stage["teacher"]) == ("cifar_resnet8", "kd", TEACHER)
    assert (stage["tau_schedule"], stage["tau_max"], stage["tau_min"]) == ("dtm", 20.0, 1.0)
    assert student["method"] == "gapkd" and student["assistant_checkpoint"] == str(folder)
    assert summary["epochs"] == 2 and summary["parity_passed"]


def test_released_gapkd_in_one_command(config, source, tmp_path):
    """The temperature falls for the assistant and is constant for the student."""
    train_all(dataclasses.replace(config, student_temperature=4.0, prefactor=True, tau_max=24.0), source=source)
    stage, student = settings(tmp_path / "run" / "assistant-1-cifar_resnet8"), settings(tmp_path / "run")
    assert (stage["tau_schedule"], stage["tau_max"], stage["temperature"]) == ("dtm", 24.0, None)
    assert (stage["student_temperature"], stage["prefactor"]) == (None, None)
    assert (student["student_temperature"], student["prefactor"], student["tau_max"]) == (4.0, True, 24.0)


@pytest.mark.parametrize(
    ("method", "epoch", "assistants", "read"),
    [
        ("kd", 1, (), [TEACHER]),
        ("takd", 1, ("cifar_resnet8", "cifar_resnet14"), ["cifar_resnet14"]),
        ("gapkd", 1, ("cifar_resnet8",), [TEACHER, "cifar_resnet8"]),
        ("dgkd", 1, ("cifar_resnet8", "cifar_resnet14"), [TEACHER, "cifar_resnet8", "cifar_resnet14"]),
        ("annealing", 2, (), [TEACHER]),
        ("annealing", 3, (), []),
    ],
)
def test_a_step_runs_the_static_networks_that_the_loss_reads(method, epoch, assistants, read):
    """Counted over the parts of one step; the value is that of the loss over all of them."""
    names = [TEACHER, *assistants]
    config = TrainConfig(method=method, teacher=TEACHER, assistant=",".join(assistants) or None, epochs=3)
    facts = Facts("digits", 10, 100, 50, (1, 8, 8), (0.5,), (0.5,), None, False)
    torch.manual_seed(0)
    statics = [StaticTeacher(network(name), facts, ((0.5,), (0.5,))) for name in names]
    images, labels = torch.randn(10, 1, 8, 8), torch.arange(10)
    student = network("cifar_resnet8_w8")
    learners = make_learners(make_networks(student, images, config), statics, images, labels, config)
    learners.train()
    calls = []
    for position, static in enumerate(statics):
        static.network.register_forward_hook(lambda *_args, position=position: calls.append(position))
    batch = Batch(images, labels, None, labels)
    torch.manual_seed(1)
    (part,) = list(parts(learners, learners, statics, batch, config, epoch))
    assert [names[position] for position in calls] == read
    torch.manual_seed(1)
    answers = [static(images) for static in statics]
    loss = learners.losses["student"]
    further = {"assistants": answers[1:]} if assistants else {}
    ce_weight, share = loss.shares()
    soft = loss(Outputs(part.logits), answers[0], batch, **further)
    whole = ce_weight * torch.nn.functional.cross_entropy(part.logits, labels) + share * soft
    torch.testing.assert_close(part.loss, whole)


def test_assistant_grown_from_the_student(config, source, tmp_path):
    grown = dataclasses.replace(config, assistant="expand:2", assistant_epochs=3)
    train_all(grown, source=source)
    folder = tmp_path / "run" / "assistant-1-expand-2"
    stage = settings(folder)
    assert (stage["model"], stage["widen"], stage["epochs"]) == (config.model, 2, 3)
    wide = load_file(folder / "student.safetensors")["layer1.0.conv1.weight"]
    narrow = load_file(tmp_path / "run" / "student.safetensors")["layer1.0.conv1.weight"]
    assert wide.shape[:2] == (2 * narrow.shape[0], 2 * narrow.shape[1])


@pytest.mark.parametrize(("method", "teachers"), [("takd", [TEACHER, "cifar_resnet8"]), ("dgkd", [TEACHER, TEACHER])])
def test_chains_hand_down(config, source, tmp_path, method, teachers):
    chained = dataclasses.replace(config, method=method, assistant="cifar_resnet8,expand:2", epochs=1)
    train_all(chained, source=source)
    folders = sorted((tmp_path / "run").glob("assistant-*"))
    assert [settings(folder)["teacher"] for folder in folders] == teachers
    assert settings(folders[0])["method"] == "kd"
    assert settings(folders[1])["method"] == ("kd" if method == "takd" else "dgkd")
    assert settings(folders[1])["assistant"] == (None if method == "takd" else "cifar_resnet8")


@pytest.mark.parametrize("method", [pytest.param("gapkd", marks=pytest.mark.thorough), "gpd+gapkd"])
def test_stop_in_either_stage_and_go_on(config, source, tmp_path, monkeypatch, method):
    """The same command with --resume auto ends where an uninterrupted one does, bit for bit."""
    whole = dataclasses.replace(config, method=method, output=str(tmp_path / "whole"))
    train_all(whole, source=source)
    stopped = dataclasses.replace(config, method=method, resume="auto")
    epoch = trainer._epoch
    for last in (1, 2):  # the second epoch of the first stage; then, after the rest of it, that of the second stage
        counter = iter(range(100))

        def interrupted(run, asked, counter=counter, last=last):
            if next(counter) == last:
                raise StoppedError("stopped")
            return epoch(run, asked)

        monkeypatch.setattr(trainer, "_epoch", interrupted)
        with pytest.raises(StoppedError):
            train_all(stopped, source=source)
        monkeypatch.setattr(trainer, "_epoch", epoch)
    train_all(stopped, source=source)
    for name in ("student.safetensors", "assistant-1-cifar_resnet8/student.safetensors"):
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "run" / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"assistant": None}, "needs a network between teacher and student; name it with --assistant"),
        ({"assistant": None, "method": "takd"}, "needs a network between teacher and student"),
        ({"assistant": None, "method": "dkd", "assistant_epochs": 3}, "belong to --assistant, which was not given"),
        ({"assistant": "expand:2,cifar_resnet8", "method": "takd"}, "comes behind those with a name"),
        ({"method": "takd", "alpha": 2.0}, "--alpha 2.0 would have no effect"),
        ({"standardise": True}, "--standardise would have no effect"),
        ({"output": None, "resume": "auto"}, "--resume goes on with the assistants in --output"),
        ({"assistant": "a,b"}, "--method gapkd has 1 assistants, --assistant names 2"),
        ({"method": "kd"}, "--assistant .*: --method kd has no network between teacher and student; gapkd, takd"),
        ({"assistant": "expand:1"}, "write expand: and a ratio of 2 or more"),
        ({"assistant": "expand:x"}, "write expand: and a ratio of 2 or more"),
        ({"tau_max": 1.0, "tau_min": 2.0}, "tau_max=1.0 < tau_min=2.0"),
        ({"epochs": 1, "warmup_epochs": 0}, "one epoch"),
        ({"assistant_checkpoint": "a,b"}, "--assistant names 1 networks and --assistant-checkpoint 2"),
        ({"temperature": 4.0, "tau_max": 8.0}, "--temperature is one value for all epochs"),
        ({"temperature": 4.0, "student_temperature": 8.0}, "--student-temperature that of the second; leave one out"),
        ({"method": "takd", "student_temperature": 4.0}, "--student-temperature would have no effect: it belongs to"),
        ({"method": "dgkd", "prefactor": True}, "--prefactor would have no effect: it belongs to --method gapkd"),
        ({"student_temperature": 4.0, "tau_max": 1.0, "tau_min": 2.0}, "tau_max=1.0 < tau_min=2.0"),
    ],
)
def test_bad_settings(config, source, changes, message):
    with pytest.raises(InputError, match=message):
        train_all(dataclasses.replace(config, **changes), source=source)


def test_schedule_without_a_temperature_is_refused(config, source):
    changed = dataclasses.replace(config, method="at", assistant=None, tau_schedule="linear")
    with pytest.raises(InputError, match="--tau-schedule linear would have no effect: the loss of --method at"):
        train_all(changed, source=source)


def test_bad_settings_of_the_student_are_found_before_the_first_stage(config, source, monkeypatch):
    monkeypatch.setattr(chain, "train", lambda *_args, **_kwargs: pytest.fail("a stage was started"))
    for changes in ({"method": "takd", "alpha": 2.0}, {"epochs": 1, "warmup_epochs": 0, "assistant_epochs": 5}):
        with pytest.raises(InputError):
            train_all(dataclasses.replace(config, **changes), source=source)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperature": 3.0}, ("kd", 3.0, None, None)),
        ({"ce_weight": 2.0, "distill_weight": 5.0}, ("kd", None, None, None)),
        ({"method": "takd", "ce_weight": 2.0, "distill_weight": 5.0}, ("kd", None, 2.0, 5.0)),
    ],
)
def test_what_the_first_stage_takes_over(config, source, tmp_path, changes, expected):
    train_all(dataclasses.replace(config, **changes), source=source)
    stage = settings(tmp_path / "run" / "assistant-1-cifar_resnet8")
    assert tuple(stage[name] for name in ("method", "temperature", "ce_weight", "distill_weight")) == expected


def test_two_processes_share_the_stages(tmp_path, teacher):
    """One group of processes for all stages; without --output the main process chooses the folder."""
    words = f"--method gapkd --teacher {TEACHER} --teacher-checkpoint {teacher} --assistant cifar_resnet8 --epochs 2"
    job = {"name": "stages", "arguments": [*words.split(), "--limit-train", "120", "--quiet"]}
    said = two_processes(tmp_path, [job])
    assert [codes(text) for text in said] == [[0], [0]], said
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "summary.json").is_file() and (run / "assistant-1-cifar_resnet8" / "summary.json").is_file()


def test_stop_in_the_first_stage_names_the_folder_of_all(config, source, tmp_path, monkeypatch):
    def stopped(*_args, **_kwargs):
        raise StoppedError("inside")

    monkeypatch.setattr(chain, "train", stopped)
    with pytest.raises(StoppedError, match=f"assistant 1 of 1 .* --resume auto --output {tmp_path / 'run'}$"):
        train_all(config, source=source)


def test_signal_at_the_very_end_of_a_stage_stops_before_the_next(config, source, tmp_path, monkeypatch):
    """Nobody looks at it any more in that stage; at the end of the last one there is nothing left to stop."""
    finish = trainer.finish

    def late(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(*arguments)

    monkeypatch.setattr(trainer, "finish", late)
    with pytest.raises(StoppedError, match=f"after assistant 1 of 1 .* --resume auto --output {tmp_path / 'run'}$"):
        train_all(config, source=source)
    assert (tmp_path / "run" / "assistant-1-cifar_resnet8" / "summary.json").is_file()
    assert not (tmp_path / "run" / "config.json").exists()
    assert train_all(dataclasses.replace(config, resume="auto"), source=source)["epochs"] == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "cifar_resnett8"}, "cifar_resnett8"),
        ({"checkpoint": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"model": "NETS:nine"}, "returns 9 logits, but digits has 10 classes"),
        ({"method": "gpd+gapkd", "branches": "repvg"}, "repvg"),
        ({"method": "takd", "assistant": "cifar_resnet8,cifar_resnett8"}, "cifar_resnett8"),
        ({"output": "s_e,tau=4"}, "--output s_e,tau=4: .* name a folder without a comma"),
    ],
)
def test_mistakes_are_found_before_the_first_stage(config, source, tmp_path, monkeypatch, changes, message):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef nine():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))\n"
    )
    monkeypatch.chdir(tmp_path)
    changes = {name: value.replace("NETS", str(tmp_path / "nets.py")) for name, value in changes.items()}
    monkeypatch.setattr(chain, "train", lambda *_args, **_kwargs: pytest.fail("a stage was started"))
    with pytest.raises(ReparamError, match=message):
        train_all(dataclasses.replace(config, **changes), source=source)


def test_output_of_another_run_is_refused_before_the_first_stage(config, source, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    monkeypatch.setattr(chain, "train", lambda *_args, **_kwargs: pytest.fail("a stage was started"))
    with pytest.raises(InputError, match="holds a run already"):
        train_all(config, source=source)


def test_large_assistant_is_warned_of(config, source):
    with pytest.warns(UserWarning, match="the assistant cifar_resnet20 has .* more than the teacher's"):
        train_all(dataclasses.replace(config, assistant="cifar_resnet20", epochs=2), source=source)


def test_smaller_assistant_is_not_warned_of(config, source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_all(dataclasses.replace(config, assistant_epochs=2), source=source)

"""Whole runs: files, numbers, determinism, and the errors of a run."""

import copy
import csv
import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reparam
from reparam.cli import main
from reparam.distill import compare as comparing
from reparam.distill import files, finish, trainer
from reparam.distill.compare import arms, compare
from reparam.distill.config import TrainConfig
from reparam.distill.data import load_source
from reparam.distill.distributed import resolve_device
from reparam.distill.engine import Engine
from reparam.distill.models import CifarResNet
from reparam.distill.networks import make_networks
from reparam.distill.optim import load_state, make_optimizer
from reparam.distill.trainer import train
from reparam.errors import InputError, ModelError, TrainingError

METHODS = ["gpd", "baseline"]


@pytest.fixture(autouse=True)
def few_curves(request, monkeypatch):
    """One test looks at them; drawing takes longer than most of the training here."""
    if request.function is not test_run_writes_everything:
        monkeypatch.setattr(finish, "_draw", lambda folder: None)


def small_net(seed=0, classes=10):
    torch.manual_seed(seed)
    return CifarResNet(8, width=2, num_classes=classes, in_chans=1)


@pytest.fixture(scope="module")
def source():
    return load_source("digits", limit_train=200)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(epochs=2, batch_size=50, output=str(tmp_path / "run"), quiet=True)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_run_writes_everything(tmp_path, config, source, method, optimizer):
    config = dataclasses.replace(config, method=method, optimizer=optimizer)
    baseline = method == "baseline"
    student = small_net()
    summary = train(config, student=student, source=source, command=["reparam", "train"])
    folder = tmp_path / "run"
    names = {"config.json", "recipe.yaml", "metrics.csv", "curves.png", "student.safetensors", "summary.json"}
    names |= {"checkpoints"}
    assert {entry.name for entry in folder.iterdir()} == (names if baseline else names | {"teacher.safetensors"})
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["baseline"] is baseline and 0 <= summary["student_top1"] <= 100
    assert summary["parity"]["max_rel"] <= 1e-5 and summary["parity"]["argmax_agreement"] == 1
    assert summary["parameters"]["student"] == sum(parameter.numel() for parameter in student.parameters())
    assert (summary["teacher_top1"] is None) is baseline and (summary["parameters"]["teacher"] is None) is baseline
    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[-1]["step"] == "8"
    assert ("teacher_loss" in rows[0]) is not baseline
    written = json.loads((folder / "config.json").read_text())
    assert written["config"]["lr"] == (0.1 if optimizer == "sgd" else 0.002)
    assert written["command"] == ["reparam", "train"] and written["versions"]["torch"]


@pytest.mark.parametrize("method", METHODS)
def test_written_student_is_the_trained_one(tmp_path, config, source, method):
    student = small_net()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    train(dataclasses.replace(config, method=method), student=student, source=source)
    state = load_file(tmp_path / "run" / "student.safetensors")
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in before.items()}
    assert not torch.equal(state["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    if method == "gpd":
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
        teacher = reparam.load(tmp_path / "run" / "teacher.safetensors", small_net(seed=1))
        extracted = reparam.extract(teacher).state_dict()
        assert all(torch.equal(value, extracted[name]) for name, value in state.items())


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_weights(tmp_path, config, source, method):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = dataclasses.replace(config, method=method, seed=seed, output=str(tmp_path / name), epochs=1)
        train(run, source=source)
        states.append(load_file(tmp_path / name / "student.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.thorough)])
def test_default_network_learns_the_digits(config, optimizer):
    summary = train(dataclasses.replace(config, epochs=15, batch_size=64, optimizer=optimizer))
    assert summary["student_top1"] > 95 and summary["teacher_top1"] > 95
    assert summary["parity_passed"] and summary["parameters"]["teacher"] > 3.5 * summary["parameters"]["student"]


def test_student_and_teacher_share_parameters_but_not_statistics(source):
    networks = make_networks(small_net(), torch.randn(2, 1, 8, 8), TrainConfig())
    assert {id(p) for p in networks.student.parameters()} == {id(p) for p in networks.teacher.parameters()}
    networks.train()
    before = {name: value.clone() for name, value in networks.teacher.state_dict().items()}
    networks.student(torch.randn(8, 1, 8, 8))
    changed = {name for name, value in networks.teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("student_statistics.") for name in changed)


class Exploding(nn.Module):
    """A network whose logits turn to NaN after a number of forward passes in training mode."""

    def __init__(self, good_steps):
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.good_steps = good_steps
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        logits = self.fc(x.flatten(1))
        return logits * float("nan") if self.calls > self.good_steps else logits


def test_nan_loss_names_epoch_and_step_and_keeps_the_last_good_checkpoint(tmp_path, config, source):
    with pytest.raises(TrainingError, match=r"student's loss is nan in epoch 2, step 3 of 4") as caught:
        train(dataclasses.replace(config, method="baseline"), student=Exploding(6), source=source)
    folder = tmp_path / "run"
    assert f"{folder / 'student.safetensors'} keeps the weights after epoch 1" in str(caught.value)
    assert "--lr (now 0.1)" in str(caught.value)
    assert all(value.isfinite().all() for value in load_file(folder / "student.safetensors").values())
    assert len(read_csv(folder / "metrics.csv")) == 1
    assert not (folder / "summary.json").exists() and not list(folder.glob("*partial*"))


def test_nan_in_the_first_epoch_keeps_the_initial_weights(tmp_path, config, source):
    student = Exploding(0)
    before = student.fc.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"epoch 1, step 1 of 4; .* keeps the initial weights"):
        train(dataclasses.replace(config, method="baseline"), student=student, source=source)
    assert torch.equal(load_file(tmp_path / "run" / "student.safetensors")["fc.weight"], before)


def test_huge_learning_rate_stops_the_run(tmp_path, config, source):
    run = dataclasses.replace(config, lr=1e30, clip_grad=0, epochs=3, warmup_epochs=0)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d of 4|weight became NaN or Inf in epoch 1"):
        train(run, student=small_net(), source=source)
    state = load_file(tmp_path / "run" / "student.safetensors")
    assert all(value.isfinite().all() for value in state.values())


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(
            path, lambda partial: (partial.write_text("half"), (_ for _ in ()).throw(KeyboardInterrupt))
        )
    assert json.loads(path.read_text()) == {"a": 1} and [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_class_count_that_does_not_fit(config, source):
    with pytest.raises(ModelError, match=r"returns 7 logits, but digits has 10 classes; build it with num_cl"):
        train(config, student=small_net(classes=7), source=source)


def test_class_count_of_a_model_file(tmp_path, config, source):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    model = f"{tmp_path / 'net.py'}:build"
    with pytest.raises(ModelError, match=r"net.py:build returns 3 logits, but digits has 10 classes"):
        train(dataclasses.replace(config, model=model), source=source)


def test_model_that_fails_on_the_images(config, source):
    with pytest.raises(ModelError, match=r"fails on images of digits, shape \[2, 1, 8, 8\]: .*3 chan.*--image-size"):
        train(config, student=nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten()), source=source)
    with pytest.raises(ModelError, match=r"returns a tensor of shape \[2, 10, 8, 8\]"):
        train(config, student=nn.Conv2d(1, 10, 1), source=source)


def test_output_folder_that_holds_a_run(config, source):
    train(dataclasses.replace(config, method="baseline", epochs=1), student=small_net(), source=source)
    with pytest.raises(InputError, match=r"holds a run already \(config.json, summary.json\)"):
        train(config, student=small_net(), source=source)


def test_output_that_is_a_file(tmp_path, config, source):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run is a file; name a folder"):
        train(config, student=small_net(), source=source)


def test_default_output_is_a_new_folder(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for name in ("digits-cifar_resnet8_w8-baseline-seed0", "digits-cifar_resnet8_w8-baseline-seed0-2"):
        train(TrainConfig(epochs=1, method="baseline", quiet=True), source=source)
        assert (tmp_path / "runs" / name / "summary.json").is_file()


def test_step_schedule_and_warm_up(tmp_path, config, source):
    run = dataclasses.replace(config, method="baseline", schedule="step", epochs=6, decay_epochs=2, warmup_epochs=1)
    train(run, student=small_net(), source=source)
    rates = [float(row["lr"]) for row in read_csv(tmp_path / "run" / "metrics.csv")]
    assert rates == pytest.approx([0.001, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_weight_decay_groups(config):
    """AdamW leaves norms and biases of the teacher without decay, SGD decays everything."""
    for optimizer, groups in (("adamw", 2), ("sgd", 1)):
        made = make_optimizer(small_net(), dataclasses.replace(config, optimizer=optimizer).resolved())
        assert len(made.param_groups) == groups
    frozen = small_net().requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        make_optimizer(frozen, config.resolved())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_state_of_an_optimizer_takes_the_memory_format_of_the_weights(config, optimizer):
    """Fused kernels go through weight and momentum by memory: a state saved in another format has to be converted."""
    settings = dataclasses.replace(config, optimizer=optimizer).resolved()

    def step(made, network):
        for number, parameter in enumerate(network.parameters()):
            torch.manual_seed(number)
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
        made.step()

    torch.manual_seed(0)
    plain = small_net()
    before = make_optimizer(plain, settings)
    assert all(group["fused"] for group in before.param_groups)
    step(before, plain)
    other = small_net().to(memory_format=torch.channels_last)
    other.load_state_dict(plain.state_dict())
    after = make_optimizer(other, settings)
    load_state(after, copy.deepcopy(before.state_dict()))
    assert any(p.stride() != q.stride() for p, q in zip(plain.parameters(), other.parameters(), strict=True))
    step(before, plain)
    step(after, other)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        # Not bit for bit: what is left over behind the last whole vector is rounded in another way.
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_fused_sgd_with_gradients_that_come_late_and_state_of_one_that_was_not_fused(config):
    """torch's own would fail in the first case and go on unfused in the second."""
    settings = dataclasses.replace(config, optimizer="sgd").resolved()
    torch.manual_seed(0)
    network, reference = small_net(), small_net()
    reference.load_state_dict(network.state_dict())
    made = make_optimizer(network, settings)
    plain = make_optimizer(reference, dataclasses.replace(settings, precision="fp16"))
    assert all(group["fused"] for group in made.param_groups) and not any(g["fused"] for g in plain.param_groups)
    for late in (1, 0):
        for optimizer, net in ((made, network), (plain, reference)):
            for number, parameter in enumerate(net.parameters()):
                torch.manual_seed(number)
                parameter.grad = None if number < late else torch.randn(parameter.shape)
            optimizer.step()
    for one, two in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    load_state(made, copy.deepcopy(plain.state_dict()))
    assert all(group["fused"] for group in made.param_groups)
    made.step()
    plain.step()
    for one, two in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_folder_data_from_end_to_end(tmp_path, config):
    from test_distill_data import write_folder

    spec = write_folder(tmp_path / "images", images=4)
    run = dataclasses.replace(config, data=spec, image_size=8, batch_size=4, epochs=1)
    summary = train(run)
    assert summary["data"]["image_shape"] == (3, 8, 8) and summary["steps"] == 2
    assert summary["parity_passed"]


def test_progress_without_a_terminal(tmp_path, config, source, capsys):
    train(dataclasses.replace(config, quiet=False), student=small_net(), source=source)
    shown = capsys.readouterr()
    assert "epoch   2/2" in shown.out and "student extracted" in shown.out and "PASS" in shown.out
    assert "ratio 2" in shown.out and "--compare" in shown.out and not shown.err


def test_progress_on_a_terminal(config, source, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(dataclasses.replace(config, quiet=False, method="baseline"), student=small_net(), source=source)
    shown = capsys.readouterr()
    assert "step/s" in shown.err or "8/8" in shown.err
    assert "epoch   2/2" in shown.out


def test_arms_of_a_comparison():
    names = [arm.name for arm in arms(TrainConfig(lr=0.1, ratio=3))]
    assert names == ["gpd lr 0.1", "baseline lr 0.1", "baseline lr 0.9"]
    names = [arm.name for arm in arms(TrainConfig(optimizer="adamw", ratio=2))]
    assert names == ["gpd lr 0.002", "baseline lr 0.002", "baseline lr 0.004", "baseline lr 0.008"]
    assert len(arms(TrainConfig(ratio=1))) == 2
    names = [arm.name for arm in arms(TrainConfig(lr=0.1, method="kd", teacher="t"))]
    assert names == ["kd lr 0.1", "baseline lr 0.1"]  # nothing is widened: there is no larger step


def test_baselines_of_a_comparison_are_what_a_user_would_train_alone():
    _, same, larger = (arm.config for arm in arms(TrainConfig(lr=0.1, branches="orepa", branch_init="scratch")))
    assert same == TrainConfig(lr=0.1, method="baseline").resolved()
    assert larger == TrainConfig(lr=0.4, method="baseline").resolved()


def test_comparison(tmp_path, config, capsys):
    run = dataclasses.replace(config, epochs=1, limit_train=100, quiet=False)
    content = compare(run, seeds=(0, 1), command=["reparam"])
    written = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert written["arms"] == json.loads(json.dumps(content["arms"]))
    assert [arm["name"] for arm in content["arms"]] == ["gpd lr 0.1", "baseline lr 0.1", "baseline lr 0.4"]
    assert all(arm["seeds"] == [0, 1] and len(arm["student_top1"]) == 2 for arm in content["arms"])
    best = max(arm["mean"] for arm in content["arms"][1:])
    assert content["verdict"]["difference"] == pytest.approx(content["arms"][0]["mean"] - best)
    assert (tmp_path / "run" / "baseline-lr-0.4-seed1" / "summary.json").is_file()
    shown = capsys.readouterr().out
    assert shown.startswith("6 runs of ") and shown.splitlines()[0].endswith("seeds 0, 1")
    assert "GPD minus the best baseline" in shown and "seed 1  baseline lr 0.4" in shown


def test_a_comparison_shows_averaged_weights_too(short, capsys):
    content = compare(dataclasses.replace(short, ema=0.5), seeds=(0, 1))
    for arm in content["arms"]:
        folders = [Path(short.output) / f"{arm['name'].replace(' ', '-')}-seed{seed}" for seed in (0, 1)]
        found = [json.loads((folder / "summary.json").read_text())["student_ema_top1"] for folder in folders]
        assert arm["student_ema_top1"] == found
    _, _, table = capsys.readouterr().out.partition("\n\n")
    head, _, *lines = table.splitlines()
    assert head.split()[-6:] == ["mean", "std", "averaged", "s", "per", "run"]
    for line, arm in zip(lines[:3], content["arms"], strict=True):
        assert line.split()[-2] == f"{sum(arm['student_ema_top1']) / 2:.2f}"


@pytest.fixture
def short(config, monkeypatch):
    """A comparison of three runs per seed, one epoch of two steps each, without pictures."""
    monkeypatch.setattr(finish, "_draw", lambda folder: None)
    monkeypatch.setattr(comparing, "draw_curves", lambda runs, path: None)
    return dataclasses.replace(config, epochs=1, limit_train=80, batch_size=40, quiet=False)


def diverging(monkeypatch, *places):
    """Let these runs, of a learning rate and a seed, meet NaN in their first step; return the runs that took steps."""
    step, seen = Engine.step, []

    def spoiled(self, batch, epoch, steps, meter):
        place = (self.config.method, self.config.lr, self.config.seed)
        seen.extend([place] if place not in seen else [])
        if place in places:
            batch = dataclasses.replace(batch, images=batch.images * float("nan"))
        step(self, batch, epoch, steps, meter)

    monkeypatch.setattr(Engine, "step", spoiled)
    return seen


def test_a_run_that_diverges_is_a_result_of_the_comparison(tmp_path, short, capsys, monkeypatch):
    diverging(monkeypatch, ("baseline", 0.4, 0), ("baseline", 0.1, 0), ("baseline", 0.1, 1))
    content = compare(short, seeds=(0, 1))
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["arms"] == content["arms"]
    gpd, same, larger = content["arms"]
    assert (gpd["seeds"], same["seeds"], larger["seeds"]) == ([0, 1], [], [1])
    assert [run["seed"] for run in same["failed"]] == [0, 1] and same["mean"] is None and gpd["failed"] == []
    assert "NaN" in larger["failed"][0]["error"] or "nan" in larger["failed"][0]["error"]
    assert content["verdict"]["best_baseline"] == "baseline lr 0.4"
    assert content["verdict"]["difference"] == pytest.approx(gpd["mean"] - larger["mean"])
    without = ["baseline lr 0.1 (seed 0, 1: no run finished)", "baseline lr 0.4 (seed 0)"]
    assert content["verdict"]["left_out"] == without
    shown = capsys.readouterr().out
    assert f"left out, because they failed: {'; '.join(without)}" in shown
    assert re.search(r"baseline lr 0.1 +FAILED +FAILED +- +- +-", shown)
    assert "FAILED  baseline lr 0.1, seed 1: " in shown


def test_a_comparison_with_nothing_to_compare_has_no_verdict(tmp_path, short, capsys, monkeypatch):
    diverging(monkeypatch, ("gpd", 0.1, 4))
    words = ["--epochs", "1", "--limit-train", "80", "--batch-size", "40", "--compare", "--seeds", "4"]
    assert main(["train", *words, "--output", str(tmp_path / "run")]) == 1
    assert "no verdict: there is nothing to compare without gpd lr 0.1 (seed 4: no run" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["verdict"] is None


@pytest.mark.parametrize("when", ["in a run", "at its end"])
def test_a_comparison_is_stopped_and_goes_on(tmp_path, short, capsys, monkeypatch, when):
    place = (Engine, "step") if when == "in a run" else (trainer, "finish")
    work, calls = getattr(*place), []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == (3 if when == "in a run" else 2):  # each time the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*arguments)

    words = ["--epochs", "1", "--limit-train", "80", "--batch-size", "40", "--compare", "--seeds", "0"]
    words = ["train", *words, "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(*place, stopping)
        assert main(words) == 143
    said = "in the run baseline lr 0.1 with seed 0; its state is saved" if when == "in a run" else "after 2 of 3 runs"
    assert f"stopped by SIGTERM {said}" in (shown := capsys.readouterr().err)
    assert shown.endswith(f"go on with the same command and --compare --resume auto --output {tmp_path / 'run'}\n")
    assert main(words) == 2 and "go on with --compare --resume auto" in capsys.readouterr().err
    assert main([*words, "--resume", "auto", "--lr", "0.2"]) == 2 and "lr was 0.1, is 0.2" in capsys.readouterr().err
    seen = diverging(monkeypatch)
    assert main([*words, "--resume", "auto"]) == 0
    left = [("baseline", 0.1, 0), ("baseline", 0.4, 0)]
    assert seen == (left if when == "in a run" else left[1:])
    content = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [arm["seeds"] for arm in content["arms"]] == [[0]] * 3 and content["verdict"]["left_out"] == []


def test_comparison_refuses(config):
    with pytest.raises(InputError, match="--compare takes --resume auto alone"):
        compare(dataclasses.replace(config, resume="x.ckpt"), seeds=(0,))
    with pytest.raises(InputError, match="--resume auto looks for a comparison in --output"):
        compare(dataclasses.replace(config, resume="auto", output=None), seeds=(0,))
    with pytest.raises(InputError, match="--compare runs the baselines itself"):
        compare(dataclasses.replace(config, method="baseline"), seeds=(0,))
    with pytest.raises(InputError, match=r"--seeds needs different numbers .* got \[1, 1\]"):
        compare(config, seeds=(1, 1))


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device abacus cannot be used here"):
        resolve_device("abacus")

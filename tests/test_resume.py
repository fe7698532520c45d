"""Stopping and going on: the same bits as without a stop, whatever stopped the run; and damaged checkpoints."""

import dataclasses
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import NETS, assert_same_run, differences, last_state, metrics, one_teacher

from reparam.cli import main
from reparam.distill import checkpoints, evaluate, files, finish, runs, states
from reparam.distill.config import TrainConfig
from reparam.distill.engine import Engine
from reparam.distill.trainer import train
from reparam.errors import FormatError, InputError, StoppedError, TrainingError

STEPS = 4
"""Steps per epoch of the runs here; they have 3 epochs."""


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return str(path)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(TrainConfig(method="baseline", epochs=1, batch_size=50, limit_train=100, output=str(folder), quiet=True))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the training here."""
    monkeypatch.setattr(finish, "_draw", lambda folder: None)


CASES = {
    "baseline": {"method": "baseline"},
    "baseline, dropout, accumulate, nesterov": {
        "method": "baseline",
        "model": "convs",
        "accumulate": 2,
        "nesterov": True,
    },
    "gpd": {},
    "gpd, adamw": {"optimizer": "adamw", "ema": 0.9, "ema_warmup": True},
    "gpd, orepa, accumulate": {"model": "normless", "branches": "orepa", "accumulate": 2, "ema": 0.9},
    "gpd, drop path, mixup": {"model": "vit", "optimizer": "adamw", "mixup": 0.4, "cutmix": 1.0, "erase": 0.3},
    "gpd, lr_scale": {"lr_scale": "student", "schedule": "step", "decay_epochs": 1.0},
    "gpd, later": {"kd_start_epoch": 2, "eval_epochs": 2, "keep_best": 0},
    "gpd+dkd": {"method": "gpd+dkd", "ema": 0.9, "mixup": 0.4, "distill_warmup": 3},
    "branches alone": {"model": "normless", "method": "baseline", "branches": "dbb"},
}
CASES |= {f"gpd+{name}": {"method": f"gpd+{name}"} for name in one_teacher() if name != "dkd"}
CASES["gpd+kdiffusion"]["heads"] = 2  # of 10, which take longer to record and run than everything else


def settings(case, nets, teacher_run, output, **changes):
    """The settings of a case: 3 epochs of 4 steps."""
    values = {"epochs": 3, "batch_size": 40, "limit_train": 160, "quiet": True, "output": str(output), **CASES[case]}
    if "model" in values:
        values["model"] = f"{nets}:{values['model']}"
    if set(values.get("method", "gpd").split("+")) - {"gpd", "baseline"}:
        values |= {"teacher": "cifar_resnet8_w8", "teacher_checkpoint": str(teacher_run)}
    return TrainConfig(**{**values, **changes})


@pytest.fixture
def order(monkeypatch):
    """Indices of the images of every step that is taken."""
    seen, step = [], Engine.step

    def noted(self, batch, epoch, steps, meter):
        seen.append((steps, batch.indices.tolist()))
        step(self, batch, epoch, steps, meter)

    monkeypatch.setattr(Engine, "step", noted)
    return seen


def stop_after(monkeypatch, number):
    """Send SIGTERM to this process at the end of that optimizer step."""
    step = Engine.step

    def stopping(self, batch, epoch, steps, meter):
        step(self, batch, epoch, steps, meter)
        if steps == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Engine, "step", stopping)


WITH_STATE = ("gpd+dkd", "gpd+crd", "gpd+kdiffusion")
"""Losses with a ramp, with a memory and parameters, and with random numbers; others that compare with a static teacher
have fewer of these, or the same."""
ALIKE = [case for case in CASES if case.startswith("gpd+") and case not in WITH_STATE] + ["gpd, later", "gpd, lr_scale"]


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.thorough) if c in ALIKE else c for c in CASES])
def test_stopped_and_resumed_is_the_same_run(tmp_path, nets, teacher_run, monkeypatch, order, case):
    """Stopped inside an epoch, for some cases also at the end of one, against a run in one go."""
    train(settings(case, nets, teacher_run, tmp_path / "whole"))
    expected = list(order)
    order.clear()
    config = settings(case, nets, teacher_run, tmp_path / "parts", resume="auto")
    for number in (4, 6) if case in ("baseline", "gpd", "gpd+dkd", "gpd, drop path, mixup") else (7,):
        with monkeypatch.context() as patch:
            stop_after(patch, number)
            with pytest.raises(StoppedError, match=rf"stopped by SIGTERM in epoch {(number - 1) // 4 + 1}"):
                train(config)
        assert last_state(tmp_path / "parts")["steps"] == number
        torch.manual_seed(random.randrange(1000))  # nothing may depend on the state of the process
        assert not (tmp_path / "parts" / "summary.json").exists()
    summary = train(config)
    assert [steps for steps, _ in expected] == list(range(1, 13)) and order == expected
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert whole["table"] == json.loads(json.dumps(summary["table"])) and summary["steps"] == 12


def test_stopped_in_the_last_evaluation(tmp_path, nets, teacher_run, monkeypatch):
    """The evaluation is given up: whoever sends SIGTERM kills the process soon."""
    measure, calls, seen = evaluate.measure, [], []

    def interrupted(entries, batches, *rest):
        calls.append(len(calls))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(entries, (seen.append(len(calls)) or batch for batch in batches), *rest)

    config = settings("gpd", nets, teacher_run, tmp_path / "parts", resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure", interrupted)
        with pytest.raises(StoppedError, match="in epoch 3, after step 4 of 4; the state is saved"):
            train(config)
    assert set(seen) == {1, 2} and last_state(tmp_path / "parts")["step"] == 4
    train(config)
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_slow_steps_are_looked_after_one_by_one(monkeypatch):
    """In several processes that decide together; the time is the largest of all of them."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    looks, looked = runs.Looks(), []
    for number in range(1, 60):
        now[0] += 0.01 if number <= 30 else 0.4 if number <= 45 else 5.0
        if looks.due():
            looked.append(number)
            looks.looked(looks.seconds())
    assert looked == [1, 11, 21, 31, 41, 43, 45, 47, *range(48, 60)]
    assert looks.due()
    looks.looked(0.0)
    assert [looks.due() for _ in range(10)] == [False] * 9 + [True]


def test_runs_with_other_seeds_differ(tmp_path, nets, teacher_run):
    """What the test above compares with can tell two runs apart, in every part of the state."""
    for seed in (0, 1):
        train(settings("gpd+reviewkd", nets, teacher_run, tmp_path / str(seed), seed=seed, ema=0.9))
    found = differences(last_state(tmp_path / "0"), last_state(tmp_path / "1"))
    for part in ("/owner/", "/losses/", "/ema/", "/optimizer/", "/rows/"):
        assert any(place.startswith(part) for place in found), part


@pytest.mark.parametrize("case", ["gpd", "gpd+dkd", "gpd, drop path, mixup"])
def test_crash_loses_the_unsaved_steps_only(tmp_path, nets, teacher_run, monkeypatch, order, case):
    train(settings(case, nets, teacher_run, tmp_path / "whole"))
    order.clear()
    config = settings(case, nets, teacher_run, tmp_path / "parts", resume="auto", save_steps=3)
    with monkeypatch.context() as patch:
        step = Engine.step

        def crashing(self, batch, epoch, steps, meter):
            if steps == 8:
                raise RuntimeError("pulled the plug")
            step(self, batch, epoch, steps, meter)

        patch.setattr(Engine, "step", crashing)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(config)
    order.clear()
    train(config)
    assert [steps for steps, _ in order] == list(range(7, 13))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_longer_training_is_another_run(tmp_path, nets, teacher_run):
    """The schedule depends on the number of epochs: a run cannot be made longer unnoticed."""
    train(settings("gpd", nets, teacher_run, tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"other settings: .*epochs was 3, is 4"):
        train(settings("gpd", nets, teacher_run, tmp_path / "run", epochs=4, resume="auto"))


def test_resume_from_a_named_checkpoint(tmp_path, nets, teacher_run):
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    first = checkpoints.checkpoints(tmp_path / "whole")[0]
    kept = tmp_path / first.name
    shutil.copy(first, kept)
    assert checkpoints.read_checkpoint(kept)["steps"] < 12
    train(settings("gpd", nets, teacher_run, tmp_path / "again", resume=str(kept)))
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_finished_run_is_not_run_again(tmp_path, nets, teacher_run, order, capsys):
    config = settings("gpd", nets, teacher_run, tmp_path / "run", resume="auto")
    summary = train(config)
    order.clear()
    again = train(dataclasses.replace(config, quiet=False))
    assert not order and again == json.loads(json.dumps(summary))
    assert "holds a finished run; nothing to do" in capsys.readouterr().out
    (tmp_path / "run" / "summary.json").write_text('{"a": 1}')
    with pytest.raises(FormatError, match=r"summary.json is damaged or was written by another .*: it lacks config"):
        train(config)
    with pytest.raises(FormatError, match=r"is a folder, not a checkpoint; to go on in it: --output .* --resume auto"):
        train(dataclasses.replace(config, resume=str(tmp_path / "run"), output=str(tmp_path / "other")))


def test_other_weights_of_the_static_teacher_are_refused(tmp_path, nets, teacher_run):
    """Its files may move, what it answers may not change."""
    given = {"method": "kd", "teacher": "cifar_resnet8_w8", "teacher_checkpoint": str(teacher_run)}
    config = settings("baseline", nets, teacher_run, tmp_path / "run", epochs=1, **given)
    moved, other = tmp_path / "moved", tmp_path / "other"
    train(config)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copytree(teacher_run, moved)
    shutil.copytree(teacher_run, other)
    weights = load_file(other / "student.safetensors")
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name][0] += 1e-3
    save_file(weights, other / "student.safetensors")
    kept = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(InputError, match="a static teacher or assistant of other weights; give the ones of that run"):
        train(dataclasses.replace(config, resume="auto", teacher_checkpoint=str(other)))
    assert (tmp_path / "run" / "config.json").read_text() == kept
    train(dataclasses.replace(config, resume="auto", teacher_checkpoint=str(moved)))


@pytest.mark.parametrize("name", ["metrics.csv", "student.safetensors", "teacher.safetensors"])
def test_killed_between_the_last_checkpoint_and_the_other_files(tmp_path, nets, teacher_run, name):
    """Everything that is made from a checkpoint is made again from it."""
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    early = tmp_path / "early"
    train(settings("gpd", nets, teacher_run, early, seed=5))
    (tmp_path / "parts" / "summary.json").unlink()
    shutil.copy(early / name, tmp_path / "parts" / name)  # the file of another moment
    train(settings("gpd", nets, teacher_run, tmp_path / "parts", resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_leftovers_of_a_kill_are_cleared_away(tmp_path, nets, teacher_run):
    folder = tmp_path / "run" / checkpoints.FOLDER
    folder.mkdir(parents=True)
    (folder / ".step-000000003-0badcafe.partial.ckpt").write_bytes(b"half")
    train(settings("gpd", nets, teacher_run, tmp_path / "run", resume="auto"))
    assert not list((tmp_path / "run").rglob("*partial*"))


# Which checkpoints stay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "save_steps"), [(0, None), (1, None), (2, None), (1, 1)])
def test_kept_checkpoints(tmp_path, nets, teacher_run, best, save_steps):
    config = settings("gpd", nets, teacher_run, tmp_path / "run", keep_best=best, save_steps=save_steps, epochs=6)
    train(config)
    rows = metrics(tmp_path / "run")
    ranked = sorted(rows, key=lambda row: (float(row["student_top1"]), int(row["step"])), reverse=True)
    expected = {int(row["step"]) for row in ranked[:best]} | ({20, 24} if save_steps is None else {23, 24})
    kept = [int(path.name[5:14]) for path in checkpoints.checkpoints(tmp_path / "run")]
    assert set(kept) == expected and kept == sorted(kept)


# Damaged, foreign, hostile -------------------------------------------------------------------------------------------


def interrupted(nets, teacher_run, folder, monkeypatch, after=10, **changes):
    """A run that was stopped with several checkpoints, and its settings."""
    config = settings("gpd", nets, teacher_run, folder, resume="auto", save_steps=2, **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(StoppedError):
            train(config)
    return config, checkpoints.checkpoints(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bit"])
def test_damaged_newest_checkpoint(tmp_path, nets, teacher_run, monkeypatch, capsys, damage):
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    config, found = interrupted(nets, teacher_run, tmp_path / "parts", monkeypatch)
    content = bytearray(found[-1].read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    found[-1].write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))])
    capsys.readouterr()
    train(dataclasses.replace(config, quiet=False))
    shown = capsys.readouterr().out
    assert f"skipped: checkpoint {found[-1]} is damaged" in shown and f"resume   {found[-2]}: 2 epochs" in shown
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_new_checkpoints_take_the_place_of_damaged_ones(tmp_path, nets, teacher_run, monkeypatch):
    """Damaged files of later steps must not count as the newest ones."""
    config, found = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch, after=9, keep_best=2)
    assert [int(path.name[5:14]) for path in found[-2:]] == [8, 9]
    for path in found[-2:]:
        path.write_bytes(b"nothing")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(StoppedError):
            train(config)
    there = [checkpoints.read_checkpoint(path)["steps"] for path in checkpoints.checkpoints(tmp_path / "run")]
    assert there[-2:] == [6, 7]


@pytest.mark.parametrize("steps", [4, 9])
def test_sent_back_to_a_checkpoint_of_its_own(tmp_path, nets, teacher_run, monkeypatch, steps):
    """A finished run that goes on from an earlier step is not finished any more."""
    config = settings("gpd", nets, teacher_run, tmp_path / "run", save_steps=3, keep_best=3)
    train(config)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (back,) = (tmp_path / "run" / checkpoints.FOLDER).glob(f"step-{steps:09d}-*")
    before = (tmp_path / "run" / "student.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, steps + 1)
        with pytest.raises(StoppedError):
            train(dataclasses.replace(config, resume=str(back)))
    assert not (tmp_path / "run" / "summary.json").exists() and len(metrics(tmp_path / "run")) == (steps + 1) // 4
    assert (tmp_path / "run" / "student.safetensors").read_bytes() != before
    train(dataclasses.replace(config, resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_all_checkpoints_damaged(tmp_path, nets, teacher_run, monkeypatch):
    config, found = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch)
    for path in found:
        path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="no checkpoint of the run can be used") as caught:
        train(config)
    assert all(str(path) in str(caught.value) for path in found)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "inside"])
def test_hostile_checkpoint_executes_nothing(tmp_path, nets, teacher_run, how):
    mark, path = tmp_path / "executed", tmp_path / "run" / "checkpoints" / "bad.ckpt"
    path.parent.mkdir(parents=True)
    hostile = Hostile(mark)
    if how == "pickle":
        path.write_bytes(pickle.dumps({"version": 1, "steps": 3, "owner": hostile}, protocol=2))
    else:
        torch.save({"version": 1, "steps": 3, "owner": hostile} if how == "inside" else hostile, path)
    with pytest.raises(FormatError, match=r"bad.ckpt is damaged or no checkpoint of a run: UnpicklingError"):
        train(settings("gpd", nets, teacher_run, tmp_path / "run", resume=str(path)))
    assert not mark.exists()
    # The file can do harm: what reads it without care executes it.
    if how == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_hostile_newest_checkpoint_is_skipped(tmp_path, nets, teacher_run, monkeypatch):
    import zlib

    config, found = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch)
    mark = tmp_path / "executed"
    content = pickle.dumps({"version": 1, "steps": 11, "owner": Hostile(mark)})
    bad = found[-1].with_name(f"step-000000011-{zlib.crc32(content):08x}.ckpt")
    bad.write_bytes(content)
    assert checkpoints.latest(tmp_path / "run").path == found[-1]
    train(config)
    assert not mark.exists()


def test_files_that_are_no_checkpoints(tmp_path, nets, teacher_run, monkeypatch):
    _, found = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch)
    state = checkpoints.read_checkpoint(found[-1])
    torch.save({**state, "version": 99}, tmp_path / "newer.ckpt")
    torch.save(state["owner"], tmp_path / "weights.ckpt")
    cases = {
        "newer.ckpt": "has version 99, this reparam reads version 1",
        "weights.ckpt": "is no checkpoint of a run; weights alone go to --checkpoint",
        "nowhere.ckpt": "no such checkpoint",
        "": "is a folder, not a checkpoint; to go on in it",
    }
    for name, message in cases.items():
        with pytest.raises(FormatError, match=message):
            train(settings("gpd", nets, teacher_run, tmp_path / "new", resume=str(tmp_path / name)))
    assert not (tmp_path / "new").exists()


def test_checkpoint_of_another_version_is_skipped(tmp_path, nets, teacher_run, monkeypatch, capsys):
    config, found = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch)
    state = checkpoints.read_checkpoint(found[-1])
    del state["version"]
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    checkpoints.write_checkpoint(tmp_path / "run", 11, state)
    monkeypatch.setattr(checkpoints, "VERSION", 1)
    capsys.readouterr()
    train(dataclasses.replace(config, quiet=False))
    assert "skipped: checkpoint" in (shown := capsys.readouterr().out) and "has version" in shown


def test_other_settings_are_named(tmp_path, nets, teacher_run, monkeypatch):
    config, _ = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch)
    other = dataclasses.replace(config, lr=0.3, ratio=3, kd_weight=1.0)
    with pytest.raises(InputError, match=r"ratio was 2, is 3") as caught:
        train(other)
    for part in ("lr was 0.1, is 0.3", "kd_weight was 3.0, is 1.0", "config.json has it", "--checkpoint"):
        assert part in str(caught.value)
    assert "seed was" not in str(caught.value)
    with pytest.raises(InputError, match=r"model was 'cifar_resnet8_w8', is 'cifar_resnet20'"):
        train(dataclasses.replace(config, model="cifar_resnet20"))


def test_settings_that_may_change(tmp_path, nets, teacher_run, monkeypatch):
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    config, _ = interrupted(nets, teacher_run, tmp_path / "run", monkeypatch)
    train(dataclasses.replace(config, save_steps=None, keep_best=3, workers=1, on_nan="rollback", threads=1))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_settings_that_an_earlier_version_did_not_have():
    """They were at their defaults, whatever these are; nothing else may be missing."""
    current = dataclasses.asdict(TrainConfig().resolved())
    new = ("checkpoint_ema", "clip_grad", "noise", "crop_pct")
    saved = {name: value for name, value in current.items() if name not in new}
    checkpoints.check_same(saved, current, Path("x"))
    with pytest.raises(InputError, match=r"noise was 0\.25, is 0\.5"):
        checkpoints.check_same(saved, {**current, "noise": 0.5}, Path("x"))
    with pytest.raises(InputError, match="gone was 3, is None"):
        checkpoints.check_same({**saved, "gone": 3}, current, Path("x"))


def test_resume_auto_needs_a_place():
    with pytest.raises(InputError, match="--resume auto looks for a run in --output, which was not given"):
        train(TrainConfig(resume="auto"))


def test_output_that_holds_another_run(tmp_path, nets, teacher_run):
    train(settings("gpd", nets, teacher_run, tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds a run already \(config.json, summary.json\).*--resume auto"):
        train(settings("gpd", nets, teacher_run, tmp_path / "run"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


# No space left -------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch, steps):
    """From that step on every checkpoint fails half way through."""
    step = Engine.step

    def filling(self, batch, epoch, number, meter):
        step(self, batch, epoch, number, meter)
        if number == steps:
            monkeypatch.setattr(os, "fsync", refuse)

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Engine, "step", filling)


def test_full_disk(tmp_path, nets, teacher_run, monkeypatch):
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    config = settings("gpd", nets, teacher_run, tmp_path / "run", resume="auto", save_steps=2)
    with monkeypatch.context() as patch:
        full_disk(patch, 9)
        with pytest.raises(
            TrainingError, match=r"cannot write into .*run: .*No space left on device \(epoch 2, step 10"
        ):
            train(config)
    assert not list((tmp_path / "run").rglob("*partial*"))
    assert last_state(tmp_path / "run")["steps"] == 8
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["metrics.csv", "student.safetensors"])
def test_full_disk_at_another_file(tmp_path, nets, teacher_run, monkeypatch, name):
    config = settings("gpd", nets, teacher_run, tmp_path / "run", resume="auto")
    replace, seen = os.replace, []

    def full(source, target):
        seen.append(Path(target).name)
        if seen.count(name) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(TrainingError, match=r"No space left on device .*older checkpoints are intact"):
            train(config)
    assert not list((tmp_path / "run").rglob("*partial*"))
    train(config)
    train(settings("gpd", nets, teacher_run, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# NaN -----------------------------------------------------------------------------------------------------------------


def poison(monkeypatch, number, times=1, where="images"):
    """Make the images of that step NaN the first few times it comes."""
    step, left = Engine.step, [times]

    def poisoned(self, batch, epoch, steps, meter):
        now = steps == number and left[0] > 0
        left[0] -= now
        if now and where == "images":
            batch = dataclasses.replace(batch, images=batch.images * float("nan"))
        step(self, batch, epoch, steps, meter)
        if now and where == "weights":
            with torch.no_grad():
                next(iter(self.learners.owner.parameters())).fill_(float("nan"))

    monkeypatch.setattr(Engine, "step", poisoned)


@pytest.mark.parametrize("number", [1, 4, 6])
def test_rollback_goes_on_with_other_data(tmp_path, nets, teacher_run, monkeypatch, order, capsys, number):
    config = settings("gpd", nets, teacher_run, tmp_path / "run", on_nan="rollback", save_steps=2, quiet=False)
    poison(monkeypatch, number)
    started = time.perf_counter()
    summary = train(config)
    assert 0 < summary["seconds"] <= time.perf_counter() - started
    assert summary["rollbacks"] == 1 and summary["epochs"] == 3
    assert "with another order of the data (1 of 5 rollbacks)" in capsys.readouterr().out
    tries = [indices for steps, indices in order if steps == number]
    assert len(tries) == 2 and sorted(tries[0]) != sorted(tries[1])
    assert all(bool(value.isfinite().all()) for value in last_state(tmp_path / "run")["owner"].values())
    back = (number - 1) // 2 * 2
    expected = [*range(1, number + 1), *range(back + 1, 13)]
    assert [steps for steps, _ in order] == expected


def test_rollback_gives_up(tmp_path, nets, teacher_run, monkeypatch, order):
    config = settings("gpd", nets, teacher_run, tmp_path / "run", on_nan="rollback")
    poison(monkeypatch, 6, times=100)
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 2, step 2 of 4"):
        train(config)
    tries = [tuple(indices) for steps, indices in order if steps == 6]
    assert len(tries) == states.MOST_ROLLBACKS + 1 == len(set(tries))


@pytest.mark.parametrize("on_nan", ["stop", "rollback"])
def test_weights_that_are_nan_are_never_saved(tmp_path, nets, teacher_run, monkeypatch, on_nan):
    """A step can have a finite loss and spoil the weights: a checkpoint right after it must not keep them."""
    config = settings("gpd", nets, teacher_run, tmp_path / "run", on_nan=on_nan, save_steps=2)
    poison(monkeypatch, 6, where="weights")
    if on_nan == "rollback":
        assert train(config)["rollbacks"] == 1
    else:
        with pytest.raises(TrainingError, match="a weight became NaN or Inf in epoch 2, step 2 of 4"):
            train(config)
    for path in checkpoints.checkpoints(tmp_path / "run"):
        state = checkpoints.read_checkpoint(path)
        assert all(bool(value.isfinite().all()) for value in state["owner"].values()), path


# From the command line -----------------------------------------------------------------------------------------------

LINE = ["train", "--epochs", "3", "--batch-size", "40", "--limit-train", "160"]


def test_command_that_is_stopped_leaves_with_143(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert main([*LINE, "--output", str(folder)]) == 143
    shown = capsys.readouterr()
    assert f"go on with --resume auto --output {folder}" in shown.err and "Traceback" not in shown.err
    assert main([*LINE, "--output", str(folder), "--resume", "auto"]) == 0
    assert main([*LINE, "--output", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "whole", folder)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_process_that_is_stopped(tmp_path):
    words = [sys.executable, "-m", "reparam", *LINE, "--output", str(tmp_path / "run"), "--epochs", "500"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                process.terminate()
                break
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.startswith("stopped") or "stopped by SIGTERM in epoch" in said
    assert last_state(tmp_path / "run")["steps"] >= 8


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    config = TrainConfig(epochs=1, limit_train=50, batch_size=25, quiet=True, output=str(tmp_path / "run"))
    train(config)
    (tmp_path / "run" / files.SUMMARY).unlink()
    for name in (".metrics.partial.csv", "..teacher.partial.safetensors.0123.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    train(dataclasses.replace(config, resume="auto"))
    assert not list((tmp_path / "run").rglob("*partial*")) and (tmp_path / "run" / files.SUMMARY).is_file()


@pytest.mark.slow
def test_limit_on_the_size_of_files(tmp_path):
    """A real refusal of the operating system in the middle of a write."""
    pytest.importorskip("resource")
    script = (
        "import resource, signal, sys\nfrom reparam.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nsys.exit(main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", script, *LINE, "--output", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*partial*")) and not list((tmp_path / "run").rglob("*.ckpt"))


def killed(tmp_path, seed, kills, epochs):
    line = ["--epochs", str(epochs), "--batch-size", "20", "--limit-train", "200", "--ema", "0.9", "--quiet"]
    line += ["--eval-epochs", "5"]
    words = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path / "killed")]
    done = subprocess.run(
        [*words, str(seed), str(kills), "5", *line], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["kills"] == kills
    assert all(finished - saved <= 5 for finished, saved in told["history"]), told["history"]
    assert len({saved for _, saved in told["history"]}) > kills // 3, told["history"]
    config = TrainConfig(
        epochs=epochs, batch_size=20, limit_train=200, ema=0.9, quiet=True, eval_epochs=5,
        output=str(tmp_path / "whole"),
    )  # fmt: skip
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*partial*"))


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """SIGKILL at random moments."""
    killed(tmp_path, 1, 4, 15)


@pytest.mark.thorough
@pytest.mark.parametrize(("seed", "kills"), [(2, 20), (3, 20), (4, 100)])
def test_killed_many_times(tmp_path, seed, kills):
    killed(tmp_path, seed, kills, 3 * kills)

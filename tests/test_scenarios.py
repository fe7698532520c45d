"""End to end on image folders: static teacher, from scratch, fine-tuning; every method; the table of a finished run."""

import builtins
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_distill_data import npz_arrays, write_folder, write_npz
from training import NETS, make_batch, make_engine, make_meter, mixed_net, one_teacher, read_csv, small_net

from reparam.cli import main
from reparam.distill import evaluation
from reparam.distill.config import TrainConfig
from reparam.distill.methods import get_distiller
from reparam.distill.networks import make_learners
from reparam.distill.trainer import train
from reparam.errors import InputError

ALIKE = {("resnet10t", "scratch"), ("test_resnet", "fine-tuning")}
"""Pairs of which others have both the scenario and the kind of network; they run when asked for."""
WITH_GPD = ("dkd", "reviewkd", "kdiffusion")
"""Methods that run beside a dynamic teacher as well; the others do when asked for."""
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs of noise in three colours."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for number, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for image in range(count):
                pixels = draw.integers(0, 120, (72 + 8 * image, 80, 3), dtype=np.uint8)
                pixels[..., 2 - number] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{image}.png")
    return f"folder:{folder}"


def line(images, output, *more):
    words = ["--data", images, "--image-size", "64", "--batch-size", "6", "--fast-dev-run", "--device", "cpu"]
    return ["train", *words, "--output", str(output), *more]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Runs that teach and are fine-tuned."""
    folder = tmp_path_factory.mktemp("trained")
    for model in ("test_resnet", "test_vit"):
        assert main(line(images, folder / model, "--method", "baseline", "--model", model, "--quiet")) == 0
    return folder


@pytest.mark.parametrize(
    ("scenario", "model"),
    [
        pytest.param(scenario, model, marks=pytest.mark.thorough if (model, scenario) in ALIKE else ())
        for scenario in ("static teacher", "scratch", "fine-tuning")
        for model in ("test_resnet", "test_vit", "resnet10t")
    ],
)
@pytest.mark.usefixtures("no_curves")
def test_scenario(tmp_path, images, trained, capsys, model, scenario):
    start = trained / ("test_vit" if model == "test_vit" else "test_resnet")
    if model == "resnet10t" and scenario == "fine-tuning":
        pytest.skip("there is no checkpoint of it")
    options = {
        "static teacher": ["--method", "gpd+dkd", "--teacher", start.name, "--teacher-checkpoint", str(start)],
        "scratch": ["--method", "gpd", "--ema", "0.9", "--mixup", "0.2"],
        "fine-tuning": ["--method", "gpd", "--lr", "0.001", "--checkpoint", str(start / "student.safetensors")],
    }[scenario]
    if model == "test_resnet":
        options += ["--branches", "repvgg"]
    assert main(line(images, tmp_path / "run", "--model", model, *options)) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["parity_passed"] and summary["steps"] == 2 and summary["teacher_top1"] is not None
    assert summary["parameters"]["teacher"] > 3 * summary["parameters"]["student"]
    assert summary["data"]["image_shape"] == [3, 64, 64] and summary["data"]["classes"] == 3
    shown = capsys.readouterr().out
    assert "PASS" in shown and "FAIL" not in shown
    if scenario == "fine-tuning":
        assert summary["config"]["branch_init"] == (None if model == "test_vit" else "student")
    if scenario == "static teacher":
        assert f"static   {start.name}, which the method dkd compares with" in shown


def test_fine_tuning_starts_from_the_weights(tmp_path, images, trained):
    """At a learning rate of almost nothing the student stays what it was, and the teacher answers like it."""
    start = trained / "test_resnet" / "student.safetensors"
    words = [
        "--model",
        "test_resnet",
        "--checkpoint",
        str(start.parent),
        "--lr",
        "1e-12",
        "--weight-decay",
        "0",
        "--noise",
        "0",
    ]
    assert main(line(images, tmp_path / "run", *words, "--quiet")) == 0
    before, after = load_file(start), load_file(tmp_path / "run" / "student.safetensors")
    for name, value in before.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "gpd"),
    [
        pytest.param(name, gpd, marks=pytest.mark.thorough if gpd and name not in WITH_GPD else ())
        for name in one_teacher()
        for gpd in (False, True)
    ],
)
@pytest.mark.usefixtures("no_curves")
def test_every_method_on_folders(tmp_path, images, trained, name, gpd):
    method = f"gpd+{name}" if gpd else name
    words = ["--teacher", "test_resnet", "--teacher-checkpoint", str(trained / "test_resnet"), "--quiet"]
    model = f"{tmp_path / 'nets.py'}:convs"
    (tmp_path / "nets.py").write_text(NETS)
    model = "test_resnet" if get_distiller(name).wants_features else model
    assert main(line(images, tmp_path / "run", "--method", method, "--model", model, *words)) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["method"] == method and summary["parity_passed"]
    assert (summary["teacher_top1"] is not None) is gpd
    row = read_csv(tmp_path / "run" / "metrics.csv")[0]
    assert float(row["student_loss"]) > 0 and ("teacher_loss" in row) is gpd


def test_unknown_method(tmp_path, images, capsys):
    words = ["--method", "dkdd", "--teacher", "test_vit"]
    assert main(line(images, tmp_path / "run", *words)) == 2
    assert "unknown method 'dkdd'; did you mean" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The table again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "baseline"],
        ["--branches", "orepa", "--ema", "0.8"],
        ["--branches", "dbb", "--method", "baseline"],
        ["--method", "baseline", "--ema", "0.8"],
    ],
    ids=" ".join,
)
def test_evaluate_gives_the_table_of_the_run(tmp_path, capsys, words):
    (tmp_path / "nets.py").write_text(NETS)
    model = ["--model", f"{tmp_path / 'nets.py'}:normless", "--epochs", "2", "--limit-train", "200"]
    assert main(["train", *model, *words, "--output", str(tmp_path / "run")]) == 0
    table = summary_of(tmp_path / "run")["table"]
    printed = [row for row in capsys.readouterr().out.splitlines() if row.startswith("  ")]
    assert main(["evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "table.json")]) == 0
    found = json.loads((tmp_path / "table.json").read_text())["table"]
    again = [row for row in capsys.readouterr().out.splitlines() if row.startswith("  ")]
    assert [row["name"] for row in found] == [row["name"] for row in table]
    for one, other in zip(table, found, strict=True):
        assert {key: one[key] for key in ("top1", "top5", "parameters", "passed", "same_as")} == {
            key: other[key] for key in ("top1", "top5", "parameters", "passed", "same_as")
        }, one["name"]
    first = [(row.split("%")[0], row[-8:]) for row in printed]
    assert first == [(row.split("%")[0], row[-8:]) for row in again] and len(first) > 3


def test_evaluate_of_a_damaged_run(tmp_path, capsys):
    base = ["train", "--fast-dev-run", "--limit-train", "100", "--batch-size", "20", "--quiet"]
    folder = tmp_path / "run"
    assert main([*base, "--output", str(folder)]) == 0
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is no output folder of reparam train" in capsys.readouterr().err
    content = bytearray((folder / "student.safetensors").read_bytes())
    (folder / "student.safetensors").write_bytes(content[:1000])
    assert main(["evaluate", str(folder)]) == 2
    assert "student.safetensors" in capsys.readouterr().err
    (folder / "student.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{")
    assert main(["evaluate", str(folder)]) == 2
    assert "config.json is damaged" in capsys.readouterr().err
    for content in ('{"a": 1}', '{"config": 5}', "[]"):
        (folder / "config.json").write_text(content)
        assert main(["evaluate", str(folder)]) == 2
        assert "config.json is damaged or was written by another version: it lacks config" in capsys.readouterr().err


def test_evaluate_says_that_a_run_has_not_finished(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--fast-dev-run", "--limit-train", "100", "--batch-size", "20", "--method", "baseline", "--quiet"]
    assert main(["train", *words, "--accumulate", "4", "--output", str(folder)]) == 0
    assert main(["evaluate", str(folder), "--batch-size", "33"]) == 0  # nothing is accumulated here
    assert "has not finished" not in capsys.readouterr().out
    (folder / "summary.json").unlink()
    assert main(["evaluate", str(folder)]) == 0
    assert "the run has not finished (summary.json is missing)" in capsys.readouterr().out


def changed_settings(folder, **changes):
    """Write other settings into config.json of a run, as if another machine had started it."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "config": {**content["config"], **changes}}))


def evaluated(folder, *words):
    """The accuracy of the student that ``reparam evaluate`` finds."""
    table = folder / "table.json"
    assert main(["evaluate", str(folder), "--json", str(table), *words]) == 0
    return json.loads(table.read_text())["table"][0]["top1"]


@pytest.mark.usefixtures("no_curves")
def test_evaluate_needs_nothing_that_only_training_has(tmp_path, capsys):
    """Neither its settings, which may not fit other data or another machine, nor its images."""
    arrays = npz_arrays(train=64, test=40)
    arrays["x_test"] = arrays["x_test"] // 2 + 60 * (arrays["y_test"][:, None, None, None] // 2).astype(np.uint8)
    run, words = tmp_path / "run", ["--limit-train", "48", "--shift", "1", "--batch-size", "8", "--epochs", "2"]
    data = ["--data", write_npz(tmp_path / "data.npz", **arrays)]
    assert main(["train", *data, *words, "--method", "baseline", "--quiet", "--output", str(run)]) == 0
    changed_settings(run, threads=10**6)
    expected = summary_of(run)["table"][0]["top1"]
    assert evaluated(run) == expected
    # The test images of the run, normalised as there although these images have other statistics.
    rest = write_npz(tmp_path / "rest.npz", **{**arrays, "x_train": None, "y_train": None})
    assert evaluated(run, "--data", rest) == expected
    assert 0 <= evaluated(run, "--data", write_folder(tmp_path / "photographs", "abcd", ("val",), size=8)) <= 100
    for other, message in (
        (write_folder(tmp_path / "three", "abc", ("test",)), "has 3 classes, and the networks tell 4 apart"),
        ("npz:" + str(tmp_path / "grey.npz"), "has images of 1 channels, and the networks of .* take 3"),
        (write_folder(tmp_path / "untested", "abcd", ("train",)), r"needs val/ \(or test/\), each with one folder"),
    ):
        write_npz(tmp_path / "grey.npz", **npz_arrays(channels=1))
        capsys.readouterr()
        assert main(["evaluate", str(run), "--data", other]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.usefixtures("no_curves")
def test_a_run_on_folders_is_evaluated_on_other_data(tmp_path):
    spec = write_folder(tmp_path / "folder", "abcd", size=8)
    words = ["--auto-augment", "rand-m5-mstd0.5", "--repeats", "2", "--crop-scale", "0.5", "--interpolation", "bicubic"]
    words += ["--image-size", "8", "--max-bad-images", "1", "--batch-size", "4", "--epochs", "1", "--quiet"]
    assert main(["train", "--data", spec, *words, "--method", "baseline", "--output", str(tmp_path / "run")]) == 0
    shutil.rmtree(tmp_path / "folder" / "train")
    assert evaluated(tmp_path / "run") == summary_of(tmp_path / "run")["table"][0]["top1"]
    assert 0 <= evaluated(tmp_path / "run", "--data", write_npz(tmp_path / "data.npz")) <= 100


def test_evaluate_refuses_a_table_that_cannot_be_written_before_it_measures(tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "_load", lambda *_: pytest.fail("the networks were loaded"))
    for name in ("nowhere/t.json", "."):
        assert main(["evaluate", str(trained / "test_vit"), "--json", str(tmp_path / name)]) == 2
        assert "name a file in a folder that exists" in capsys.readouterr().err


# Pictures and events -------------------------------------------------------------------------------------------------


def drawn(monkeypatch, folder, **changes):
    """Number of lines in each panel of curves.png, and its size."""
    from matplotlib.figure import Figure

    panels, save = [], Figure.savefig

    def spy(self, *arguments, **options):
        panels.append([len(axes.lines) for axes in self.axes])
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    train(TrainConfig(epochs=2, batch_size=50, limit_train=100, output=str(folder), quiet=True, **changes))
    with Image.open(folder / "curves.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        colours = len(set(picture.convert("RGB").get_flattened_data() if hasattr(picture, "get_flattened_data")
                          else picture.convert("RGB").getdata()))  # fmt: skip
    assert colours > 10
    return panels[-1]


def test_curves(tmp_path, monkeypatch):
    assert drawn(monkeypatch, tmp_path / "baseline", method="baseline") == [1]
    assert drawn(monkeypatch, tmp_path / "gpd") == [2, 2]  # the gap and its zero
    assert drawn(monkeypatch, tmp_path / "ema", ema=0.5) == [3, 2]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if "tensorboard" in name:
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    config = TrainConfig(epochs=1, limit_train=100, tensorboard=True, quiet=True, output=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"--tensorboard needs TensorBoard; pip install 'reparam\[tensorboard\]'"):
        train(config)
    assert not (tmp_path / "run" / "metrics.csv").exists()  # said before anything was trained


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp64"])
@pytest.mark.parametrize("method", ["baseline", "gpd"])
@pytest.mark.usefixtures("no_curves")
def test_precisions_run_on_the_cpu(tmp_path, precision, method):
    config = TrainConfig(
        precision=precision, method=method, epochs=1, limit_train=100, batch_size=50, ema=0.5, accumulate=2, quiet=True,
        output=str(tmp_path / "run"), channels_last=True,
    )  # fmt: skip
    summary = train(config)
    assert summary["parity_passed"]
    state = load_file(tmp_path / "run" / "student.safetensors")
    assert state["conv1.weight"].dtype == (torch.float64 if precision == "fp64" else torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about itself
def test_compiled_step_equals_eager():
    """One step of both losses through torch.compile."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a compiler")
    found = []
    for compiled in (lambda module: module, torch.compile):
        engine = make_engine(mixed_net(), TrainConfig(lr=0.01, clip_grad=0.0))
        labels = torch.arange(100) % 10
        batch = make_batch(dtype=torch.float32)
        engine.learners = make_learners(engine.networks, [], batch.images[:2], labels, engine.config, compiled)
        engine._distributed = engine.learners
        engine.learners.train()
        engine.step(batch, 1, 1, make_meter(engine))
        found.append([value.grad.clone() for value in engine.networks.owner.parameters()])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_option_compile_compiles(tmp_path, monkeypatch):
    used, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, *rest, **more: (used.append(module), module)[1])
    config = TrainConfig(compile=True, epochs=1, limit_train=100, quiet=True, output=str(tmp_path / "run"))
    train(config, student=small_net())
    assert used and compile_ is not torch.compile
    assert dataclasses.replace(config, compile=False) != config
    assert Path(tmp_path / "run" / "summary.json").is_file()

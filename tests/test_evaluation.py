"""`reparam evaluate`: the networks of a checkpoint, the static teacher in the table; averaged weights as a start."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import NETS, facts, read_csv

from reparam.cli import main
from reparam.distill import evaluation
from reparam.distill.checkpoints import checkpoints, read_checkpoint
from reparam.distill.compare import arms
from reparam.distill.config import TrainConfig
from reparam.distill.report import closing
from reparam.distill.statics import load_static_teachers
from reparam.distill.students import build_student
from reparam.errors import FormatError
from reparam.weight_files import read_weights

WEIGHTS = ("student.safetensors", "student_ema.safetensors", "teacher.safetensors", "teacher_ema.safetensors")


def small(folder, *words):
    """A command that trains a small network for two epochs."""
    (folder / "nets.py").write_text(NETS)
    base = ["train", "--epochs", "2", "--limit-train", "200", "--batch-size", "50", "--seed", "3", "--quiet"]
    return [*base, "--model", f"{folder / 'nets.py'}:normless", "--output", str(folder / "run"), *words]


def table_of(path):
    return {row["name"]: row for row in json.loads(path.read_text())["table"]}


def measured(folder, path, *words):
    """The table that the command writes for ``path``."""
    assert main(["evaluate", str(path), "--json", str(folder / "table.json"), *words]) == 0
    return table_of(folder / "table.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run: a dynamic teacher with branches, and averaged weights."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(small(folder, "--branches", "orepa", "--ema", "0.8", "--keep-best", "2")) == 0
    return folder


def test_a_checkpoint_has_the_networks_of_its_epoch(folder, tmp_path, capsys):
    *_, earlier, last = checkpoints(folder / "run")
    found = measured(tmp_path, last, "--output", str(tmp_path / "last"))
    assert "after 2 epochs\n" in capsys.readouterr().out
    table = table_of(folder / "run" / "summary.json")
    assert list(found) == list(table)
    for name, row in table.items():
        assert (found[name]["top1"], found[name]["parameters"]) == (row["top1"], row["parameters"]), name
    # What the run itself wrote after its last epoch, bit for bit.
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == sorted(WEIGHTS)
    for name in WEIGHTS:
        own, written = load_file(folder / "run" / name), load_file(tmp_path / "last" / name)
        assert own.keys() == written.keys() and all(torch.equal(own[key], written[key]) for key in own), name
    found = measured(tmp_path, earlier, "--output", str(tmp_path / "earlier"))
    row = read_csv(folder / "run" / "metrics.csv")[0]
    assert found["student as trained"]["top1"] == pytest.approx(float(row["student_top1"]))
    assert found["student as trained (EMA)"]["top1"] == pytest.approx(float(row["student_ema_top1"]))
    assert found["teacher"]["top1"] == pytest.approx(float(row["teacher_top1"]))
    own, written = (load_file(place / "student.safetensors") for place in (folder / "run", tmp_path / "earlier"))
    assert any(not torch.equal(own[name], written[name]) for name in own)


def test_a_student_alone_has_checkpoints_too(tmp_path):
    assert main(small(tmp_path, "--method", "baseline")) == 0
    (*_, last) = checkpoints(tmp_path / "run")
    found = measured(tmp_path, last, "--output", str(tmp_path / "new"))
    assert list(found) == ["student as trained", "student extracted", "student folded"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student.safetensors"]
    # The student goes where weights go.
    again = ["train", "--fast-dev-run", "--limit-train", "100", "--batch-size", "20", "--quiet"]
    model = ["--model", f"{tmp_path / 'nets.py'}:normless", "--checkpoint", str(tmp_path / "new")]
    assert main([*again, *model, "--output", str(tmp_path / "tuned")]) == 0


def test_the_run_names_its_best_epoch(folder):
    """Where that is not the last one, the closing lines say how to get its networks."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    rows = read_csv(folder / "run" / "metrics.csv")
    best = max(rows, key=lambda row: (float(row["student_top1"]), int(row["epoch"])))
    assert (summary["best_epoch"], summary["best_student_top1"]) == (int(best["epoch"]), float(best["student_top1"]))
    assert summary["best_checkpoint"].startswith(f"step-{int(best['step']):09d}-")
    path = folder / "run" / "checkpoints" / summary["best_checkpoint"]
    assert path.is_file()
    summary["best_epoch"] = 1
    assert f"reparam evaluate {path} --output DIR" in closing(summary, folder / "run")
    summary["best_epoch"] = summary["epochs"]
    assert "--output DIR" not in closing(summary, folder / "run")


def test_the_checkpoint_of_a_run_in_float64(tmp_path, monkeypatch):
    assert main(small(tmp_path, "--precision", "fp64", "--ema", "0.8")) == 0
    (*_, last) = checkpoints(tmp_path / "run")
    monkeypatch.setattr(evaluation, "TSNE_IMAGES", 40)
    found = measured(tmp_path, last, "--output", str(tmp_path / "new"), "--tsne", str(tmp_path / "logits.png"))
    assert (tmp_path / "logits.png").is_file()
    table = table_of(tmp_path / "run" / "summary.json")
    assert {name: row["top1"] for name, row in found.items()} == {name: row["top1"] for name, row in table.items()}
    for name in WEIGHTS:
        own, written = load_file(tmp_path / "run" / name), load_file(tmp_path / "new" / name)
        assert all(torch.equal(own[key], written[key]) and own[key].dtype == written[key].dtype for key in own), name
    assert written["conv1.weight" if "conv1.weight" in written else next(iter(written))].dtype == torch.float64


def test_a_checkpoint_of_several_processes_has_the_mean_of_their_statistics(tmp_path):
    """Within an epoch each has its own, as in a run that goes on in one process."""
    assert main(small(tmp_path, "--model", "cifar_resnet8_w8", "--epochs", "1", "--limit-batches", "1")) == 0
    (*_, last) = checkpoints(tmp_path / "run")
    state = read_checkpoint(last)
    name = next(name for name in state["owner"] if name.endswith("running_mean") and "student_statistics" in name)
    own = state["owner"][name].clone()
    state["statistics"] = [{"owner": {name: own + more}, "ema": {}} for more in (0.0, 1.0)]
    path = tmp_path / "within.ckpt"
    torch.save({**state, "step": 3}, path)
    assert main(["evaluate", str(path), "--output", str(tmp_path / "new")]) == 0
    found = load_file(tmp_path / "new" / "student.safetensors")[name.partition(".")[2]]
    torch.testing.assert_close(found, own + 0.5)


def test_a_network_that_has_changed_since(tmp_path, capsys):
    assert main(small(tmp_path, "--method", "baseline")) == 0
    (*_, last) = checkpoints(tmp_path / "run")
    changed = NETS.replace("def normless(", "def other(") + "\n\ndef normless(num_classes=10, in_chans=1):\n"
    (tmp_path / "nets.py").write_text(f"{changed}    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n")
    for path in (last, tmp_path / "run"):
        assert main(["evaluate", str(path)]) == 2
    assert f"{last} does not fit {tmp_path / 'nets.py'}:normless, which may have changed" in capsys.readouterr().err


def test_bad_input(folder, tmp_path, capsys):
    (*_, last) = checkpoints(folder / "run")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "student.safetensors").write_text("mine")
    for words, message in (
        ([str(last), "--output", str(taken)], "holds something already; name a new folder"),
        ([str(last), "--output", str(taken / "student.safetensors")], "is a file or holds something already"),
        ([str(folder / "run"), "--output", str(tmp_path / "new")], "has the files of its networks already"),
        ([str(tmp_path / "missing")], "is no output folder of reparam train, nor a checkpoint"),
        ([str(taken / "student.safetensors")], "is damaged or no checkpoint of a run"),
    ):
        assert main(["evaluate", *words]) == 2
        assert message in capsys.readouterr().err
    assert (taken / "student.safetensors").read_text() == "mine" and not (tmp_path / "new").exists()
    torn = tmp_path / last.name
    torn.write_bytes(last.read_bytes()[:-1])
    assert main(["evaluate", str(torn)]) == 2
    assert "does not have the checksum in its name" in capsys.readouterr().err


def test_weights_of_a_checkpoint_are_refused_with_the_way_out(folder):
    (*_, last) = checkpoints(folder / "run")
    with pytest.raises(
        FormatError, match=r"is a checkpoint of a training run; write its student first: reparam evaluate"
    ):
        read_weights(last)


@pytest.mark.parametrize("method", ["kd", "gpd+takd"])
def test_the_static_teacher_is_in_the_table(tmp_path, capsys, method):
    assert main(small(tmp_path, "--method", "baseline")) == 0
    shutil.move(tmp_path / "run", tmp_path / "static")
    own = table_of(tmp_path / "static" / "summary.json")["student extracted"]
    model = f"{tmp_path / 'nets.py'}:normless"
    words = ["--method", method, "--teacher", model, "--teacher-checkpoint", str(tmp_path / "static")]
    if method != "kd":
        words += ["--assistant", model, "--assistant-checkpoint", str(tmp_path / "static")]
    assert main(small(tmp_path, *words)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    table = table_of(tmp_path / "run" / "summary.json")
    names = ["static teacher", *([f"assistant {model}"] if method != "kd" else [])]
    assert list(table)[-len(names) :] == names
    for name in names:
        assert (table[name]["top1"], table[name]["parameters"]) == (own["top1"], own["parameters"])
        assert table[name]["parity"] is None
    assert summary["static_teacher_top1"] == own["top1"]
    found = measured(tmp_path, tmp_path / "run")
    assert {name: row["top1"] for name, row in found.items()} == {name: row["top1"] for name, row in table.items()}
    capsys.readouterr()
    weights = load_file(tmp_path / "static" / "student.safetensors")
    for name in weights:
        weights[name] = weights[name] * 1.5
    save_file(weights, tmp_path / "static" / "student.safetensors")
    assert list(measured(tmp_path, tmp_path / "run")) == list(table)[: -len(names)]
    assert "these are not the weights that it, or an assistant, had in the run" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "static")
    assert list(measured(tmp_path, tmp_path / "run")) == list(table)[: -len(names)]
    assert "without the static teacher: " in capsys.readouterr().out


# Averaged weights as a start -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starts(folder, tmp_path_factory):
    """A run folder and a checkpoint of torch.save, both with raw and averaged weights; and these."""
    raw, averaged = (load_file(folder / "run" / f"student{kind}.safetensors") for kind in ("", "_ema"))
    path = tmp_path_factory.mktemp("pickled") / "model_best.pth.tar"
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, path)
    return {"run": folder / "run", "file": path}, raw, averaged


def same(network, state):
    found = network.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name].cpu(), state[name]) for name in state)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_which_weights_a_run_starts_from(folder, starts, kind):
    paths, raw, averaged = starts
    config = TrainConfig(model=f"{folder / 'nets.py'}:normless", checkpoint=str(paths[kind]))
    assert same(build_student(config, 10, 1), raw) and not same(build_student(config, 10, 1), averaged)
    assert same(build_student(dataclasses.replace(config, checkpoint_ema=True), 10, 1), averaged)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_which_weights_a_static_teacher_has(folder, starts, kind):
    paths, raw, averaged = starts
    model = f"{folder / 'nets.py'}:normless"
    config = TrainConfig(method="kd", model=model, teacher=model, teacher_checkpoint=str(paths[kind])).resolved()
    example = torch.randn(2, 1, 8, 8)
    (teacher,) = load_static_teachers(config, facts(), example)
    assert same(teacher.network, raw)
    (teacher,) = load_static_teachers(dataclasses.replace(config, teacher_checkpoint_ema=True), facts(), example)
    assert same(teacher.network, averaged)


def test_averaged_weights_that_are_not_there(folder, tmp_path, capsys):
    assert main(small(tmp_path, "--method", "baseline")) == 0
    model = ["--model", f"{folder / 'nets.py'}:normless", "--output", str(tmp_path / "new"), "--checkpoint-ema"]
    assert main(["train", *model, "--checkpoint", str(tmp_path / "run")]) == 2
    assert "has no averaged weights (student_ema.safetensors): a run has them if it" in capsys.readouterr().err
    assert main(["train", *model, "--checkpoint", str(tmp_path / "run" / "student.safetensors")]) == 2
    assert "holds one set of weights, so there is no EMA to choose" in capsys.readouterr().err
    assert main(["train", *model]) == 2
    assert "--checkpoint-ema would have no effect: there is no --checkpoint" in capsys.readouterr().err


def test_assistants_have_no_averaged_teachers_in_between(tmp_path):
    """The averaged weights are those of the static teacher; assistants are trained without them."""
    start, model = tmp_path / "start", f"{tmp_path / 'nets.py'}:normless"
    assert main([*small(tmp_path, "--method", "baseline", "--ema", "0.5"), "--output", str(start)]) == 0
    words = ["--method", "takd", "--teacher", model, "--teacher-checkpoint", str(start), "--teacher-checkpoint-ema"]
    with pytest.warns(UserWarning, match="more than the teacher"):
        assert main(small(tmp_path, *words, "--assistant", f"{model},expand:2")) == 0
    rows = table_of(tmp_path / "run" / "summary.json")
    averaged = table_of(start / "summary.json")["student extracted (EMA)"]
    # A folder that has moved brings its assistants along.
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="more than the teacher"):
        assert list(measured(tmp_path, tmp_path / "moved")) == list(rows)
    (*_, last) = checkpoints(tmp_path / "moved")
    with pytest.warns(UserWarning, match="more than the teacher"):
        assert list(measured(tmp_path, last)) == list(rows)
    assert rows["static teacher"]["top1"] == averaged["top1"]
    folders = sorted((tmp_path / "moved").glob("assistant-*/config.json"))
    flags = [json.loads(path.read_text())["config"]["teacher_checkpoint_ema"] for path in folders]
    assert flags == [True, False]


def test_baselines_of_a_comparison_have_no_such_settings():
    config = TrainConfig(method="kd", teacher="t", teacher_checkpoint="x", teacher_checkpoint_ema=True)
    assert [arm.config.teacher_checkpoint_ema for arm in arms(config)] == [True, False]

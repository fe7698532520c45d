"""reparam bench on a tiny network: what the JSON holds, that both sides really train, and what is refused."""

import argparse
import json
import types

import pytest
import torch

from reparam.bench import command, costs, growth, scale, surgery, timing
from reparam.bench import imports as imports_module
from reparam.bench.step import GPD, IDEAL, STUDENT, WIDE, file_name, prepare, recipe_names
from reparam.bench.subjects import setting
from reparam.cli import build_parser, main
from reparam.distill.distributed import Group
from reparam.errors import ReparamError

NET = """
from torch import nn

def build(num_classes=10, in_chans=3, width=4):
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )

def wide(num_classes=10, in_chans=3):
    return build(num_classes, in_chans, 8)
"""
TINY = ["--batch", "4", "--size", "8", "--classes", "5", "--runs", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NET)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(costs, "_SMALL", (32, 1000))


def only_result(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    words = ["--branches", "orepa,dbb", "--side-by-side", "--wide-model", f"{net}:wide", "--teacher", f"{net}:wide"]
    limits = costs._SMALL
    costs._SMALL = (32, 1000)
    try:
        assert main(["bench", "step", "--model", f"{net}:build", *words, *TINY, "--folder", str(folder)]) == 0
    finally:
        costs._SMALL = limits
    return only_result(folder)


# The timing core -----------------------------------------------------------------------------------------------------


def test_jobs_run_in_turn_after_the_warm_up():
    order = []
    jobs = {name: timing.Job(lambda name=name: order.append(name)) for name in "ab"}
    found = timing.interleaved(jobs, 3, warmup=2, calls=2)
    assert order == ["a", "a", "b", "b"] * 5
    assert {name: len(one.seconds) for name, one in found.items()} == {"a": 3, "b": 3}
    assert found["a"].peak is None


def test_spread_and_ratio():
    a, b = timing.Measured([2.0, 4.0, 9.0]), timing.Measured([1.0, 4.0, 3.0])
    assert timing.spread(a.seconds) == {"median": 4.0, "min": 2.0, "max": 9.0, "quartiles": [3.0, 6.5], "runs": 3}
    assert timing.spread([0.5])["quartiles"] == [0.5, 0.5]
    assert timing.ratio(a, b) == {"of_medians": 1.3333, "median": 2.0, "low": 1.5, "high": 2.5}


def test_storages_count_once():
    value = torch.zeros(10)
    assert timing.nbytes([value, value[2:], value.view(2, 5), torch.zeros(1)]) == 44


def test_multiply_adds_and_bytes():
    left, right = torch.zeros(2, 3), torch.zeros(3, 5)
    found = costs.count(lambda: (left @ right).view(-1).add_(1))
    assert found["multiply_adds"] == 30
    assert found["bytes_moved"] == 4 * (6 + 15 + 10) + 4 * (10 + 10)  # the view moves nothing
    ceiling = {"flops_per_second": 120.0, "bytes_per_second": 408.0}
    assert costs.shares(found, 1.0, ceiling) == {
        "share_of_peak": 0.5,
        "share_of_bandwidth": 0.5,
        "share_of_roofline": 0.5,
    }


# A step --------------------------------------------------------------------------------------------------------------


def test_a_step_result_says_where_it_comes_from(result):
    assert {"commit", "versions", "date", "device", "device_type", "threads", "tf32"} <= set(result)
    assert result["kind"] == "step" and result["threads"] == 1 and result["method"] == "gpd+kd"
    assert "nets.py" in result["command"] and result["model"] == "nets.py:build"
    assert "/" not in result["command"].replace("/ ", "")
    assert (result["batch"], result["size"], result["precision"], result["compile"]) == (4, 8, "fp32", False)


def test_rows_of_a_step(result):
    names = [f"{GPD} + orepa", f"{GPD} + dbb"]
    assert {STUDENT, WIDE, IDEAL, GPD, "native wide", *names} <= set(result["steps"])
    ideal = result["steps"][IDEAL]
    for name, row in result["steps"].items():
        assert row["seconds"]["runs"] == 3 and row["peak_memory_bytes"] is None
        expected = row["seconds"]["median"] / ideal["seconds"]["median"]
        assert row["over_ideal"]["of_medians"] == pytest.approx(expected, rel=1e-3), name
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"]["median"], rel=1e-3)
        assert row["share_of_roofline"] == max(row["share_of_peak"], row["share_of_bandwidth"])
    assert ideal["over_ideal"]["median"] == 1
    assert result["steps"]["kd"]["parameter_bytes"] == result["steps"][STUDENT]["parameter_bytes"]
    # Neither plain nor wide: the student's step and one answer of the static teacher.
    of_the_teacher = ideal["multiply_adds"] - sum(result["steps"][name]["multiply_adds"] for name in (STUDENT, WIDE))
    assert result["steps"]["kd"]["multiply_adds"] == result["steps"][STUDENT]["multiply_adds"] + of_the_teacher


def test_methods_have_files_of_their_own():
    given = argparse.Namespace(model="resnet18", ratio=2, batch=4, size=8, precision="fp32", teacher="resnet34")
    vars(given).update(optimizer="sgd", compile=False, channels_last=False, cuda_graph=False, no_overlap=False)
    names = set()
    for given.method in ("kd", "dkd", "kdiffusion"):
        names.add(file_name(given, torch.device("cpu")))
    assert len(names) == 3 and "step-resnet18-r2-batch4-8-fp32-cpu-resnet34" in names


def test_sizes_of_a_step(result):
    rows = result["steps"]
    assert rows[WIDE]["parameter_bytes"] == rows["native wide"]["parameter_bytes"] == rows[GPD]["parameter_bytes"]
    assert rows[IDEAL]["parameter_bytes"] == rows[STUDENT]["parameter_bytes"] + rows[WIDE]["parameter_bytes"]
    assert rows[f"{GPD} + orepa"]["parameter_bytes"] > rows[GPD]["parameter_bytes"]
    for name in (STUDENT, WIDE, IDEAL, GPD):  # SGD with momentum, and every parameter has a gradient
        sizes = {rows[name][key] for key in ("parameter_bytes", "gradient_bytes", "optimizer_bytes")}
        assert len(sizes) == 1, name


def test_multiply_adds_of_a_step(result):
    rows = result["steps"]
    wide = rows[WIDE]["multiply_adds"]
    assert wide == rows["native wide"]["multiply_adds"] > 2 * rows[STUDENT]["multiply_adds"]
    # The static teacher answers in both, and GPD without branches computes no more than the ideal.
    assert rows[IDEAL]["multiply_adds"] == rows[GPD]["multiply_adds"] > wide + rows[STUDENT]["multiply_adds"]
    assert rows[f"{GPD} + orepa"]["multiply_adds"] > rows[GPD]["multiply_adds"]


def test_parts_of_a_step(result):
    parts = result["parts"]
    assert {"forward and backward", "clipping and optimizer"} == set(parts[STUDENT]) == set(parts[WIDE])
    assert {
        "teacher: forward and backward",
        "student view: forward and backward",
        "narrowing",
        "clipping and optimizer",
        "static teacher: forward",
    } == set(parts[GPD])
    more = set(parts[f"{GPD} + orepa"]) - set(parts[GPD])
    assert more == {"narrowing and merging of the student", "merging of the teacher"}


def test_branches_side_by_side_compute_the_same(result):
    rows = [row for name, row in result["steps"].items() if name.startswith("plain student + orepa")]
    assert len(rows) == 2 and all(row["relative_difference_of_outputs"] < 1e-4 for row in rows)
    assert rows[0]["multiply_adds"] != rows[1]["multiply_adds"]


def bench_of(net, *words):
    options = build_parser(train_options=False).parse_args(["bench", "step", "--model", f"{net}:build", *TINY, *words])
    return prepare(setting(options, Group(0, 0, 1, torch.device("cpu"))), options, [])


def test_both_sides_really_train(net):
    bench = bench_of(net)
    student, wide, gpd = (bench.steps[name] for name in (STUDENT, WIDE, GPD))
    before = {name: [t.detach().clone() for t in job.tensors()] for name, job in bench.steps.items()}
    assert [t.shape for t in student.tensors()] != [t.shape for t in wide.tensors()]
    bench.steps[IDEAL].run()
    gpd.run()
    for name, job in ((STUDENT, student), (WIDE, wide), (GPD, gpd)):
        pairs = zip(before[name], job.tensors(), strict=False)
        changed = [not torch.equal(old, new) for old, new in pairs if new.is_floating_point()]
        assert sum(changed) > len(changed) / 2, name


def test_parts_leave_gradients_to_the_optimizer(net):
    bench = bench_of(net)
    parts = bench.parts[GPD]
    names = list(parts)
    assert names.index("clipping and optimizer") == names.index("teacher: forward and backward") + 1
    parts["teacher: forward and backward"].run()
    before = [t.detach().clone() for t in parts["narrowing"].tensors()]
    parts["clipping and optimizer"].run()
    after = parts["narrowing"].tensors()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))


def test_recipes_and_their_options_in_one_word():
    assert recipe_names(["orepa,orepa:branches=4,pointwise=released", "dbb", "orepa"]) == [
        "orepa",
        "orepa:branches=4,pointwise=released",
        "dbb",
    ]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--runs", "0"], "--runs must be at least 1, got 0"),
        (["step", "--batch", "1"], "--batch must be at least 2, got 1"),
        (["step", "--size", "0"], "--size must be at least 1"),
        (["step", "--model", "resnet81"], "resnet18"),
        (["step", "--branches", "oprea"], "orepa"),
        (["step", "--branches", "orepa:brunches=2"], "branches=6"),
        (["step", "--cuda-graph"], "--cuda-graph records work of a GPU"),
        (["step", "--precision", "tf32"], "--precision tf32 is a mode of CUDA GPUs"),
        (["step", "--method", "dkd"], "name one with --teacher"),
        (["step", "--no-overlap"], "name one with --teacher"),
        (["step", "--side-by-side"], "name a recipe with --branches"),
        (["step", "--device", "meta"], "cpu and cuda only"),
        (["surgery", "resnet81"], "resnet18"),
        (["fold", "resnet81"], "resnet18"),
        (["fold", "--batch", "0"], "--batch must be at least 1"),
        (["scale", "--processes", "2,0"], "list of numbers from 1"),
        (["scale", "--precision", "tf32"], "--precision tf32"),
    ],
)
def test_bad_input_is_refused(words, message, tmp_path, capsys):
    assert main(["bench", *words, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path, capsys):
    assert main(["bench", "step", "--device", "cuda", "--folder", str(tmp_path)]) == 2
    assert "--device cuda cannot be used here" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "step", "--folder", str(tmp_path / "file" / "results")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_options_come_without_torch(monkeypatch):
    parser = argparse.ArgumentParser()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    command.add_arguments(parser)
    assert parser.parse_args(["surgery"]).models == []


# Surgery, folding, processes -----------------------------------------------------------------------------------------


def test_surgery(net, tmp_path, monkeypatch):
    monkeypatch.setattr(imports_module.subprocess, "run", answered)
    monkeypatch.setattr(surgery, "growth", lambda device, runs: growth.growth(device, runs, (1e4, 4e4)))
    words = ["--size", "8", "--batch", "2", "--runs", "2", "--threads", "1"]
    only = ["--only", "models", "--only", "growth", "--only", "import"]
    assert main(["bench", "surgery", f"{net}:build", *words, *only, "--folder", str(tmp_path)]) == 0
    data = only_result(tmp_path)
    (row,) = data["models"].values()
    operations = {"deepcopy", "plan", "expand without verification", "expand", "extract", "fold", surgery.YARDSTICK}
    assert set(row["seconds"]) == operations and row["input"] == [1, 3, 8, 8]
    assert row["over_yardstick"][surgery.YARDSTICK]["median"] == 1
    for mode in ("eval", "train"):
        medians = [row["view"][mode][name]["median"] for name in ("view", "plain")]
        assert row["view"][mode]["view_over_plain"]["of_medians"] == pytest.approx(medians[0] / medians[1], rel=1e-3)
        on_top = row["view"][mode]["on_top"]["median"] / medians[1]
        assert row["view"][mode]["on_top_over_plain"]["of_medians"] == pytest.approx(on_top, rel=1e-3)
    sizes = [entry["parameters"] for entry in data["growth"]["sizes"]]
    assert sizes[0] < sizes[1] and all(entry["expand_seconds"] for entry in data["growth"]["sizes"])
    assert set(data["growth"]["exponents"]) == {"plan", "expand"}
    assert data["limits"]["flops_per_second"] > 0 and "fp64" in data["limits"]["how"]
    assert data["import"]["reparam_seconds"]["median"] == 0.25 and data["import"]["also_imported"] == []


def answered(*_, **__):
    return types.SimpleNamespace(stdout=json.dumps({"torch": 1.0, "reparam": 0.25, "all": 0.5, "heavy": []}))


def test_exponent_is_the_slope():
    rows = [{"parameters": 10.0**n, "seconds": 3 * 10 ** (1.5 * n)} for n in range(4)]
    assert growth._exponent(rows, "seconds") == 1.5
    assert growth._exponent(rows[:1], "seconds") is None


def test_growing_networks_have_the_wanted_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in growth.ResidualNetwork(83).parameters())
    assert count == pytest.approx(1e6, rel=0.05)


@pytest.mark.slow
def test_imports_in_a_fresh_process():
    found = imports_module.imports(1)
    assert found["torch_seconds"]["median"] > 0
    assert found["every_name_seconds"]["median"] > found["reparam_seconds"]["median"] > 0
    assert found["also_imported"] == []


def test_fold(tmp_path):
    words = ["--runs", "2", "--threads", "1"]
    assert main(["bench", "fold", "cifar_resnet8_w8", *words, "--folder", str(tmp_path)]) == 0
    row = only_result(tmp_path)["models"]["cifar_resnet8_w8"]
    assert row["norms_before"] > 0 == row["reparam"]["norms"]
    assert row["reparam"]["float64_error"] < 1e-13 and row["reparam"]["time_ratio"]["median"] > 0


@pytest.mark.thorough
def test_scale(net, tmp_path):
    assert main(["bench", "scale", "--model", f"{net}:build", *TINY, "--folder", str(tmp_path)]) == 0
    data = only_result(tmp_path)
    rows = {(row["method"], row["processes"]): row for row in data["rows"]}
    assert data["backend"] == "gloo" and set(rows) == {(m, n) for m in ("plain student", "GPD") for n in (1, 2)}
    for (_, count), row in rows.items():
        # What is sent is what there are gradients of: once, not once for each learner.
        assert row["reduced_bytes"] == (row["gradient_bytes"] if count == 2 else 0)
        assert row["ring_bytes"] == (row["gradient_bytes"] if count == 2 else 0)
        assert row["images_per_second"] == pytest.approx(4 * count / row["seconds"]["median"], rel=1e-3)
    assert rows["GPD", 1]["efficiency"] == 1
    assert rows["GPD", 2]["gradient_bytes"] > rows["plain student", 2]["gradient_bytes"]


def test_process_counts():
    assert scale.process_counts("4,2") == [1, 2, 4]


def test_a_process_that_dies_is_an_error():
    dead = types.SimpleNamespace(exitcode=3)
    with pytest.raises(ReparamError, match="exit code 3"):
        scale._answer([dead], types.SimpleNamespace(empty=lambda: True))


def test_outputs_of_networks_are_checked(tmp_path, capsys):
    (tmp_path / "nets.py").write_text("from torch import nn\ndef build():\n    return nn.Flatten()\n")
    words = ["bench", "step", "--model", f"{tmp_path}/nets.py:build", "--batch", "2", "--size", "4"]
    assert main([*words, "--folder", str(tmp_path / "out")]) == 2
    assert "logits" in capsys.readouterr().err

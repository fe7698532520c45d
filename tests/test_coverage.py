"""``reparam coverage``: the command on tiny models, its file and page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.cli import main
from reparam.coverage import catalogue, command, measure, reasons, runner
from reparam.coverage.page import page
from reparam.coverage.weights import balance, randomise
from reparam.errors import GuardError, InputError

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "coverage.json"

NETS = '''
"""A network with an operator that no rule covers, and builders that fail in their own ways."""
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.head(torch.cumsum(torch.relu(self.norm(self.stem(x))), 1))

def broken():
    raise ValueError("no weights | today")

def dies():
    os._exit(3)

def slow():
    time.sleep(60)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["coverage", *arguments])
    return code, *capsys.readouterr()


def rows(path: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


# The command ---------------------------------------------------------------------------------------------------------


def test_a_run_its_file_its_page_and_what_a_second_run_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("test_resnet", "test_vit", "cifar_resnet8_w8")
    code, out, _ = call(capsys, *names, "--page", "page.md")
    assert code == 0, out
    assert "[3/3]" in out and "3 models, 0 with an error" in out and "3 exact, 3 back" in out

    data = json.loads((folder / "coverage.json").read_text())
    assert data["command"] == "reparam coverage test_resnet test_vit cifar_resnet8_w8 --page page.md"
    assert {"commit", "versions", "device", "date", "wall_seconds"} <= set(data)
    assert str(folder) not in json.dumps(data) and str(Path(torch.__file__).parent) not in json.dumps(data)
    found = {row["name"]: row for row in data["rows"]}
    assert [found[name]["family"] for name in names] == ["resnet", "vision_transformer", "cifar_resnet"]
    assert [found[name]["group"] for name in names] == ["timm", "timm", "other"]
    resnet = found["test_resnet"]
    assert resnet["coverage"] == 1 and resnet["input"] == "2x3x160x160" and not resnet["narrow"]
    assert resnet["parameters"][1] > 3 * resnet["parameters"][0]
    assert resnet["multiply_adds"][1] > 3 * resnet["multiply_adds"][0]
    for row in found.values():
        assert 0 < row["worst_error"] <= 1e-12 and row["round_trip"] == "bit-equal"
        assert row["seconds"]["expand"] >= row["seconds"]["plan"] > 0 and row["peak_memory_mib"] > 100
    assert (folder / "page.md").read_text() == command.page_of(folder / "coverage.json")

    before = (folder / "coverage.json").read_bytes()
    code, out, _ = call(capsys, *names, "--page", "page.md")
    assert (code, (folder / "coverage.json").read_bytes()) == (0, before)
    assert "3 of 3 models are in coverage.json already" in out and "[1/" not in out

    code, out, _ = call(capsys, "cifar_resnet8_w8", "--again")
    assert code == 0 and "[1/1] cifar_resnet8_w8" in out
    assert set(rows(folder / "coverage.json")) == set(names)

    code, _, err = call(capsys, *names, "--ratio", "3")
    assert code == 2
    assert "holds results of another kind (ratio 2, now 3): --again" in err
    code, out, _ = call(capsys, "cifar_resnet8_w8", "--ratio", "3", "--again")
    assert code == 0 and "round trip within 2 ulp" in out
    assert set(rows(folder / "coverage.json")) == {"cifar_resnet8_w8"}


def test_what_goes_wrong_costs_one_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("nets.py:slow", "nets.py:dies", "nets.py:broken", "nets.py:Net")
    # In a run of its own, so that the limit can be below what any machine needs for the others.
    assert call(capsys, *names[1:])[0] == 1
    code, out, _ = call(capsys, *names, "--time-limit", "2", "--page", "page.md")
    assert code == 1 and "3 of 4 models are in" in out
    found = rows(folder / "coverage.json")
    assert [found[name]["status"] for name in names] == ["timeout", "error", "error", "ok"]
    assert found["nets.py:slow"]["error"]["message"] == "not done after 2 s"
    assert found["nets.py:dies"]["error"]["message"] == "the process ended with exit code 3"
    assert "no weights | today (at nets.py:" in found["nets.py:broken"]["error"]["message"]
    (entry,) = found["nets.py:Net"]["contractions"]
    assert (entry["operator"], entry["count"]) == ("cumsum", 1)
    assert re.fullmatch(r"nets\.py:\d+", entry["first"])
    assert found["nets.py:Net"]["narrow"]
    assert "no weights \\| today" in (folder / "page.md").read_text()

    (folder / "nets.py").write_text(NETS.replace('raise ValueError("no weights | today")', "return Net()"))
    code, out, _ = call(capsys, *names[1:])
    assert code == 1 and "3 of 3 models are in" in out
    code, out, _ = call(capsys, "nets.py:broken", "nets.py:Net", "--retry")
    assert code == 0 and "1 of 2 models are in" in out and "[1/1] nets.py:broken" in out


def test_plan_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "test_resnet", "test_vit", "--plan-only", "--output", "p.json", "--page", "p.md")
    assert code == 0 and "2 models, 0 with an error" in out
    for row in rows(folder / "p.json").values():
        assert set(row["seconds"]) == {"build", "plan"} and "worst_error" not in row and "round_trip" not in row
    assert "2 networks on the meta device: 2 planned, 0 with an error" in (folder / "p.md").read_text()


def test_an_interrupted_run_keeps_its_rows(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(entries: list[catalogue.Entry], *_: object) -> Any:
        yield entries[0], row_of(entries[0].name)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_all", two)
    assert call(capsys, "test_vit", "test_resnet")[0] == 130
    assert set(rows(folder / "coverage.json")) == {"test_vit"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet81"], r"no model 'resnet81'; did you mean 'resnet18'"),
        (["torchvision.models:resnet81"], r"torchvision has no model 'torchvision.models:resnet81'; did you mean"),
        (["resnet18", "--all"], "--all chooses the models; leave out their names"),
        (["resnet18", "--group", "timm"], "--group chooses the models; leave out their names"),
        (["--all", "--group", "video"], "--all means all models of timm, so it does not go with --group video"),
        (["resnet18", "--output", "missing/c.json"], "cannot write missing/c.json: there is no folder missing"),
        (["resnet18", "--page", "missing/c.md"], "cannot write missing/c.md: there is no folder missing"),
        (["resnet18", "--output", "."], "it is a folder"),
        (["resnet18", "--output", "nets.py"], "nets.py is no result of reparam coverage"),
        (["resnet18", "--output", "plan.json"], "plan.json is no result of reparam coverage: it has no 'format'"),
        (["resnet18", "--output", "newer.json"], "newer.json has version 2, this release reads version 1"),
        (["resnet18", "--jobs", "0"], "--jobs must be larger than 0, not 0"),
        (["resnet18", "--ratio", "0"], "--ratio must be larger than 0, not 0"),
        (["resnet18", "--time-limit", "-1"], "--time-limit must be larger than 0"),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    (folder / "plan.json").write_text("{}")
    (folder / "newer.json").write_text('{"format": "reparam-coverage", "version": 2}')
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert re.search(message, err), err
    assert err.count("\n") == 1 and err.startswith("error: ")


def test_the_choices_of_group_are_those_of_the_catalogue() -> None:
    assert command._CHOICES == catalogue.CHOICES


# The parts -----------------------------------------------------------------------------------------------------------


def test_the_steps_are_those_of_expand() -> None:
    model = catalogue.build(catalogue.Entry("test_resnet", "timm"))
    plan, teacher, error = measure._expanded(model, 2, None, {})
    expected = reparam.expand(model, 2)
    assert plan.to_json() == reparam.plan(model, 2).to_json()
    assert error > 0
    state, other = teacher.state_dict(), expected.state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in other.items()}


def test_a_teacher_that_refuses_its_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification runs the graph without its guards, so the teacher itself has to run as well."""

    def refuse(*_: Any, **__: Any) -> None:
        raise GuardError("recorded for other inputs")

    monkeypatch.setattr(measure, "build_teacher", lambda *_: refuse)
    row = measure.measured(catalogue.Entry("test_resnet", "timm"), measure.Settings())
    assert row["status"] == "error" and row["error"]["type"] == "GuardError"


class Growing(nn.Module):
    """Blocks whose values grow where statistics do not fit, and a last layer that starts near 0."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)) for _ in range(20))
        for weight in (w for w in self.blocks.parameters() if w.dim() > 1):
            nn.init.normal_(weight, std=1.0)
        self.twice, self.idle = nn.Conv2d(8, 8, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 4))
        self.last = nn.Linear(8, 5)
        nn.init.normal_(self.last.weight, std=1e-4)
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache["x"] = x
        for block in self.blocks:
            x = x + block(x)
        found: torch.Tensor = self.last(self.twice(self.twice(x)).mean((2, 3)))
        return found


def test_balanced_weights_are_random_and_keep_activations_at_their_scale() -> None:
    torch.manual_seed(0)
    model, x = randomise(Growing()), torch.randn(2, 8, 5, 5)
    before = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    largest: list[float] = []

    def look(_module: nn.Module, _args: Any, y: torch.Tensor) -> None:
        largest.append(float(y.detach().abs().max()))

    hooks = [m.register_forward_hook(look) for m in model.modules()]
    model.eval()(x)
    assert max(largest) > 1e6
    model.cache.clear()
    given = x.clone()
    assert balance(model.train(), ((x,), {})) is model and model.training
    assert torch.equal(x, given) and not model.cache
    largest.clear()
    assert float(model.eval()(x).detach().square().mean()) == pytest.approx(1, rel=1e-4)
    assert max(largest) < 100
    wide = {name for name, value in before.items() if value.dim() > 1}
    for name, old in before.items():
        scale = (model.state_dict()[name] / old).flatten()
        assert torch.allclose(scale, scale[0], rtol=1e-5), f"{name}: one factor for the whole tensor"
        layer = old.dim() > 1 or f"{name.rpartition('.')[0]}.weight" in wide
        kept = name.startswith("idle") or not (layer or "running" in name)
        assert bool(scale[0] == 1) == kept, name
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_balance_of_nothing_and_zeros_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1, bias=False))
    for x in (torch.zeros(1, 3, 4, 4), torch.zeros(0, 3, 4, 4), torch.full((1, 3, 4, 4), torch.inf)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        balance(model, ((x,), {}))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_families() -> None:
    import timm

    families = catalogue.families()
    assert set(families) <= set(timm.list_modules())
    assert "cifar_resnet" not in families
    if timm.__version__ == "1.0.31":
        assert len(families) == 98 and len(catalogue.every_timm_model()) == 1371


def test_the_smallest_of_a_family() -> None:
    import timm

    names = catalogue.families()["starnet"]
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in names}
    found = catalogue.smallest("starnet", reversed(names))
    assert found.parameters == min(counts.values()) == counts[found.name]
    known = {"starnet": ["starnet_s1", 5]}
    assert catalogue.smallest_of_each_family(known) == [catalogue.Entry("starnet_s1", "timm", "starnet", 5)]


def test_torchvision_entries() -> None:
    entries = catalogue.torchvision_models()
    by_name = {entry.name: entry for entry in entries}
    kinds = [entry.group for entry in entries]
    assert kinds.count("torchvision classification") >= 80 and kinds.count("torchvision segmentation") >= 6
    assert kinds.count("torchvision video") >= 9 and kinds.count("torchvision optical_flow") >= 2
    assert kinds.count("torchvision detection") >= 12
    assert by_name["torchvision.models.video:mvit_v1_b"].inputs == ((1, 3, 16, 224, 224),)
    detector = by_name["torchvision.models.detection:retinanet_resnet50_fpn"]
    ((image,),) = catalogue.example(detector)
    assert image.shape == (3, 128, 128) and detector.options["weights_backbone"] is None
    assert catalogue.named(["torchvision.models:resnet18"]) == [by_name["torchvision.models:resnet18"]]
    assert catalogue.named(["torchvision.models:fcn_resnet50"])[0].group == "torchvision segmentation"
    with pytest.raises(InputError, match="no model"):
        catalogue.named(["torchvision.models.video:r3d_81"])


def test_reasons_are_the_same_in_every_block() -> None:
    file = Path(torch.__file__).parent / "nn" / "modules" / "conv.py"
    texts = {
        reasons.reason_text(
            f"TraceError: {file}:{12}: depends on the value of layer{k}.{k}.bn1.training of {k} channels"
        )
        for k in (3, 4)
    }
    # layer3 and layer4 are names, not numbers.
    assert {re.sub(r"layer\d", "layer", text) for text in texts} == {
        "TraceError: torch/nn/modules/conv.py:12: depends on the value of layer.*.bn1.training of N channels"
    }
    assert reasons.short_source(f"{file}:7") == "torch/nn/modules/conv.py:7"
    assert reasons.short_source("") == ""
    assert reasons.short_text(f"cannot read {ROOT}/setup.cfg and/or it") == "cannot read setup.cfg and/or it"
    assert reasons.reason_text("no rule for getitem_3 and getitem_12") == "no rule for getitem_* and getitem_*"
    assert len(reasons.short_text("x " * 1000)) == reasons.LONGEST


def test_large_models_take_more_than_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_memory", lambda: 100e9)
    settings = measure.Settings()
    places = [runner._slots(catalogue.Entry("x", "timm", "", n), settings, 2) for n in (0, 10**8, 3 * 10**9, 10**11)]
    assert places == [1, 1, 2, 2]


# The page ------------------------------------------------------------------------------------------------------------


def row_of(name: str, group: str = "timm", **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "group": group, "family": "nets", "status": "ok", "input": "2x3x32x32",
        "parameters": [1_000, 4_000], "multiply_adds": [2_000_000, 7_000_000], "coverage": 0.97,
        "contractions": [], "worst_error": 3e-15, "round_trip": "bit-equal", "narrow": [], "leaves": [], "notes": [],
        "seconds": {"build": 0.1, "plan": 0.5, "expand": 1.5, "extract": 0.1}, "peak_memory_mib": 400,
        "total_seconds": 2.0, "commit": "0123456789", **changes,
    }  # fmt: skip


def data_of(*found: dict[str, Any], plan_only: bool = False) -> dict[str, Any]:
    versions = {"torch": "2.0", "timm": "1.0", "torchvision": "0.1"}
    return {
        "command": "reparam coverage", "commit": "", "versions": versions, "device": "CPU", "cores": 2, "jobs": 2,
        "threads": 1, "ratio": 2, "date": "2026-01-01", "plan_only": plan_only, "wall_seconds": 600.0,
        "rows": list(found),
    }  # fmt: skip


def test_the_page_says_what_the_rows_say() -> None:
    contraction = {"operator": "sort", "reason": "blocks.*.x | y", "count": 12, "first": "a.py:1"}
    failed = {"type": "CaptureError", "message": "no graph", "where": "a.py:3"}
    flow = {"name": "torchvision.models.optical_flow:raft", "group": "torchvision optical_flow", "status": "error"}
    text = page(
        data_of(
            row_of("good"),
            row_of("narrow", coverage=0.5, contractions=[contraction]),
            row_of("wrong", worst_error=1e-3, round_trip="2 of 9 tensors differ, first a"),
            {**flow, "error": failed},
        ),
        data_of(row_of("one"), row_of("two", coverage=0.3), plan_only=True),
    )
    assert "| timm | 3 | 2 | 2 | 2 | 2 | 50.0% | 1.0e-03 | 1.5 | 1.5 |" in text
    assert "| torchvision optical flow | 1 | 0 | 0 | 0 | 0 |" in text
    assert "| nets | `good` | 2x3x32x32 | 1.00k, 4.00x | 2.00M, 3.50x | 97.0% | 3.0e-15 | yes |" in text
    assert "| sort 12 |" in text and "| `sort` | blocks.\\*.x \\| y | 1 | 12 | nets |" in text
    assert "**1.0e-03** | **2 of 9 tensors differ, first a**" in text
    assert "| `torchvision.models.optical_flow:raft` | CaptureError | no graph | a.py:3 |" in text
    assert "2 networks on the meta device: 2 planned, 0 with an error or out of time; 10 minutes" in text
    assert "Under 60%: `two` 30.0%." in text
    assert "`reparam coverage` at commit `0123456789`, torch 2.0, timm 1.0" in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_the_page_of_nothing() -> None:
    text = page({**data_of(), "rows": []})
    assert "Nothing has been measured yet." in text and "## Summary" not in text
    assert "contracted-and-why" in text and "## What is contracted and why" in text

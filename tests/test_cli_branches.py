"""``--branches`` and ``--init`` on the command line."""

import json
from pathlib import Path

import pytest

from reparam.cli import main

NET = """
from torch import nn

def build():
    norm = nn.BatchNorm2d
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5),
    )
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:build"


def planned(spec: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    assert main(["plan", spec, "--input-size", "3,8,8", "--json", "-", *options]) == 0
    return json.loads(capsys.readouterr().out)


def recipes(plan: dict) -> dict[str, str]:
    return {row["site"]["name"]: row["recipe"] for row in plan["branches"]}


def test_one_recipe(spec, capsys):
    assert recipes(planned(spec, capsys)) == {}
    assert recipes(planned(spec, capsys, "--branches", "dbb")) == {"0.weight": "dbb", "3.weight": "dbb"}
    found = planned(spec, capsys, "--branches", "orepa:branches=4", "--init", "scratch")
    assert recipes(found) == {"0.weight": "orepa:branches=4", "3.weight": "orepa:branches=4"}
    assert {row["site"]["init"] for row in found["branches"]} == {"scratch"}


def test_patterns(spec, capsys):
    found = planned(spec, capsys, "--branches", "0=acb", "*=orepa:branches=2")
    assert recipes(found) == {"0.weight": "acb", "3.weight": "orepa:branches=2"}
    found = planned(spec, capsys, "--branches", "0=none", "--branches", "re:3.*=repvgg", "--ratio", "3")
    assert recipes(found) == {"3.weight": "repvgg"} and found["ratio"] == 3
    found = planned(spec, capsys, "--ratio", "3=2", "*=1", "--branches", "3=none", "*=dbb")
    assert recipes(found) == {"0.weight": "dbb"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--branches", "orpea"], "unknown branch recipe 'orpea'; did you mean 'orepa', 'orepa_small'?"),
        (["--branches", "7=expandnet:variant=ck"], "fit where entry '7' wants it: 7.weight: variant 'ck' is for"),
        (["--branches", "dbb", "3=none"], "entry '3' decides no layer: the first entry that matches counts"),
        (["--branches", "9=dbb"], "branches entry '9' matches no convolution or linear layer"),
        (["--branches", "dbb", "--branches", "acb"], "--branches has two recipes for '*'; leave one out"),
        (["--init", "scratch"], "init='scratch' says how branches start, and there are none"),
    ],
)
def test_bad_input(spec, capsys, options, message):
    assert main(["plan", spec, "--input-size", "3,8,8", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("init", ["student", "scratch"])
def test_expand_and_extract(spec, tmp_path, capsys, init):
    teacher, student = str(tmp_path / "teacher.safetensors"), str(tmp_path / "student.safetensors")
    options = ["--input-size", "3,8,8", "--branches", "dbb", "--init", init, "--output", teacher]
    assert main(["expand", spec, *options]) == 0
    assert ("with branches does" in capsys.readouterr().out) == (init == "scratch")
    assert main(["extract", teacher, spec, "--output", student]) == 0
    code = main(["check", spec, teacher, "--checkpoint-a", student, "--input-size", "3,8,8"])
    assert (code, "PASS" in capsys.readouterr().out) == (0, True)
    code = main(["check", spec, teacher, "--input-size", "3,8,8"])
    assert code == (1 if init == "scratch" else 0)

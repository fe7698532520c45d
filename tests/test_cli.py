"""The command line: every command on a real model, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reparam
from reparam.cli import build_parser, main
from reparam.models import load_model
from reparam.weight_files import save_weights

ROOT = Path(__file__).parent.parent

NETS = '''
"""A network that says nothing about the input it takes, and one that differs from it."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=5, in_chans=3, act=torch.relu):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, num_classes)
        self.act = act

    def forward(self, x):
        x = self.act(self.body(self.act(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def other():
    return Net(act=torch.sigmoid)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    return code, *capsys.readouterr()


SIZE = ("--input-size", "3,12,12")


# plan ----------------------------------------------------------------------------------------------------------------


def test_plan_prints_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "plan", "nets.py:Net", "--ratio", "2", *SIZE)
    assert (code, err) == (0, "")
    assert all(name in out for name in ("stem", "body", "head"))


def test_plan_follows_ratio_ignore_and_model_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {
        call(capsys, "plan", "nets.py:Net", *SIZE, *more)[1]
        for more in ([], ["--ratio", "3"], ["--ignore", "body"], ["--ignore", "st*", "body"], ["--num-classes", "9"])
    }
    assert len(outputs) == 5


def test_plan_json_to_file_and_to_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, table, err = call(capsys, "plan", "nets.py:Net", *SIZE, "--json", "plan.json")
    assert "wrote plan.json" in err
    code, printed, _ = call(capsys, "plan", "nets.py:Net", *SIZE, "--json", "-")
    assert code == 0
    assert json.loads(printed) == json.loads((folder / "plan.json").read_text())
    assert str(reparam.Plan.from_json(printed)) == table.rstrip("\n")


def test_plan_as_dot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "plan", "nets.py:Net", *SIZE, "--dot", "plan.dot")[0] == 0
    assert (folder / "plan.dot").read_text().startswith("digraph")


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_drawing_without_graphviz_is_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    code, out, err = call(capsys, "plan", "nets.py:Net", *SIZE, f"--{kind}", f"plan.{kind}")
    assert code == 0
    assert "stem" in out
    assert f"graphviz's `dot` is not installed, so plan.{kind} was not drawn" in err
    assert "wrote plan.dot" in err
    assert (folder / "plan.dot").read_text().startswith("digraph")


def fake_dot(folder: Path, body: str) -> None:
    program = folder / "dot"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def test_a_drawing_with_graphviz(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_dot(folder, 'test "$1" = "-Tsvg" && cat')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    code, _, err = call(capsys, "plan", "nets.py:Net", *SIZE, "--svg", "plan.svg")
    assert (code, err) == (0, "wrote plan.svg\n")
    assert (folder / "plan.svg").read_text().startswith("digraph")


def test_a_drawing_that_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_dot(folder, 'cat > /dev/null; echo "no fonts" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    code, _, err = call(capsys, "plan", "nets.py:Net", *SIZE, "--png", "plan.png")
    assert (code, err) == (2, "error: graphviz could not draw plan.png: no fonts\n")


# expand, extract, check ----------------------------------------------------------------------------------------------


def test_a_round_trip_through_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    source = load_model("nets.py:Net")
    source.norm.running_mean.normal_()
    save_weights(source, "before.safetensors")

    expand = ("expand", "nets.py:Net", *SIZE, "--checkpoint", "before.safetensors", "--output", "teacher.safetensors")
    code, out, _ = call(capsys, *expand)
    assert code == 0
    assert "every node compared" in out and "wrote teacher.safetensors" in out

    code, out, _ = call(
        capsys, "extract", "teacher.safetensors", "nets.py:Net", "--seed", "9", "--output", "after.safetensors"
    )
    assert code == 0
    before, after = load_file("before.safetensors"), load_file("after.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)

    checkpoint = ("--checkpoint-a", "after.safetensors")
    assert call(capsys, "check", "nets.py:Net", "teacher.safetensors", *checkpoint, *SIZE)[0] == 0
    checkpoints = ("--checkpoint-a", "before.safetensors", "--checkpoint-b", "after.safetensors")
    code, out, _ = call(capsys, "check", "nets.py:Net", "nets.py:Net", *checkpoints, *SIZE)
    assert code == 0
    assert "PASS" in out


def test_expand_obeys_its_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, weights = {}, {}
    for name, more in {
        "two": [],
        "two again": [],
        "three": ["--ratio", "3"],
        "quiet": ["--noise", "0", "--no-verify"],
        "seed": ["--seed", "1"],
        "narrow": ["--ignore", "body"],
    }.items():
        code, out, _ = call(capsys, "expand", "nets.py:Net", *SIZE, *more, "--output", "teacher.safetensors")
        assert code == 0
        assert ("unverified" in out) == ("--no-verify" in more)
        tensors = load_file("teacher.safetensors")
        weights[name] = next(value for key, value in tensors.items() if key.endswith("body.weight"))
        shapes[name] = tuple(weights[name].shape)
    assert shapes["two"] == (16, 12, 3, 3)
    assert shapes["three"] == (24, 18, 3, 3)
    assert shapes["narrow"] == (8, 6, 3, 3)
    assert torch.equal(weights["two"], weights["two again"])
    assert not torch.equal(weights["two"], weights["seed"])
    assert torch.equal(weights["quiet"][0], weights["quiet"][1])
    assert not torch.equal(weights["two"][0], weights["two"][1])


def test_check_fails_with_exit_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "check", "nets.py:Net", "nets.py:other", *SIZE)
    assert code == 1
    assert "FAIL" in out


def test_check_of_a_model_with_itself_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "check", "nets.py:Net", "nets.py:Net", *SIZE)[0] == 0


def test_a_timm_model_needs_no_input_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "resnet10t", "--num-classes", "3", "--in-chans", "1")
    assert code == 0
    assert "layer4" in out


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--methd", "kd"], "reparam train: error: unknown option --methd; did you mean '--method'"),
        (["plan", "resnet18", "--ratoi=2"], "reparam plan: error: unknown option --ratoi; did you mean '--ratio'"),
    ],
)
def test_unknown_options_belong_to_their_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "resnet81"], "no model 'resnet81'; did you mean"),
        (["plan", "nets.py:Nett", *SIZE], "has no 'Nett'; did you mean 'Net'"),
        (["plan", "nets.py:Net", *SIZE, "--ratio", "0"], "ratio"),
        (["plan", "nets.py:Net", *SIZE, "--ignore", "stm"], "stem"),
        (["plan", "nets.py:Net", *SIZE, "--json", "missing/plan.json"], "missing"),
        (["plan", "nets.py:Net", *SIZE, "--svg", "plan.png"], "--svg writes a file that ends in .svg, not plan.png"),
        (["plan", "nets.py:Net", "--input-size", "4,12,12"], "nets.py:Net|stem|channels|input"),
        (["expand", "nets.py:Net", *SIZE, "--output", "missing/t.safetensors"], "there is no folder missing"),
        (
            ["expand", "nets.py:Net", *SIZE, "--output", "t", "--checkpoint", "none.pth"],
            "no such weight file: none.pth",
        ),
        (["expand", "nets.py:Net", *SIZE, "--output", "t", "--checkpoint", "bad.safetensors"], "is truncated or not a"),
        (
            ["expand", "nets.py:Net", *SIZE, "--output", "t", "--checkpoint", "wide.safetensors"],
            "is a teacher; .* extract",
        ),
        (["extract", "bad.safetensors", "nets.py:Net", "--output", "s.safetensors"], "bad.safetensors"),
        (["extract", "none.safetensors", "nets.py:Net", "--output", "s.safetensors"], "none.safetensors"),
        (["check", "nets.py:Net", "nets.py:Net", "--ema"], "no checkpoint was given"),
        (["check", "nets.py:Net", "x.safetensors", "--checkpoint-b", "y"], "leave out --checkpoint-b"),
        (["check", "nets.py:Net", "bad.safetensors"], r"bad\.safetensors((?!--checkpoint-b).)*$"),
        (["check", "nets.py:Net", "plain.safetensors"], "holds no plan.*--checkpoint-b plain.safetensors"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    save_file({"w": torch.zeros(2)}, folder / "wide.safetensors", metadata={"reparam_plan": "{}"})
    save_file({"w": torch.zeros(2)}, folder / "plain.safetensors")
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert re.search(message, err)
    assert err.startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["squash"], "invalid choice: 'squash'"),
        (["plan"], "required: MODEL"),
        (["plan", "resnet18", "--ratio", "1.5"], "invalid int value: '1.5'"),
        (["plan", "resnet18", "--input-size", "3,x,4"], "is not a shape such as 3,224,224"),
        (["plan", "resnet18", "--input-size", "3,0,4"], "is not a shape such as 3,224,224"),
        (["expand", "resnet18"], "required: --output"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bug_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(reparam, "plan", broken)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "nets.py:Net", *SIZE])


# The program itself --------------------------------------------------------------------------------------------------


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_help_is_quick_and_imports_neither_torch_nor_timm() -> None:
    script = (
        "import sys; from reparam.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "reparam expand resnet18" in done.stdout
    assert "loaded: []" in done.stdout


def test_the_module_runs_as_a_program() -> None:
    done = run_python("-W", "ignore", "-m", "reparam.cli", "plan", "no_such_model_name")
    assert done.returncode == 2
    assert done.stderr.startswith("error: timm ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"reparam {reparam.__version__}\n"


def subparsers() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def test_train_has_its_options() -> None:
    text = subparsers()["train"].format_help()
    assert "--method" in text and "--teacher" in text and "--help-all" in text and "--baseline" not in text


def test_the_command_line_page_names_every_option() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, parser in subparsers().items():
        assert f"\n## {name}\n" in page
        if name != "train":
            options = {option for action in parser._actions for option in action.option_strings if option != "-h"}
            assert not {option for option in options if option not in page}

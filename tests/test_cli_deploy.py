"""``reparam fold`` and ``reparam export``: files that work, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reparam.cli import main
from reparam.models import load_model, load_weights
from reparam.passes.fold import fold
from reparam.weight_files import save_weights

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent

NETS = '''
"""A network that says nothing about the input it takes, and two that cannot be exported."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=5, in_chans=3, act=torch.relu):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, num_classes)
        self.act = act

    def forward(self, x):
        x = self.act(self.body(self.act(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def branching():
    return Net(act=lambda x: x if x.sum() > 0 else -x)


def damaged():
    net = Net()
    net.body.weight.data[0] = torch.nan
    return net
'''
SIZE = ("--input-size", "3,12,12")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights(folder: Path) -> Path:
    torch.manual_seed(3)
    model = load_model("nets.py:Net")
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    save_weights(model, "weights.safetensors")
    return folder / "weights.safetensors"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    return code, *capsys.readouterr()


# export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_export_writes_a_file_and_compares_it(weights: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    arguments = ("export", "nets.py:Net", "--checkpoint", "weights.safetensors", *SIZE, "--output", f"net.{ending}")
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "batches of any size" in out and ("opset" in out) == (ending == "onnx")
    assert re.search(r"^PASS: .* on batches of 2, 1 and 5: .*argmax agreement 100.0%$", out, re.MULTILINE)
    assert re.search(rf"^wrote net\.{ending} \(0\.0 MB\)$", out, re.MULTILINE)
    model = load_model("nets.py:Net", checkpoint=weights).eval()
    from reparam.deploy.export import compare

    assert compare(model, f"net.{ending}", torch.randn(2, 3, 12, 12)).passed
    assert not compare(load_model("nets.py:Net").eval(), f"net.{ending}", torch.randn(2, 3, 12, 12)).passed


def test_a_timm_model_needs_no_input_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "export", "test_resnet", "--num-classes", "3", "--output", "net.pt2")
    assert code == 0
    assert "PASS" in out


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_file_that_differs_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    from reparam.deploy import parity

    monkeypatch.setattr(parity, "_differences", lambda _pairs: (1.0, 1.0))
    code, out, _ = call(capsys, "export", "nets.py:Net", *SIZE, "--output", f"net.{ending}")
    assert code == 1
    assert "FAIL" in out and f"wrote net.{ending}" in out


# fold ----------------------------------------------------------------------------------------------------------------


def test_folded_weights_load_into_the_folded_model(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("fold", "nets.py:Net", "--checkpoint", "weights.safetensors", *SIZE, "--output", "small.safetensors")
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    assert re.search(r"^PASS: ", out, re.MULTILINE) and "wrote small.safetensors" in out
    x = torch.randn(4, 3, 12, 12)
    folded = fold(load_model("nets.py:Net").eval(), example_input=x)
    load_weights(folded, "small.safetensors")
    model = load_model("nets.py:Net", checkpoint=weights).eval()
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_fold_that_may_grow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bottle.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1), nn.Flatten())\n"
    )
    sizes = {}
    for more in ([], ["--allow-growth"]):
        code, out, _ = call(capsys, "fold", "bottle.py:net", *SIZE, *more, "--output", "s.safetensors")
        assert code == 0
        assert ("give --allow-growth to fold it" in out) == (not more)
        sizes[bool(more)] = len(load_file("s.safetensors"))
        assert call(capsys, "export", "bottle.py:net", *SIZE, "--fold", *more, "--output", "s.pt2")[0] == 0
    assert sizes[True] < sizes[False]


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_export_of_the_folded_network(weights: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    arguments = ("nets.py:Net", "--checkpoint", "weights.safetensors", *SIZE, "--fold", "--output", f"net.{ending}")
    code, out, _ = call(capsys, "export", *arguments)
    assert code == 0
    assert len(re.findall(r"^PASS: ", out, re.MULTILINE)) == 2
    from reparam.deploy.export import compare

    model = load_model("nets.py:Net", checkpoint=weights).eval()
    assert compare(model, f"net.{ending}", torch.randn(2, 3, 12, 12)).passed


def test_export_of_a_folded_timm_model_needs_no_input_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "export", "test_resnet", "--fold", "--output", "net.pt2")
    assert code == 0
    assert out.count("PASS") >= 2


@pytest.mark.parametrize("command", [["fold", "--output", "s.safetensors"], ["export", "--fold", "--output", "s.pt2"]])
def test_a_fold_that_differs_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    from reparam.passes import fold as module

    own = module.fold_with_report

    def wrong(*arguments: Any, **options: Any) -> Any:
        folded, report = own(*arguments, **options)
        with torch.no_grad():
            next(folded.parameters()).add_(0.1)
        return folded, report

    monkeypatch.setattr(module, "fold_with_report", wrong)
    code, out, _ = call(capsys, *command, "nets.py:Net", *SIZE)
    assert code == 1
    assert "FAIL: float64" in out and "wrote s." in out


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nets.py:Net", *SIZE, "--output", "net.pth"], r"net\.pth does not end in \.onnx"),
        (["export", "nets.py:Net", *SIZE, "--output", "missing/net.onnx"], "there is no folder missing; make it first"),
        (["export", "no_such_file.py:Net", "--output", "dir.onnx"], r"dir\.onnx: it is a folder"),
        (["export", "nets.py:Net", "--input-size", "4,12,12", "--output", "net.onnx"], "does not accept the example"),
        (["export", "nets.py:Net", *SIZE, "--checkpoint", "wide.safetensors", "--output", "n.pt2"], "is a teacher"),
        (["export", "nets.py:Net", *SIZE, "--checkpoint", "none.pth", "--output", "n.pt2"], "no such weight file"),
        (["export", "nets.py:Net", *SIZE, "--ema", "--output", "n.pt2"], "no checkpoint was given"),
        (["export", "nets.py:damaged", *SIZE, "--output", "n.onnx"], "body.weight holds 54 NaN or Inf values"),
        (["export", "nets.py:branching", *SIZE, "--output", "n.onnx"], r"cannot record Net: .*nets\.py:\d+"),
        (["export", "resnet81", "--output", "n.onnx"], "no model 'resnet81'; did you mean"),
        (["fold", "nets.py:Net", *SIZE, "--output", "n.onnx"], r"in \.safetensors, not n\.onnx; .* MODEL --fold"),
        (["export", "nets.py:Net", *SIZE, "--allow-growth", "--output", "n.pt2"], "--allow-growth belongs to --fold"),
        (["fold", "nets.py:Net", *SIZE, "--output", "missing/n.safetensors"], "there is no folder missing"),
        (["fold", "resnet81", "--output", "n.safetensors"], "no model 'resnet81'; did you mean"),
        (["fold", "nets.py:Net", "--checkpoint", "wide.safetensors", "--output", "n.safetensors"], "is a teacher"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save_file({"w": torch.zeros(2)}, folder / "wide.safetensors", metadata={"reparam_plan": "{}"})
    (folder / "dir.onnx").mkdir()
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert re.search(message, err)
    assert err.startswith("error: ") and err.count("\n") == 1
    assert {path.name for path in folder.iterdir()} <= before


def test_fold_refuses_damaged_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "fold", "nets.py:damaged", *SIZE, "--output", "n.safetensors")
    assert code == 2
    assert err.startswith("error: ") and "NaN" in err


def test_missing_packages(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    code, _, err = call(capsys, "export", "nets.py:Net", *SIZE, "--output", "n.onnx")
    assert (code, err) == (2, 'error: writing onnx needs onnxruntime: pip install "reparam[export]"\n')


@pytest.mark.parametrize("command", ["fold", "export"])
def test_usage_errors(capsys: pytest.CaptureFixture[str], command: str) -> None:
    for arguments, message in (([], "required: MODEL, --output"), (["resnet18"], "required: --output")):
        with pytest.raises(SystemExit) as caught:
            main([command, *arguments])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fold", "export"])
def test_help_imports_no_torch(command: str) -> None:
    script = (
        "import sys; from reparam.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'timm', 'numpy', 'onnx'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--output FILE" in done.stdout and "loaded: []" in done.stdout

"""Export: files that other programs run, compared with the network; every refusal; nothing lost on failure."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import reparam
from reparam.deploy import export as module
from reparam.deploy import parity
from reparam.deploy.export import compare
from reparam.deploy.formats import FORMATS, quiet
from reparam.errors import CaptureError, FormatError, InputError, ModelError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ENDINGS = ("onnx", "pt2")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 8, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.head(self.drop(x.mean((2, 3))))


class Small(nn.Module):
    """A linear layer and whatever a test does with it."""

    def __init__(self, act: Callable[..., Any] = torch.relu) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = act

    def forward(self, x: Tensor) -> Any:
        return self.act(self.layer(x))


class Many(nn.Module):
    """Positional, keyword and plain inputs; nested outputs, with a None and a number among them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.a = nn.Linear(4, 5)

    def forward(self, x: Tensor, scale: int = 2, *, index: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        out = self.a(x + self.table(index)) * scale
        if mask is not None:
            out = out.masked_fill(~mask, 0.0)
        return {"out": out, "rest": (out.softmax(1), None, x.shape[0])}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def run_file(path: Path, x: Tensor) -> Tensor:
    """Run a file as its user would."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with quiet(), torch.no_grad():
        return torch.export.load(path).module()(x)


@pytest.fixture(scope="module", params=ENDINGS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `net` for tests that read it only."""
    path = tmp_path_factory.mktemp("written") / f"net.{request.param}"
    reparam.export(net(), path, X)
    return path


# What works ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_file_computes_what_the_network_does_for_every_batch(tmp_path: Path, ending: str) -> None:
    model, path = net(), tmp_path / f"net.{ending}"
    report = reparam.export(model, path, X)
    assert isinstance(report, reparam.ExportReport)
    assert report.passed and report.max_rel < 1e-5 and report.argmax_agreement == 1
    assert (report.path, report.format, report.dtype) == (str(path), ending, "float32")
    assert report.any_batch and report.batches == (2, 1, 5)
    assert (report.opset is not None) == (ending == "onnx")
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            assert torch.allclose(run_file(path, x), model(x), atol=1e-5)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_extracted_student(tmp_path: Path, ending: str) -> None:
    student = reparam.extract(reparam.expand(net(), example_input=X)).eval()
    assert reparam.export(student, tmp_path / f"student.{ending}", X).passed


def test_a_timm_network_says_what_it_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    report = reparam.export(model, tmp_path / "net.onnx")
    assert report.passed and report.any_batch
    assert compare(model, tmp_path / "net.onnx") == report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"channels": (16, 32, 64, 128)}),
        ("vit_tiny_patch16_224", {"depth": 2}),
        *(
            pytest.param(name, {}, marks=pytest.mark.thorough)
            for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "levit_128s", "efficientnet_b0")
        ),
    ],
)
def test_timm_networks(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    size = 224 if name.startswith(("vit", "levit")) else 64
    for ending in ENDINGS:
        report = reparam.export(model, tmp_path / f"net.{ending}", torch.randn(2, 3, size, size))
        assert report.passed and report.any_batch, str(report)


@pytest.mark.parametrize("written", ["onnx"], indirect=True)
def test_the_free_dimension_is_called_batch_and_no_path_is_in_the_file(written: Path) -> None:
    graph = onnx.load(written).graph
    for value in [*graph.input, *graph.output]:
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert __file__.encode() not in written.read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_several_inputs_and_outputs(tmp_path: Path, capfd: pytest.CaptureFixture[str], ending: str) -> None:
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(3, 4),
        "mask": torch.rand(3, 1) > 0.3,
        "index": torch.tensor([6, 2, 0]),
        "scale": 3,
    }
    report = reparam.export(Many().eval(), tmp_path / f"net.{ending}", inputs)
    assert report.passed and report.batches == (3, 1, 6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", ENDINGS)
def test_code_that_fixes_the_batch(tmp_path: Path, ending: str) -> None:
    model = Small(lambda x: x.view(8, 2)).eval()
    report = reparam.export(model, tmp_path / f"net.{ending}", torch.randn(4, 4))
    assert report.passed and not report.any_batch and report.batches == (4,)


def test_batch_sizes_that_the_network_refuses_are_not_compared(tmp_path: Path) -> None:
    class Net(Small):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] < 2:
                raise ValueError("too few")
            return self.layer(x)

    report = reparam.export(Net().eval(), tmp_path / "net.onnx", torch.randn(4, 4))
    assert report.passed and report.batches == (4, 7)
    model = Net().eval()
    model.register_forward_pre_hook(lambda _module, inputs: None if inputs[0].is_meta else 1 / 0)
    with pytest.raises(ModelError, match=r"the network does not run on inputs of \(4, 4\): division by zero"):
        compare(model, tmp_path / "net.onnx", torch.randn(4, 4))


def test_inputs_without_a_common_first_size(tmp_path: Path) -> None:
    class Net(Small):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.layer(x) @ self.layer(y).T

    report = reparam.export(Net().eval(), tmp_path / "net.onnx", (torch.randn(3, 4), torch.randn(5, 4)))
    assert report.passed and not report.any_batch and report.batches == ()
    assert "batches" not in str(report)


@pytest.mark.parametrize(("dtype", "ending"), [("float64", "onnx"), ("float64", "pt2"), ("bfloat16", "pt2")])
def test_other_dtypes(tmp_path: Path, dtype: str, ending: str) -> None:
    kind = getattr(torch, dtype)
    report = reparam.export(Small().to(kind).eval(), tmp_path / f"net.{ending}", torch.randn(2, 4, dtype=kind))
    assert report.passed and report.dtype == dtype
    assert report.tolerance == {"float64": 1e-10, "bfloat16": 0.1}[dtype]


def test_the_format_may_be_said(tmp_path: Path) -> None:
    report = reparam.export(Small().eval(), str(tmp_path / "net.bin"), torch.randn(1, 4), format="onnx")
    assert report.passed and report.format == "onnx"
    assert report.batches == (2, 1, 5), "one sample is recorded as two: a recording keeps a size of 1"
    assert os.listdir(tmp_path) == ["net.bin"]


def test_large_models_keep_their_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    model = net()
    assert reparam.export(model, tmp_path / "net.onnx", X).passed
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert compare(model, tmp_path / "net.onnx", X).passed


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_network_and_the_generator_stay_as_they_were(tmp_path: Path, ending: str) -> None:
    model = net()
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    first = reparam.export(model, tmp_path / f"net.{ending}", X)
    assert torch.equal(state, torch.get_rng_state())
    after = model.state_dict(keep_vars=True)
    assert set(after) == set(before) and not any(child.training for child in model.modules())
    assert all(id(after[name]) == old and torch.equal(after[name], value) for name, (old, value) in before.items())
    assert reparam.export(model, tmp_path / f"net.{ending}", X) == first


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_a_forward_pass_leaves_in_a_module_is_not_the_recordings(tmp_path: Path, ending: str) -> None:
    class Caching(Small):
        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.layer.bias.abs()
            return self.layer(x) + self.cache["bias"]

    model = Caching().eval()
    model.cache = {}
    assert reparam.export(model, tmp_path / f"net.{ending}", torch.randn(2, 4)).passed
    assert model.cache == {}


@pytest.mark.parametrize("written", ["onnx"], indirect=True)
def test_the_report_in_words(written: Path) -> None:
    report = compare(net(), written, X)
    assert str(report).startswith(f"PASS: onnxruntime {onnxruntime.__version__} against the network in float32 on ")
    assert "on batches of 2, 1 and 5: max abs" in str(report) and "argmax agreement 100.0%" in str(report)
    assert str(dataclasses.replace(report, max_rel=2e-4)).startswith("FAIL: ")
    assert not dataclasses.replace(report, max_rel=float("nan")).passed


# The comparison can fail ---------------------------------------------------------------------------------------------


def corrupt(path: Path, amount: float = 0.05) -> None:
    """Change one weight tensor inside a file."""
    if path.suffix == ".onnx":
        content = onnx.load(path)
        weights = next(entry for entry in content.graph.initializer if len(entry.dims) == 4)
        values = onnx.numpy_helper.to_array(weights) + amount
        weights.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weights.name))
        onnx.save(content, path)
        return
    with quiet():
        program = torch.export.load(path)
        with torch.no_grad():
            program.state_dict["body.weight"].add_(amount)
        torch.export.save(program, path)


def test_a_file_with_other_weights_fails(written: Path, tmp_path: Path) -> None:
    model, path = net(), tmp_path / written.name
    shutil.copy(written, path)
    assert compare(model, path, X).passed
    assert not compare(net(seed=1), path, X).passed
    corrupt(path)
    report = compare(model, path, X)
    assert not report.passed and report.max_rel > 1e-3
    assert str(report).startswith("FAIL: ")


@pytest.mark.parametrize("ending", ENDINGS)
def test_export_itself_sees_a_file_that_was_written_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    own = FORMATS[ending].write

    def write(program: Any, path: Path) -> None:
        own(program, path)
        corrupt(path)

    monkeypatch.setitem(FORMATS, ending, dataclasses.replace(FORMATS[ending], write=write))
    assert not reparam.export(net(), tmp_path / f"net.{ending}", X).passed
    assert os.listdir(tmp_path) == [f"net.{ending}"]


def test_an_error_at_another_batch_size_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded program is right for the recorded batch only."""
    model, frozen = Small(lambda x: x * x.shape[0]).eval(), Small(lambda x: x * 2).eval()
    frozen.load_state_dict(model.state_dict())
    own = module._recorded
    monkeypatch.setattr(module, "_recorded", lambda _model, *rest: own(frozen, *rest))
    report = reparam.export(model, tmp_path / "net.pt2", torch.randn(2, 4))
    assert not report.passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_differences_that_are_not_numbers_count(bad: float) -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    b = a.clone()
    b[0, 0] = bad + 0.5
    assert parity._differences([(a, b)])[1] > 0.1
    assert parity._differences([(b, a)])[1] > 0.1
    assert parity._differences([(b, b.clone())]) == (0.0, 0.0)
    assert parity._agreement([(a, a), (a, a.flip(1))]) == 0.5


# Bad input -----------------------------------------------------------------------------------------------------------


def nan_net() -> Net:
    model = net()
    with torch.no_grad():
        model.body.weight[0, 0] = torch.nan
    return model


def partly_training() -> Net:
    model = net()
    model.norm.train()
    return model


def branching() -> Small:
    return Small(lambda x: x if x.sum() > 0 else -x).eval()


@pytest.mark.parametrize(
    ("make", "name", "error", "message"),
    [
        (net, "net.pth", InputError, r"net\.pth does not end in \.onnx \(ONNX\) or \.pt2 \(torch\.export\)"),
        (net, "net", InputError, "rename it, or say format='onnx' or 'pt2'"),
        (net, "missing/net.onnx", InputError, "there is no folder .*missing; make it first"),
        (net, "taken/net.onnx", InputError, "there is no folder .*taken; make it first"),
        (net, "folder.onnx", InputError, r"it is a folder; name a file in it, such as .*folder\.onnx.model\.onnx"),
        (lambda: net().train(), "net.onnx", ModelError, r"the model \(Net\) is in train mode.*call model\.eval\(\)"),
        (partly_training, "net.pt2", ModelError, r"norm \(BatchNorm2d\) is in train mode, and the file would keep"),
        (nan_net, "net.onnx", ModelError, "body.weight holds 9 NaN or Inf values"),
        (nan_net, "net.pt2", ModelError, "body.weight holds"),
        (lambda: net().to("meta"), "net.onnx", ModelError, "stem.weight is on the meta device and has no values; load"),
        (lambda: 3, "net.onnx", InputError, "must be a torch.nn.Module, not int"),
        (lambda: Net, "net.onnx", InputError, "make an instance of it"),
        (
            lambda: reparam.expand(net(), example_input=X).eval(),
            "net.onnx",
            ModelError,
            r"is a teacher.*extract its student first: reparam\.export\(reparam\.extract\(teacher\)\.eval\(\), path\)",
        ),
        (
            lambda: reparam.student_view(reparam.expand(net(), example_input=X)).eval(),
            "net.onnx",
            ModelError,
            "a view of one; extract its student first",
        ),
    ],
)
def test_refusals(tmp_path: Path, make: Any, name: str, error: type[Exception], message: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(error, match=message):
        reparam.export(make(), tmp_path / name, X.to("meta") if "meta" in message else X)
    assert sorted(os.listdir(tmp_path)) == ["folder.onnx", "taken"]


def test_wrong_formats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format must be 'onnx', 'pt2' or None, not 'tflite'"):
        reparam.export(net(), tmp_path / "net.onnx", X, format="tflite")
    with pytest.raises(InputError, match=r"ends in \.pt2 and format is 'onnx'; leave format out, or rename"):
        reparam.export(net(), tmp_path / "net.pt2", X, format="onnx")
    with pytest.raises(InputError, match="path must name a file, not be a NoneType"):
        reparam.export(net(), None, X)  # type: ignore[arg-type]


def test_wrong_examples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not accept the example_input"):
        reparam.export(net(), tmp_path / "net.onnx", torch.randn(2, 4, 12, 12))
    with pytest.raises(InputError, match="no example input can be found for Many"):
        reparam.export(Many().eval(), tmp_path / "net.onnx")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(InputError, match=r"cannot write .*net\.onnx: Permission denied; choose another folder"):
        reparam.export(net(), tmp_path / "net.onnx", X)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="choose another folder"):
        reparam.export(net(), tmp_path / "locked" / "net.pt2", X)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(InputError) as caught:
        reparam.export(net(), tmp_path / "net.onnx", X)
    message = 'writing onnx needs onnx, onnxscript, onnxruntime: pip install "reparam[export]"'
    assert str(caught.value) == message
    assert reparam.export(net(), tmp_path / "net.pt2", X).passed


def test_dtypes_that_onnx_lacks(tmp_path: Path) -> None:
    model = Small().bfloat16().eval()
    with pytest.raises(ModelError, match=r"in bfloat16, which onnxruntime does not run on CPUs; export model\.float"):
        reparam.export(model, tmp_path / "net.onnx", torch.randn(2, 4, dtype=torch.bfloat16))


# Nothing is lost on failure ------------------------------------------------------------------------------------------


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def unreadable(path: Path) -> Any:
    raise RuntimeError("Could not find an implementation for Conv(11)\nand pages of advice")


@pytest.mark.parametrize(
    ("make", "changed", "error", "message"),
    [
        (
            branching,
            {},
            CaptureError,
            r"cannot record Small: .*data-dependent.*test_export\.py:\d+: .*if x\.sum\(\) > 0",
        ),
        (
            lambda: Small(lambda x: torch.linalg.eigvals(x.view(-1, 2, 2)).real).eval(),
            {},
            ModelError,
            r"cannot translate the network to ONNX: .*linalg_eig.*ends in \.pt2 needs no translation",
        ),
        (Small, {"write": full_disk}, OSError, "No space left"),
        (Small, {"write": interrupted}, KeyboardInterrupt, ""),
        (Small, {"open": unreadable}, ModelError, r"net\.onnx: the file cannot be opened again: .*Conv\(11\)$"),
    ],
)
def test_the_old_file_survives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make: Any,
    changed: dict[str, Any],
    error: type[BaseException],
    message: str,
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"precious")
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], **changed))
    with pytest.raises(error) as caught:
        reparam.export(make().eval(), path, torch.randn(2, 4))
    assert re.search(message, str(caught.value))
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert capfd.readouterr() == ("", "")


def test_a_new_file_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")
    assert reparam.export(net(), path, X).passed
    assert compare(net(), path, X).passed


def test_comparing_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"net\.onnx does not exist"):
        compare(net(), tmp_path / "net.onnx", X)
    for ending in ENDINGS:
        (tmp_path / f"net.{ending}").write_bytes(b"no such thing")
        with pytest.raises(ModelError, match="the file cannot be opened again"):
            compare(net(), tmp_path / f"net.{ending}", X)


def test_comparing_with_a_network_of_other_shapes(written: Path) -> None:
    wider = net()
    wider.head = nn.Linear(8, 6)
    with pytest.raises(ModelError, match=r"returns \[\(2, 6\)\], and the file \[\(2, 5\)\]"):
        compare(wider.eval(), written, X)
    with pytest.raises(ModelError, match="cannot run it on inputs of"):
        compare(Small().eval(), written, torch.randn(2, 4))

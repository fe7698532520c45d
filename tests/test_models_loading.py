"""`reparam.models`: models by name, weights from files, and every way in which both can be wrong."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from reparam.distill.students import build
from reparam.errors import FormatError, InputError, ModelError
from reparam.models import load_model, load_weights
from reparam.weight_files import read_weights, save_weights

NETS = '''
"""Builders for the tests."""
from torch import nn
from helper import WIDTH

def build(num_classes=4, in_chans=3):
    return nn.Sequential(nn.Conv2d(in_chans, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Flatten(), nn.Linear(WIDTH, num_classes))

def plain():
    return nn.Linear(3, 2)

def broken():
    raise RuntimeError("no such luck")

def number():
    return 3

class Namespace:
    @staticmethod
    def inner():
        return nn.Linear(5, 1)

instance = nn.Linear(1, 1)
constant = 7
'''  # noqa: E501


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


# Models by name ------------------------------------------------------------------------------------------------------


def test_timm_name_with_classes_and_channels() -> None:
    model = load_model("resnet10t", num_classes=7, in_chans=1)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)


def test_unknown_timm_name_lists_near_matches() -> None:
    with pytest.raises(InputError, match=r"no model 'resnet81'; did you mean .*'resnet18'"):
        load_model("resnet81")


def test_callable_in_a_file_that_imports_its_neighbour(nets: Path) -> None:
    model = load_model(f"{nets}:build", num_classes=9)
    assert isinstance(model, nn.Sequential)
    assert model[0].out_channels == 6
    assert model[3].out_features == 9


def test_nested_callable(nets: Path) -> None:
    assert isinstance(load_model(f"{nets}:Namespace.inner"), nn.Linear)


def test_callable_in_a_module() -> None:
    assert load_model("torchvision.models:squeezenet1_1", num_classes=5)(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_arguments_behind_kwargs_are_tried() -> None:
    """torchvision's builders take ``**kwargs`` and hand them on to a class that knows no ``in_chans``."""
    with pytest.raises(InputError, match=r"torchvision.models:resnet18 takes no argument in_chans: TypeError"):
        load_model("torchvision.models:resnet18", num_classes=5, in_chans=3)
    assert build("torchvision.models:resnet18", 5, 3).fc.out_features == 5


def test_module_in_the_current_folder(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.rename(nets.with_name("my_local_nets.py"))
    monkeypatch.chdir(nets.parent)
    assert isinstance(load_model("my_local_nets:plain"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("", {}, InputError, "named by a string"),
        ("nets.py:", {}, InputError, "not of the form"),
        (":build", {}, InputError, "not of the form"),
        ("nets.py", {}, InputError, r"names a file, but no model in it; write nets\.py:callable"),
        ("weights.pth", {}, InputError, "is a file; name the model itself"),
        ("net.py:build", {}, InputError, r"no such file: .*net\.py; did you mean .*nets\.py"),
        ("nets.py:bild", {}, InputError, r"has no 'bild'; did you mean 'build'"),
        ("nets.py:plain", {"num_classes": 3}, InputError, r"takes no argument num_classes; its signature is plain\(\)"),
        ("nets.py:broken", {}, ModelError, r"failed: RuntimeError: no such luck \(at .*nets\.py:\d+\)"),
        ("nets.py:number", {}, ModelError, "returned a int, not an nn.Module"),
        ("nets.py:instance", {}, InputError, "is a module object"),
        ("nets.py:constant", {}, InputError, "is a int"),
        ("bad.py:build", {}, ModelError, r"importing .*bad\.py failed: SyntaxError"),
        ("no_such_package_at_all.nets:build", {}, InputError, "there is no module 'no_such_package_at_all.nets'"),
        ("torch.nn:Liner", {}, InputError, r"has no 'Liner'; did you mean 'Linear'"),
        ("resnet10t", {"no_such": 1}, TypeError, "no_such"),
        ("resnet10t", {"in_chans": -1}, ModelError, r"could not build resnet10t\(in_chans=-1\)"),
        ("resnet10t", {"pretrained": True, "checkpoint": "x"}, InputError, "both given"),
        ("resnet10t", {"ema": True}, InputError, "no checkpoint was given"),
    ],
)
def test_bad_names(
    nets: Path, monkeypatch: pytest.MonkeyPatch, spec: str, options: dict[str, Any], error: type, message: str
) -> None:
    (nets.parent / "bad.py").write_text("def build(:\n")
    (nets.parent / "weights.pth").write_bytes(b"")
    monkeypatch.chdir(nets.parent)
    with pytest.raises(error, match=message):
        load_model(spec, **options)


def test_an_import_that_fails_inside_the_users_module_is_not_called_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"importing needs_more failed: .*no_such_dependency"):
        load_model("needs_more:build")


# Weights -------------------------------------------------------------------------------------------------------------


def wrap_plain(state: dict[str, Tensor]) -> object:
    return state


WRAPPERS = {
    "plain": wrap_plain,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "arch": "small"},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "data parallel": lambda state: {"state_dict": {"module." + key: value for key, value in state.items()}},
    "compiled and parallel": lambda state: {"module._orig_mod." + key: value for key, value in state.items()},
    "timm, with its arguments": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_checkpoints_and_their_wrappers(tmp_path: Path, wrapper: str) -> None:
    source, target = small(), small()
    assert not equal(source.state_dict(), target.state_dict())
    torch.save(WRAPPERS[wrapper](source.state_dict()), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert equal(source.state_dict(), target.state_dict())


def test_averaged_weights(tmp_path: Path) -> None:
    raw, averaged, target = small(), small(), small()
    path = tmp_path / "both.pth"
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, path)
    load_weights(target, path)
    assert equal(target.state_dict(), raw.state_dict())
    load_weights(target, path, ema=True)
    assert equal(target.state_dict(), averaged.state_dict())


def test_averaged_weights_that_are_not_there(tmp_path: Path) -> None:
    torch.save({"state_dict": small().state_dict(), "epoch": 1}, tmp_path / "raw.pth")
    with pytest.raises(FormatError, match=r"no averaged weights under state_dict_ema.* it holds state_dict, epoch"):
        read_weights(tmp_path / "raw.pth", ema=True)
    save_weights(small(), tmp_path / "raw.safetensors")
    with pytest.raises(FormatError, match="no EMA to choose"):
        read_weights(tmp_path / "raw.safetensors", ema=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_save_weights_round_trip(tmp_path: Path, name: str) -> None:
    source, target = small().to(torch.bfloat16), small().to(torch.bfloat16)
    save_weights(source, tmp_path / name)
    load_weights(target, tmp_path / name)
    assert equal(source.state_dict(), target.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_save_weights_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        save_weights(small(), tmp_path / "missing" / "weights.safetensors")


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_under_all_names_or_one(tmp_path: Path) -> None:
    source = tied()
    save_weights(source, tmp_path / "all.safetensors")
    save_model(source, str(tmp_path / "one.safetensors"))
    assert len(read_weights(tmp_path / "all.safetensors")) == 2
    assert len(read_weights(tmp_path / "one.safetensors")) == 1
    for name in ("all", "one"):
        target = tied()
        load_weights(target, tmp_path / f"{name}.safetensors")
        assert equal(source.state_dict(), target.state_dict())
        assert target[0].weight is target[2].weight


def test_a_model_whose_own_names_begin_with_module(tmp_path: Path) -> None:
    source, target = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
    save_weights(source, tmp_path / "weights.safetensors")
    load_weights(target, tmp_path / "weights.safetensors")
    assert equal(source.state_dict(), target.state_dict())


def test_old_checkpoints_without_batch_counters(tmp_path: Path) -> None:
    source, target = small(), small()
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    save_file(state, tmp_path / "old.safetensors")
    load_weights(target, tmp_path / "old.safetensors")
    assert torch.equal(source[0].weight, target[0].weight)


def test_load_hooks_that_rename_keys_are_obeyed(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    old = {"weight_g": source.weight.detach().norm(dim=1, keepdim=True), "weight_v": source.weight.detach()}
    save_file({**old, "bias": source.bias.detach()}, tmp_path / "old.safetensors")
    load_weights(target, tmp_path / "old.safetensors")
    torch.testing.assert_close(target.weight, source.weight)


def test_a_classifier_for_other_classes_starts_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    source, target = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes)) for classes in (7, 5))
    save_weights(source, tmp_path / "seven.safetensors")
    own = target[1].weight.detach().clone()
    with pytest.raises(FormatError, match=r"2 mismatched: 1\.weight \(file \[7, 4\], model \[5, 4\]\)"):
        load_weights(target, tmp_path / "seven.safetensors")
    with pytest.warns(UserWarning, match=r"is for 7 classes, and there are 5: 1\.bias, 1\.weight start anew"):
        load_weights(target, tmp_path / "seven.safetensors", new_classifier=True)
    assert torch.equal(target[0].weight, source[0].weight) and torch.equal(target[1].weight, own)
    narrow = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 5))  # not a classifier alone
    with pytest.raises(FormatError, match="3 mismatched"):
        load_weights(narrow, tmp_path / "seven.safetensors", new_classifier=True)


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_weights(small(), tmp_path / "weights.safetensors")
    before = (tmp_path / "weights.safetensors").read_bytes()
    monkeypatch.setattr("reparam.weight_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(small(), tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = {key: torch.full_like(value, 5) for key, value in small().state_dict().items()}
    state["2.weight"] = torch.zeros(3, 4, 1, 1)
    state["extra"] = state.pop("0.bias")
    save_file(state, tmp_path / "other.safetensors")
    target = small()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(FormatError) as caught:
        load_weights(target, tmp_path / "other.safetensors")
    message = str(caught.value)
    assert "does not fit Sequential" in message
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: extra" in message
    assert "1 mismatched: 2.weight (file [3, 4, 1, 1], model [2, 4, 1, 1])" in message
    assert equal(before, target.state_dict())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_file({f"k{index:02}": torch.zeros(1) for index in range(30)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match=r"30 unexpected: k00, .* and 22 more"):
        load_weights(small(), tmp_path / "other.safetensors")


# Hostile and damaged files -------------------------------------------------------------------------------------------


class Bomb:
    """Runs a command when it is unpickled by an ordinary unpickler."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "wrapped", "state"])
def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path: Path, place: str, legacy: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "hostile.pth"
    state: dict[str, Any] = dict(small().state_dict())
    content = {
        "value": {"state_dict": state, "note": Bomb(marker)},
        "wrapped": Bomb(marker),
        "state": {**state, "0.weight": Bomb(marker)},
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FormatError, match=r"was refused and nothing in it was executed.*\w+\.mkdir"):
        load_model("torch.nn:Identity", checkpoint=path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file does bite where nobody looks
    assert marker.exists()


def test_a_plain_pickle_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(FormatError):
        read_weights(path)
    assert not marker.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "module.pth")
    with pytest.raises(FormatError, match=r"plain values \([\w.]+\)\. .*save its state_dict alone"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_weights(small(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"cut\.safetensors is truncated or not a safetensors file"):
        read_weights(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -200])
def test_truncated_checkpoint(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.pth"
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"cut\.pth"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not weights by name"),
        ({"epoch": 3, "lr": 0.1}, "no weights under state_dict, .* it holds epoch, lr"),
        ({}, "no weights"),
    ],
)
def test_files_without_weights(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(FormatError, match=message):
        read_weights(tmp_path / "odd.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such weight file"):
        read_weights(tmp_path / "none.pth")

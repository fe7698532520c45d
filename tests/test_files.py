"""Teachers on disk: what comes back is what was saved; nothing is executed; nothing half-written stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import BY_NAME, UNet, built, error, sample

import reparam
from reparam.errors import FormatError, InputError
from reparam.passes import files
from reparam.passes.teacher import Teacher


def teacher_of(name: str, dtype: torch.dtype = torch.float64, ratio: int = 2) -> Teacher:
    entry = BY_NAME[name]
    return reparam.expand(built(entry, dtype), ratio, example_input=sample(entry.shape, dtype=dtype), verify=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        torch.equal(t, second[key]) and t.dtype == second[key].dtype for key, t in first.items()
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("name", ["unet", "net1d", "net3d", "mlp", "tied", "weight_norm", "spectral_norm", "nfnet"])
def test_round_trip(name: str, ratio: int, path: Path) -> None:
    teacher = teacher_of(name, ratio=ratio)
    reparam.save(teacher, path)
    fresh = built(BY_NAME[name], seed=7)
    before = {key: t.clone() for key, t in fresh.state_dict().items()}
    loaded = reparam.load(path, fresh)
    assert same(teacher, loaded)
    x = sample(BY_NAME[name].other)
    with torch.no_grad():
        assert torch.equal(teacher(x), loaded(x))
        assert torch.equal(reparam.student_view(teacher)(x), reparam.student_view(loaded)(x))
        assert error(fresh(x), loaded(x)) > 1e-6
    assert type(reparam.extract(loaded)) is type(fresh)
    assert all(torch.equal(t, before[key]) for key, t in fresh.state_dict().items())
    # ... and a second generation is the same file.
    again = path.with_name("again.safetensors")
    reparam.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough if name in ("googlenet", "densenet121", "regnetx_002") else ())
        for name in ("googlenet", "densenet121", "densenet", "shufflenet_v2_x0_5", "regnetx_002")
    ],
)
def test_round_trip_of_whole_networks(name: str, path: Path) -> None:
    teacher = teacher_of(name, torch.float32)
    reparam.save(teacher, path)
    assert same(teacher, reparam.load(path, built(BY_NAME[name], torch.float32, seed=7)))


def test_a_trained_teacher(path: Path) -> None:
    teacher = teacher_of("unet").train()
    view = reparam.student_view(teacher).train()
    optimizer = torch.optim.AdamW(teacher.parameters(), 1e-3)
    x = sample((2, 3, 32, 32))
    for _ in range(2):
        (teacher(x).square().mean() + view(x).square().mean()).backward()
        optimizer.step()
    reparam.save(teacher, path)
    loaded = reparam.load(path, UNet().double().train())
    assert same(teacher, loaded)
    assert loaded.training
    teacher.eval()
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(teacher(x), loaded(x))
        assert same(reparam.extract(teacher), reparam.extract(loaded))


def test_training_goes_on_after_loading(path: Path) -> None:
    teacher = teacher_of("net1d").train()
    reparam.save(teacher, path)
    loaded = reparam.load(path, built(BY_NAME["net1d"]).train())
    x = sample((4, 2, 64))
    for one in (teacher, loaded):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        (one(x).square().mean() + reparam.student_view(one)(x).square().mean()).backward()
        optimizer.step()
    assert same(teacher, loaded)


def test_tied_weights_are_written_once(path: Path) -> None:
    teacher = teacher_of("tied")
    reparam.save(teacher, path)
    assert {"encode.weight", "decode.weight"} - set(load_file(path)) == {"decode.weight"}
    loaded = reparam.load(path, built(BY_NAME["tied"]))
    assert loaded.encode.weight is loaded.decode.weight
    assert torch.equal(loaded.encode.weight, teacher.encode.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype, path: Path) -> None:
    teacher = teacher_of("net1d", dtype)
    reparam.save(teacher, path)
    assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {dtype}
    assert same(teacher, reparam.load(path, built(BY_NAME["net1d"], dtype)))


def test_a_student_of_another_dtype_decides(path: Path) -> None:
    """The file holds float32; the given student, and so the teacher, is float64."""
    teacher = teacher_of("net1d", torch.float32)
    reparam.save(teacher, path)
    loaded = reparam.load(path, built(BY_NAME["net1d"], torch.float64))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert all(torch.equal(t.double(), loaded.state_dict()[key].double()) for key, t in teacher.state_dict().items())


def test_mode_and_flags_come_from_the_student(path: Path) -> None:
    reparam.save(teacher_of("unet"), path)
    student = UNet().double().train()
    student.head.weight.requires_grad_(False)
    loaded = reparam.load(path, student)
    assert loaded.training
    assert not loaded.head.weight.requires_grad


def test_the_file_is_plain_safetensors_with_the_plan(path: Path) -> None:
    teacher = teacher_of("unet")
    reparam.save(teacher, str(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["reparam_plan"])["format"] == "reparam-plan"
    assert set(load_file(path)) == set(teacher.state_dict())


def test_ignored_layers_survive(path: Path) -> None:
    model = built(BY_NAME["unet"])
    x = sample((2, 3, 32, 32))
    teacher = reparam.expand(model, 2, example_input=x, ignore=["down.*"])
    reparam.save(teacher, path)
    assert same(teacher, reparam.load(path, model))


def test_keyword_inputs_survive(path: Path) -> None:
    model = built(BY_NAME["net1d"])
    reparam.save(reparam.expand(model, 2, example_input={"x": sample((2, 2, 64))}), path)
    loaded = reparam.load(path, model)
    x = sample((3, 2, 80))
    with torch.no_grad():
        assert error(model(x), loaded(x=x)) <= 1e-12


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("net1d")
    reparam.save(teacher, path)
    before = path.read_bytes()

    def broken(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left on device")

    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    for target in ("os.replace", "reparam.weight_files.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(OSError, match="no space left"):
                reparam.save(teacher, path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
    reparam.save(teacher, path)
    assert path.read_bytes() != before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name the file in it"):
        reparam.save(teacher_of("net1d"), tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder .*nowhere does not exist; make it first"):
        reparam.save(teacher_of("net1d"), tmp_path / "nowhere" / "teacher.safetensors")


def test_saving_something_else(path: Path) -> None:
    with pytest.raises(InputError, match=r"teacher made by reparam\.expand or reparam\.load is needed, not UNet"):
        reparam.save(UNet(), path)
    assert not path.exists()


def test_the_file_can_be_read_by_others(path: Path) -> None:
    reparam.save(teacher_of("net1d"), path)
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(path: Path) -> Path:
    reparam.save(teacher_of("net1d"), path)
    return path


def student() -> nn.Module:
    return built(BY_NAME["net1d"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors does not exist"):
        reparam.load(tmp_path / "none.safetensors", student())


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file(written: Path, keep: float) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(FormatError, match=r"is no readable safetensors file \(truncated or damaged\)"):
        reparam.load(written, student())


def test_a_pickle_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weight": Hostile()}, path)
    with pytest.raises(FormatError, match="no readable safetensors file"):
        reparam.load(path, student())
    assert not (tmp_path / "executed").exists()


def test_a_file_without_a_plan(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(FormatError, match=r"holds no plan: it is not a teacher written by reparam\.save"):
        reparam.load(path, student())


def rewritten(
    path: Path,
    plan: Callable[[dict], object] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> None:
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["reparam_plan"])
    state = load_file(path)
    if plan:
        plan(data)
    if tensors:
        tensors(state)
    save_file(state, path, metadata={"reparam_plan": json.dumps(data)})


def test_a_plan_of_an_unknown_version(written: Path) -> None:
    rewritten(written, lambda data: data.update(version=1))
    with pytest.raises(FormatError, match="has version 1, this release of reparam reads version 2"):
        reparam.load(written, student())


def test_a_damaged_plan(written: Path) -> None:
    rewritten(written, lambda data: data.pop("params"))
    with pytest.raises(FormatError, match="the plan is damaged: KeyError: 'params'"):
        reparam.load(written, student())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["edits"].update(relu_99={"steps": [], "constants": [], "out": []}),
        lambda data: data["edits"].update(add={"steps": [[["args", 77], []]], "constants": [], "out": []}),
        lambda data: data["edits"].update(add={"steps": [], "constants": [[["nowhere", 0], 1]], "out": []}),
        lambda data: data["attributes"].update({"no.such.module": 1}),
        lambda data: data["attributes"].update({"stem.forward": 1}),
        lambda data: data["attributes"].update({"stem.weight": 1}),
        lambda data: data["attributes"].update({"stem._parameters": 1}),
        lambda data: data.update(statistics=["norm.nothing"]),
        lambda data: data.update(statistics=["norm"]),
        lambda data: data["inputs"].update(args=[{"tensor": [2, 2, 64], "dtype": "load"}]),
        lambda data: data["inputs"].update(args=[{"tensor": [2, 5, 64], "dtype": "float64"}]),
        lambda data: data["inputs"].update(args=[]),
        lambda data: data["params"].pop("stem.weight"),
    ],
)
def test_a_plan_that_does_not_fit_its_student(written: Path, change: Callable[[dict], object]) -> None:
    """Whatever stands in the JSON: a FormatError, and nothing else happens."""
    rewritten(written, change)
    with pytest.raises(FormatError):
        reparam.load(written, student())


def test_a_student_of_another_class(written: Path) -> None:
    with pytest.raises(FormatError, match="holds a teacher of Net1d, the given student is a UNet"):
        reparam.load(written, UNet())


def test_a_student_of_another_width(written: Path) -> None:
    other = student()
    other.mix[0] = nn.Conv1d(12, 12, 3, padding=1)
    with pytest.raises(FormatError, match=r"mix\.0\.weight was \[12, 12, 1\], the given student has \[12, 12, 3\]"):
        reparam.load(written, other)
    wide = student()
    wide.head = nn.Linear(36, 9).double()
    with pytest.raises(FormatError, match=r"head\.weight was \[5, 36\], the given student has \[9, 36\]"):
        reparam.load(written, wide)


def test_a_student_with_another_graph(written: Path) -> None:
    other = student()
    other.pool = nn.AdaptiveMaxPool1d(3)
    with pytest.raises(FormatError, match="the graph of the given student differs from the one that was expanded"):
        reparam.load(written, other)


def test_weights_that_do_not_fit(written: Path) -> None:
    rewritten(written, tensors=lambda state: state.update({"stem.weight": torch.zeros(3, 3)}))
    with pytest.raises(FormatError, match=r"stem\.weight has shape \[3, 3\], the teacher needs \[24, 2, 7\]"):
        reparam.load(written, student())


def test_missing_and_unexpected_weights(written: Path) -> None:
    rewritten(written, tensors=lambda state: state.update(strange=state.pop("stem.weight")))
    with pytest.raises(FormatError, match=r"does not fit: missing \['stem\.weight'\], unexpected \['strange'\]"):
        reparam.load(written, student())


def test_a_student_that_cannot_be_one(written: Path) -> None:
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, not str"):
        reparam.load(written, "resnet18")  # type: ignore[arg-type]


def test_unshared_keeps_empty_tensors() -> None:
    state = {"a": torch.zeros(0), "b": torch.zeros(0)}
    assert set(files._unshared(state)) == {"a", "b"}

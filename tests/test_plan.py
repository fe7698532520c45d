"""The plan as data: coverage, table, JSON, drawings, multiply-adds, ignored layers, meta models."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import BY_NAME, Net1d, UNet, built, error, mlp, randomise, sample

import reparam
from reparam.errors import FormatError, InputError
from reparam.passes.plan import VERSION, Plan

X = torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def unet() -> Plan:
    return reparam.plan(UNet(), 2, example_input=X)


# Contents ------------------------------------------------------------------------------------------------------------


class Computed(nn.Module):
    """Layers whose operator sees another form of the weight: reshaped, or made by a layer from an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.flat, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)).flatten(2)
        x = self.flat.weight.flatten(1) @ x
        scale = self.flat.weight.square().sum((1, 2, 3))  # and its norm: a second use of the same weight
        return self.last((x * scale.view(-1, 1)).unsqueeze(-1))


def test_rows_have_the_shapes_of_the_parameters() -> None:
    """Whatever form of it the operator sees; of several operators the first is named."""
    network, x = Computed(), torch.randn(2, 3, 5, 5)
    plan = reparam.plan(network, 2, example_input=x)
    wide = reparam.expand(network, 2, example_input=x).state_dict()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}
    assert {row.name: row.shape for row in plan.layers} == shapes
    assert {row.name: row.wide_shape for row in plan.layers} == {name: tuple(wide[name].shape) for name in shapes}
    assert shapes["flat.weight"] == (6, 4, 1, 1) and tuple(wide["flat.weight"].shape) == (12, 8, 1, 1)


class Unknown(nn.Module):
    """A layer whose weight goes through something that has no rule."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.how = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), how
        self.branching = Branching()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.middle.weight * 2
        weight = torch.linalg.matrix_exp(weight) if self.how == "operator" else self.branching(weight)
        return self.last(F.linear(F.relu(self.first(x)), weight).relu())


class Branching(nn.Module):
    """Code that no graph can hold."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight if bool(weight.sum() > 0) else -weight


@pytest.mark.parametrize(
    ("how", "reader"),
    [
        ("operator", r"linalg_matrix_exp, which has no rule$"),
        ("code", r"branching, which is kept as it is \(\S+test_plan\.py:\d+: control flow depends on"),
    ],
)
def test_notes_name_what_keeps_a_weight_narrow(how: str, reader: str) -> None:
    plan = reparam.plan(Unknown(how), 2, example_input=torch.randn(2, 4))
    (note,) = plan.notes
    assert re.search("^middle.weight: kept at student width, read by " + reader, note), note
    assert str(plan).endswith(note)
    assert {row.name: row.widened for row in plan.layers}["middle.weight"] is False


class Monitored(nn.Module):
    """Reads its weights with an operator that has no rule, beside using them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.special.i0e(self.middle.weight.detach()).sum()
        return self.last(self.middle(self.first(x).relu()).relu()) * (1 + 0.01 * size)


def test_notes_say_nothing_about_weights_that_are_widened() -> None:
    plan = reparam.plan(Monitored(), 2, example_input=torch.randn(2, 4))
    assert {row.name: row.widened for row in plan.layers}["middle.weight"]
    assert plan.notes == ()


@torch.library.custom_op("reparam_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_notes_on_an_operator_of_ones_own() -> None:
    class Custom(Monitored):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(self.first(x).relu(), halved(self.middle.weight)).relu())

    (note,) = reparam.plan(Custom(), 2, example_input=torch.randn(2, 4)).notes
    assert note.startswith("middle.weight: kept at student width, read by ") and "exported" not in note


def test_notes_on_an_exported_program() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    plan = reparam.plan(torch.export.export(network, (x,)).module(), 2, example_input=x)
    first, second = plan.notes
    assert first == "0.weight and 1 more: kept at student width, read by conv2d.default, which has no rule"
    assert second.endswith("plan the module itself")
    assert reparam.plan(network, 2, example_input=x).notes == ()


def test_layers(unet: Plan) -> None:
    layers = {layer.name: layer for layer in unet.layers}
    assert list(layers) == [n for n, p in UNet().named_parameters() if p.dim() == 4]
    first, last, middle = layers["down.0.0.weight"], layers["head.weight"], layers["middle.0.weight"]
    assert (first.shape, first.wide_shape, first.reason) == ((8, 3, 3, 3), (16, 3, 3, 3), "input of the network")
    assert (last.shape, last.wide_shape, last.reason) == ((3, 8, 1, 1), (3, 16, 1, 1), "output of the network")
    assert (middle.shape, middle.wide_shape, middle.reason) == ((32, 16, 3, 3), (64, 32, 3, 3), "")
    assert all(layer.widened for layer in unet.layers)
    assert layers["up.0.weight"].operator == "conv_transpose2d"
    assert re.fullmatch(r".*:\d+", middle.source)
    assert unet.coverage == 1.0
    assert (unet.model, unet.ratio, unet.leaves.keys() & {"head"}) == ("UNet", 2, set())


def test_parameters_are_counted(unet: Plan) -> None:
    model = UNet()
    teacher = reparam.expand(model, 2, example_input=X)
    assert unet.parameters == sum(p.numel() for p in model.parameters())
    assert unet.wide_parameters == sum(p.numel() for p in teacher.parameters())


def test_multiply_adds_of_resnet18() -> None:
    """Counted by hand: 1.814 G for the student, 7.019 G for the teacher (3.87x; the stem only 2x)."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet18")
    made = reparam.plan(model, 2)
    student, teacher = made.multiply_adds
    assert student / 1e9 == pytest.approx(1.814, abs=0.001)
    assert teacher / 1e9 == pytest.approx(7.019, abs=0.003)
    assert teacher / student == pytest.approx(3.87, abs=0.01)
    stem = made.layers[0]
    assert stem.wide_multiply_adds == 2 * stem.multiply_adds


def test_multiply_adds_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten()
    )
    model.append(nn.Linear(8 * 7 * 7, 10))
    made = reparam.plan(model, 2, example_input=torch.randn(5, 3, 16, 16))
    assert [x.multiply_adds for x in made.layers] == [16 * 16 * 27 * 8, 7 * 7 * 36 * 8, 8 * 49 * 10]
    assert [x.wide_multiply_adds for x in made.layers] == [2 * 16 * 16 * 27 * 8, 4 * 7 * 7 * 36 * 8, 2 * 8 * 49 * 10]


def test_a_transposed_convolution_is_counted_by_its_input() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 6, 3, stride=2))
    made = reparam.plan(model, 2, example_input=torch.randn(2, 1, 5, 5))
    assert made.layers[1].multiply_adds == 5 * 5 * 4 * 6 * 9


def test_the_plan_is_immutable(unet: Plan) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        unet.ratio = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        unet.params["x"] = None  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        unet.layers[0].shape = ()  # type: ignore[misc]


def test_ratio_1() -> None:
    made = reparam.plan(UNet(), 1, example_input=X)
    assert not made.params and not made.edits
    assert made.coverage == 0.0
    assert made.parameters == made.wide_parameters
    assert made.multiply_adds[0] == made.multiply_adds[1]
    assert all(layer.shape == layer.wide_shape for layer in made.layers)
    assert "0.0%" in str(made)


def test_ratio_3() -> None:
    made = reparam.plan(UNet(), 3, example_input=X)
    layers = {layer.name: layer for layer in made.layers}
    assert layers["middle.0.weight"].wide_shape == (96, 48, 3, 3)


# For people ----------------------------------------------------------------------------------------------------------


def test_the_table(unet: Plan) -> None:
    lines = str(unet).splitlines()
    assert lines[0].split() == ["layer", "operator", "shape", "teacher", "widened", "multiply-adds"]
    assert set(lines[1]) <= {"-", " "}
    row = next(line for line in lines if line.startswith("middle.0.weight"))
    assert re.search(r"conv2d +32x16x3x3 +64x32x3x3 +yes +[\d.]+k -> [\d.]+M$", row)
    assert "head.weight" in str(unet) and "output of the network" in str(unet)
    assert "UNet, ratio 2: 100.0% of the conv and linear weights widened on both sides" in str(unet)
    assert re.search(r"parameters [\d.]+k -> [\d.]+k, multiply-adds per sample [\d.]+M -> [\d.]+M", str(unet))


def test_the_table_names_what_is_contracted() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.sort(self.stem(x), dim=1).values)

    made = reparam.plan(Sorted(), 2, example_input=torch.randn(3, 4))
    text = str(made)
    assert re.search(r"contracted before sort \(sort.*test_plan\.py:\d+\): \S", text)
    assert "its input is at student width" in text
    assert made.coverage < 1


def test_a_module_that_is_never_called_stands_in_the_table() -> None:
    model = mlp()
    model.add_module("spare", nn.Identity())
    model.spare.unused = nn.Linear(3, 3)
    made = reparam.plan(model, 2, example_input=torch.randn(4, 20))
    layer = made.layers[-1]
    assert (layer.name, layer.widened, layer.reason) == ("spare.unused.weight", False, "not used by this forward pass")


class Sized(nn.Module):
    """A depthwise layer as a function that reads a size off its weight, and a weight that is read as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 2, 1)
        self.taps = nn.Parameter(torch.randn(8, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weight = self.depth.weight.squeeze(1)
        x = F.conv1d(x, weight.unsqueeze(1), self.depth.bias, padding=weight.shape[-1] - 1, groups=x.shape[1])
        x = torch.exp(-((x.transpose(1, 2).unsqueeze(-1) - torch.linspace(-1, 1, 5, dtype=x.dtype)) ** 2)).flatten(2)
        return self.head(F.linear(x, self.taps.flatten(1)).transpose(1, 2))


class Sorted(nn.Module):
    """A weight whose rows are sorted: there is no rule for that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(F.linear(torch.relu(self.stem(x)), self.body.weight.sort(0).values)))


def test_a_size_that_is_read_off_a_computed_weight_does_not_keep_it_narrow() -> None:
    model = randomise(Sized().double()).eval()
    teacher = reparam.expand(model, 2, example_input=sample((2, 3, 7)))
    assert [layer.wide_shape for layer in teacher.plan.layers if layer.name in ("depth.weight", "taps")] == [
        (16, 16, 5),
        (16, 1, 3),
    ]
    assert teacher.plan.coverage == 1.0
    with torch.no_grad():
        for shape in [(1, 3, 9), (5, 3, 7)]:
            assert error(model(sample(shape)), teacher(sample(shape))) <= 1e-12


@pytest.mark.parametrize("build", [Sorted, Sized, UNet], ids=lambda c: c.__name__)
def test_what_is_not_widened_has_a_reason(build: Any) -> None:
    x = {Sorted: (2, 3), Sized: (2, 3, 7), UNet: (2, 3, 32, 32)}[build]
    made = reparam.plan(build(), 2, example_input=torch.randn(x))
    assert all(layer.widened or layer.reason for layer in made.layers)
    assert all(row.reason for row in made.contractions)


def test_dot(unet: Plan) -> None:
    text = unet.to_dot()
    assert text.startswith("digraph plan {") and text.endswith("}")
    assert text.count("->") >= len(unet.layers) - 1
    assert "middle.0.weight" in text and "32x16x3x3 -> 64x32x3x3" in text
    assert text.count('label="') == len(unet.layers)


def test_drawing_without_graphviz(unet: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    for name in ("plan.svg", "plan.png", "plan.dot"):
        written = unet.draw(tmp_path / name)
        assert written == tmp_path / "plan.dot"
        assert written.read_text() == unet.to_dot()
    assert not (tmp_path / "plan.svg").exists()


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_drawing_with_graphviz(unet: Plan, tmp_path: Path) -> None:
    assert b"<svg" in unet.draw(tmp_path / "plan.svg").read_bytes()


def test_drawing_calls_graphviz(unet: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dot"
    program.write_text('#!/bin/sh\necho "<svg $1>"\ncat\n')
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _name: str(program))
    written = unet.draw(str(tmp_path / "plan.svg"))
    assert written == tmp_path / "plan.svg"
    assert written.read_text().startswith("<svg -Tsvg>\ndigraph plan {")


def test_drawing_as_something_else(unet: Plan, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot draw a plan as 'plan\.jpeg': the ending must be \.svg, \.png or \.dot"
    ):
        unet.draw(tmp_path / "plan.jpeg")


# For files -----------------------------------------------------------------------------------------------------------


def same(a: Plan, b: Plan) -> None:
    for field in dataclasses.fields(Plan):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        assert dict(mine) == dict(other) if hasattr(mine, "items") else mine == other, field.name


@pytest.mark.parametrize(
    "name",
    [
        "unet",
        "net1d",
        "tied",
        "spectral_norm",
        pytest.param("googlenet", marks=pytest.mark.thorough),
        "densenet",
        "shufflenet_v2_x0_5",
        "nfnet",
    ],
)
def test_json_round_trip(name: str) -> None:
    entry = BY_NAME[name]
    made = reparam.plan(built(entry), 3, example_input=sample(entry.shape))
    text = made.to_json()
    again = Plan.from_json(text)
    same(made, again)
    assert again.to_json() == text
    assert json.loads(text)["version"] == VERSION
    assert str(again) == str(made)
    assert (again.coverage, again.multiply_adds) == (made.coverage, made.multiply_adds)


def test_json_of_keyword_inputs_and_constants() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, image: torch.Tensor, scale: float = 1.0, size: tuple[int, int] = (1, 1)) -> dict[str, Any]:
            x = torch.relu(self.stem(image)) * scale
            x = nn.functional.adaptive_avg_pool2d(x, size)
            x = x.reshape(x.shape[0], 8, -1)[:, 0:8, ..., None]
            return {"out": self.head(x)}

    made = reparam.plan(Options(), 2, example_input={"image": X, "scale": 2.0, "size": (3, 3)})
    same(made, Plan.from_json(made.to_json()))
    assert made.inputs["kwargs"]["size"] == {"tuple": [{"value": 3}, {"value": 3}]}


def test_unknown_version(unet: Plan) -> None:
    data = json.loads(unet.to_json())
    data["version"] = 99
    with pytest.raises(
        FormatError, match=rf"this plan has version 99, this release of reparam reads version {VERSION}; make the"
    ):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '"x"', "null", '{"format": "other"}'])
def test_not_a_plan(text: str) -> None:
    with pytest.raises(FormatError, match="not a plan"):
        Plan.from_json(text)


def damaged(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Copies with one thing missing or of another type."""
    result = []
    for key in data:
        if key in ("format", "version"):
            continue
        result.append({k: v for k, v in data.items() if k != key})
        for wrong in (None, 7, "x", [1], {"a": 1}):
            if type(wrong) is not type(data[key]):
                result.append({**data, key: wrong})
    return result


def test_damaged_plans(unet: Plan) -> None:
    data = json.loads(unet.to_json())
    for wrong in damaged(data):
        with pytest.raises(FormatError, match="the plan is damaged"):
            Plan.from_json(json.dumps(wrong))


def test_damaged_tables(unet: Plan) -> None:
    def change(path: list[Any], value: Any) -> str:
        data = json.loads(unet.to_json())
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        return json.dumps(data)

    for path, value in [
        (["params", "head.weight", "maps"], {"1": {"size": 8, "repeat": 0}}),
        (["params", "head.weight", "maps"], {"7": {"size": 8, "repeat": 2}}),
        (["params", "head.weight", "maps"], {"1": {"size": 8, "index": [0, 1]}}),
        (["params", "head.weight", "maps"], {"1": {"size": 8, "index": [9] * 16}}),
        (["params", "head.weight", "shape"], [3, -8, 1, 1]),
        (["params", "head.weight", "divide"], "x"),
        (["layers", 0], {"name": "x"}),
        (["contractions"], [{"node": "x"}]),
        (["edits"], {"relu": {"steps": [[["args", 0], [{"step": "explode"}]]], "constants": [], "out": []}}),
        (["value_maps"], {"relu": [[[1, {"size": 2}]]]}),
    ]:
        with pytest.raises(FormatError, match="the plan is damaged"):
            Plan.from_json(change(path, value))


# Ignoring layers -----------------------------------------------------------------------------------------------------


def kept(made: Plan) -> set[str]:
    return {layer.name for layer in made.layers if "ignored" in layer.reason}


def test_ignore_by_name() -> None:
    for entry in (["middle.0"], "middle.0", ["middle.0.weight"]):
        made = reparam.plan(UNet(), 2, example_input=X, ignore=entry)
        assert kept(made) == {"middle.0.weight"}
        layer = next(x for x in made.layers if x.name == "middle.0.weight")
        assert layer.shape == layer.wide_shape and not layer.widened
        assert layer.reason.startswith(f"ignored ({'middle.0' if 'weight' not in entry[0] else 'middle.0.weight'})")
        assert 0 < made.coverage < 1
        assert "ignored (middle.0" in str(made)


def test_ignore_by_glob() -> None:
    made = reparam.plan(UNet(), 2, example_input=X, ignore=["down.*"])
    assert kept(made) == {n for n, p in UNet().named_parameters() if n.startswith("down.") and p.dim() == 4}


def test_ignore_by_type() -> None:
    made = reparam.plan(UNet(), 2, example_input=X, ignore=[nn.ConvTranspose2d])
    assert kept(made) == {"up.0.weight", "up.1.weight"}


def test_ignored_layers_keep_their_weights_and_the_function() -> None:
    model = built(BY_NAME["unet"])
    x = sample((2, 3, 32, 32))
    teacher = reparam.expand(model, 2, example_input=x, ignore=["middle.0", nn.ConvTranspose2d])
    assert torch.equal(teacher.middle[0].weight, model.middle[0].weight)
    assert torch.equal(teacher.up[0].weight, model.up[0].weight)
    assert teacher.middle[3].weight.shape == (64, 32, 3, 3)
    assert teacher.join[0][3].weight.shape == (32, 32, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), model(x), rtol=1e-10, atol=1e-10)


def test_everything_ignored() -> None:
    made = reparam.plan(UNet(), 2, example_input=X, ignore=[nn.Module])
    assert made.coverage == 0.0
    assert not made.params


# Without weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [UNet, Net1d, mlp])
def test_a_meta_model_gives_the_same_plan(builder: Any) -> None:
    with torch.device("meta"):
        empty = builder()
    shape = {"UNet": (2, 3, 32, 32), "Net1d": (2, 2, 64)}.get(type(empty).__name__, (4, 20))
    same(
        reparam.plan(builder(), 2, example_input=torch.randn(shape)),
        reparam.plan(empty, 2, example_input=torch.randn(shape, device="meta")),
    )


def test_a_meta_model_finds_its_own_input() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("mobilenetv3_small_050")
    made = reparam.plan(model)
    assert made.inputs["args"][0]["tensor"] == [2, 3, 224, 224]
    assert made.coverage == 1.0


def test_planning_changes_nothing() -> None:
    model = UNet().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    reparam.plan(model, 2)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnety_1280", "convnextv2_huge"])
def test_a_large_model_plans_in_seconds(name: str) -> None:
    """About 0.65e9 parameters each; nothing but shapes is touched."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    start = time.perf_counter()
    made = reparam.plan(model, 2)
    assert time.perf_counter() - start < 30
    assert made.parameters > 6e8
    assert made.wide_parameters > 3.9 * made.parameters
    assert made.coverage == 1.0


def test_sources_name_model_code_or_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert re.search(r"torch/nn/modules/conv\.py:\d+$", reparam.plan(model, 2, example_input=X).layers[0].source)
    assert re.search(r"zoo\.py:\d+$", reparam.plan(UNet(), 2, example_input=X).layers[0].source)


def test_an_example_input_that_cannot_be_written() -> None:
    class Styled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor, style: object) -> torch.Tensor:
            return self.stem(x)

    made = reparam.plan(Styled(), 2, example_input=(X, object()))
    with pytest.raises(InputError, match="the plan cannot be written: an example input or a constant is no JSON value"):
        made.to_json()

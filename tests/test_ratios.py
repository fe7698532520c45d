"""Ratios of their own for parts of a network: which entry decides a layer, streams, contradictions, real networks."""

from __future__ import annotations

import collections
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import random_checks
import torch
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from random_networks import Program, programs
from stream_networks import Step, StreamProgram, account_of, stream_programs
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, UNet, built, error, randomise, sample, tensors

import reparam
from reparam.cli import main
from reparam.errors import FormatError, InputError, ReparamError
from reparam.ops.steps import Realign
from reparam.passes.plan import Plan
from reparam.passes.rows import LayerPlan

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Ratio = int | Mapping[str, int]


def widths(made: Plan) -> dict[str, int | None]:
    """Replicas of the first dimension of every layer; None: not equally many."""
    return {row.name: made.params[row.name].maps[0].uniform if _is_wide(made, row) else 1 for row in made.layers}


def _is_wide(made: Plan, row: LayerPlan) -> bool:
    return row.name in made.params and 0 in made.params[row.name].maps


def row(made: Plan, name: str) -> LayerPlan:
    return next(layer for layer in made.layers if layer.name == name)


def checked(model: nn.Module, ratio: Ratio, x: Tensor = X) -> Plan:
    """Expand, compare in float64 also at another batch size, go back bit by bit; returns the plan."""
    model = randomise(model.double()).eval()
    teacher = reparam.expand(model, ratio, example_input=x)
    view = reparam.student_view(teacher)
    with torch.no_grad():
        for given in (x, torch.cat([x, x.flip(0)[:1]])):
            assert error(model(given), teacher(given)) <= 1e-12
            assert error(model(given), view(given)) <= 1e-12
    if not isinstance(ratio, int) and all(r & (r - 1) == 0 for r in ratio.values()):
        plain = reparam.extract(teacher).state_dict()
        assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())
    return teacher.plan


def refused(model: nn.Module, match: str, ratio: Any, **options: Any) -> None:
    options = {"example_input": X.float(), **options}
    for function in (reparam.plan, reparam.expand):
        with pytest.raises(InputError, match=match) as caught:
            function(model, ratio, **options)
        assert isinstance(caught.value, ReparamError)


class Residual(nn.Module):
    """Two blocks on one stream, a gate, a depthwise layer, and a second stream behind ``turn``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.two = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1))
        self.turn = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.gate = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = x + self.one(x)
        x = x + self.two(x)
        x = self.depthwise(torch.relu(self.turn(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.head(x.mean((2, 3)))


LAYERS = ["stem", "one.0", "one.2", "two.0", "two.2", "turn", "depthwise", "gate", "head"]


def numbers(made: Plan) -> list[int | None]:
    assert [layer.name for layer in made.layers] == [f"{name}.weight" for name in LAYERS]
    return list(widths(made).values())


# Which entry decides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ({"*": 2}, [2, 2, 2, 2, 2, 2, 2, 2, 1]),
        ({"one.0": 4}, [1, 4, 1, 1, 1, 1, 1, 1, 1]),
        ({"one.0.weight": 4, "*": 2}, [2, 4, 2, 2, 2, 2, 2, 2, 1]),
        ({"two.0": 3, "one.0": 4, "*": 2}, [2, 4, 2, 3, 2, 2, 2, 2, 1]),
        ({"one.0": 4, "o*": 2, "re:[ds].*": 3, "turn": 3, "two.2": 2}, None),
        ({"one.0": 4, "o*": 2, "re:[tdg](?!wo).*": 3}, [2, 4, 2, 1, 2, 3, 3, 3, 1]),
        ({"re:one|two": 2}, [2, 2, 2, 2, 2, 1, 1, 1, 1]),
        ({"re:(one|two)\\.0": 4, "*.2": 2}, [2, 4, 2, 4, 2, 1, 1, 1, 1]),
        ({"re:.*\\.0\\.weight": 2}, [1, 2, 1, 2, 1, 1, 1, 1, 1]),
        ({"????": 2}, [2, 1, 2, 1, 2, 2, 2, 2, 1]),
        ({"head": 4, "*": 1}, [1] * 9),
        ({"one.0": 1, "*": 2}, [2, 1, 2, 2, 2, 2, 2, 2, 1]),
    ],
)
def test_the_first_entry_that_matches_decides(ratio: dict[str, int], expected: list[int] | None) -> None:
    if expected is None:
        refused(Residual(), "contradict each other", ratio)
    else:
        assert numbers(checked(Residual(), ratio)) == expected


def test_the_order_of_the_entries_counts() -> None:
    one, two = ({"one.0": 4, "*.0": 2, "*": 2}, {"*.0": 2, "one.0.*": 4, "*": 2})
    assert widths(reparam.plan(Residual(), one, example_input=X.float()))["one.0.weight"] == 4
    refused(Residual(), r"ratio entry 'one\.0\.\*' decides no layer", two)


def test_a_number_is_the_same_as_a_mapping_of_everything() -> None:
    for name in ("unet", "tied", "spectral_norm", "weight_norm", "net3d", "mlp"):
        model, x = built(BY_NAME[name]), sample(BY_NAME[name].shape)
        for ratio in (1, 2, 3):
            one, two = (reparam.plan(model, r, example_input=x) for r in (ratio, {"*": ratio}))
            assert (one.params, one.edits, one.value_maps) == (two.params, two.edits, two.value_maps)
            assert [r.wide_shape for r in one.layers] == [r.wide_shape for r in two.layers]
            assert (one.ratio, dict(two.ratio)) == (ratio, {"*": ratio})  # type: ignore[call-overload]


def test_the_mapping_is_copied() -> None:
    given = {"one.0": 4}
    made = reparam.plan(Residual(), given, example_input=X.float())
    given["one.0"] = 3
    assert made.ratio == {"one.0": 4}
    with pytest.raises(TypeError):
        made.ratio["one.0"] = 3  # type: ignore[index]


def test_computed_and_tied_weights_have_the_name_of_their_parameter() -> None:
    model = built(BY_NAME["weight_norm"])
    x = sample(BY_NAME["weight_norm"].shape)
    made = checked(model, {"2": 4, "*": 2}, x)
    assert widths(made)["2.parametrizations.weight.original1"] == 4
    assert widths(made)["0.parametrizations.weight.original1"] == 2
    made = checked(built(BY_NAME["tied"]), {"decode": 4, "*": 2}, sample(BY_NAME["tied"].shape))
    assert made.params["encode.weight"].wide_shape == (48, 16)  # a tied weight has all its names


def test_a_weight_that_is_a_buffer_has_a_ratio() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)
            self.register_buffer("filters", torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(F.conv2d(torch.relu(self.stem(x)), self.filters)))

    made = checked(Fixed(), {"filters": 4, "*": 2})
    assert made.params["filters"].wide_shape == (24, 16, 3, 3)


# Streams -------------------------------------------------------------------------------------------------------------


def test_layers_that_no_entry_matches_follow_their_stream() -> None:
    made = checked(Residual(), {"one.2": 4, "gate": 2})
    assert numbers(made) == [4, 1, 4, 1, 4, 2, 2, 2, 1]
    assert row(made, "stem.weight").reason == "input of the network; ratio 4 as one.2.weight, in whose stream it is"
    assert row(made, "two.2.weight").reason.endswith("ratio 4 as one.2.weight, in whose stream it is")
    assert row(made, "turn.weight").reason == "ratio 2 as gate.weight, in whose stream it is"
    assert row(made, "one.0.weight").reason == "no ratio entry matches it"
    assert row(made, "turn.weight").widened and not row(made, "one.0.weight").widened
    assert not repeats(made)


def repeats(made: Plan) -> list[str]:
    """Nodes in front of which a narrow value is repeated."""
    return [
        node for node, edit in made.edits.items() for _path, steps in edit.steps for step in steps
        if isinstance(step, Realign) and step.source.is_identity
    ]  # fmt: skip


def test_a_stream_may_be_asked_to_stay_narrow() -> None:
    made = checked(Residual(), {"two.2": 1, "*.0": 2})
    assert numbers(made) == [1, 2, 1, 2, 1, 1, 1, 1, 1]
    assert row(made, "two.2.weight").reason == "ratio 1 by entry 'two.2'"
    assert row(made, "stem.weight").reason.endswith("ratio 1 as two.2.weight, in whose stream it is")


@pytest.mark.parametrize(
    ("ratio", "first", "second", "operator_name", "stream"),
    [
        ({"one.2": 4, "*": 2}, "stem", "one.2", "add", "stem.weight, one.2.weight, two.2.weight"),
        ({"two.2": 3, "stem": 2}, "stem", "two.2", "add_1", "stem.weight, one.2.weight, two.2.weight"),
        ({"two.2": 1, "*": 2}, "stem", "two.2", "add_1", "stem.weight, one.2.weight, two.2.weight"),
        ({"gate": 4, "*": 2}, "turn", "gate", "mul", "turn.weight, depthwise.weight, gate.weight"),
        ({"depthwise": 4, "turn": 2}, "depthwise", "turn", "conv2d_6", "turn.weight, depthwise.weight, gate.weight"),
    ],
)  # fmt: skip
def test_contradictions_name_both_layers_and_where_they_meet(
    ratio: dict[str, int], first: str, second: str, operator_name: str, stream: str
) -> None:
    entries = {name: next(e for e in ratio if e in (name, "*")) for name in (first, second)}
    said = [rf"{n}\.weight \(entry '{re.escape(e)}': {ratio[e]}\)" for n, e in entries.items()]
    kind = operator_name.rstrip("_0123456789") if operator_name != "conv2d_6" else "conv2d"
    refused(
        Residual(),
        rf"the ratios contradict each other: {said[0]} and {said[1]} meet at {kind} \({operator_name} in module "
        rf"'.+', .*(test_ratios|conv)\.py:\d+\), where their values need equally many "
        rf"replicas\. Give the layers of this stream the same ratio: {re.escape(stream)}$",
        ratio,
    )
    refused(
        Residual(),
        r"one\.2\.weight \(entry 'one\.2': 2\), in whose stream stem\.weight is, "
        r"and two\.2\.weight \(entry 'two\.2': 3\) meet at add \(add_1 ",
        {"two.2": 3, "one.2": 2},
    )


class Merge(nn.Module):
    """Three layers on the same input, and ``merge`` of their outputs."""

    def __init__(self, merge: Any, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width + 8 * (merge is concatenation), 2, 1)
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.merge(self.a(x), self.b(x), self.c(x)))


def concatenation(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([a, b, c], dim=1)


def cat_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([a, b], dim=1) + c


def piece_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([a, b], dim=1)[:, 4:] * c


def product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    a, b = a.flatten(2), b.flatten(2)
    return c + (a.transpose(1, 2) @ b).softmax(-1).mean((1, 2))[:, None, None, None]


def glu(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.glu(torch.cat([a, b], dim=1), dim=1) + c


def stacked(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.stack([a, b], dim=1).sum(1) + c


def shuffled(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.channel_shuffle(torch.cat([a, b], dim=1), 2) + c


def test_other_operators_may_combine_different_ratios() -> None:
    """Concatenation, matrix products and gated units are no streams; values are brought to one map where needed."""
    made = checked(Merge(product, 4), {"a": 4, "b": 2, "c": 3})
    assert widths(made) == {"a.weight": 4, "b.weight": 2, "c.weight": 3, "head.weight": 1}
    assert any(made.edits)
    made = checked(Merge(glu, 4), {"a": 4, "b": 2})
    assert widths(made)["a.weight"] == 4 and widths(made)["b.weight"] == 2


def test_a_concatenation_keeps_the_ratio_of_each_part() -> None:
    made = checked(Merge(concatenation, 12), {"a": 4, "b": 2})
    assert widths(made) == {"a.weight": 4, "b.weight": 2, "c.weight": 1, "head.weight": 1}
    assert made.params["head.weight"].maps[1].counts.tolist() == [4] * 4 + [2] * 4 + [1] * 12
    assert not made.edits and not made.contractions
    refused(Merge(cat_add, 8), r"b\.weight \(entry 'b': 2\) and c\.weight \(entry 'c': 4\)", {"b": 2, "c": 4})
    through = r"b\.weight \(entry 'b': 2\) and a\.weight \(entry 'a': 4\), in whose stream c\.weight is, meet at add"
    refused(Merge(cat_add, 8), through, {"a": 4, "b": 2})  # c has one ratio
    made = checked(Merge(cat_add, 8), {"a": 2})
    assert widths(made) == {"a.weight": 2, "b.weight": 2, "c.weight": 2, "head.weight": 1}  # c is in both streams


def test_a_piece_is_in_the_stream_of_its_layer_only() -> None:
    made = checked(Merge(piece_add, 4), {"a": 4, "b": 2})
    assert widths(made) == {"a.weight": 4, "b.weight": 2, "c.weight": 2, "head.weight": 1}
    refused(Merge(piece_add, 4), r"b\.weight \(entry 'b': 2\) and c\.weight \(entry 'c': 4\)", {"b": 2, "c": 4})


def flattened(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.flatten(2) * b.flatten(2)).unflatten(2, (12, 12)) + c


def test_a_stream_goes_through_reshapes() -> None:
    assert set(list(widths(checked(Merge(flattened, 4), {"b": 4})).values())[:3]) == {4}
    refused(Merge(flattened, 4), r"a\.weight \(entry 'a': 2\) and c\.weight \(entry 'c': 4\)", {"a": 2, "c": 4})


def test_a_computed_weight_is_a_layer_of_its_own() -> None:
    """Its replicas were once taken for those of the layer in front of it."""
    conv = Step("conv", (0,), (("out", 4), ("groups", 1)))
    program = StreamProgram(
        (conv, Step("standard", (1,), (("out", 4),)), Step("linear", (2,), (("out", 4),)), Step("add", (2, 3)))
    )
    made = reparam.plan(program.build(), {"layers.2": 4, "layers.0": 2}, example_input=program.sample())
    assert widths(made) == {
        "layers.0.weight": 2, "layers.1.weight": 4, "layers.2.weight": 4, "mix.weight": 1, "head.weight": 1
    }  # fmt: skip


def test_a_stack_is_a_stream() -> None:
    assert widths(checked(Merge(stacked, 4), {"b": 4})) == {
        "a.weight": 4, "b.weight": 4, "c.weight": 4, "head.weight": 1
    }  # fmt: skip
    refused(Merge(stacked, 4), r"meet at stack \(stack in module", {"a": 4, "b": 2})


def test_layers_that_cannot_be_told_apart_are_brought_to_one_map() -> None:
    """Behind a shuffle of two layers nothing says which channel is whose: no stream, and still exact."""
    made = checked(Merge(shuffled, 8), {"a": 2, "b": 2, "c": 4})
    assert widths(made) == {"a.weight": 2, "b.weight": 2, "c.weight": 4, "head.weight": 1}
    made = checked(Merge(shuffled, 8), {"a": 2, "b": 2})
    assert widths(made) == {"a.weight": 2, "b.weight": 2, "c.weight": 1, "head.weight": 1}
    assert repeats(made) == ["add"]
    made = checked(Merge(shuffled, 8), {"a": 4, "b": 2})
    assert widths(made)["a.weight"] == 4


class Shuffled(nn.Module):
    """A depthwise layer behind a shuffle of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.depthwise(F.channel_shuffle(torch.cat([self.a(x), self.b(x)], dim=1), 2))))


def test_a_depthwise_layer_behind_a_shuffle_cannot_have_another_ratio() -> None:
    assert list(widths(checked(Shuffled(), {"*": 2})).values()) == [2, 2, 2, 1]
    assert list(widths(checked(Shuffled(), {"a": 2, "b": 2})).values()) == [2, 2, 2, 1]
    for ratio in (1, 4):
        refused(
            Shuffled(),
            rf"the ratios contradict each other: depthwise\.weight \(entry 'depthwise': {ratio}\) repeats each channel "
            r"as often as its input does, and what comes to it at conv2d \(conv2d_2 in module 'depthwise', .*py:"
            r"\d+\) is repeated 2 times\. Give it the ratio of the layers in front of it$",
            {"depthwise": ratio, "*": 2},
        )


def test_a_depthwise_layer_behind_the_input_has_no_choice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    made = checked(model, {"0": 4, "2": 2})
    assert list(widths(made).values()) == [1, 2, 1]
    assert row(made, "0.weight").reason == (
        "input of the network; what it is connected to does not allow ratio 4 by entry '0'"
    )


def test_functions_that_are_not_traced_into() -> None:
    model = Wrapped()
    made = checked(model, {"b": 4, "*": 2}, torch.randn(3, 5, dtype=torch.float64))
    assert widths(made) == {"a.weight": 2, "b.weight": 4, "c.weight": 1}


class Branching(nn.Module):
    """Its forward branches on a size, and its inside needs edits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1000:
            return x
        x = torch.relu(self.up(x))
        half = int(x.shape[1] / 2)
        return self.down(torch.cat([x[:, half:], x[:, :half]], dim=1))


def test_a_layer_inside_a_module_with_control_flow() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Branching(), nn.ReLU(), nn.Linear(8, 2))
    made = checked(model, {"2.up": 4}, torch.randn(3, 4, dtype=torch.float64))
    assert list(widths(made).values()) == [1, 4, 1, 1]
    assert row(made, "2.down.weight").wide_shape == (8, 48)


class Recurrent(nn.Module):
    """An embedding, a recurrent network with a residual, attention and an mlp."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.rnn = getattr(nn, kind)(6, 8, 2, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _state = self.rnn(self.table(x))
        return self.head(self.encoder(y + self.mix(torch.relu(y))).mean(1))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_and_attention(kind: str) -> None:
    x = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
    made = checked(Recurrent(kind), {"rnn.weight_hh_l1": 4, "encoder.linear1": 2, "table": 2}, x)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    assert made.params["table.weight"].wide_shape == (11, 12)
    assert row(made, "rnn.weight_ih_l0").wide_shape == (4 * gates * 8, 2 * 6)
    assert row(made, "rnn.weight_hh_l1").wide_shape == (4 * gates * 8, 4 * 8)
    assert row(made, "rnn.weight_ih_l0").reason == "ratio 4 as rnn.weight_hh_l1, in whose stream it is"
    assert row(made, "mix.weight").wide_shape == (4 * 8, 4 * 8)
    assert row(made, "encoder.self_attn.in_proj_weight").wide_shape == (24, 4 * 8)
    assert row(made, "encoder.self_attn.out_proj.weight").wide_shape == (4 * 8, 8)
    assert row(made, "encoder.linear1.weight").wide_shape == (2 * 12, 4 * 8)
    refused(
        Recurrent(kind),
        r"rnn\.weight_hh_l1 \(entry 'rnn\.weight_hh_l1': 4\) and rnn\.weight_ih_l0 \(entry '\*': 2\) meet at ",
        {"rnn.weight_hh_l1": 4, "*": 2},
        example_input=x,
    )


@torch.fx.wrap
def wrapped(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(wrapped(torch.relu(self.a(x)), self.b.weight)))


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "match"),
    [
        ({}, r"ratio is an empty mapping, which widens nothing; for example ratio=2, or ratio=\{'layer4\.\*': 4, "),
        ({"stem": 0}, r"'stem' must be an int >= 1, not 0; \{'stem': 1\} keeps the channels, \{'stem': 2\} doubles"),
        ({"stem": -2}, r"ratio entry 'stem' must be an int >= 1, not -2"),
        ({"*": 2, "stem": 2.0}, r"ratio entry 'stem' must be an int >= 1, not 2\.0 \(float\); for example \{'stem': 2"),
        ({"stem": "2"}, r"ratio entry 'stem' must be an int >= 1, not '2' \(str\)"),
        ({"stem": True}, r"ratio entry 'stem' must be an int >= 1, not True \(bool\)"),
        ({"stem": None}, r"not None \(NoneType\)"),
        ({3: 2}, r"a ratio entry is a name, a glob, or 're:' and a regular expression, not 3 \(int\)"),
        ({nn.Conv2d: 2}, r"a ratio entry is a name, a glob, or 're:' and a regular expression, not <class .*\(type\)"),
        ({"re:(": 2}, r"ratio entry 're:\(' is no regular expression: .*unterminated"),
        ({"stm": 2}, r"ratio entry 'stm' matches no module or parameter; did you mean 'stem'"),
        ({"*": 2, "tow.0": 4}, r"ratio entry 'tow\.0' matches no module or parameter; did you mean .*'two\.0'"),
        ({"re:stem.": 2}, r"ratio entry 're:stem\.' matches no module or parameter; did you mean .*'stem'"),
        ({"zzz": 2}, r"ratio entry 'zzz' matches no module or parameter$"),
        ({"STEM": 2}, r"ratio entry 'STEM' matches no module or parameter"),
        ({"two.1": 2}, r"ratio entry 'two\.1' matches no layer \(the weight of a convolution, a linear, an embedding "
                       r"or a recurrent layer\), only two\.1\.bias, .*; these follow the layers around them, so name"),
        ({"*.bias": 2}, r"ratio entry '\*\.bias' matches no layer .* only depthwise\.bias, gate\.bias, .* and 4 more;"),
        ({"*": 2, "stem": 4}, r"ratio entry 'stem' decides no layer: the first entry that matches counts, and '\*' "
                              r"stands before it and matches stem\.weight; move it to the front"),
        ({"one.0": 2, "one.2": 4, "one": 4}, r"ratio entry 'one' decides no layer: .* 'one\.0', 'one\.2' stands"),
    ],
)  # fmt: skip
def test_bad_mappings(ratio: Any, match: str) -> None:
    refused(Residual(), match, ratio)


def test_an_entry_for_ignored_layers_only() -> None:
    refused(
        Residual(),
        r"ratio entry 'stem' matches only layers that ignore=\.\.\. keeps: stem\.weight; drop it",
        {"stem": 2, "*": 2},
        ignore=["stem"],
    )
    made = reparam.plan(Residual(), {"*": 2}, example_input=X.float(), ignore=["stem"])
    assert widths(made)["stem.weight"] == 1 and widths(made)["one.2.weight"] == 2
    made = reparam.plan(Residual(), {"one.2": 4, "turn": 2}, example_input=X.float(), ignore=["two.2"])
    assert widths(made)["two.2.weight"] == 1  # it does not follow its stream either
    assert row(made, "two.2.weight").reason == "ignored (two.2)"


def test_training_takes_one_ratio() -> None:
    from reparam.distill.config import TrainConfig

    with pytest.raises(InputError, match=r"--ratio of a training run is one int for all layers, got \{'\*': 2\}"):
        TrainConfig(ratio={"*": 2})  # type: ignore[arg-type]


# Random networks -----------------------------------------------------------------------------------------------------

COMMON = settings(
    derandomize=True, deadline=None, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip
NUMBER = int(os.environ.get("RANDOM_RATIOS", "40"))
CHOICES = st.sampled_from((None, None, None, None, 2, 2, 2, 1, 3, 4))


@pytest.fixture(scope="module")
def seen() -> Iterator[collections.Counter[str]]:
    """Count what the random networks showed; the test would prove little if one of these were rare."""
    counts: collections.Counter[str] = collections.Counter()
    yield counts
    if counts["networks"] >= 30:
        assert counts["contradictions"] >= 0.1 * counts["networks"]
        assert counts["exact"] >= 0.4 * counts["networks"]
        assert counts["followers"] >= 0.2 * counts["networks"]
        assert all(counts[f"ratio {r}"] >= 0.1 * counts["networks"] for r in (1, 2, 3, 4))


@settings(COMMON, max_examples=NUMBER)
@given(stream_programs(), st.data())
def test_random_streams(seen: collections.Counter[str], program: StreamProgram, data: Any) -> None:
    """Every law holds and every layer has the ratio it was given, or the entries contradict each other."""
    account = account_of(program)
    drawn = {name: data.draw(CHOICES, label=name) for name in account.layers}
    entries = {name: ratio for name, ratio in drawn.items() if ratio is not None}
    if not entries:
        return
    note(f"{entries}\n{program}")
    expected = account.ratios(entries)
    seen["networks"] += 1
    event(f"contradiction: {expected is None}")
    if expected is None:
        seen["contradictions"] += 1
        with pytest.raises(InputError, match="the ratios contradict each other") as caught:
            reparam.plan(program.build(), entries, example_input=program.sample())
        named = [name for name in entries if f"{name} (entry '{name}': {entries[name]})" in str(caught.value)]
        assert len(named) == 2 and operator.ne(*(entries[name] for name in named))
        return
    try:
        random_checks.check(program, entries)
    except InputError as error:  # a depthwise layer behind one that nothing was said about
        assert any(f"{name} (entry '{name}': {entries.get(name)}) repeats" in str(error) for name in account.unsure)
        return
    seen["exact"] += 1
    found = widths(reparam.plan(program.build(), entries, example_input=program.sample()))
    for name, ratio in expected.items():
        if name in account.unsure or (name in account.computed and found[name] == 1):
            continue
        assert found[name] == ratio, name
        seen[f"ratio {ratio}"] += 1
        seen["followers"] += name not in entries and ratio > 1


@settings(COMMON, max_examples=NUMBER // 2)
@given(programs(), st.data())
def test_random_networks(program: Program, data: Any) -> None:
    """Operators of every kind with mixed ratios: exact, or a contradiction."""
    network = program.build()
    layers = [layer.name for layer in reparam.plan(network, 2, example_input=program.sample()).layers]
    drawn = {name: data.draw(CHOICES, label=name) for name in layers}
    entries = {name: ratio for name, ratio in drawn.items() if ratio is not None}
    if set(layers) - set(entries) and data.draw(st.booleans(), label="default"):
        entries["*"] = 2
    if not entries:
        return
    note(f"{entries}\n{program}")
    try:
        random_checks.check(program, entries)
    except InputError as error:
        assert "the ratios contradict each other" in str(error)


# Real networks -------------------------------------------------------------------------------------------------------


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options)


SIZE = (2, 3, 64, 64)


@pytest.mark.slow
def test_resnet18() -> None:
    made = checked(timm_model("resnet18", channels=(16, 32, 64, 128)), {"layer4.*": 4, "*": 2}, sample(SIZE))
    found = widths(made)
    assert {found[name] for name in found if name.startswith("layer4.")} == {4}
    assert {found[name] for name in found if not name.startswith(("layer4.", "fc"))} == {2}
    assert row(made, "layer4.0.conv1.weight").wide_shape == (512, 128, 3, 3)
    assert row(made, "layer4.0.downsample.0.weight").wide_shape == (512, 128, 1, 1)
    assert row(made, "fc.weight").wide_shape == (10, 512)
    assert made.coverage == 1.0 and not made.contractions and not any(e.steps for e in made.edits.values())


@pytest.mark.thorough
def test_mobilenetv2() -> None:
    model = timm_model("mobilenetv2_035")
    x = sample(SIZE).float()
    refused(model, r"conv_pw\.weight \(entry '\*\.conv_pw': 4\)", {"*.conv_pw": 4, "*": 2}, example_input=x)
    made = checked(model, {"blocks.5.*": 4, "blocks.6.*.conv_pw": 1, "blocks.6.*.conv_dw": 1, "*": 2}, sample(SIZE))
    found = widths(made)
    assert {found[name] for name in found if name.startswith("blocks.5.")} == {4}
    assert found["blocks.6.0.conv_pw.weight"] == found["blocks.6.0.conv_dw.weight"] == 1
    assert {found[name] for name in found if name.startswith(("blocks.4.", "conv_stem", "blocks.6.0.conv_pwl"))} == {2}
    assert row(made, "blocks.5.1.conv_dw.weight").wide_shape[0] == 4 * row(made, "blocks.5.1.conv_dw.weight").shape[0]
    found = widths(checked(model, {"*.conv_pw": 4, "blocks.0.0.conv_dw": 1}, sample(SIZE)))
    follow = [name for name in found if re.match(r"blocks\.[1-6].*\.conv_(pw|dw)\.weight", name)]
    # The pointwise layer of the first block is its last one.
    assert {found[name] for name in follow} == {4} and found["blocks.0.0.conv_pw.weight"] == 4
    assert {found[name] for name in found if name.endswith("conv_pwl.weight")} == {1} and len(follow) == 32


@pytest.mark.thorough
def test_regnetx() -> None:
    made = checked(timm_model("regnetx_002"), {"s4.*.conv2.conv": 4, "s4.*.conv1.conv": 1, "*": 2}, sample(SIZE))
    found = widths(made)
    assert {found[name] for name in found if re.fullmatch(r"s4\..*\.conv2\.conv\.weight", name)} == {4}
    assert {found[name] for name in found if re.fullmatch(r"s4\..*\.conv1\.conv\.weight", name)} == {1}
    assert {found[name] for name in found if re.fullmatch(r"s4\..*\.conv3\.conv\.weight", name)} == {2}
    assert not made.contractions


@pytest.mark.slow
def test_a_transformer_with_wide_mlps_only() -> None:
    made = checked(timm_model("test_vit"), {"*.mlp.fc1": 4}, sample((2, 3, 160, 160)))
    blocks = [layer for layer in made.layers if layer.name.startswith("blocks.")]
    assert len(blocks) >= 16
    for layer in blocks:
        out, inner = layer.shape
        wide = {"fc1": (4 * out, inner), "fc2": (out, 4 * inner)}.get(layer.name.split(".")[-2], (out, inner))
        assert layer.wide_shape == wide, layer.name
    assert not made.contractions


@pytest.mark.parametrize(
    ("name", "wide", "others"),
    [
        ("nfnet", r"stages\.3\..*", {}),  # standardised weights
        ("resnetv2_bit", r"stages\.3\..*", {}),
        ("shufflenet_v2_x0_5", r"stage4\.(?!0\.branch1\.0).*", {"stage4.0.branch1.0": 2}),
        ("convnext_atto", r".*\.mlp\.fc1\.weight", {}),
        ("densenet", r"features\.denseblock2\..*", {}),
    ],
)
@pytest.mark.slow
def test_other_networks(name: str, wide: str, others: dict[str, int]) -> None:
    entry = BY_NAME[name]
    made = checked(built(entry), {**others, f"re:{wide}": 4, "*": 2}, sample(entry.shape))
    found = widths(made)
    for layer in made.layers:
        ends = "output of the network" in layer.reason
        assert found[layer.name] == (1 if ends else 4 if re.fullmatch(wide, layer.name) else 2), layer.name
    assert {2, 4} <= set(found.values()) and made.coverage == 1.0


# Files, views, command line ------------------------------------------------------------------------------------------

RATIO = {"up.*": 4, "re:down\\.0.*": 2}


def test_the_plan_says_its_ratios_and_goes_through_json() -> None:
    made = reparam.plan(UNet(), RATIO, example_input=torch.randn(2, 3, 32, 32))
    assert "UNet, ratio {'up.*': 4, 're:down\\\\.0.*': 2}: " in str(made) and "ratio {'up.*': 4," in repr(made)
    data = json.loads(made.to_json())
    assert data["version"] == 2 and data["ratio"] == [["up.*", 4], ["re:down\\.0.*", 2]]
    again = Plan.from_json(made.to_json())
    assert again == made and list(again.ratio) == list(RATIO)  # type: ignore[arg-type]
    assert again.to_json() == made.to_json() and str(again) == str(made)
    for wrong in ([], [["a"]], [["a", "b"]], [["a", 2, 3]], [[1, 2]], [["a", True]], {"a": 2}, "2", None, 2.0, True):
        with pytest.raises(FormatError, match="the plan is damaged"):
            Plan.from_json(json.dumps({**data, "ratio": wrong}))


def test_save_and_load(tmp_path: Path) -> None:
    model, x = built(BY_NAME["unet"]), sample((2, 3, 32, 32))
    teacher = reparam.expand(model, RATIO, example_input=x)
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    again = reparam.load(tmp_path / "teacher.safetensors", UNet().double().eval())
    assert again.plan == teacher.plan and dict(again.plan.ratio) == RATIO  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(again(x), teacher(x))
    plain = reparam.extract(again).state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())


def test_gradients_through_the_view() -> None:
    model, x = randomise(Residual().double()).eval(), X
    teacher = reparam.expand(model, {"one.2": 4, "gate": 2}, example_input=x)
    view = reparam.student_view(teacher)
    (own,) = torch.autograd.grad(model(x).square().sum(), [model.one[0].weight])
    (wide,) = torch.autograd.grad(view(x).square().sum(), [teacher.one[0].weight])
    assert wide.shape == (12, 32, 1, 1)
    torch.testing.assert_close(wide[:, ::4], 4 * own)
    assert all(bool(t.isfinite().all()) for t in tensors([own, wide]))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    return code, *capsys.readouterr()


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), "
        "nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    return "net.py:build"


def test_command_line(net: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    size = ("--input-size", "3,8,8")
    outputs = {
        run(capsys, "plan", *order, *size)
        for order in (
            (net, "--ratio", "0=4", "re:[24]=2"),
            ("--ratio", "0=4", "re:[24]=2", net),
            ("--ratio=0=4", "re:[24]=2", net),
            ("--ratio", "0=4", "--ratio", "re:[24]=2", net),
        )
    }
    assert len(outputs) == 1
    code, out, err = outputs.pop()
    assert (code, err) == (0, "") and "ratio {'0': 4, 're:[24]': 2}" in out
    assert re.search(r"2\.weight +conv2d +4x4x1x1 +8x16x1x1 +yes", out)
    assert run(capsys, "plan", "--ratio", "3", net, *size) == run(capsys, "plan", net, "--ratio", "3", *size)
    code, out, _ = run(capsys, "expand", net, "--ratio", "*=2", *size, "--output", "teacher.safetensors")
    assert code == 0 and "ratio {'*': 2}" in out
    assert run(capsys, "check", net, "teacher.safetensors", *size)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3", "0=4"], r"--ratio 3 is for all layers; beside PATTERN=R write '\*=3', as the last"),
        (["0=4", "0=2"], "--ratio has '0' twice; the first entry that matches a layer decides"),
        (["nine=4"], "ratio entry 'nine' matches no module or parameter"),
        (["0=0"], "ratio entry '0' must be an int >= 1, not 0"),
    ],
)
def test_command_line_errors(net: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _out, err = run(capsys, "plan", net, "--input-size", "3,8,8", "--ratio", *arguments)
    assert code == 2 and re.match(f"error: {message}", err)


@pytest.mark.parametrize("text", ["0=x", "0=", "0=1.5", "x", "1.5"])
def test_command_line_refuses_what_is_no_number(net: str, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", net, "--ratio", text])
    number = text.rpartition("=")[2]
    said = f"invalid int value: {number!r}; a ratio is an int, or PATTERN=R such as 'layer4.*=4'"
    assert said in capsys.readouterr().err

"""Recurrent networks: the hidden state is widened, its weights divide by the replicas of what they read.

The rows of a weight are equal blocks, one per gate, so every gate gets the same map: that of the hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from reparam.ops.maps import ReplicaMap
from reparam.passes.call import Call, Name
from reparam.passes.records import record_layer, weight_name
from reparam.passes.registry import rule
from reparam.passes.rules.linear import output_map
from reparam.passes.streams import follows, produced, ratio_of
from reparam.passes.torch_recurrent import GATES, recurrent, unpacked
from reparam.passes.values import Free, Pair, Refuse, Value, student, walk


@dataclass(frozen=True)
class _Cell:
    """The weights of one layer and direction, by where they stand in the call; the projection and biases may lack."""

    gates: int
    inputs: Name
    state: Name
    biases: tuple[Name, ...] = ()
    projection: Name | None = None


@dataclass(frozen=True)
class _Layout:
    """The maps of a cell: of its input, its hidden (and cell) state, and of the state that it reads and returns."""

    inputs: ReplicaMap
    hidden: ReplicaMap
    state: ReplicaMap


def _weigh(call: Call, cell: _Cell, wanted: _Layout) -> _Layout:
    """Ask for the weights of a cell; returns the maps that they got.

    Raises:
        Refuse: they got maps that do not fit together, because they are used elsewhere too.
    """
    rows = ReplicaMap.joined([wanted.hidden] * cell.gates)
    inputs = call.weight(cell.inputs, {0: rows, 1: wanted.inputs}, 0, 1)
    rows = _map(inputs, 0)
    hidden = rows.same_blocks(cell.gates)
    if hidden is None:
        raise Refuse("its weight is used elsewhere too, and its gates have different layouts")
    state = wanted.state
    if cell.projection is not None:
        projection = call.weight(cell.projection, {0: state, 1: hidden}, 0, 1)
        state = _map(projection, 0)
        _check(_map(projection, 1) == hidden)
    read = call.weight(cell.state, {0: rows, 1: state}, 0, 1)
    _check(_map(read, 0) == rows)
    for bias in cell.biases:
        call.match(bias, {0: rows})
        _check(_map(call.pair(bias), 0) == rows)
    return _Layout(_map(inputs, 1), hidden, _map(read, 1))


def _check(fits: bool) -> None:
    if not fits:
        raise Refuse("its weights have different layouts, because they are used elsewhere too")


def _map(pair: Pair, dim: int) -> ReplicaMap:
    return pair.maps.get(dim) or ReplicaMap.identity(pair.s.shape[dim])


def _is_ignored(call: Call, weights: list[Name]) -> bool:
    """One weight that keeps its width keeps the whole state at the student's."""
    planner = call.planner
    nodes = [node for name in weights if isinstance(node := call.source(name), fx.Node)]
    return any(planner.name_of(source) in planner.ignored for node in nodes for source in planner.sources(node))


@rule(recurrent, mixing=True)
def recurrent_layers(
    call: Call,
    input: Value,
    hx: Value,
    weights: Value,
    mode: Value,
    has_biases: Value,
    num_layers: Value,
    dropout: Value,
    training: Value,
    bidirectional: Value,
    batch_first: Value,
    lengths: Value = None,
    enforce_sorted: Value = True,
) -> Value:
    """All layers of an LSTM, GRU or RNN; torch gives all of them one width.

    The next step reads the whole state, so it is wide also where only the network's output follows.
    """
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d != 2], "replicas along its steps")
    _narrow_lengths(call)
    cells = _cells(mode, has_biases, num_layers, bidirectional, len(weights))
    rows, width = student(weights[1]).shape
    first = cells[0][0]
    ignored = _is_ignored(call, [("weights", k) for k in range(len(weights))])
    # What an LSTM projects its state to has a ratio of its own.
    ratios = [1 if ignored else ratio_of(call, name) for name in (first.inputs, first.projection or first.inputs)]
    layout = _Layout(
        _map(call.pair("input"), 2),
        ReplicaMap.repeat(rows // GATES[mode], ratios[0]),
        ReplicaMap.repeat(width, ratios[1]),
    )
    found: list[_Layout] = []
    for layer in cells:
        got = [_weigh(call, cell, layout) for cell in layer]
        _check(all(other == got[0] for other in got))
        if found:
            # All states stand in one tensor; a later layer reads the one in front of it as it is.
            _check(got[0] == _Layout(layout.inputs, found[0].hidden, found[0].state))
        found.append(got[0])
        layout = _Layout(ReplicaMap.joined([got[0].state] * len(layer)), got[0].hidden, got[0].state)
    call.align("input", 2, found[0].inputs)
    hidden, state = _in_stream(call, [cell for layer in cells for cell in layer], found[0])
    _give_states(call, mode, 2, first, _Layout(found[0].inputs, hidden, state))
    maps = iter([ReplicaMap.joined([state] * len(cells[0])), state, hidden])
    value = call.result(lambda _s, _t: {2: next(maps)})
    _note(call, cells, found[0], x.s.shape[1 if batch_first else 0])
    return value


@rule(unpacked)
def unpack(
    call: Call, input: Value, lengths: Value, batch_first: Value, padding_value: Value, total_length: Value
) -> Value:
    """Sequences cut and filled to one length."""
    x = call.pair("input")
    maps = dict(call.narrow("input", [d for d in x.maps if d < 2], "replicas along its steps").maps)
    _narrow_lengths(call)
    return call.result(lambda s, _t: maps if s.dim() > 1 else {})


def _narrow_lengths(call: Call) -> None:
    """Lengths are the student's, whatever they are computed from."""
    name: Name
    for path, leaf in list(walk(call.get("lengths"))):
        name = ("lengths", *path)
        if isinstance(leaf, (Pair, Free)):
            call.narrow(name)
        call.narrow_int(name)
    if call.node.target is unpacked:
        call.narrow_int("total_length")


def _in_stream(call: Call, cells: list[_Cell], layout: _Layout) -> tuple[ReplicaMap, ReplicaMap]:
    """Note that all weights have one hidden state (and all projections one output); returns the maps of both."""
    first = cells[0]
    hidden = produced(call, first.inputs, layout.hidden)
    for name in [name for cell in cells for name in (cell.inputs, cell.state)]:
        follows(call, name, hidden)
    if first.projection is None:
        return hidden, hidden
    state = produced(call, first.projection, layout.state)
    for cell in cells:
        if cell.projection is not None:
            follows(call, cell.projection, state)
    return hidden, state


def _cells(mode: str, has_biases: bool, layers: int, bidirectional: bool, count: int) -> list[list[_Cell]]:
    """Return the cells of each layer; ``count`` weights stand one behind the other."""
    directions = 2 if bidirectional else 1
    step = count // (layers * directions)
    biases = 2 if has_biases else 0

    def at(start: int) -> _Cell:
        places: list[Name] = [("weights", start + k) for k in range(step)]
        projection = places[-1] if step > 2 + biases else None
        return _Cell(GATES[mode], places[0], places[1], tuple(places[2 : 2 + biases]), projection)

    return [[at((layer * directions + d) * step) for d in range(directions)] for layer in range(layers)]


def _give_states(call: Call, mode: str, dim: int, cell: _Cell, layout: _Layout) -> None:
    """Bring given states into the layout of the network's own."""
    places: list[tuple[Name, ReplicaMap]] = [("hx", layout.state)]
    if mode == "LSTM":
        places = [(("hx", 0), layout.state), (("hx", 1), layout.hidden)]
    for place, wanted in places if call.get("hx") is not None else []:
        given = call.get(place)
        if isinstance(given, Pair) and dim in given.maps:
            follows(call, cell.projection or cell.inputs if place == ("hx", 0) else cell.inputs, given.maps[dim])
        call.match(place, {dim: wanted})


def _note(call: Call, cells: list[list[_Cell]], first: _Layout, steps: int) -> None:
    """Tell the plan what became of the weights, and the modules which widths they state."""
    planner, data = call.planner, call.source("input")
    for number, cell in enumerate(cell for layer in cells for cell in layer):
        for name in (cell.inputs, cell.state, cell.projection):
            if name is not None:
                weight = call.pair(name)
                counts = (steps * weight.s.numel(), steps * weight.t.numel())
                outside = name is cell.inputs and number < len(cells[0])
                given = data if outside and isinstance(data, fx.Node) else call.node
                record_layer(planner, call.node, given, call.source(name), weight, (0, 1), counts)
        _state_widths(call, cell, first)


def _state_widths(call: Call, cell: _Cell, layout: _Layout) -> None:
    """Let the module that owns the weights state their widths; they may be parametrised."""
    planner = call.planner
    path = weight_name(planner, call.source(cell.inputs)) or ""
    while path:
        path = path.rpartition(".")[0]
        module = planner.capture.root.get_submodule(path)
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            widths = {"hidden_size": layout.hidden, "input_size": layout.inputs}
            widths |= {} if cell.projection is None else {"proj_size": layout.state}
            planner.state.attributes |= {f"{path}.{n}" if path else n: len(m) for n, m in widths.items()}
            return


# -- one step ------------------------------------------------------------------------------------------------------


@rule(torch.lstm_cell, mixing=True)
def lstm_cell(
    call: Call, input: Value, hx: Value, w_ih: Value, w_hh: Value, b_ih: Value = None, b_hh: Value = None
) -> Value:
    """One step of an LSTM; the state that it reads may have another map than the one it returns."""
    return _step(call, "LSTM")


@rule(torch.gru_cell, mixing=True)
def gru_cell(
    call: Call, input: Value, hx: Value, w_ih: Value, w_hh: Value, b_ih: Value = None, b_hh: Value = None
) -> Value:
    """One step of a GRU."""
    return _step(call, "GRU")


@rule(torch.rnn_tanh_cell, torch.rnn_relu_cell, mixing=True)
def rnn_cell(
    call: Call, input: Value, hx: Value, w_ih: Value, w_hh: Value, b_ih: Value = None, b_hh: Value = None
) -> Value:
    """One step of an RNN."""
    return _step(call, "RNN_TANH")


def _step(call: Call, mode: str) -> Value:
    x = call.pair("input")
    call.narrow("input", [d for d in x.maps if d != 1], "replicas along its batch")
    names: list[Any] = [name for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call.get(name) is not None]
    cell = _Cell(GATES[mode], "w_ih", "w_hh", tuple(names[2:]))
    size = student(call.get("w_hh")).shape[1]
    hidden = ReplicaMap.identity(size) if _is_ignored(call, names) else output_map(call, size, "w_ih")
    got = _weigh(call, cell, _Layout(_map(call.pair("input"), 1), hidden, hidden))
    # The gates of a GRU mix the old state into the new one, index by index.
    _check(mode != "GRU" or got.hidden == got.state)
    call.align("input", 1, got.inputs)
    _give_states(call, mode, 1, cell, got)
    value = call.result({1: _in_stream(call, [cell], got)[0]})
    _note(call, [[cell]], got, 1)
    return value

"""torch's own recurrent modules as one node each, with padded sequences in place of packed ones.

Their forwards compare sizes, and how long a packed sequence is only the data tell. While tracing, packing keeps the
padded sequence and its lengths together; the recurrent node packs and pads again when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from reparam.passes.torch_modules import Patch, Record, everywhere, is_symbolic

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Blocks of rows in the weights of a recurrent layer."""


def recurrent(
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    mode: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any = None,
    enforce_sorted: bool = True,
) -> tuple[Tensor, ...]:
    """Run the layers of an LSTM, GRU or RNN.

    Args:
        input: [N, B, I], or [B, N, I] where ``batch_first``.
        hx: initial states [layers * directions, B, H] (for an LSTM a pair of them), zeros where None.
        weights: of each layer and direction ``weight_ih [gates * H, I]``, ``weight_hh [gates * H, H]``, two biases
            where ``has_biases``, and ``weight_hr [P, H]`` where the LSTM projects its output.
        mode: a key of ``GATES``.
        has_biases: whether there are biases.
        num_layers: number of layers.
        dropout: share of the outputs of each layer but the last that is dropped in train mode.
        training: the mode.
        bidirectional: whether each layer also runs backwards.
        batch_first: the layout of ``input`` and of the output.
        lengths: of each sequence, where the input was packed; the output is 0 behind them.
        enforce_sorted: whether these lengths must decrease.

    Returns:
        The output, the final states, and the final cell states of an LSTM.
    """
    steps, batch = (input.shape[d] for d in ((1, 0) if batch_first else (0, 1)))
    if hx is None:
        rows, width = weights[1].shape
        count = num_layers * (2 if bidirectional else 1)
        hx = input.new_zeros(count, batch, width)
        if mode == "LSTM":
            hx = (hx, input.new_zeros(count, batch, rows // GATES[mode]))
    run = getattr(torch, mode.lower())
    options = (list(weights), has_biases, num_layers, dropout, training, bidirectional)
    result: tuple[Tensor, ...]
    if input.device.type == "meta":
        return _on_meta(input, hx, weights, mode, bidirectional, batch_first)
    if lengths is None:
        result = run(input, hx, *options, batch_first)
        return result
    packed = rnn.pack_padded_sequence(input, _real(lengths, steps), batch_first, enforce_sorted)
    data, sizes, order, back = packed
    if order is not None:
        hx = pytree.tree_map(lambda state: state.index_select(1, order), hx)
    output, *states = run(data, sizes, hx, *options)
    output, _ = rnn.pad_packed_sequence(rnn.PackedSequence(output, sizes, order, back), batch_first, 0.0, steps)
    return (output, *(state if back is None else state.index_select(1, back) for state in states))


def _on_meta(
    input: Tensor, hx: Any, weights: Sequence[Tensor], mode: str, bidirectional: bool, batch_first: bool
) -> tuple[Tensor, ...]:
    """Return results of the right sizes: torch's own meta kernel runs every step of every sequence.

    Raises:
        RuntimeError: sizes of input, states and weights do not fit.
    """
    rows, width = weights[1].shape
    hidden, directions = rows // GATES[mode], 2 if bidirectional else 1
    batch = input.shape[0 if batch_first else 1]
    states = [] if hx is None else list(hx) if mode == "LSTM" else [hx]
    sizes = [width, hidden][: 2 if mode == "LSTM" else 1]
    if input.shape[2] != weights[0].shape[1] or any(x.shape[2] != n for x, n in zip(states, sizes, strict=False)):
        raise RuntimeError("sizes of input, states and weights of a recurrent network do not fit")
    per_layer = sum(1 for weight in weights if weight.dim() == 2 and weight.shape[0] == rows) // 2
    output = input.new_empty((*input.shape[:2], width * directions))
    return (output, *(input.new_empty((per_layer, batch, n)) for n in sizes))


def unpacked(
    input: Tensor, lengths: Any, batch_first: bool, padding_value: float, total_length: int | None
) -> tuple[Tensor, Tensor]:
    """Return what ``pad_packed_sequence`` returns for the packed sequences of these lengths in ``input``."""
    steps = input.shape[1 if batch_first else 0]
    if input.device.type == "meta":
        shape = list(input.shape)
        shape[1 if batch_first else 0] = steps if total_length is None else total_length
        return input.new_empty(shape), torch.as_tensor(lengths, dtype=torch.int64)
    packed = rnn.pack_padded_sequence(input, _real(lengths, steps), batch_first, False)
    return rnn.pad_packed_sequence(packed, batch_first, padding_value, total_length)


def _real(lengths: Any, steps: int) -> Tensor:
    """Return lengths as torch wants them; all 0, as made-up inputs are, they mean whole sequences."""
    found = torch.as_tensor(lengths, dtype=torch.int64).cpu()
    return found if bool(found.any()) else torch.full_like(found, steps)


def compact(root: nn.Module) -> None:
    """Move the weights of recurrent modules into one block of memory each, as cuDNN wants them."""
    for module in root.modules():
        # Parametrised weights are computed anew at each call.
        if isinstance(module, nn.RNNBase) and all(isinstance(w, nn.Parameter) for w in module._flat_weights):
            module.flatten_parameters()


class Padded(dict[str, Any]):
    """What ``pack_padded_sequence`` returns while tracing.

    A dict, so that its values are found among the outputs of a module. Nothing else knows its parts: those of a
    packed sequence are in another order.
    """

    def __iter__(self) -> Iterator[Any]:
        """Refuse to be taken apart."""
        raise fx.proxy.TraceError("the parts of a packed sequence are asked for")


def torch_recurrent(record: Record) -> list[Patch]:
    """Return what to replace in torch's recurrent networks and packed sequences while tracing.

    Args:
        record: ``record(function, args, kwargs)`` returns the recorded value, or NotImplemented to run torch's code.
    """
    forwards = [(kind, "forward", _forward(record, kind.forward)) for kind in (nn.RNN, nn.LSTM, nn.GRU)]
    return [*forwards, *_packing(record)]


def _forward(record: Record, plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        # By name: the list of all weights that the module keeps has no symbolic ones.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if isinstance(input, Padded):
            given = (input["input"], hx, weights, self.mode, *options, input["batch_first"], input["lengths"])
            result = record(recurrent, (*given, input["enforce_sorted"]), {})
            output, *states = (result[k] for k in range(3 if self.mode == "LSTM" else 2))
            return Padded({**dict(input.items()), "input": output}), _states(states)
        if isinstance(input, rnn.PackedSequence) or not is_symbolic(input, hx, weights):
            return plain(self, input, hx)
        batch, batched = 0 if self.batch_first else 1, input.dim() == 3
        if not batched:
            input = input.unsqueeze(batch)
            hx = None if hx is None else pytree.tree_map(lambda state: state.unsqueeze(1), hx)
        result = record(recurrent, (input, hx, weights, self.mode, *options, self.batch_first), {})
        output, *states = (result[k] for k in range(3 if self.mode == "LSTM" else 2))
        if not batched:
            output, states = output.squeeze(batch), [state.squeeze(1) for state in states]
        return output, _states(states)

    return forward


def _states(states: list[Any]) -> Any:
    return tuple(states) if len(states) == 2 else states[0]


def _packing(record: Record) -> list[Patch]:
    plain_pack, plain_pad = rnn.pack_padded_sequence, rnn.pad_packed_sequence

    def pack(input: Any, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Any:
        if not is_symbolic(input, lengths):
            return plain_pack(input, lengths, batch_first, enforce_sorted)
        return Padded(input=input, lengths=lengths, batch_first=batch_first, enforce_sorted=enforce_sorted)

    def pad(sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: Any = None) -> Any:
        if not isinstance(sequence, Padded):
            return plain_pad(sequence, batch_first, padding_value, total_length)
        x = sequence["input"] if sequence["batch_first"] == batch_first else sequence["input"].transpose(0, 1)
        result = record(unpacked, (x, sequence["lengths"], batch_first, padding_value, total_length), {})
        return result[0], result[1]

    return [*everywhere("pack_padded_sequence", plain_pack, pack), *everywhere("pad_packed_sequence", plain_pad, pad)]

"""torch's own attention, transformer, recurrent and embedding modules: exact and wide, in both modes, at every size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_nets import leaves
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import reparam
from reparam.errors import CaptureError

EXACT = 1e-12
Inputs = dict[str, Any]
E = 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def causal(n: int) -> Tensor:
    return torch.full((n, n), float("-inf"), dtype=torch.float64).triu(1)


def truth(*shape: int) -> Tensor:
    """A random mask that leaves at least the first key to every query."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) > 0.6
    mask[..., 0] = False
    return mask


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, eval mode, every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@dataclass(frozen=True)
class Case:
    """A network and its inputs for a batch size and a length.

    Args:
        name: of the test.
        make: builds the network.
        inputs: inputs by name, for a batch size and a length.
        reasons: parts of the reasons of all contractions.
        narrow: layers that are not widened on both sides.
        marks: of the test.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    reasons: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()
    marks: tuple[Any, ...] = ()


def difference(a: Any, b: Any) -> float:
    first, second = leaves(a), leaves(b)
    assert len(first) == len(second) > 0
    worst = 0.0
    for x, y in zip(first, second, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        worst = max(worst, float((x - y).detach().abs().max()) / (float(x.detach().abs().max()) or 1.0))
    return worst


def fresh(inputs: Inputs) -> Inputs:
    return copy.deepcopy(inputs)


def check(case: Case, ratio: int) -> None:
    model = randomise(case.make())
    example = case.inputs(2, 5)
    torch.manual_seed(0)
    teacher = reparam.expand(model, ratio, example_input=example)
    reasons = [f"{c.operator}: {c.reason}" for c in teacher.plan.contractions]
    assert len(reasons) == len(case.reasons), reasons
    assert all(part in reason for part, reason in zip(case.reasons, reasons, strict=True)), reasons
    assert [layer.name for layer in teacher.plan.layers if not layer.widened] == list(case.narrow)
    view = reparam.student_view(teacher)
    for training in (False, True):
        for network in (model, teacher, view):
            network.train(training)
        for batch, length in ((2, 5), (1, 7), (3, 4)):
            inputs = case.inputs(batch, length)
            expected, found = model(**fresh(inputs)), teacher(**fresh(inputs))
            assert type(expected) is type(found)
            assert difference(expected, found) <= EXACT
            assert difference(expected, view(**fresh(inputs))) <= EXACT
    check_gradients(teacher, case.inputs(2, 5))
    back = reparam.extract(teacher)
    own = model.state_dict()
    assert list(back.state_dict()) == list(own)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, own[name]) if ratio == 2 else torch.allclose(tensor, own[name], rtol=1e-15, atol=0)
    assert difference(model.eval()(**fresh(example)), back.eval()(**fresh(example))) <= EXACT


def check_gradients(teacher: Any, inputs: Inputs) -> None:
    """Every matrix of the teacher gets a gradient that is not zero."""
    outputs = leaves(teacher(**inputs))
    sum((out * randn(*out.shape, seed=9)).sum() for out in outputs if out.requires_grad).backward()
    used = {layer.name for layer in teacher.plan.layers if layer.widened}
    for name, parameter in teacher.named_parameters():
        if name in used:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


# -- attention ---------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """Attention between two linear layers; returns the attention weights too where there are any."""

    def __init__(self, use: str = "self", call: Inputs | None = None, **options: Any) -> None:
        super().__init__()
        options = {"num_heads": 2, "batch_first": True, **options}
        self.use, self.call = use, {"need_weights": False, **(call or {})}
        self.q = nn.Linear(3, E)
        if use != "self":
            self.k = nn.Linear(3, options.get("kdim", E))
        if use == "each":
            self.v = nn.Linear(3, options.get("vdim", E))
        self.attn = nn.MultiheadAttention(E, **options)
        self.head = nn.Linear(E, 4)

    def forward(self, x: Tensor, y: Tensor | None = None, **masks: Tensor) -> Any:
        q = self.q(x)
        if self.use == "self":
            q, k, v = q, q, q
        elif self.use == "cross":
            k = v = self.k(y)
        else:
            k, v = self.k(y), self.v(y)
        out, weights = self.attn(q, k, v, **masks, **self.call)
        return self.head(out) if weights is None else (self.head(out), weights)


def sequence(batch: int, length: int, **masks: Callable[[int, int], Tensor]) -> Inputs:
    return {"x": randn(batch, length, 3), **{name: make(batch, length) for name, make in masks.items()}}


def two(batch: int, length: int) -> Inputs:
    return {"x": randn(batch, length, 3), "y": randn(batch, length + 2, 3, seed=1)}


def attend(name: str, inputs: Callable[[int, int], Inputs] = sequence, **options: Any) -> Case:
    return Case(f"attention-{name}", lambda: Attend(**options), inputs)


def masked(**masks: Callable[[int, int], Tensor]) -> Callable[[int, int], Inputs]:
    return lambda batch, length: sequence(batch, length, **masks)


def first(batch: int, length: int) -> Inputs:
    return {"x": randn(length, batch, 3)}


def single(batch: int, length: int) -> Inputs:
    return {"x": randn(length, 3)}


WEIGHTS = {"need_weights": True}
HEADS = {"need_weights": True, "average_attn_weights": False}

ATTENTION = [
    attend("self"),
    attend("self-weights", call=WEIGHTS),
    attend("self-weights-of-heads", call=HEADS),
    attend("sequence-first", first, batch_first=False),
    attend("sequence-first-weights", first, batch_first=False, call=WEIGHTS),
    attend("no-bias", bias=False),
    attend("one-head", num_heads=1),
    attend("width-one-heads", num_heads=E),
    attend("cross", two, use="cross"),
    attend("cross-weights", two, use="cross", call=WEIGHTS),
    attend("three", two, use="each"),
    attend("three-no-bias", two, use="each", bias=False),
    attend("kdim", two, use="each", kdim=4),
    attend("kdim-vdim", two, use="each", kdim=4, vdim=5, bias=False),
    attend("bias-kv", add_bias_kv=True),
    attend("zero", add_zero_attn=True, call=WEIGHTS),
    attend("bias-kv-zero-cross", two, use="cross", add_bias_kv=True, add_zero_attn=True),
    attend("bias-kv-sequence-first", first, add_bias_kv=True, batch_first=False),
    attend("padding", masked(key_padding_mask=truth)),
    attend("padding-weights", masked(key_padding_mask=truth), call=WEIGHTS),
    attend("padding-float", masked(key_padding_mask=lambda b, n: randn(b, n))),
    attend("padding-bias-kv-zero", masked(key_padding_mask=truth), add_bias_kv=True, add_zero_attn=True),
    attend("mask", masked(attn_mask=lambda b, n: truth(n, n))),
    attend("mask-float", masked(attn_mask=lambda b, n: randn(n, n))),
    attend("mask-float-weights", masked(attn_mask=lambda b, n: randn(n, n)), call=HEADS),
    attend("mask-heads", masked(attn_mask=lambda b, n: truth(2 * b, n, n))),
    attend("mask-heads-float", masked(attn_mask=lambda b, n: randn(2 * b, n, n)), call=WEIGHTS),
    attend("mask-bias-kv", masked(attn_mask=lambda b, n: truth(n, n)), add_bias_kv=True, add_zero_attn=True),
    attend("both-masks", masked(attn_mask=lambda b, n: truth(n, n), key_padding_mask=truth)),
    attend("both-masks-heads", masked(attn_mask=lambda b, n: randn(2 * b, n, n), key_padding_mask=randn)),
    attend("causal", masked(attn_mask=lambda b, n: causal(n)), call={"is_causal": True, "need_weights": False}),
    attend("causal-weights", masked(attn_mask=lambda b, n: causal(n)), call={"is_causal": True, "need_weights": True}),
    attend("causal-padding", masked(attn_mask=lambda b, n: causal(n), key_padding_mask=randn),
           call={"is_causal": True, "need_weights": False}),
    attend("unbatched", single),
    attend("unbatched-weights", single, call=WEIGHTS, batch_first=False),
    attend("unbatched-mask", lambda b, n: {"x": randn(n, 3), "attn_mask": truth(n, n), "key_padding_mask": truth(n)},
           call=HEADS),
]  # fmt: skip


class Pool(nn.Module):
    """Attention by the function, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, E, 1)
        self.k, self.q, self.v = (nn.Linear(E, E) for _ in range(3))
        self.out = nn.Linear(E, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        return F.multi_head_attention_forward(
            x[:1], x, x, E, 2, None, torch.cat([self.q.bias, self.k.bias, self.v.bias]), None, None, False, 0.0,
            self.out.weight, self.out.bias, use_separate_proj_weight=True, training=self.training, need_weights=False,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0].squeeze(0)  # fmt: skip


class Queries(nn.Module):
    """Learned queries look at the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, E))
        self.stem, self.head = nn.Linear(3, E), nn.Linear(E, 4)
        self.attn = nn.MultiheadAttention(E, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.attn(self.queries.expand(x.shape[0], -1, -1), x, x)[0])


OTHERS = [
    Case("attention-function", Pool, lambda b, n: {"x": randn(b, 3, n, n)}),
    Case("attention-learned-queries", Queries, sequence),
    Case("attention-root", lambda: nn.MultiheadAttention(E, 2, batch_first=True),
         lambda b, n: {"query": randn(b, n, E), "key": randn(b, n, E, seed=1), "value": randn(b, n, E, seed=2)}),
]  # fmt: skip


# -- transformers ------------------------------------------------------------------------------------------------------


class Coder(nn.Module):
    """A stack of torch's layers between embeddings and a head."""

    def __init__(self, stack: nn.Module, hints: Inputs) -> None:
        super().__init__()
        self.stem, self.stack, self.head, self.hints = nn.Linear(3, E), stack, nn.Linear(E, 4), hints

    def forward(self, x: Tensor, y: Tensor | None = None, **masks: Any) -> Tensor:
        inputs = (self.stem(x),) if y is None else (self.stem(x), self.stem(y))
        return self.head(self.stack(*inputs, **masks, **self.hints))


class Causal(nn.Module):
    """Builds its own causal mask."""

    def __init__(self, hint: bool | None) -> None:
        super().__init__()
        self.stem, self.head, self.hint = nn.Linear(3, E), nn.Linear(E, 4), hint
        self.stack = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.stack(self.stem(x), mask=mask, is_causal=self.hint))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(**{"d_model": E, "nhead": 2, "dim_feedforward": 10, "dropout": 0.0,
                                         "batch_first": True, **options})  # fmt: skip


def decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(**{"d_model": E, "nhead": 2, "dim_feedforward": 10, "dropout": 0.0,
                                         "batch_first": True, **options})  # fmt: skip


def encoder(nested: bool = False, norm: bool = False, **options: Any) -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(**options), 2, nn.LayerNorm(E) if norm else None,
                                 enable_nested_tensor=nested)  # fmt: skip


def transformer(**options: Any) -> nn.Module:
    return nn.Transformer(**{"d_model": E, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 2,
                             "dim_feedforward": 10, "dropout": 0.0, "batch_first": True, **options})  # fmt: skip


def coder(name: str, stack: Callable[[], nn.Module], inputs: Callable[[int, int], Inputs] = sequence,
          **hints: Any) -> Case:  # fmt: skip
    quiet = (pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),)
    return Case(name, lambda: Coder(stack(), hints), inputs, marks=quiet)


def pair_of(**masks: Callable[[int, int], Any]) -> Callable[[int, int], Inputs]:
    """Two sequences, the first two tokens shorter, with masks."""
    return lambda b, n: {**two(b, n), **{name: make(b, n) for name, make in masks.items()}}


CODERS = [
    coder("encoder-layer", encoder_layer),
    coder("encoder-layer-norm-first-gelu", lambda: encoder_layer(norm_first=True, activation="gelu")),
    coder("encoder-layer-no-bias", lambda: encoder_layer(bias=False, activation=nn.SiLU())),
    coder("encoder-layer-sequence-first", lambda: encoder_layer(batch_first=False), first),
    coder("encoder-layer-unbatched", encoder_layer, single),
    coder("encoder-layer-mask", encoder_layer, masked(src_mask=lambda b, n: truth(n, n))),
    coder("encoder", encoder),
    coder("encoder-norm", lambda: encoder(norm=True, norm_first=True)),
    coder("encoder-nested", lambda: encoder(nested=True)),
    coder("encoder-mask", encoder, masked(mask=lambda b, n: truth(n, n))),
    coder("encoder-causal-mask", encoder, masked(mask=lambda b, n: causal(n))),
    coder("encoder-padding", encoder, masked(src_key_padding_mask=truth)),
    coder("encoder-both", encoder, masked(mask=lambda b, n: causal(n), src_key_padding_mask=randn)),
    coder("decoder-layer", decoder_layer, two),
    coder("decoder-layer-norm-first", lambda: decoder_layer(norm_first=True, bias=False), two),
    coder("decoder", lambda: nn.TransformerDecoder(decoder_layer(), 2, nn.LayerNorm(E)), two),
    coder("decoder-masks", lambda: nn.TransformerDecoder(decoder_layer(), 2), pair_of(
        tgt_mask=lambda b, n: causal(n), memory_mask=lambda b, n: truth(n, n + 2), tgt_key_padding_mask=randn,
        memory_key_padding_mask=lambda b, n: truth(b, n + 2))),
    coder("decoder-causal", lambda: nn.TransformerDecoder(decoder_layer(), 1), pair_of(
        tgt_mask=lambda b, n: causal(n)), tgt_is_causal=True),
    coder("transformer", transformer, two),
    coder("transformer-sequence-first", lambda: transformer(batch_first=False), lambda b, n: {
        "x": randn(n, b, 3), "y": randn(n + 2, b, 3, seed=1)}),
    coder("transformer-norm-first", lambda: transformer(norm_first=True, activation="gelu"), two),
    coder("transformer-masks", transformer, pair_of(
        src_mask=lambda b, n: truth(n, n), src_key_padding_mask=truth, tgt_mask=lambda b, n: causal(n + 2),
        memory_mask=lambda b, n: truth(n + 2, n), memory_key_padding_mask=truth,
        tgt_key_padding_mask=lambda b, n: randn(b, n + 2))),
    Case("transformer-root", transformer, lambda b, n: {"src": randn(b, n, E), "tgt": randn(b, n + 1, E, seed=1),
                                                       "tgt_mask": causal(n + 1)}),
    Case("encoder-own-mask", lambda: Causal(None), sequence),
    Case("encoder-own-mask-hint", lambda: Causal(True), sequence),
]  # fmt: skip


# -- recurrent networks ------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network between linear layers; ``given``: with initial states as inputs, or learned ones."""

    def __init__(self, net: nn.Module, states: str = "", given: str = "") -> None:
        super().__init__()
        self.stem, self.net, self.states, self.given = nn.Linear(3, 5), net, states, given
        directions = 2 if net.bidirectional else 1
        self.width = net.proj_size or net.hidden_size
        self.head = nn.Linear(self.width * directions, 4)
        if given == "learned":
            self.h = nn.Parameter(torch.randn(net.num_layers * directions, 1, self.width))
            self.c = nn.Parameter(torch.randn(net.num_layers * directions, 1, net.hidden_size))
        if given == "computed":
            self.h = nn.Linear(3, self.width)
            self.c = nn.Linear(3, net.hidden_size)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        if self.given == "learned":
            h, c = (state.expand(-1, x.shape[0], -1).contiguous() for state in (self.h, self.c))
        if self.given == "computed":
            h, c = (layer(x.mean(1)).unsqueeze(0) for layer in (self.h, self.c))
        lstm = isinstance(self.net, nn.LSTM)
        out, last = self.net(self.stem(x), h if h is None or not lstm else (h, c))
        if self.states == "last":
            return self.head(last[0][-1] if lstm else last[-1])
        return (self.head(out), last) if self.states else self.head(out)


def rnn(name: str, kind: Any, inputs: Callable[[int, int], Inputs] = sequence, states: str = "", given: str = "",
        **options: Any) -> Case:  # fmt: skip
    options = {"batch_first": True, **options}
    unused = ("c.weight",) if given == "computed" and kind is not nn.LSTM else ()
    return Case(f"rnn-{name}", lambda: Recurrent(kind(5, 4, **options), states, given), inputs, narrow=unused)


def with_states(layers: int, width: int = 4) -> Callable[[int, int], Inputs]:
    return lambda b, n: {"x": randn(b, n, 3), "h": randn(layers, b, width), "c": randn(layers, b, 4, seed=1)}


class Loop(nn.Module):
    """A cell in a loop over a fixed number of steps, or called once."""

    def __init__(self, cell: nn.Module, steps: int, ends: bool = False, start: bool = False) -> None:
        super().__init__()
        self.stem, self.cell, self.head = nn.Linear(3, 5), cell, nn.Linear(4, 4)
        self.steps, self.ends, self.start = steps, ends, start

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        state: Any = None
        if self.start:
            state = x.new_zeros(x.shape[0], 4)
            state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(self.steps):
            state = self.cell(x[:, step], state)
        if self.ends:
            return state
        return self.head(state[0] if isinstance(state, tuple) else state)


class Unbatched(Loop):
    def forward(self, x: Tensor) -> Any:
        x, state = self.stem(x), None
        for step in range(self.steps):
            state = self.cell(x[step], state)
        return self.head(state)


RECURRENT = [
    rnn("lstm", nn.LSTM),
    rnn("gru", nn.GRU),
    rnn("tanh", nn.RNN),
    rnn("relu", nn.RNN, nonlinearity="relu"),
    rnn("lstm-states", nn.LSTM, states="all"),
    rnn("gru-last", nn.GRU, states="last"),
    rnn("lstm-last", nn.LSTM, states="last", num_layers=2),
    rnn("lstm-sequence-first", nn.LSTM, first, batch_first=False),
    rnn("lstm-no-bias", nn.LSTM, bias=False, num_layers=2, bidirectional=True),
    rnn("lstm-projected", nn.LSTM, proj_size=2, states="all"),
    rnn("lstm-projected-deep", nn.LSTM, proj_size=3, num_layers=3, bidirectional=True, states="all", bias=False),
    rnn("lstm-deep", nn.LSTM, num_layers=3, bidirectional=True, states="all"),
    rnn("gru-deep", nn.GRU, num_layers=2, bidirectional=True, states="all", bias=False),
    rnn("tanh-deep", nn.RNN, num_layers=2, bidirectional=True, states="all"),
    rnn("lstm-unbatched", nn.LSTM, single, states="all", bidirectional=True),
    rnn("gru-unbatched", nn.GRU, single, states="all", batch_first=False),
    rnn("gru-given-unbatched", nn.GRU, lambda b, n: {"x": randn(n, 3), "h": randn(1, 4)}, states="all"),
    rnn("lstm-given", nn.LSTM, with_states(2), states="all", num_layers=2),
    rnn("lstm-given-projected", nn.LSTM, with_states(2, 3), states="all", bidirectional=True, proj_size=3),
    rnn("gru-given", nn.GRU, with_states(2), bidirectional=True),
    rnn("lstm-learned", nn.LSTM, given="learned", states="all"),
    rnn("gru-learned", nn.GRU, given="learned", num_layers=2),
    rnn("lstm-computed", nn.LSTM, given="computed", proj_size=2),
    rnn("tanh-computed", nn.RNN, given="computed"),
    Case("rnn-lstm-root", lambda: nn.LSTM(3, 4, 2), lambda b, n: {"input": randn(n, b, 3)}),
    Case("rnn-gru-root", lambda: nn.GRU(3, 4, bidirectional=True), lambda b, n: {"input": randn(n, b, 3)}),
    *[Case(f"cell-{kind.__name__}-{steps}{'-ends' if ends else ''}{'-start' if start else ''}",
           lambda kind=kind, steps=steps, ends=ends, start=start: Loop(kind(5, 4), steps, ends, start), sequence,
           narrow=() if not ends else ("cell.weight_hh", "head.weight") if steps == 1 else ("head.weight",))
      for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell) for steps, ends, start in (
          (2, False, False), (3, False, True), (1, True, True), (4, True, False))],
    Case("cell-relu-no-bias", lambda: Loop(nn.RNNCell(5, 4, bias=False, nonlinearity="relu"), 2), sequence),
    Case("cell-unbatched", lambda: Unbatched(nn.GRUCell(5, 4), 2), single),
]  # fmt: skip


# -- embeddings --------------------------------------------------------------------------------------------------------


class Embed(nn.Module):
    """A table and what follows."""

    def __init__(self, table: nn.Module, tied: bool = False, mean: bool = False) -> None:
        super().__init__()
        self.table, self.body, self.tied, self.mean = table, nn.Linear(E, E), tied, mean
        if not tied:
            self.head = nn.Linear(E, 4)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x = self.table(x) if weights is None else self.table(x, per_sample_weights=weights)
        x = torch.tanh(self.body(x))
        return F.linear(x, self.table.weight) if self.tied else self.head(x)


def words(batch: int, length: int) -> Inputs:
    return {"x": torch.randint(0, 7, (batch, length), generator=torch.Generator().manual_seed(length))}


def bag(mode: str, **options: Any) -> Case:
    return Case(f"embedding-bag-{mode}", lambda: Embed(nn.EmbeddingBag(7, E, mode=mode, **options)), words)


RENORM = ("rescales the rows",)

EMBEDDINGS = [
    Case("embedding", lambda: Embed(nn.Embedding(7, E)), words),
    Case("embedding-padding", lambda: Embed(nn.Embedding(7, E, padding_idx=2)), words),
    Case("embedding-tied", lambda: Embed(nn.Embedding(7, E), tied=True), words),
    Case("embedding-max-norm", lambda: Embed(nn.Embedding(7, E, max_norm=0.5)), words, RENORM, narrow=("body.weight",)),
    bag("sum"), bag("mean"), bag("max", padding_idx=1),
    Case("embedding-bag-weights", lambda: Embed(nn.EmbeddingBag(7, E, mode="sum")),
         lambda b, n: {**words(b, n), "weights": randn(b, n)}),
    Case("embedding-bag-max-norm", lambda: Embed(nn.EmbeddingBag(7, E, max_norm=0.5)), words, RENORM,
         narrow=("body.weight",)),
]  # fmt: skip

CASES = [*ATTENTION, *OTHERS, *CODERS, *RECURRENT, *EMBEDDINGS]
PARAMS = [pytest.param(case, id=case.name, marks=case.marks) for case in CASES]


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("case", PARAMS)
def test_exact_and_wide(case: Case, ratio: int) -> None:
    check(case, ratio)


# -- properties of recurrent networks ----------------------------------------------------------------------------------


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    sizes=st.tuples(st.integers(1, 5), st.integers(2, 5), st.integers(0, 3)),
    layers=st.integers(1, 3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    ratio=st.integers(2, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_any_recurrent_network(
    kind: Any, sizes: tuple[int, int, int], layers: int, flags: tuple[bool, ...], batch: int, length: int, ratio: int,
    seed: int,
) -> None:  # fmt: skip
    inputs, hidden, projection = sizes
    bias, batch_first, bidirectional, given_states = flags
    projection = min(projection, hidden - 1) if kind is nn.LSTM else 0
    options = {"proj_size": projection} if projection else {}
    net = kind(inputs, hidden, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **options)
    model = randomise(net, seed)
    count = layers * (2 if bidirectional else 1)

    def example(b: int, n: int) -> tuple[Any, ...]:
        x = randn(*((b, n) if batch_first else (n, b)), inputs, seed=seed)
        h, c = randn(count, b, projection or hidden, seed=seed), randn(count, b, hidden, seed=seed + 1)
        return (x, (h, c) if kind is nn.LSTM else h) if given_states else (x,)

    torch.manual_seed(seed)
    teacher = reparam.expand(model, ratio, example_input=example(2, 3))
    assert not teacher.plan.contractions and teacher.plan.coverage == 1.0
    xs = example(batch, length)
    with torch.no_grad():
        assert difference(model(*xs), teacher(*xs)) <= EXACT
        assert difference(model(*xs), reparam.student_view(teacher)(*xs)) <= EXACT
    widths = {layer.wide_shape[0] for layer in teacher.plan.layers if "weight_hr" not in layer.name}
    assert widths == {model.weight_ih_l0.shape[0] * ratio}


# -- packed sequences --------------------------------------------------------------------------------------------------


class Packs(nn.Module):
    """Sequences of unequal lengths, packed for the recurrent network; ``inner``: in a module of its own."""

    def __init__(self, net: nn.Module, total: int | None = None, value: float = 0.0, states: bool = False) -> None:
        super().__init__()
        self.stem, self.net = nn.Linear(3, 5), net
        self.again = nn.GRU(8 if net.bidirectional else 4, 4)
        self.head, self.total, self.value, self.states = nn.Linear(4, 3), total, value, states

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor | None = None) -> Any:
        packed = pack_padded_sequence(self.stem(x), lengths, batch_first=True, enforce_sorted=False)
        packed, last = self.net(packed, h)
        packed, _ = self.again(packed)
        out, sizes = pad_packed_sequence(packed, not self.states, self.value, self.total)
        return (self.head(out), sizes.double(), last) if self.states else self.head(out)


def uneven(batch: int, length: int) -> Inputs:
    lengths = torch.arange(batch) % length + 1
    lengths[-1] = length - 1
    return {"x": randn(batch, length, 3), "lengths": lengths}


PACKED = [
    Case("packed-gru", lambda: Packs(nn.GRU(5, 4)), uneven),
    Case("packed-lstm", lambda: Packs(nn.LSTM(5, 4, 2, bidirectional=True), states=True), uneven),
    Case("packed-filled", lambda: Packs(nn.RNN(5, 4), total=9, value=2.5), uneven),
    Case("packed-given", lambda: Packs(nn.GRU(5, 4, bidirectional=True), states=True),
         lambda b, n: {**uneven(b, n), "h": randn(2, b, 4)}),
]  # fmt: skip


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_packed_sequences(case: Case, ratio: int) -> None:
    check(case, ratio)


def test_the_parts_of_a_packed_sequence_are_not_known() -> None:
    class Opens(Packs):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:  # type: ignore[override]
            data, *_ = pack_padded_sequence(self.stem(x), lengths, batch_first=True)
            return data

    with pytest.raises(CaptureError, match="parts of a packed sequence"):
        reparam.expand(Opens(nn.GRU(5, 4)).double(), example_input=uneven(2, 5))


# -- weights that are used elsewhere too, or keep their width ----------------------------------------------------------


@pytest.mark.parametrize("ignore", ["net", "net.weight_hh_l0", "net.bias_ih_l0", "net.weight_hr_l0", nn.LSTM])
def test_one_ignored_weight_keeps_the_state_narrow(ignore: Any) -> None:
    model = randomise(Recurrent(nn.LSTM(5, 4, batch_first=True, proj_size=2), states="all"))
    x = randn(2, 5, 3)
    teacher = reparam.expand(model, 2, example_input=x, ignore=[ignore])
    assert difference(model(x), teacher(x)) <= EXACT
    hidden = next(layer for layer in teacher.plan.layers if layer.name == "net.weight_hh_l0")
    assert hidden.wide_shape == hidden.shape


@pytest.mark.parametrize("ignore", ["original0", "original1"])
def test_an_ignored_part_of_a_computed_weight_keeps_the_state_narrow(ignore: str) -> None:
    model, x = randomise(normed("weight_hh_l0")), randn(2, 5, 3)
    name = f"net.parametrizations.weight_hh_l0.{ignore}"
    teacher = reparam.expand(model, 2, example_input=x, ignore=[name])
    assert difference(model(x), teacher(x)) <= EXACT
    assert not teacher.plan.contractions
    assert teacher.net.hidden_size == 4


@pytest.mark.parametrize("ignore", ["a.weight_ih_l0", "b.weight_ih_l0"])
def test_weights_that_cannot_agree_are_contracted(ignore: str) -> None:
    """One of two networks that share a weight must stay narrow, the other one wants it wide."""
    model, x = randomise(Shared()), randn(2, 5, 3)
    teacher = reparam.expand(model, 2, example_input=x, ignore=[ignore])
    assert difference(model(x), teacher(x)) <= EXACT
    assert [c.reason for c in teacher.plan.contractions] == [
        "its weights have different layouts, because they are used elsewhere too"
    ]
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in reparam.extract(teacher).state_dict().items())


@pytest.mark.parametrize("ignore", ["attn", "attn.in_proj_weight", "attn.out_proj", "k"])
def test_ignored_parts_of_attention(ignore: str) -> None:
    model = randomise(Attend("cross"))
    inputs = two(2, 5)
    teacher = reparam.expand(model, 2, example_input=inputs, ignore=[ignore])
    assert difference(model(**inputs), teacher(**inputs)) <= EXACT
    assert reparam.plan(model, 2, example_input=inputs).coverage == 1.0 > teacher.plan.coverage


class Twice(nn.Module):
    """A recurrent network called on two inputs, of which only one is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.net, self.head = nn.Linear(3, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.net(self.stem(x))[0]), self.net(torch.cat([x, x[..., :1]], -1))[0]


class Shared(nn.Module):
    """Two recurrent networks that share a weight, and one whose two weights are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.a, self.b = (nn.LSTM(4, 4, batch_first=True) for _ in range(2))
        self.c = nn.GRU(4, 4, batch_first=True)
        self.b.weight_hh_l0 = self.a.weight_hh_l0
        self.c.weight_hh_l0 = self.c.weight_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.stem(x))[0])[0])[0])


class Reads(nn.Module):
    """Reads a weight of its recurrent network, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.net(x)[0]), self.net.weight_hh_l0.sum()


class SharedAttention(nn.Module):
    """Two attention layers, of one and of two sequences, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, E), nn.Linear(E, 2)
        self.a, self.b = (nn.MultiheadAttention(E, 2, batch_first=True) for _ in range(2))
        self.b.in_proj_weight = self.a.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.b(self.a(x, x, x)[0], x, x)[0])


class Transposed(nn.Module):
    """Uses the weights of its recurrent network in linear layers, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.net, self.head = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.net(self.stem(x))[0], self.net.weight_ih_l0)
        return self.head(F.linear(x, self.net.weight_hh_l0.t()))


class Words(nn.Module):
    """An encoder, and a decoder of single steps that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = nn.GRU(3, 4, batch_first=True), nn.GRUCell(4, 4)
        self.score, self.head = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens, state = self.encoder(x)
        state, outs = state[0], []
        for _ in range(2):
            weights = torch.softmax((self.score(tokens) * state[:, None]).sum(-1), -1)
            context = (weights[..., None] * tokens).sum(1)
            state = self.cell(context, state)
            outs.append(self.head(torch.cat([context, state], -1)))
        return torch.stack(outs, 1)


class Columns(nn.Module):
    """Convolutions whose columns a recurrent network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 2)
        self.net = nn.GRU(12, 4, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.stem(x).flatten(1, 2).transpose(1, 2))[0])


def normed(name: str) -> nn.Module:
    model = Recurrent(nn.LSTM(5, 4, batch_first=True))
    parametrizations.weight_norm(model.net, name)
    return model


SHARED = [
    Case("called-twice", Twice, sequence),
    Case("shared", Shared, sequence),
    Case("read", Reads, sequence),
    Case("shared-attention", SharedAttention, sequence),
    Case("transposed", Transposed, sequence),
    Case("encoder-decoder", Words, sequence),
    Case("columns", Columns, lambda b, n: {"x": randn(b, 3, 3, n)}),
    Case("weight-norm-input", lambda: normed("weight_ih_l0"), sequence),
    Case("weight-norm-state", lambda: normed("weight_hh_l0"), sequence),
    Case("weight-norm-attention", lambda: _normed_attention(), sequence),
]


def _normed_attention() -> nn.Module:
    model = Attend()
    parametrizations.weight_norm(model.attn, "in_proj_weight")
    return model


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_shared_weights(case: Case, ratio: int) -> None:
    check(case, ratio)


# -- dropout, leaves, copies, files, fast paths ------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{}, WEIGHTS], ids=["fused", "weights"])
def test_dropout_of_attention_obeys_the_mode(call: Inputs) -> None:
    """The attention weights are as many as the student's, so equal seeds drop the same."""
    model, x = randomise(Attend(dropout=0.4, call=call)), randn(2, 5, 3)
    teacher = reparam.expand(model, 2, example_input=x)
    assert difference(teacher(x), teacher(x)) == 0.0
    assert difference(model(x), teacher(x)) <= EXACT
    results = []
    for network, seed in ((model.train(), 1), (teacher.train(), 1), (teacher, 2)):
        torch.manual_seed(seed)
        results.append(network(x))
    assert difference(*results[:2]) <= EXACT
    assert difference(*results[1:]) > 1e-3


def test_dropout_between_recurrent_layers_obeys_the_mode() -> None:
    model, x = randomise(Recurrent(nn.LSTM(5, 4, 2, batch_first=True, dropout=0.5))), randn(2, 5, 3)
    teacher = reparam.expand(model, 2, example_input=x)
    assert difference(model(x), teacher(x)) <= EXACT
    teacher.train()
    assert difference(teacher(x), teacher(x)) > 1e-3


class Chooses(nn.Module):
    """Kept as a leaf: it branches on a size."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0] if x.shape[1] > 2 else self.net(x.flip(1))[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_inside_leaves(kind: Any) -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 5), Chooses(kind(5, 4, 2, batch_first=True)), nn.Linear(4, 2)))
    teacher = reparam.expand(model, 2, example_input=randn(2, 5, 3))
    assert teacher.plan.coverage == 1.0 and "1" in teacher.plan.leaves
    for n in (2, 6):
        x = randn(3, n, 3)
        assert difference(model(x), teacher(x)) <= EXACT
        assert difference(model(x), reparam.student_view(teacher)(x)) <= EXACT
    assert (teacher.get_submodule("1.net").hidden_size, teacher.get_submodule("1.net").input_size) == (8, 10)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", ["attention-cross", "transformer", "rnn-lstm-projected-deep", "rnn-gru-root"])
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    model, inputs = randomise(case.make()), case.inputs(2, 5)
    teacher = reparam.expand(model, 2, example_input=inputs)
    view = reparam.student_view(teacher)
    check_gradients(teacher, inputs)
    sum(out.sum() for out in leaves(view(**inputs))).backward()
    reparam.save(teacher, tmp_path / "teacher.safetensors")
    loaded = reparam.load(tmp_path / "teacher.safetensors", model)
    copied = copy.deepcopy(teacher)
    for other in (copied, loaded):
        assert difference(teacher(**inputs), other(**inputs)) == 0.0
        assert difference(view(**inputs), reparam.student_view(other)(**inputs)) == 0.0
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert difference(view(**inputs), reparam.extract(teacher)(**inputs)) <= EXACT
    assert difference(view(**inputs), teacher(**inputs)) > 1e-3
    single = {key: value.float() for key, value in inputs.items()}
    teacher.float()
    assert leaves(teacher(**single))[0].dtype == leaves(view(**single))[0].dtype == torch.float32


def test_modules_state_their_widths() -> None:
    model = randomise(Recurrent(nn.LSTM(5, 4, 2, proj_size=3)))
    net = reparam.expand(model, 2, example_input=randn(2, 5, 3)).net
    assert (net.input_size, net.hidden_size, net.proj_size) == (10, 8, 6)
    cell = reparam.expand(randomise(Loop(nn.GRUCell(5, 4), 2)), 3, example_input=randn(2, 5, 3)).cell
    assert (cell.input_size, cell.hidden_size) == (15, 12)


def test_fast_paths_give_the_same_where_nothing_is_padded() -> None:
    """Behind the padding torch's fast path returns zeros, its slow path and the teacher do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        model, x = randomise(Coder(encoder(nested=True), {})), randn(2, 5, 3)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        teacher = reparam.expand(model, 2, example_input={"x": x, "src_key_padding_mask": padding})
        with torch.no_grad():
            found, expected = (network(x=x, src_key_padding_mask=padding) for network in (teacher, model))
            assert difference(found[~padding], expected[~padding]) <= EXACT
            assert difference(found, expected) > 1e-3
            assert torch.backends.mha.get_fastpath_enabled()
        assert difference(found, model(x=x, src_key_padding_mask=padding)) <= EXACT
        report = reparam.check(model, teacher, example_input={"x": x, "src_key_padding_mask": padding})
        assert report.max_rel <= EXACT


def test_torch_is_itself_again_after_tracing() -> None:
    before = nn.MultiheadAttention.forward, F.multi_head_attention_forward, nn.LSTM.forward, pack_padded_sequence
    reparam.plan(Attend().double(), example_input=randn(2, 5, 3))
    from torch.nn.utils import rnn as home

    after = nn.MultiheadAttention.forward, F.multi_head_attention_forward, nn.LSTM.forward, home.pack_padded_sequence
    assert before == after and pack_padded_sequence is home.pack_padded_sequence

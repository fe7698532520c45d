"""torch's own attention and transformer modules, written so that the tracer can record them.

Their forwards branch on sizes, on data and on what a fused kernel supports. While tracing, attention becomes
projections, ``scaled_dot_product_attention`` and a linear layer, and the fast paths are off.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparam.passes.modes import choose

Record = Callable[..., Any]
Patch = tuple[Any, str, Any]


@contextlib.contextmanager
def without_fast_paths() -> Iterator[None]:
    """While active, torch's transformer layers run operator by operator, as they are recorded.

    Their fast paths give other results where padding or a mask of numbers is involved.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def is_symbolic(*values: Any) -> bool:
    """Whether a proxy is among these values."""
    return any(issubclass(type(leaf), fx.Proxy) for leaf in pytree.tree_leaves(values))


def everywhere(name: str, plain: Any, new: Any) -> list[Patch]:
    """Return patches for all modules that have a function under its own name, as ``from torch... import`` leaves it."""
    return [(home, name, new) for home in _homes(name, plain, len(sys.modules))]


@functools.cache
def _homes(name: str, plain: Any, _modules: int) -> list[Any]:
    """Search all modules; again where more have been imported."""
    found = [(home, getattr(home, "__dict__", {}).get(name)) for home in list(sys.modules.values())]
    # A recording inside another one finds what that one put there.
    return [home for home, value in found if value is not None and getattr(value, "reparam_plain", value) is plain]


def torch_modules(record: Record) -> list[Patch]:
    """Return what to replace in torch's attention and transformers while tracing.

    Args:
        record: ``record(function, args, kwargs)`` returns the recorded value, or NotImplemented to run torch's code.
    """
    return [*_attention(record), *_masks(record), *_transformers()]


# -- attention -----------------------------------------------------------------------------------------------------


def in_projection(
    query: Tensor, key: Tensor, value: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the projections of query, key and value.

    Args:
        query: [..., E].
        key: [..., K].
        value: [..., V].
        weights: one weight [3 E, E] for all of them, or three of their own.
        bias: [3 E], or None.
    """
    parts = weights[0].chunk(3) if len(weights) == 1 else tuple(weights)
    biases = (None,) * 3 if bias is None else bias.split([part.shape[0] for part in parts])
    if key is value and len(weights) == 1:
        # One product for keys and values of the same tokens.
        rows = parts[0].shape[0]
        both = F.linear(key, weights[0][rows:], None if bias is None else bias[rows:])
        return (F.linear(query, parts[0], biases[0]), *both.chunk(2, -1))
    given = zip((query, key, value), parts, biases, strict=True)
    return tuple(F.linear(x, part, b) for x, part, b in given)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a truth mask (True: not attended to) as the number that is added to the products."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _dtype(value: Any) -> Any:
    """The dtype of a tensor, also where it is symbolic."""
    return value.node.meta["val"].dtype if is_symbolic(value) else value.dtype


def _masks(record: Record) -> list[Patch]:
    plain_mask, plain_dtype = F._canonical_mask, F._none_or_dtype

    def canonical_mask(
        mask: Any, mask_name: str, other_type: Any, other_name: str, target_type: Any, check_other: bool = True
    ) -> Any:
        if not is_symbolic(mask, target_type):
            return plain_mask(mask, mask_name, other_type, other_name, target_type, check_other)
        if mask is None or _dtype(mask).is_floating_point:
            return mask
        return record(additive_mask, (mask, target_type), {})

    def none_or_dtype(value: Any) -> Any:
        return _dtype(value) if is_symbolic(value) else plain_dtype(value)

    return [(F, "_canonical_mask", canonical_mask), (F, "_none_or_dtype", none_or_dtype)]


def _attention(record: Record) -> list[Patch]:
    plain_forward, plain_function = nn.MultiheadAttention.forward, F.multi_head_attention_forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_symbolic(args, kwargs, self.out_proj.weight):
            return plain_forward(self, *args, **kwargs)
        given = _bound(plain_forward, self, *args, **kwargs)
        names = ("in_proj_weight",) if self._qkv_same_embed_dim else tuple(f"{n}_proj_weight" for n in "qkv")
        return _attend(
            record,
            (given["query"], given["key"], given["value"]),
            _Projections(
                [getattr(self, n) for n in names], self.in_proj_bias, self.out_proj.weight, self.out_proj.bias
            ),
            (given["attn_mask"], given["key_padding_mask"]),
            heads=self.num_heads,
            width=self.embed_dim,
            extra=(self.bias_k, self.bias_v),
            zero=self.add_zero_attn,
            dropout=self.dropout,
            training=self.training,
            is_causal=given["is_causal"],
            need_weights=given["need_weights"],
            average=given["average_attn_weights"],
            batch=0 if self.batch_first else 1,
        )

    def function(*args: Any, **kwargs: Any) -> Any:
        if not is_symbolic(args, kwargs):
            return plain_function(*args, **kwargs)
        given = _bound(plain_function, *args, **kwargs)
        if given["static_k"] is not None or given["static_v"] is not None:
            return record(plain_function, args, kwargs)
        names = [f"{n}_proj_weight" for n in "qkv"] if given["use_separate_proj_weight"] else ["in_proj_weight"]
        out = (given["out_proj_weight"], given["out_proj_bias"])
        return _attend(
            record,
            (given["query"], given["key"], given["value"]),
            _Projections([given[name] for name in names], given["in_proj_bias"], *out),
            (given["attn_mask"], given["key_padding_mask"]),
            heads=given["num_heads"],
            width=given["embed_dim_to_check"],
            extra=(given["bias_k"], given["bias_v"]),
            zero=given["add_zero_attn"],
            dropout=given["dropout_p"],
            training=given["training"],
            is_causal=given["is_causal"],
            need_weights=given["need_weights"],
            average=given["average_attn_weights"],
            batch=1,
        )

    return [
        (nn.MultiheadAttention, "forward", forward),
        *everywhere("multi_head_attention_forward", plain_function, function),
        (torch.backends.mha, "get_fastpath_enabled", lambda: False),
    ]


def _bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, with the defaults."""
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments


class _Projections(NamedTuple):
    """The weights of an attention layer; ``inner`` holds one packed weight, or three."""

    inner: list[Any]
    inner_bias: Any
    outer: Any
    outer_bias: Any


def _attend(
    record: Record,
    inputs: tuple[Any, Any, Any],
    weights: _Projections,
    masks: tuple[Any, Any],
    *,
    heads: int,
    width: int,
    extra: tuple[Any, Any],
    zero: bool,
    dropout: float,
    training: Any,
    is_causal: bool,
    need_weights: bool,
    average: bool,
    batch: int,
) -> tuple[Any, Any]:
    """``F.multi_head_attention_forward`` out of operators that have rules; ``batch`` is the batch dimension."""
    batched = inputs[0].dim() == 3
    mask, padding = masks
    if not batched:
        inputs = _each(lambda x: x.unsqueeze(batch), inputs)
        padding = None if padding is None else padding.unsqueeze(0)
    if is_causal and mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    is_causal = is_causal and padding is None and not need_weights
    mask = None if is_causal else _as_bias(record, mask, inputs[0])
    padding = _as_bias(record, padding, inputs[0])

    q, k, v = _project(record, inputs, weights.inner, weights.inner_bias)
    if extra[0] is not None:
        tokens = (k.size(0), -1, -1) if batch == 0 else (-1, k.size(1), -1)
        k, v = (torch.cat([x, b.expand(*tokens)], 1 - batch) for x, b in zip((k, v), extra, strict=True))
    # The width of a head follows from that of the input; heads of one channel are repeated themselves.
    sizes = (heads, 1 if width == heads else -1)
    q, k, v = (_split_heads(x, sizes, batch) for x in (q, k, v))
    if zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _merged(mask, padding, heads, (extra[0] is not None) + zero)

    scores = None
    if need_weights:
        # The width of the student's heads: replicas are divided out by the rule of the product.
        scores = torch.matmul(q * math.sqrt(1.0 / (width // heads)), k.transpose(-2, -1))
        scores = F.softmax(scores if mask is None else scores + mask, dim=-1)
        scores = F.dropout(scores, dropout, training) if dropout else scores
        result = torch.matmul(scores, v)
        scores = scores.mean(dim=1) if average else scores
    else:
        p = _chosen(record, training, dropout) if dropout else 0.0
        result = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
    result = result.transpose(1, 2) if batch == 0 else result.permute(2, 0, 1, 3)
    result = F.linear(result.flatten(-2), weights.outer, weights.outer_bias)
    if not batched:
        result, scores = result.squeeze(batch), None if scores is None else scores.squeeze(0)
    return result, scores


def _each(function: Callable[[Any], Any], values: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Apply a function; equal values stay the same object."""
    found = {id(value): function(value) for value in values}
    first, second, third = (found[id(value)] for value in values)
    return first, second, third


def _as_bias(record: Record, mask: Any, query: Any) -> Any:
    if mask is None or _dtype(mask).is_floating_point:
        return mask
    return record(additive_mask, (mask, query.dtype), {})


def _project(record: Record, inputs: tuple[Any, Any, Any], weights: list[Any], bias: Any) -> Any:
    query, key, value = inputs
    if query is key and key is value and len(weights) == 1:
        return F.linear(query, weights[0], bias).chunk(3, -1)
    projected = record(in_projection, (query, key, value, weights, bias), {})
    return [projected[position] for position in range(3)]


def _split_heads(x: Any, sizes: tuple[int, int], batch: int) -> Any:
    """[B, N, E] or [N, B, E] to [B, heads, N, E / heads]."""
    x = x.unflatten(-1, sizes)
    return x.transpose(1, 2) if batch == 0 else x.permute(1, 2, 0, 3)


def _merged(mask: Any, padding: Any, heads: int, extra: int) -> Any:
    """Return what is added to the products, or None; ``extra`` keys at the end are attended to by all."""
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    if padding is not None:
        padding = padding.unsqueeze(1).unsqueeze(1)
    if extra:
        mask, padding = (None if m is None else F.pad(m, (0, extra)) for m in (mask, padding))
    if mask is None or padding is None:
        return padding if mask is None else mask
    return mask + padding


def _chosen(record: Record, training: Any, dropout: float) -> Any:
    if is_symbolic(training):
        return record(choose, (training, dropout, 0.0), {})
    return dropout if training else 0.0


# -- transformers --------------------------------------------------------------------------------------------------


def _transformers() -> list[Patch]:
    home = nn.modules.transformer
    plain_forward, plain_detect = nn.Transformer.forward, home._detect_is_causal_mask

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_symbolic(args, kwargs):
            return plain_forward(self, *args, **kwargs)
        # Without the comparisons of sizes, which the operators inside make again.
        given = _bound(plain_forward, self, *args, **kwargs)
        memory = self.encoder(
            given["src"],
            mask=given["src_mask"],
            src_key_padding_mask=given["src_key_padding_mask"],
            is_causal=given["src_is_causal"],
        )
        names = "tgt_mask memory_mask tgt_key_padding_mask memory_key_padding_mask tgt_is_causal memory_is_causal"
        return self.decoder(given["tgt"], memory, **{name: given[name] for name in names.split()})

    def detect(mask: Any, is_causal: bool | None = None, size: Any = None) -> bool:
        # torch compares the mask with a causal one to spare it; added as it is, it gives the same.
        return is_causal is True if is_symbolic(mask, size) else plain_detect(mask, is_causal, size)

    return [(nn.Transformer, "forward", forward), (home, "_detect_is_causal_mask", detect)]

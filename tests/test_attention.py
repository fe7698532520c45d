"""Attention, written in many ways: drawn transformers, what the keyword ``heads`` widens, real models.

The default run draws the same networks every time; the thorough run draws others:
``pytest -m thorough tests/test_attention.py``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_blocks import AROUND, Recipe, recipe, recipes
from attention_networks import CHOICES, C
from hypothesis import HealthCheck, Phase, currently_in_test_context, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import randomise

import reparam
from reparam.errors import InputError
from reparam.passes.capture import Capture, key_of
from reparam.passes.expand import verify_plan
from reparam.passes.plan import Plan
from reparam.passes.search import prepare
from reparam.passes.widen import build_teacher

EXACT = 1e-12
COMMON = {
    "deadline": None, "print_blob": True, "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}  # fmt: skip
CI = settings(max_examples=int(os.environ.get("ATTENTION_NETWORKS", "10")), derandomize=True, **COMMON)
THOROUGH = settings(
    max_examples=int(os.environ.get("ATTENTION_NETWORKS", "500")), phases=(Phase.generate, Phase.shrink), **COMMON
)

Known = Callable[[Mapping[str, Any], str], bool]
NARROW: list[tuple[tuple[str, ...], Known, str]] = [
    (("near.0.weight", "near.2.weight"), lambda o, heads: o["bias"] == "mlp",
     "the network that computes a table of biases sees parameters and buffers only"),
    (("read.q.weight", "read.gate.weight", "read.wq"), lambda o, heads: o["kind"] == "latents",
     "its input is a parameter: nothing asks for a wider one"),
    (("read.before.weight", "read.after.weight"), lambda o, heads: o["kind"] == "latents",
     "a product with queries that are parameters is no sign of heads: the keys keep the default"),
    (("before.weight", "after.weight"),
     lambda o, heads: heads != "count" or o["heads"] == 1 or o["divide"] == "stack" or o["merge"] == "cat",
     "it mixes heads, whose number stays where their width is widened, and where the code takes them one by one"),
    (("pools.0.weight", "pools.1.weight", "pools.2.weight"), lambda o, heads: heads == "count",
     "a convolution with one filter for each channel of a head: their width stays where their number is widened"),
    (("out.weight",), lambda o, heads: o["merge"] == "cat" and heads == "count",
     "the code concatenates as many heads as the student has"),
]  # fmt: skip
"""What may stay narrow: the ends of the names of layers, for which choices, and why."""


def known(o: Mapping[str, Any], heads: str, name: str) -> bool:
    return any(name.endswith(names) and when(o, heads) for names, when, _why in NARROW)


def grow(model: nn.Module, ratio: int, x: tuple[Tensor, ...], heads: str) -> tuple[Capture, Plan, float]:
    capture, inputs, made = prepare(model, ratio, x, heads=heads)
    return capture, made, verify_plan(model, capture, made, inputs, None)


def laws(drawn: Recipe, ratio: int, heads: str) -> Plan:
    """The teacher is exact at every node and for other batches; it is as wide as stated; it returns; it learns."""
    if currently_in_test_context():
        note(f"heads {heads!r}, ratio {ratio}: {drawn}")
        event(f"heads {heads}")
    model, x = drawn.build(), drawn.sample()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture, made, error = grow(model, ratio, x, heads)
        assert error <= EXACT
        torch.manual_seed(0)
        teacher = build_teacher(model, capture, made, 0.25)
    narrow = {layer.name: layer.reason for layer in made.layers if not layer.widened}
    assert not {name: why for name, why in narrow.items() if not known(drawn.o, heads, name)}
    assert made.coverage == 1.0 or narrow
    for batch in (1, 3):
        xs = drawn.sample(batch, seed=batch + 5)
        with torch.no_grad():
            expected = model(*xs)
            assert (teacher(*xs) - expected).abs().max() <= EXACT * expected.abs().max()
    back = reparam.extract(teacher).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(back[name], value) if ratio == 2 else torch.allclose(back[name], value, rtol=1e-15, atol=0)
    learns(model, teacher, x)
    return made


def learns(model: nn.Module, teacher: nn.Module, x: tuple[Tensor, ...]) -> None:
    """Gradients reach every weight of the teacher that they reach in the student."""
    for network in (model, teacher):
        network(*x).square().sum().backward()
    wide = dict(teacher.named_parameters())
    # The gradient of a number that softmax takes away again (one bias for all scores) is rounding.
    least = 1e-10 * max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        reached = p.grad is not None and float(p.grad.abs().max()) > least
        grad = wide[name].grad
        assert not reached or (grad is not None and bool(grad.isfinite().all() and grad.any())), name


RATIOS, HEADS = st.sampled_from((2, 3)), st.sampled_from(("auto", "width", "count"))


@pytest.mark.slow
@CI
@given(recipes(), RATIOS, HEADS)
def test_drawn_transformers(drawn: Recipe, ratio: int, heads: str) -> None:
    laws(drawn, ratio, heads)


@pytest.mark.thorough
@THOROUGH
@given(recipes(), RATIOS, HEADS)
def test_many_drawn_transformers(drawn: Recipe, ratio: int, heads: str) -> None:
    laws(drawn, ratio, heads)


NEEDS: dict[str, dict[str, Any]] = {
    "talking": {"product": "matmul"}, "causal": {"product": "sdpa"}, "given": {"tokens": "class"},
    "pool": {"tokens": "class"}, "bias": {"tokens": "class"},
}  # fmt: skip
EACH = [(key, value) for key, values in {**AROUND, **CHOICES}.items() for value in dict.fromkeys(values)]


@pytest.mark.parametrize(("key", "value"), EACH, ids=[f"{key}-{value}" for key, value in EACH])
def test_each_ingredient(key: str, value: Any) -> None:
    """Each way of writing each ingredient, in the plainest network: ``auto`` widens what the better choice does.

    Above 99 % it looks no further.
    """
    drawn = recipe(**{**NEEDS.get(key, {}), key: value})
    assert drawn.o[key] == value
    model, x = drawn.build(), drawn.sample()
    found = {}
    for heads in ("width", "count", "auto"):
        if len(found) == 2 and min(found.values()) == 1.0:
            return  # nothing to choose
        _capture, made, error = grow(model, 2, x, heads)
        assert error <= EXACT
        assert all(layer.widened or known(drawn.o, heads, layer.name) for layer in made.layers), heads
        found[heads] = made.coverage
    assert found["auto"] >= min(0.99, max(found.values()))


# The keyword ----------------------------------------------------------------------------------------------------------


def dims_of_queries(capture: Capture, made: Plan) -> list[int]:
    """The widened dimensions of the queries [B, heads, N, width] that go into attention."""
    node = next(n for n in capture.graph.nodes if n.target is F.scaled_dot_product_attention)
    return [dim for maps in made.value_maps.get(key_of(node.args[0]), ()) for dim, _map in maps]


WRITTEN = [
    ("project", "five"), ("project", "heads_first"), ("project", "heads_three"), ("project", "three_last"),
    ("project", "chunk"), ("project", "separate"), ("project", "kv"), ("project", "einsum"), ("project", "rows"),
    ("divide", "view"), ("divide", "unflatten_rest"), ("divide", "tokens_last"), ("divide", "width_first"),
    ("norm", "full"), ("rotary", "half"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRITTEN, ids=[value for _key, value in WRITTEN])
def test_what_the_keyword_widens(key: str, value: str) -> None:
    """Whatever the order in which the code writes heads, their width and q, k, v: the number or the width."""
    base = {"project": "chunk"} if key == "divide" else {}
    drawn = recipe(**{"product": "sdpa", **base, key: value})
    for heads, dims in (("width", [3]), ("count", [1]), ("auto", [3])):
        capture, made, error = grow(drawn.build(), 2, drawn.sample(), heads)
        assert dims_of_queries(capture, made) == dims
        assert (made.coverage, error <= EXACT) == (1.0, True)


def test_a_single_head_has_no_number_to_widen() -> None:
    drawn = recipe(heads=1, product="sdpa")
    capture, made, _error = grow(drawn.build(), 2, drawn.sample(), "count")
    assert (dims_of_queries(capture, made), made.coverage) == ([3], 1.0)


def test_torch_attention_follows_the_keyword() -> None:
    drawn = recipe(kind="module")
    for heads in ("width", "count", "auto"):
        _capture, made, error = grow(drawn.build(), 2, drawn.sample(), heads)
        assert (made.coverage, error <= EXACT) == (1.0, True)


class Bound(nn.Module):
    """Attention with code that depends on the width of its heads (``"width"``) or on their number (``"count"``)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.qkv, self.out, self.head = (nn.Linear(3, C), nn.Linear(C, 3 * C), nn.Linear(C, C),
                                                    nn.Linear(C, 2))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        b, n, _c = x.shape
        q, k, v = self.qkv(self.stem(x)).reshape(b, n, 3, 3, C // 3).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "width":
            v = torch.cumsum(v, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        if self.kind == "count":
            return self.head(self.out(torch.cat([y[:, k] for k in range(3)], dim=-1)))
        return self.head(self.out(y.transpose(1, 2).reshape(b, n, C)))


@pytest.mark.parametrize(("kind", "better"), [("width", "count"), ("count", "width")])
def test_auto_takes_what_widens_more(kind: str, better: str) -> None:
    torch.manual_seed(0)
    model, x = Bound(kind).double(), (torch.randn(2, 5, 3, dtype=torch.float64),)
    found = {heads: grow(model, 2, x, heads) for heads in ("width", "count", "auto")}
    assert all(error <= EXACT for _capture, _made, error in found.values())
    assert found[better][1].coverage == found["auto"][1].coverage == 1.0
    assert found[kind][1].coverage < 1.0
    assert [layer.name for layer in found[kind][1].layers if not layer.widened] == ["out.weight"]


@pytest.mark.parametrize("call", [reparam.plan, reparam.expand])
def test_another_value_is_refused(call: Callable[..., Any]) -> None:
    message = "heads must be one of 'auto', 'count', 'width', not 'depth'"
    with pytest.raises(InputError, match=message):
        call(nn.Linear(2, 2), 2, example_input=torch.randn(1, 2), heads="depth")


@pytest.mark.parametrize("heads", ["auto", "width", "count"])
def test_heads_folded_into_the_batch(heads: str) -> None:
    """No order of indices is chosen for a dimension that holds the batch: the teacher takes every batch size."""
    for options in ({"bias": "padded", "kind": "grid"}, {"talking": "before"}):
        drawn = recipe(product="bmm", heads=6, project="narrow", divide="width_first", **options)
        laws(drawn, 2, heads)


def test_tokens_keep_their_number() -> None:
    """A product of queries with a table of positions is no layer: its outputs are tokens."""
    for bias in ("shaw", "decomposed"):
        for product in ("matmul", "sdpa"):
            drawn = recipe(bias=bias, product=product)
            _capture, made, _error = grow(drawn.build(), 2, drawn.sample(), "width")
            table = made.params["blocks.0.attention.table"]
            assert table.wide_shape == (table.shape[0], 2 * table.shape[1])


# Whole models ---------------------------------------------------------------------------------------------------------

FEW, TINY = {"img_size": 64, "depth": 3}, {"img_size": 64}
BIASES = ("mlp.fc1", "mlp.fc2")
"""The networks that compute tables of biases, from parameters and buffers alone."""

MODELS: list[tuple[str, int, dict[str, Any], float, tuple[str, ...]]] = [
    ("vit_small_patch16_rope_ape_224", 64, FEW, 1.0, ()),
    ("vit_small_patch16_rope_mixed_224", 64, FEW, 1.0, ()),
    ("vit_pwee_patch16_reg1_gap_256", 64, FEW, 1.0, ()),
    ("vit_relpos_small_patch16_rpn_224", 64, FEW, 0.999, BIASES),
    ("vit_srelpos_small_patch16_224", 64, FEW, 0.999, BIASES),
    ("swinv2_cr_tiny_ns_224", 128, {"img_size": 128, "depths": (2, 2, 2, 2)}, 0.998, BIASES),
    ("naflexvit_base_patch16_map", 64, {"depth": 2}, 0.97, ("attn_pool.q",)),
    ("naflexvit_base_patch16_gap", 64, {"depth": 2}, 1.0, ()),
    ("eva02_small_patch14_224", 56, {"img_size": 56, "depth": 3}, 1.0, ()),
    ("beit3_base_patch16_224", 64, {"img_size": 64, "depth": 2}, 1.0, ()),
    ("cait_xs24_384", 64, FEW, 0.9999, ("attn.proj_l", "attn.proj_w")),
    ("xcit_nano_12_p16_224", 64, FEW, 0.993, ("pos_embed.token_projection",)),
    ("maxvit_rmlp_pico_rw_256", 128, {"img_size": 128}, 0.99, BIASES),
    ("coatnet_rmlp_nano_rw_224", 128, {"img_size": 128}, 0.997, BIASES),
    ("samvit_base_patch16_224", 64, {**FEW, "global_attn_indexes": (1,)}, 1.0, ()),
    ("hiera_tiny_224", 224, {}, 1.0, ()),
    ("hiera_small_abswin_256", 256, {}, 1.0, ()),
    ("mvitv2_tiny", 64, TINY, 1.0, ()),
    ("mvitv2_small_cls", 64, TINY, 1.0, ()),
    ("tiny_vit_11m_224", 224, {}, 1.0, ()),
    ("vitamin_small_224", 64, TINY, 1.0, ()),
    ("pvt_v2_b1", 64, {}, 1.0, ()),
    ("pvt_v2_b2_li", 64, {}, 1.0, ()),
    ("davit_tiny", 64, {}, 1.0, ()),
    ("gcvit_xxtiny", 224, {}, 1.0, ()),
    ("focalnet_tiny_lrf", 64, {}, 1.0, ()),
    ("nextvit_small", 64, {}, 1.0, ()),
    ("volo_d1_224", 64, TINY, 1.0, ()),
    ("twins_svt_small", 64, {}, 1.0, ()),
    ("twins_pcpvt_small", 64, {}, 1.0, ()),
    ("crossvit_9_240", 240, {}, 1.0, ()),
    ("botnet26t_256", 256, {}, 1.0, ()),
    ("halonet26t", 256, {}, 1.0, ()),
    ("lambda_resnet26t", 64, {}, 0.999, ("self_attn.conv_lambda",)),
    ("levit_128s", 224, {}, 1.0, ()),
]
"""Name, side of the input, arguments, coverage, and the ends of the names of layers that stay narrow."""


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "size", "given", "coverage", "narrow"), MODELS, ids=[row[0] for row in MODELS])
def test_models(name: str, size: int, given: dict[str, Any], coverage: float, narrow: tuple[str, ...]) -> None:
    """Models that nobody had in mind: exact at every node, and as wide as stated."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **given).double().eval())
    x = (torch.randn(1, 3, size, size, dtype=torch.float64),)
    _capture, made, error = grow(model, 2, x, "auto")
    assert error <= EXACT
    assert made.coverage >= coverage
    ends = tuple(f"{end}.weight" for end in narrow)
    assert [layer.name for layer in made.layers if not layer.widened and not layer.name.endswith(ends)] == []

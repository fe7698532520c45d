"""Which recorded operators are linear, and what they are in terms of kernels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reparam.ops import algebra, kernels
from reparam.ops.kernels import Kernel
from reparam.passes.folding.constants import Constants, is_computed
from reparam.passes.folding.ops import Affine, Op, Vector, value_of


def read_operators(graph: fx.Graph, constant: set[fx.Node]) -> dict[fx.Node, Op]:
    """Return the linear operators of a graph, in its order."""
    found: dict[fx.Node, Op] = {}
    for node in graph.nodes:
        name = _name(node)
        reader = _READERS.get(name)
        if reader is None or node in constant or not isinstance(value_of(node), Tensor):
            continue
        if not value_of(node).is_floating_point() or "needed" not in node.meta:
            continue
        op = reader(_Given(node, name, constant))
        if op is not None and all(isinstance(value_of(n), Tensor) for n in op.inputs):
            found[node] = op
    return found


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        name = str(node.target).rstrip("_")
        return name if name in _METHODS else ""
    return _FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""


@dataclass
class _Given:
    """A node and the arguments it was given."""

    node: fx.Node
    name: str
    constant: set[fx.Node]

    def get(self, names: str, *defaults: Any) -> list[Any]:
        """Return arguments by name; the last ones have defaults."""
        words = names.split()
        values = dict(zip(words[len(words) - len(defaults) :], defaults, strict=True))
        values.update(zip(words, self.node.args, strict=False))
        values.update(self.node.kwargs)
        return [values.get(word) for word in words]

    def fixed(self, *values: Any) -> bool:
        """Whether the values are constants."""
        return all(v in self.constant or not isinstance(v, fx.Node) for v in values)

    def data(self, value: Any) -> bool:
        """Whether a value is a tensor that depends on the input."""
        return isinstance(value, fx.Node) and value not in self.constant and isinstance(value_of(value), Tensor)


def _conv(given: _Given) -> Op | None:
    names = "input weight bias stride padding dilation groups"
    x, weight, bias, *rest = given.get(names, None, 1, 0, 1, 1)
    return _kernel(given, x, weight, bias, rest, kernels.conv)


def _conv_transpose(given: _Given) -> Op | None:
    names = "input weight bias stride padding output_padding groups dilation"
    x, weight, bias, *rest = given.get(names, None, 1, 0, 0, 1, 1)
    return _kernel(given, x, weight, bias, rest, kernels.conv_transpose)


def _linear(given: _Given) -> Op | None:
    x, weight, bias = given.get("input weight bias", None)
    return _kernel(given, x, weight, bias, [], kernels.linear)


def _kernel(given: _Given, x: Any, weight: Any, bias: Any, rest: list[Any], make: Callable[..., Kernel]) -> Op | None:
    if not given.data(x) or not given.fixed(weight, bias) or _holds_nodes(rest):
        return None
    rank = value_of(weight).dim()
    if (make is not kernels.linear and value_of(x).dim() != rank) or rank < 2 or value_of(x).dim() < 2:
        return None  # without a batch
    rest = [tuple(v) if isinstance(v, (list, tuple)) else v for v in rest]
    try:
        make(*(_meta(v) for v in (weight, bias)), *rest)
    except Exception:  # "same" padding of an even kernel
        return None

    def build(constants: Constants) -> Kernel:
        return make(constants(weight), constants(bias), *rest)

    return Op(given.node, "kernel", (x,), build, changed=is_computed(weight))


def _meta(value: Any) -> Any:
    return value_of(value) if isinstance(value, fx.Node) else value


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _avg_pool(given: _Given) -> Op | None:
    names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
    x, size, stride, padding, ceil, include, divisor = given.get(names, None, 0, False, True, None)
    if not given.data(x) or _holds_nodes([size, stride, padding]) or divisor is not None:
        return None
    dims = int(given.name[8])
    channels = value_of(x).shape[1]
    if value_of(x).dim() != dims + 2 or ceil:
        return Op(given.node, "move", (x,))
    size, stride, padding = (_each(v, dims) for v in (size, stride or size, padding))
    if any(padding) and not include:
        return Op(given.node, "move", (x,))

    def build(constants: Constants) -> Kernel:
        like = torch.empty((), dtype=torch.float64, device=constants.device)
        return replace(kernels.average(channels, size, like), stride=stride, padding=padding)

    return Op(given.node, "pool", (x,), build)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _pad(given: _Given) -> Op | None:
    x, pad, mode, fill = given.get("input pad mode value", "constant", None)
    if given.data(x) and mode in ("reflect", "replicate", "circular"):
        return Op(given.node, "move", (x,))
    if not given.data(x) or _holds_nodes(pad) or mode != "constant" or fill not in (None, 0) or len(pad) % 2:
        return None
    dims = value_of(x).dim() - 2
    sides = [*pad, *(0,) * (2 * dims - len(pad))]
    if len(sides) != 2 * dims or sides[::2] != sides[1::2] or min(sides, default=-1) < 0:
        return None
    channels, padding = value_of(x).shape[1], tuple(reversed(sides[::2]))

    def build(constants: Constants) -> Kernel:
        like = torch.empty((), dtype=torch.float64, device=constants.device)
        return replace(kernels.identity(channels, dims, like, channels), padding=padding)

    return Op(given.node, "pad", (x,), build)


def _batch_norm(given: _Given) -> Op | None:
    names = "input running_mean running_var weight bias training momentum eps"
    x, mean, var, weight, bias, training, _, eps = given.get(names, None, None, False, 0.1, 1e-5)
    return _norm(given, x, (mean, var, weight, bias), training, eps)


def _instance_norm(given: _Given) -> Op | None:
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    x, mean, var, weight, bias, training, _, eps = given.get(names, None, None, None, None, True, 0.1, 1e-5)
    return _norm(given, x, (mean, var, weight, bias), training, eps)


def _norm(given: _Given, x: Any, tensors: tuple[Any, ...], training: Any, eps: Any) -> Op | None:
    if training is not False or tensors[0] is None or tensors[1] is None or not given.data(x):
        return None
    if not given.fixed(*tensors) or isinstance(eps, fx.Node) or value_of(x).dim() < 2:
        return None

    def part(index: int) -> Vector:
        def compute(constants: Constants) -> Tensor:
            mean, var, weight, bias = map(constants, tensors)
            return algebra.affine_of(mean, var, weight, bias, eps)[index]

        return compute

    return Op(given.node, "affine", (x,), affine=Affine(1, part(0), part(1)), norm=True)


def _arithmetic(given: _Given) -> Op | None:
    names = "input other"
    a, b = given.get(names)
    if set(given.node.kwargs) - {"input", "other"} or len(given.node.args) > 2:
        return None
    if given.data(a) and given.data(b):
        return _sum(given, a, b) if given.name in ("add", "sub") else None
    x, other = (a, b) if given.data(a) else (b, a)
    if not given.fixed(other):  # a size: another input has another one
        return None
    if not given.data(x) or (x is b and given.name == "div") or isinstance(other, bool):
        return None
    value, out = value_of(x), value_of(given.node)
    if out.shape != value.shape or out.dtype != value.dtype:
        return None
    dim = _dimension(other, value)
    if dim == 0:
        return None
    return Op(given.node, "affine", (x,), affine=_affine_of(given.name, dim, other, x is b))


def _affine_of(name: str, dim: int | None, other: Any, reverse: bool) -> Affine:
    def vector(change: Callable[[Tensor], Tensor]) -> Vector:
        return lambda constants: change(constants.vector(other))

    if name == "mul":
        return Affine(dim, vector(lambda v: v), None)
    if name == "div":
        return Affine(dim, vector(torch.reciprocal), None)
    if name == "add":
        return Affine(dim, None, vector(lambda v: v))
    if reverse:
        return Affine(dim, vector(lambda v: -torch.ones_like(v)), vector(lambda v: v))
    return Affine(dim, None, vector(torch.neg))


def _dimension(other: Any, value: Tensor) -> int | None:
    """Return the one dimension along which a constant varies: None for a number, 0 for anything else."""
    constant = _meta(other)
    if isinstance(constant, (int, float)):
        return None
    if not isinstance(constant, Tensor) or constant.dim() > value.dim() or constant.is_complex():
        return 0
    shape = [1] * (value.dim() - constant.dim()) + list(constant.shape)
    wide = [d for d, n in enumerate(shape) if n != 1]
    if not wide:
        return None
    return wide[0] if len(wide) == 1 and shape[wide[0]] == value.shape[wide[0]] else 0


def _sum(given: _Given, a: fx.Node, b: fx.Node) -> Op | None:
    out = value_of(given.node)
    if any(value_of(v).shape != out.shape or value_of(v).dtype != out.dtype for v in (a, b)):
        return None
    return Op(given.node, "add", (a, b), signs=(1, -1 if given.name == "sub" else 1))


def _negative(given: _Given) -> Op | None:
    (x,) = given.get("input")
    minus: Vector = lambda constants: constants.vector(-1.0)  # noqa: E731
    return Op(given.node, "affine", (x,), affine=Affine(None, minus, None)) if given.data(x) else None


def _cat(given: _Given) -> Op | None:
    parts, dim = given.get("tensors dim", 0)
    dim = given.node.kwargs.get("axis", dim)
    if not isinstance(parts, (list, tuple)) or not all(map(given.data, parts)) or not isinstance(dim, int):
        return None
    return Op(given.node, "cat", tuple(parts), dim=dim % value_of(given.node).dim())


def _same(given: _Given) -> Op | None:
    x = given.get("input")[0]
    if given.name.endswith("dropout") or "dropout" in given.name:
        training = given.get("input p training", 0.5, True)[2]
        if training is not False:
            return None
    return Op(given.node, "same", (x,)) if given.data(x) and value_of(x).dtype == value_of(given.node).dtype else None


def _move(given: _Given) -> Op | None:
    x: Any = given.node.args[0] if given.node.args else given.node.kwargs.get("input")
    if not given.data(x) or value_of(x).dtype != value_of(given.node).dtype:
        return None
    return Op(given.node, "move", (x,))


_DROPOUTS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
_MOVES = (
    "view reshape flatten unflatten permute transpose squeeze unsqueeze reshape_as view_as movedim swapaxes moveaxis "
    "swapdims t ravel pixel_shuffle pixel_unshuffle channel_shuffle roll flip mean adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample repeat_interleave"
)
_READERS: dict[str, Callable[[_Given], Op | None]] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _conv),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _conv_transpose),
    **dict.fromkeys(["avg_pool1d", "avg_pool2d", "avg_pool3d"], _avg_pool),
    **dict.fromkeys(["add", "sub", "mul", "div"], _arithmetic),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    **dict.fromkeys(["contiguous", "clone", "detach", *_DROPOUTS.split()], _same),
    **dict.fromkeys(_MOVES.split(), _move),
    "linear": _linear,
    "pad": _pad,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "neg": _negative,
}
_METHODS = set(_MOVES.split()) | {"add", "sub", "mul", "div", "neg", "contiguous", "clone", "detach"}


def _functions() -> dict[Any, str]:
    """Return the functions of torch by their common name."""
    found = {getattr(home, n): n for home in (torch, F) for n in _READERS if callable(getattr(home, n, None))}
    spelled = {"add": "add iadd", "sub": "sub isub", "mul": "mul imul", "div": "truediv itruediv", "neg": "neg"}
    found |= {getattr(operator, word): name for name, words in spelled.items() for word in words.split()}
    for name, words in {"sub": "subtract", "mul": "multiply", "div": "divide true_divide", "neg": "negative"}.items():
        found |= {getattr(torch, word): name for word in words.split()}
    return found


_FUNCTIONS = _functions()

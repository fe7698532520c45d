"""The vocabulary of the random networks: what one step of a drawn network can be.

A step is an nn.Module whose arguments are plain data, so that a network prints as a short program. ``draw`` picks the
arguments for given inputs, or returns None where the step does not apply to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

T = TypeVar("T")
WIDTHS = (4, 6, 3, 5, 8, 7, 10, 9, 12, 2, 1)


class Pick:
    """A source of choices; simple options stand first, so that shrinking goes towards them."""

    def of(self, options: Sequence[T]) -> T:
        raise NotImplementedError

    def flag(self) -> bool:
        return self.of((False, True))

    def width(self) -> int:
        return self.of(WIDTHS)

    def divisor(self, *numbers: int) -> int:
        """A common divisor."""
        common = math.gcd(*numbers)
        return self.of([n for n in range(1, common + 1) if common % n == 0])


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the network under construction: ``image`` [B, C, ...], ``tokens`` [B, T, C] or ``vector`` [B, C]."""

    form: str
    sample: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sample.shape)

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.form == "tokens" else self.shape[1]

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.shape) - 2

    @property
    def space(self) -> tuple[int, ...]:
        return self.shape[2:]


class Op(nn.Module):
    """One step. Subclasses take the inputs' values and plain options."""

    forms: ClassVar[tuple[str, ...]] = ("image",)
    arity: ClassVar[int] = 1
    same: ClassVar[bool] = False
    """All inputs must have the shape of the first."""
    gives: ClassVar[str | None] = None
    """Form of the result; None for that of the first input."""
    often: ClassVar[int] = 1

    def __init__(self, *xs: Value, **options: Any) -> None:
        super().__init__()
        self.o = options

    @classmethod
    def draw(cls, pick: Pick, *xs: Value) -> dict[str, Any] | None:
        return {}


OPS: dict[str, type[Op]] = {}


def op(cls: type[Op]) -> type[Op]:
    OPS[cls.__name__.lower()] = cls
    return cls


def simple(kind: type[Op], table: dict[str, Callable[..., Any]], name: str, often: int = 1) -> None:
    """Register a step that picks one function of a table."""

    def draw(cls: type[Op], pick: Pick, *xs: Value) -> dict[str, Any]:
        return {"f": pick.of(list(table))}

    def forward(self: Op, *xs: Tensor) -> Any:
        return table[self.o["f"]](*xs)

    OPS[name] = type(name, (kind,), {"draw": classmethod(draw), "forward": forward, "often": often})


def parameter(*shape: int, mean: float = 0.0, scale: float = 0.5) -> nn.Parameter:
    return nn.Parameter(mean + scale * torch.randn(shape))


# -- linear operators ----------------------------------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DECONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
F_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMS = ("module", "functional", "standardised", "weight_norm", "spectral_norm", "gain", "flat")
"""How the weight of a convolution comes about."""


def channel(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))


@op
class Conv(Op):
    often = 8

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.conv = CONV[x.dims](
            x.channels, o["out"], o["kernel"], o["stride"], o["padding"], o["dilation"], o["groups"], o["bias"],
            o["mode"],
        )  # fmt: skip
        if o["form"] == "weight_norm":
            parametrizations.weight_norm(self.conv, dim=0)
        if o["form"] == "spectral_norm":
            parametrizations.spectral_norm(self.conv)
        if o["form"] == "gain":
            self.gain = parameter(o["out"], mean=1.0)

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kind = pick.of(("dense", "groups", "depthwise"))
        out = pick.width()
        groups = 1
        if kind == "groups":
            groups = pick.divisor(x.channels, out)
        if kind == "depthwise":
            out, groups = x.channels * pick.of((1, 2, 3)), x.channels
        kernel = pick.of((1, 3, 2))
        dilation = pick.of((1, 2)) if kernel > 1 else 1
        same = dilation * (kernel - 1) // 2
        return {
            "out": out, "kernel": kernel, "stride": pick.of((1, 1, 2)), "padding": pick.of((same, same, 0)),
            "dilation": dilation, "groups": groups, "bias": pick.flag(),
            "mode": pick.of(("zeros", "zeros", "reflect", "circular", "replicate")),
            "form": pick.of(("module", "module", "module", *FORMS)),
        }  # fmt: skip

    def weight(self) -> Tensor:
        w = self.conv.weight
        if self.o["form"] == "standardised":
            flat = w.reshape(1, w.shape[0], -1)
            return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-3).reshape_as(w)
        if self.o["form"] == "gain":
            return w * channel(self.gain, w)
        return w

    def forward(self, x: Tensor) -> Tensor:
        o, dims = self.o, x.dim() - 2
        if o["form"] in ("module", "weight_norm", "spectral_norm") or o["mode"] != "zeros":
            return self.conv(x)
        if o["form"] == "flat" and o["kernel"] == 1 and o["groups"] == 1 and o["stride"] == 1 and not o["padding"]:
            y = torch.einsum("bcn,oc->bon", x.flatten(2), self.conv.weight.flatten(1))
            return y.reshape(x.shape[0], o["out"], *x.shape[2:])
        return F_CONV[dims](x, self.weight(), self.conv.bias, o["stride"], o["padding"], o["dilation"], o["groups"])


@op
class Deconv(Op):
    often = 2

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.conv = DECONV[x.dims](
            x.channels, o["out"], o["kernel"], o["stride"], o["padding"], o["extra"], o["groups"], o["bias"]
        )

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kind, out, groups = pick.of(("dense", "groups", "depthwise")), pick.width(), 1
        if kind == "groups":
            groups = pick.divisor(x.channels, out)
        if kind == "depthwise":
            out, groups = x.channels * pick.of((1, 2)), x.channels
        stride = pick.of((1, 2))
        return {
            "out": out, "kernel": pick.of((2, 3)), "stride": stride, "padding": pick.of((0, 1)),
            "extra": pick.of((0, 1)) if stride == 2 else 0, "groups": groups, "bias": pick.flag(),
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@op
class Linear(Op):
    forms = ("tokens", "vector", "image")
    often = 6

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.image = x.form == "image"
        self.linear = nn.Linear(x.channels, o["out"], o["bias"])
        if o["form"] == "weight_norm":
            parametrizations.weight_norm(self.linear)
        if o["form"] == "spectral_norm":
            parametrizations.spectral_norm(self.linear)
        if o["form"] in ("matmul", "einsum", "addmm"):
            self.matrix = parameter(x.channels, o["out"])

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        forms = ("module", "module", "functional", "weight_norm", "spectral_norm", "matmul", "einsum", "addmm")
        return {"out": pick.width(), "bias": pick.flag(), "form": pick.of(forms)}

    def forward(self, x: Tensor) -> Tensor:
        if self.image:
            return self.on_last(x.movedim(1, -1)).movedim(-1, 1)
        return self.on_last(x)

    def on_last(self, x: Tensor) -> Tensor:
        form = self.o["form"]
        if form == "functional":
            return F.linear(x, self.linear.weight, self.linear.bias)
        if form == "addmm" and x.dim() == 2 and self.linear.bias is not None:
            return torch.addmm(self.linear.bias, x, self.matrix)
        if form in ("matmul", "addmm"):
            return x @ self.matrix
        if form == "einsum":
            return torch.einsum("...c,cd->...d", x, self.matrix)
        return self.linear(x)


@op
class Tied(Op):
    """One weight in two operators: twice as it is, or the second time transposed."""

    forms = ("tokens", "vector", "image")

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.image = x.form == "image"
        self.one = nn.Linear(x.channels, o["out"])
        self.two = nn.Linear(x.channels, o["out"])
        self.two.weight = self.one.weight

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        return {"out": pick.width(), "use": pick.of(("sum", "cat", "back", "scaled"))}

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.image else x
        use, one, two = self.o["use"], self.one, self.two
        if use == "sum":
            y = one(x) + two(F.relu(x))
        elif use == "cat":
            y = torch.cat((one(x), two(x)), -1)
        elif use == "back":
            y = F.linear(F.silu(one(x)), two.weight.t())
        else:
            y = one(x) + F.linear(x, two.weight * 0.5, two.bias)
        return y.movedim(-1, 1) if self.image else y


@op
class Head(Op):
    """Flatten and a linear layer whose size follows from channels and resolution."""

    gives = "vector"

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.sizes = x.shape[1:]
        self.linear = nn.Linear(math.prod(x.shape[1:]), o["out"])

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        forms = ("flatten", "view", "reshape", "constant", "last")
        return {"out": pick.width(), "form": pick.of(forms)} if math.prod(x.shape[1:]) <= 400 else None

    def forward(self, x: Tensor) -> Tensor:
        form = self.o["form"]
        if form == "flatten":
            x = x.flatten(1)
        elif form == "view":
            x = x.contiguous().view(x.size(0), -1)
        elif form == "reshape":
            x = x.reshape(-1, math.prod(self.sizes))
        elif form == "last":
            x = x.movedim(1, -1).flatten(1)
        else:
            x = torch.flatten(x, start_dim=1).reshape(x.shape[0], math.prod(self.sizes))
        return self.linear(x)


# -- norms and activations -----------------------------------------------------------------------------------------

BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@op
class Norm(Op):
    forms = ("image", "vector", "tokens")
    often = 6

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        kind, affine, c = o["kind"], o["affine"], x.channels
        self.last = kind in ("layer", "rms") and x.form == "image"
        if kind == "batch":
            keep = o["keep"]
            self.norm: nn.Module = BATCH[max(x.dims, 1)](c, affine=affine, track_running_stats=keep)
        elif kind == "group":
            self.norm = nn.GroupNorm(o["groups"], c, affine=affine)
        elif kind == "instance":
            self.norm = INSTANCE[x.dims](c, affine=affine, track_running_stats=o["keep"])
        elif kind == "layer":
            self.norm = nn.LayerNorm(c, elementwise_affine=affine)
        elif kind == "layer_all":
            self.norm = nn.LayerNorm(x.shape[1:], elementwise_affine=affine)
        elif kind == "rms":
            self.norm = nn.RMSNorm(c, elementwise_affine=affine, eps=1e-5)
        else:
            self.norm = nn.LocalResponseNorm(3)
        for p in self.norm.parameters():
            nn.init.normal_(p, 0.7, 0.3)

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ["layer", "rms"]
        if x.form == "vector":
            kinds = ["batch", "layer", "rms", "group"]
        if x.form == "image":
            kinds = ["batch", "batch", "layer", "rms", "group", "instance", "layer_all", "local"]
        kind = pick.of(kinds)
        options = {"kind": kind, "affine": pick.flag()}
        if kind in ("batch", "instance"):
            # Statistics of a handful of values (a batch of 2 has x - mean = +-d) have no well-conditioned gradient.
            few = math.prod(x.space) * (2 if kind == "batch" else 1) < 16
            options["keep"] = True if few else pick.of((True, True, False))
        if kind == "group":
            options["groups"] = pick.divisor(x.channels)
        if (kind == "instance" and math.prod(x.space) < 4) or (kind == "layer_all" and math.prod(x.shape[1:]) > 400):
            return None
        return options

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            axes = (0, *range(2, x.dim()), 1)
            return self.norm(x.permute(axes)).permute(0, x.dim() - 1, *range(1, x.dim() - 1))
        return self.norm(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu_inplace": lambda: nn.ReLU(inplace=True), "relu6": nn.ReLU6, "leaky": nn.LeakyReLU,
    "elu": nn.ELU, "selu": nn.SELU, "celu": nn.CELU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU, "mish": nn.Mish, "softplus": nn.Softplus, "softsign": nn.Softsign, "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid, "logsigmoid": nn.LogSigmoid, "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh, "hardshrink": nn.Hardshrink, "softshrink": nn.Softshrink, "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, 0.5), "prelu": nn.PReLU, "softmax": lambda: nn.Softmax(1),
    "log_softmax": lambda: nn.LogSoftmax(-1), "softmin": lambda: nn.Softmin(1), "identity": nn.Identity,
    "rrelu": nn.RReLU,
}  # fmt: skip


@op
class Act(Op):
    forms = ("image", "tokens", "vector")
    often = 6

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        if o["kind"] == "prelu_channels":
            self.act: nn.Module = nn.PReLU(x.shape[1])
            nn.init.uniform_(self.act.weight)
        elif o["kind"] == "glu":
            self.act = nn.GLU(-1 if x.form == "tokens" else 1)
        else:
            self.act = ACTIVATIONS[o["kind"]]()

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = [*ACTIVATIONS, "prelu_channels"] + (["glu"] * 3 if x.channels % 2 == 0 else [])
        return {"kind": pick.of(kinds)}

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.clone() if self.o["kind"].endswith("inplace") else x)


class _AnyForm(Op):
    forms = ("image", "tokens", "vector")


simple(
    _AnyForm,
    {
        "relu": F.relu,
        "silu": F.silu,
        "method_tanh": lambda x: x.tanh(),
        "torch_sigmoid": torch.sigmoid,
        "inplace": lambda x: F.relu_(x + 0.1),
        "clamp": lambda x: x.clamp(-1, 1.5),
        "abs": lambda x: x.abs() + 0.1,
        "square": lambda x: (0.3 * x) ** 2,
        "sqrt": lambda x: (x.abs() + 0.5).sqrt(),
        "exp": lambda x: torch.exp(-x.abs()),
        "swish": lambda x: x * torch.sigmoid(1.7 * x),
        "twice": lambda x: x + x,
        "times_itself": lambda x: 0.2 * x * x,
        "affine": lambda x: 1 - 0.5 * x,
        "reciprocal": lambda x: 1.0 / (1 + x.abs()),
        "where": lambda x: torch.where(x > 0, x, 0.1 * x),
        "masked_fill": lambda x: x.masked_fill(x < -0.5, -0.5),
        "logit": lambda x: torch.log1p(x.abs()),
        "detach": lambda x: x + x.detach(),
        "cast": lambda x: x.to(x.dtype).type_as(x).contiguous(),
        "maximum": lambda x: torch.maximum(x, -0.2 * x),
        "nan_to_num": lambda x: torch.nan_to_num(x),
        "sin": lambda x: torch.sin(x) + x,
        "lerp": lambda x: torch.lerp(x, F.relu(x), 0.3),
        "addcmul": lambda x: torch.addcmul(x, x, F.hardtanh(x), value=0.1),
        "atan2": lambda x: torch.atan2(x, 2 + x.abs()),
        "sub_inplace": lambda x: (x * 1.0).sub_(0.3).mul_(0.9),
    },
    "pointwise",
    often=4,
)


@op
class Dropout(Op):
    forms = ("image", "tokens", "vector")

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.drop = (nn.Dropout2d if o["kind"] == "channels" else nn.Dropout)(o["p"])

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ["module", "functional", "path"] + (["channels"] if x.form == "image" and x.dims == 2 else [])
        return {"kind": pick.of(kinds), "p": pick.of((0.0, 0.0, 0.3))}

    def forward(self, x: Tensor) -> Tensor:
        if self.o["kind"] == "functional":
            return F.dropout(x, self.o["p"], self.training)
        if self.o["kind"] == "path":
            if self.o["p"] == 0.0 or not self.training:
                return x
            keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.o["p"])
            return x * keep / (1 - self.o["p"])
        return self.drop(x)


# -- learned tensors used as they are ------------------------------------------------------------------------------


@op
class Learned(Op):
    forms = ("image", "tokens", "vector")
    often = 3

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        c = [n if d == (len(x.shape) - 1 if x.form == "tokens" else 1) else 1 for d, n in enumerate(x.shape)]
        shape = {"channels": c, "scalar": [], "place": [1, *x.shape[1:]], "flat": [x.channels]}[o["shape"]]
        self.axes = x.dims if x.form == "image" else 0
        self.w = parameter(*shape, mean=1.0 if o["use"] == "mul" else 0.0)
        self.register_buffer("fixed", torch.randn(shape) if o["use"] == "buffer" else None)

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        return {
            "shape": pick.of(("channels", "flat", "scalar", "place")),
            "use": pick.of(("mul", "add", "buffer", "rsub", "exp", "sigmoid", "slice", "norm")),
        }

    def forward(self, x: Tensor) -> Tensor:
        use, w = self.o["use"], self.w
        if self.o["shape"] == "flat":
            w = w.view(-1, *[1] * self.axes)
        if use == "buffer":
            fixed = self.fixed
            return x * w + (fixed.view_as(w) if self.o["shape"] == "flat" else fixed)
        if use == "slice" and w.dim():
            w = torch.cat((w[:1], w[1:]))
        if use == "norm":
            w = w / (1 + w.abs().amax())
        return {
            "mul": lambda: x * w, "add": lambda: w + x, "rsub": lambda: w - x, "exp": lambda: x * torch.exp(-w.abs()),
            "sigmoid": lambda: x * w.sigmoid() + F.silu(x) * (1 - w.sigmoid()), "slice": lambda: x + w,
            "norm": lambda: x * w,
        }[use]()  # fmt: skip


# -- several inputs ------------------------------------------------------------------------------------------------


class _Pair(Op):
    forms = ("image", "tokens", "vector")
    arity = 2
    same = True


simple(
    _Pair,
    {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * torch.tanh(b),
        "sub": lambda a, b: a - 0.5 * b,
        "div": lambda a, b: a / (1 + b.abs()),
        "max": lambda a, b: torch.max(a, b),
        "where": lambda a, b: torch.where(a > b, a, 0.3 * b),
        "mean": lambda a, b: torch.stack((a, b)).mean(0),
        "stack": lambda a, b: torch.stack([a, b], dim=1).sum(dim=1),
        "stack_max": lambda a, b: torch.stack([a, b], -1).amax(-1),
        "stack_softmax": lambda a, b: (torch.stack([a, b], 1).softmax(1) * torch.stack([b, a], 1)).sum(1),
        "select": lambda a, b: torch.stack([a, b], 1).flatten(1, 2)[:, : a.shape[1]] + b,
        "fuse": lambda a, b: sum([a, b, a]),
        "inplace": lambda a, b: (a + 0).add_(b),
        "gate": lambda a, b: torch.sigmoid(a.mean(-1, keepdim=True)) * b,
    },
    "pair",
    often=6,
)


@op
class Cat(Op):
    forms = ("image", "tokens", "vector")
    arity = 2
    often = 3

    @classmethod
    def draw(cls, pick: Pick, a: Value, b: Value) -> dict[str, Any] | None:
        if (a.form == "image" and a.space == b.space) or (a.form == "tokens" and a.shape[1] == b.shape[1]):
            return {"dim": 1 if a.form == "image" else -1, "form": pick.of(("list", "tuple", "resize"))}
        if a.form == "vector":
            return {"dim": 1, "form": "list"}
        if a.form == "image" and a.dims == b.dims and a.shape[:1] == b.shape[:1]:
            return {"dim": 1, "form": "resize"}
        return None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.o["form"] == "resize" and a.dim() > 2:
            b = F.interpolate(b, size=a.shape[2:]) if self.o["dim"] == 1 else b
        return torch.cat([a, b] if self.o["form"] == "list" else (a, b, a), dim=self.o["dim"])


@op
class Modulate(Op):
    """A vector, or the mean of another value, scales and shifts an image or tokens (FiLM)."""

    forms = ("image", "tokens")
    arity = 2
    often = 1

    def __init__(self, x: Value, v: Value, **o: Any) -> None:
        super().__init__(**o)
        self.image = x.form == "image"
        self.axes = x.dims
        self.pooled = {"image": tuple(range(2, v.dims + 2)), "tokens": (1,), "vector": ()}[v.form]
        self.film = nn.Linear(v.channels, 2 * x.channels)

    @classmethod
    def draw(cls, pick: Pick, x: Value, v: Value) -> dict[str, Any] | None:
        return {"form": pick.of(("chunk", "split", "view", "unbind"))}

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        y, form = self.film(v.mean(self.pooled) if self.pooled else v), self.o["form"]
        if form == "chunk":
            scale, shift = y.chunk(2, dim=1)
        elif form == "split":
            scale, shift = y.split(y.shape[1] // 2, dim=-1)
        elif form == "view":
            scale, shift = y.view(y.size(0), 2, -1).permute(1, 0, 2)
        else:
            scale, shift = y.unflatten(1, (2, -1)).unbind(1)
        if self.image:
            scale, shift = (t.view(t.shape[0], -1, *[1] * self.axes) for t in (scale, shift))
        else:
            scale, shift = scale[:, None], shift.unsqueeze(1)
        return x * (1 + scale) + shift

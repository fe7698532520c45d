"""More steps of the random networks: pooling, shuffles, gates, reductions, attention, operators without a rule."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from random_ops import OPS, Op, Pick, Value, op, parameter, simple
from torch import Tensor, nn

POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
F_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
F_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}


@op
class Pool(Op):
    often = 3

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        kernel, stride, d = o["kernel"], o["stride"], x.dims
        pad = kernel // 2 if o["pad"] else 0
        self.pool = {
            "max": lambda: POOL[d](kernel, stride, pad), "average": lambda: AVERAGE[d](kernel, stride, pad),
            "adaptive": lambda: ADAPTIVE[d](kernel), "adaptive_max": lambda: ADAPTIVE_MAX[d](kernel),
            "indices": lambda: POOL[d](kernel, stride, pad, return_indices=True),
            "unpool": lambda: POOL[d](2, 2, return_indices=True),
            "difference": lambda: AVERAGE[d](3, 1, 1, count_include_pad=False),
        }.get(o["kind"], nn.Identity)()  # fmt: skip

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = (
            "max", "average", "adaptive", "adaptive_max", "functional", "functional_average", "indices", "unpool",
            "difference", "lp",
        )  # fmt: skip
        return {"kind": pick.of(kinds), "kernel": pick.of((2, 3)), "stride": pick.of((1, 2)), "pad": pick.flag()}

    def forward(self, x: Tensor) -> Tensor:
        d, kind = x.dim() - 2, self.o["kind"]
        if kind == "functional":
            return F_POOL[d](x, self.o["kernel"], stride=self.o["stride"])
        if kind == "functional_average":
            return F_AVERAGE[d](x, kernel_size=self.o["kernel"], stride=self.o["stride"])
        if kind == "indices":
            return self.pool(x)[0]
        if kind == "difference":
            return self.pool(x) - x
        if kind == "lp":
            return {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}[d](x.abs() + 0.1, 2.0, 2)
        if kind == "unpool":
            small, places = self.pool(x)
            unpool = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}[d]
            return unpool(small, places, 2, 2, output_size=x.shape[2:])
        return self.pool(x)


@op
class Resize(Op):
    often = 2

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ["pad", "pad_mode", "pad_channels", "pad_value", "crop", "nearest", "smooth", "size", "roll", "flip",
                 "strided", "slice", "module", "pad_channels_value"]  # fmt: skip
        return {"kind": pick.of(kinds), "mode": pick.of(("reflect", "replicate", "circular"))}

    def forward(self, x: Tensor) -> Tensor:
        kind, d = self.o["kind"], x.dim() - 2
        smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
        table = {
            "pad": lambda: F.pad(x, [1, 0] * d),
            "pad_mode": lambda: F.pad(x, (1, 1) * d, mode=self.o["mode"]),
            "pad_channels": lambda: F.pad(x, [0, 0] * d + [1, 2]),
            "pad_value": lambda: F.pad(x, (0, 1) * d, value=0.5),
            "pad_channels_value": lambda: F.pad(x, [0, 0] * d + [0, 1], "constant", 0.7),
            "crop": lambda: F.pad(x, [-1, 0] * d),
            "nearest": lambda: F.interpolate(x, scale_factor=2),
            "smooth": lambda: F.interpolate(x, scale_factor=1.5, mode=smooth, align_corners=False),
            "size": lambda: F.interpolate(x, size=tuple(n + 1 for n in x.shape[2:]), mode=smooth, align_corners=True),
            "module": lambda: nn.Upsample(scale_factor=2, mode="nearest")(x),
            "roll": lambda: torch.roll(x, 1, -1),
            "flip": lambda: x.flip(-1),
            "strided": lambda: x[..., ::2],
            "slice": lambda: x[(slice(None), slice(None), *[slice(1, None)] * d)],
        }
        return table[kind]()


@op
class Shuffle(Op):
    """Reshapes of the channels, with sizes computed from the shape or constant."""

    often = 5

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.c, self.space = x.channels, x.space
        self.shuffle = nn.ChannelShuffle(o["groups"]) if o["kind"] == "module" else nn.Identity()

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = [
            "computed", "constant", "half_constant", "module", "flatten", "stack", "chunks", "unflatten", "to_batch",
            "einsum_like", "swap_back",
        ]  # fmt: skip
        return {"kind": pick.of(kinds), "groups": pick.divisor(x.channels)}

    def forward(self, x: Tensor) -> Tensor:
        kind, g, space = self.o["kind"], self.o["groups"], x.shape[2:]
        if kind == "module":
            return self.shuffle(x)
        if kind == "computed":
            b, c = x.size(0), x.size(1)
            return x.view(b, g, c // g, *space).transpose(1, 2).contiguous().view(b, c, *space)
        if kind == "constant":
            y = x.reshape(-1, g, self.c // g, *self.space)
            return y.transpose(1, 2).reshape(-1, self.c, *self.space)
        if kind == "half_constant":
            y = x.reshape(x.shape[0], g, self.c // g, *space).transpose(1, 2)
            return y.reshape(x.shape[0], -1, *space)
        if kind == "flatten":
            return x.reshape(x.shape[0], g, -1, *space).transpose(2, 1).flatten(1, 2)
        if kind == "stack":
            return torch.stack(x.chunk(g, 1), 2).flatten(1, 2)
        if kind == "chunks":
            return torch.cat(x.split(x.shape[1] // g, 1)[::-1], 1)
        if kind == "unflatten":
            return x.unflatten(1, (g, self.c // g)).mul(2).flatten(1, 2)
        if kind == "to_batch":
            y = x.reshape(x.shape[0] * g, -1, *space)
            return F.silu(y).reshape(x.shape[0], -1, *space)
        if kind == "einsum_like":
            return torch.movedim(x.view(x.shape[0], g, -1, *space), 2, 1).reshape(x.shape)
        y = x.flatten(2).transpose(1, 2)
        return y.transpose(1, 2).reshape(x.shape[0], x.shape[1], *space)


@op
class Depth(Op):
    """Pixels to channels and back."""

    often = 2

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        if x.dims != 2:
            return None
        even = all(n % 2 == 0 for n in x.space)
        kinds = ["unfold", "slices"] if all(n > 2 for n in x.space) else []
        kinds += ["shuffle", "reshape_up"] if x.channels % 4 == 0 else []
        kinds += ["unshuffle", "reshape_down", "patches"] if even else []
        return {"kind": pick.of(kinds)} if kinds else None

    def forward(self, x: Tensor) -> Tensor:
        kind, (b, c, h, w) = self.o["kind"], x.shape
        if kind == "shuffle":
            return F.pixel_shuffle(x, 2)
        if kind == "unshuffle":
            return F.pixel_unshuffle(x, 2)
        if kind == "unfold":
            return F.unfold(x, 3, padding=1).view(b, -1, h, w)[:, : 3 * c]
        if kind == "reshape_up":
            y = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
            return y.reshape(b, c // 4, 2 * h, 2 * w)
        if kind == "reshape_down":
            y = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
            return y.reshape(b, 4 * c, h // 2, w // 2)
        if kind == "patches":
            y = x.unfold(2, 2, 2).unfold(3, 2, 2)
            return y.mean((-1, -2))
        return torch.cat([x[:, :, 0:-1:2, :-1:2], x[..., 1::2, :-1:2][..., : (h - 1 + 1) // 2, :]], 1)


@op
class Pieces(Op):
    """Part of the channels takes another way."""

    forms = ("image", "tokens", "vector")
    often = 5

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.c, self.dim = x.channels, -1 if x.form == "tokens" else 1
        self.register_buffer("order", torch.randperm(x.channels))
        self.places = self.order.tolist()

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ["slice_cat", "step", "narrow", "index_select", "roll", "flip", "unbind", "select", "tensor_split",
                 "first", "split_sizes", "list_index", "repeat", "expand", "interleave", "setitem", "gather",
                 "negative", "last_of_chunks", "ellipsis"]  # fmt: skip
        if x.channels % 2 == 0:
            kinds += ["chunk_gate", "chunk_cat", "split_gate", "glu", "even_odd"]
        return {"kind": pick.of(kinds), "at": pick.of(range(1, x.channels + 1))} if x.channels > 1 else None

    def cut(self, x: Tensor, start: int | None, stop: int | None, step: int | None = None) -> Tensor:
        return x[:, slice(start, stop, step)] if self.dim == 1 else x[..., slice(start, stop, step)]

    def forward(self, x: Tensor) -> Tensor:
        kind, at, d, c = self.o["kind"], self.o["at"], self.dim, self.c
        inner = min(at, c - 1)
        if kind == "unbind":
            parts = x.unbind(d)
            return torch.stack([parts[-1], *parts[:-1]], d)
        if kind == "tensor_split":
            return torch.cat(torch.tensor_split(x, 2, d)[::-1], d)
        if kind == "split_sizes":
            a, b = x.split([inner, c - inner], d)
            return torch.cat((F.silu(a), b), d)
        if kind in ("chunk_gate", "split_gate"):
            a, b = x.chunk(2, d) if kind == "chunk_gate" else x.split(x.shape[d] // 2, dim=d)
            return a * F.gelu(b)
        if kind == "setitem":
            y = x.clone()
            if d == 1:
                y[:, :inner] = F.relu(y[:, :inner])
            else:
                y[..., :inner] = 0.5
            return y
        table = {
            "slice_cat": lambda: torch.cat((F.relu(self.cut(x, None, inner)), self.cut(x, inner, None)), d),
            "step": lambda: self.cut(x, None, None, 2),
            "narrow": lambda: x.narrow(d, inner - 1, c - inner + 1),
            "index_select": lambda: x.index_select(d, self.order),
            "roll": lambda: torch.roll(x, inner, d),
            "flip": lambda: torch.flip(x, (d,)),
            "select": lambda: x - x.select(d, inner).unsqueeze(d),
            "first": lambda: x + self.cut(x, inner - 1, inner),
            "list_index": lambda: x[:, self.places] if d == 1 else x[..., self.places],
            "repeat": lambda: x.repeat(1, 2, *[1] * (x.dim() - 2)) if d == 1 else x.repeat(1, 1, 2),
            "expand": lambda: x.mean(d, keepdim=True).expand_as(x) + x,
            "interleave": lambda: x.repeat_interleave(2, d),
            "gather": lambda: torch.gather(x, d, torch.zeros_like(x, dtype=torch.long)) + x,
            "negative": lambda: self.cut(x, -inner, None),
            "last_of_chunks": lambda: x.chunk(3, d)[-1],
            "ellipsis": lambda: x[..., None].squeeze(-1)[:, None].squeeze(1),
            "chunk_cat": lambda: torch.cat([t * (k + 1) for k, t in enumerate(x.chunk(2, d))], d),
            "glu": lambda: F.glu(x, d),
            "even_odd": lambda: self.cut(x, 0, None, 2) + self.cut(x, 1, None, 2),
        }
        return table[kind]()


# -- gates ---------------------------------------------------------------------------------------------------------


@op
class Gate(Op):
    often = 4

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        c = x.channels
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[x.dims]
        kind = o["kind"]
        if kind.startswith("se"):
            self.down, self.up = conv(c, o["width"], 1), conv(o["width"], c, 1)
        elif kind == "fc":
            self.down, self.up = nn.Linear(c, o["width"]), nn.Linear(o["width"], c)
        elif kind == "eca":
            self.down = nn.Conv1d(1, 1, 3, padding=1)
        elif kind == "spatial":
            self.down = conv(2, 1, 3, padding=1)
        elif kind == "selective":
            self.down, self.up = conv(c, o["width"], 1), conv(o["width"], 2 * c, 1)
        else:
            self.down = conv(c, 1, 1)
        self.c = c

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ("se", "se_hard", "fc", "one", "spatial", "eca", "se_constant", "pool", "selective")
        return {"kind": pick.of(kinds), "width": pick.of((2, 1, 3, 4))}

    def forward(self, x: Tensor) -> Tensor:
        kind, axes = self.o["kind"], tuple(range(2, x.dim()))
        if kind == "one":
            return x * torch.sigmoid(self.down(x))
        if kind == "pool":
            place = self.down(x).flatten(2).softmax(-1)
            v = torch.matmul(x.flatten(2), place.transpose(1, 2))
            return x + v.view(x.shape[0], -1, *[1] * len(axes))
        if kind == "spatial":
            both = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
            return x * self.down(both).sigmoid()
        mean = x.mean(axes, keepdim=True)
        if kind == "fc":
            v = self.up(F.relu(self.down(mean.flatten(1))))
            return x * torch.sigmoid(v).view(x.shape[0], x.shape[1], *[1] * len(axes))
        if kind == "eca":
            v = self.down(mean.flatten(1).unsqueeze(1)).squeeze(1)
            return x * v.sigmoid().reshape(x.shape[0], -1, *[1] * len(axes)).expand_as(x)
        if kind == "se_constant":
            v = self.up(F.silu(self.down(mean))).view(-1, self.c, *[1] * len(axes))
            return x * F.hardsigmoid(v)
        if kind == "selective":
            two = torch.stack((x, F.relu(x)), 1)
            v = self.up(F.relu(self.down(two.sum(1).mean(axes, keepdim=True))))
            v = v.view(x.shape[0], 2, x.shape[1], *[1] * len(axes)).softmax(dim=1)
            return (two * v).sum(dim=1)
        v = self.up(F.relu(self.down(mean)))
        return x * (F.hardsigmoid(v) if kind == "se_hard" else v.sigmoid())


# -- reductions, combined with the value they come from -------------------------------------------------------------


def _dim(x: Tensor) -> int:
    """The channel dimension of the form at hand: a token or image of rank 3 cannot be told apart, both are fine."""
    return 1


class _Any(Op):
    forms = ("image", "tokens", "vector")


simple(
    _Any,
    {
        "mean": lambda x: x - x.mean(1, keepdim=True),
        "sum": lambda x: x + 0.1 * x.sum(1, keepdim=True),
        "sum_last": lambda x: x * torch.tanh(x.sum(dim=-1, keepdim=True)),
        "amax": lambda x: x - 0.5 * x.amax(1, True),
        "amin": lambda x: x + x.amin(dim=-1, keepdim=True),
        "max_values": lambda x: x + torch.max(x, dim=1, keepdim=True)[0],
        "min_values": lambda x: x + x.min(-1, keepdim=True).values,
        "var": lambda x: x / (0.5 + x.var(1, unbiased=False, keepdim=True)),
        "std": lambda x: x / (0.5 + torch.sqrt(0.1 + x.var(1, keepdim=True))),
        "std_all": lambda x: x * (x.std(correction=0) + 0.5),
        "var_space": lambda x: x / (0.5 + x.var(-1, keepdim=True)),
        "var_several": lambda x: x / (1 + x.var(tuple(range(1, x.dim())), keepdim=True)),
        "var_mean": lambda x: (
            (x - torch.var_mean(x, 1, keepdim=True)[1])
            / (torch.var_mean(x, dim=1, correction=0, keepdim=True)[0] + 0.5).sqrt()
        ),
        "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1),
        "norm": lambda x: x / (0.5 + x.norm(2, 1, keepdim=True)),
        "norm1": lambda x: x / (0.5 + torch.norm(x, p=1, dim=1, keepdim=True)),
        "vector_norm": lambda x: x / (0.5 + torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
        "grn": lambda x: x * (lambda g: g / (g.mean(1, keepdim=True) + 0.5))(x.norm(2, -1, keepdim=True)),
        "normalize": lambda x: F.normalize(x + 0.01, dim=1),
        "normalize_last": lambda x: F.normalize(x + 0.01, dim=-1, p=1.0, eps=1e-3),
        "cosine": lambda x: x * F.cosine_similarity(x, torch.relu(x) + 0.1, dim=1).unsqueeze(1),
        "softmax": lambda x: x * x.softmax(1),
        "softmax_last": lambda x: F.softmax(x, dim=-1) * 3,
        "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
        "all": lambda x: torch.where((x > -9).all(1, keepdim=True), x, 0.0),
        "layer_functional": lambda x: F.layer_norm(x, x.shape[1:]) if x[0].numel() > 3 else x,
        "layer_last": lambda x: F.layer_norm(x, (x.shape[-1],), eps=1e-2),
        "group_functional": lambda x: F.group_norm(x, 1, eps=1e-3) if x[0].numel() > 3 else x,
        "instance_functional": lambda x: F.instance_norm(x, eps=1e-2) if x.dim() > 3 else x,
        "count": lambda x: x / math.sqrt(x.shape[1]) * x.size(1) ** -0.25,
        "mean_all": lambda x: x - x.mean(),
        "prod": lambda x: x * torch.tanh(x.prod(1, keepdim=True)),
        "dot": lambda x: x * torch.einsum("bc...,bc...->b...", x, torch.tanh(x)).unsqueeze(1).tanh(),
        "cov": lambda x: (
            torch.einsum("bcn,bdn->bcd", x.flatten(2), x.flatten(2)).softmax(-1) @ x.flatten(2) if x.dim() == 3 else x
        ),
        "bmm": lambda x: torch.bmm(torch.bmm(x, x.transpose(1, 2)).tanh(), x) * 0.1 if x.dim() == 3 else x,
    },
    "reduce",
    often=5,
)


simple(
    _Any,
    {
        "sort": lambda x: x.sort(1).values,
        "sort_last": lambda x: torch.sort(x, -1)[0],
        "cumsum": lambda x: 0.3 * torch.cumsum(x, 1),
        "cumsum_last": lambda x: x.cumsum(-1) * 0.3,
        "fft": lambda x: torch.fft.fft(x, dim=1).abs(),
        "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 0.5, n=x.shape[-1], dim=-1),
        "median": lambda x: x - x.median(1, keepdim=True).values,
        "topk": lambda x: x + x.topk(1, dim=1).values,
        "diff": lambda x: torch.diff(x, dim=1, prepend=x[:, :1]),
        "argmax": lambda x: x + 0.1 * x.argmax(1, keepdim=True).to(x.dtype),
        "one_hot": lambda x: x * F.one_hot(x.argmax(-1), x.shape[-1]),
        "kthvalue": lambda x: x - torch.kthvalue(x, 1, dim=1, keepdim=True).values,
        "cummax": lambda x: x.cummax(1)[0],
        "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
        "tril": lambda x: x.tril() if x.dim() > 2 else x,
        "renorm": lambda x: torch.renorm(x, 2, 0, 5.0),
        "quantile": lambda x: x - x.quantile(0.5, dim=1, keepdim=True),
        "pdist": lambda x: torch.cdist(x, x + 1).mean(-1, keepdim=True) + x if x.dim() == 3 else x,
        "take_along": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
        "masked": lambda x: x * (torch.arange(x.shape[1], device=x.device) % 2).view(-1, *[1] * (x.dim() - 2)),
    },
    "unknown",
    often=2,
)


# -- forms ---------------------------------------------------------------------------------------------------------


@op
class ToTokens(Op):
    gives = "tokens"
    often = 2

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        return {"kind": pick.of(("flatten", "permute", "view"))}

    def forward(self, x: Tensor) -> Tensor:
        if self.o["kind"] == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.o["kind"] == "view":
            return x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1).contiguous()
        return x.permute(0, *range(2, x.dim()), 1).reshape(x.shape[0], -1, x.shape[1])


@op
class ToImage(Op):
    forms = ("tokens",)
    gives = "image"
    often = 2

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.n, self.c = x.shape[1:]

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        return {"kind": pick.of(("sequence", "square", "constant"))}

    def forward(self, x: Tensor) -> Tensor:
        y, kind = x.transpose(1, 2), self.o["kind"]
        if kind == "sequence":
            return y
        rows = max(k for k in range(1, math.isqrt(self.n) + 1) if self.n % k == 0)
        if kind == "constant":
            return y.reshape(-1, self.c, rows, self.n // rows)
        return y.reshape(y.shape[0], y.shape[1], rows, -1)


@op
class ToVector(Op):
    forms = ("image", "tokens")
    gives = "vector"
    often = 2

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        if x.form == "tokens":
            return {"kind": pick.of(("mean_tokens", "max_tokens", "first"))}
        return {"kind": pick.of(("pool", "mean", "amax", "sum_view"))}

    def forward(self, x: Tensor) -> Tensor:
        kind, axes = self.o["kind"], tuple(range(2, x.dim()))
        return {
            "mean_tokens": lambda: x.mean(1), "max_tokens": lambda: x.max(dim=1).values, "first": lambda: x[:, 0],
            "pool": lambda: F.adaptive_avg_pool1d(x.flatten(2), 1).flatten(1), "mean": lambda: x.mean(axes),
            "amax": lambda: x.amax(dim=axes), "sum_view": lambda: 0.2 * x.view(x.shape[0], x.shape[1], -1).sum(-1),
        }[kind]()  # fmt: skip


@op
class Attention(Op):
    forms = ("tokens",)
    often = 4

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        c = x.channels
        self.h, self.d = o["heads"], c // o["heads"]
        self.qkv, self.out = nn.Linear(c, 3 * c, o["bias"]), nn.Linear(c, c)
        self.rel = parameter(self.h, x.shape[1], x.shape[1]) if o["kind"] == "relative" else None
        self.module = nn.MultiheadAttention(c, self.h, batch_first=True) if o["kind"] == "module" else None

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ("sdpa", "matmul", "einsum", "linear", "channel", "relative", "module", "query")
        return {"kind": pick.of(kinds), "heads": pick.divisor(x.channels), "bias": pick.flag()}

    def forward(self, x: Tensor) -> Tensor:
        (b, n, c), kind = x.shape, self.o["kind"]
        if self.module is not None:
            return self.module(x, x, x, need_weights=False)[0]
        if kind == "query":
            q, k, v = self.qkv(x).split(c, -1)
            weight = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(c), -1)
            return self.out(weight @ v)
        if kind == "einsum":
            q, k, v = (t.view(b, n, self.h, self.d) for t in self.qkv(x).chunk(3, dim=-1))
            weight = (torch.einsum("bihd,bjhd->bhij", q, k) * self.d**-0.5).softmax(-1)
            return self.out(torch.einsum("bhij,bjhd->bihd", weight, v).reshape(b, n, c))
        q, k, v = self.qkv(x).reshape(b, n, 3, self.h, c // self.h).permute(2, 0, 3, 1, 4).unbind(0)
        if kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif kind == "linear":
            y = F.softplus(q) @ (F.softplus(k).transpose(-2, -1) @ v) / n
        elif kind == "channel":
            weight = (q.transpose(-2, -1) @ k / n).softmax(-1)
            y = v @ weight.transpose(-2, -1)
        else:
            weight = (q * self.d**-0.5) @ k.transpose(-2, -1)
            y = (weight if self.rel is None else weight + self.rel).softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, c))


@op
class Mixer(Op):
    """A linear layer over the tokens, that is, over a dimension that is not the channels."""

    forms = ("tokens",)
    often = 2

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.mix = nn.Linear(x.shape[1], o["out"]) if o["kind"] == "linear" else nn.Conv1d(x.shape[1], o["out"], 1)
        self.image = x.form == "image"

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        return {"kind": pick.of(("linear", "conv")), "out": pick.of((3, 4, 6))} if x.shape[1] <= 40 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.o["kind"] == "conv":
            return self.mix(x)
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


# -- modules that cannot be recorded -------------------------------------------------------------------------------


@op
class Opaque(Op):
    forms = ("image", "tokens")
    often = 2

    def __init__(self, x: Value, **o: Any) -> None:
        super().__init__(**o)
        self.image = x.form == "image"
        c = x.channels
        if o["kind"] == "gru":
            self.body: nn.Module = nn.GRU(c, c, batch_first=True)
        else:
            self.body = nn.Linear(c, c)
        self.norm = nn.BatchNorm1d(c) if o["kind"] == "training" else nn.Identity()

    @classmethod
    def draw(cls, pick: Pick, x: Value) -> dict[str, Any] | None:
        kinds = ["data", "size", "training"] + (["gru"] if x.form == "tokens" else [])
        return {"kind": pick.of(kinds)}

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.image else x
        kind = self.o["kind"]
        if kind == "gru":
            return self.body(x)[0]
        if kind == "data":
            y = self.body(x) if x.sum() == x.sum() else x
        elif kind == "size":
            y = self.body(x) if x.shape[1] > 2 else F.relu(self.body(x))
        else:
            y = self.body(x)
            y = self.norm(y.flatten(0, -2)).reshape_as(y) if self.training else y
        return y.movedim(-1, 1) if self.image else y


__all__ = ["OPS"]

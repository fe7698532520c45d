"""The operator table: one row per operator and form of its call. See ``rule_nets.Row``."""

from __future__ import annotations

import copy
import math
import operator
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as P
from rule_nets import CONVS, Row, around, op, tokens, whole
from timm.layers import (
    BatchNormAct2d,
    BlurPool2d,
    DropPath,
    FrozenBatchNormAct2d,
    GroupNorm1Act,
    GroupNormAct,
    LayerNorm2d,
    LayerNormAct,
    LayerNormAct2d,
    RmsNorm,
    RmsNorm2d,
    ScaledStdConv2d,
    SqueezeExcite,
    StdConv2d,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
C = 8
MASK = lambda: torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).bool()
POSITIONS = lambda: torch.tensor([[[4], [0], [2]]])
OLD_STYLE = (pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),)
PROJECTED = (pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),)
EVEN_SAME = (pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),)

# -- convolutions ------------------------------------------------------------------------------------------------------

CONV_FORMS: dict[str, dict[str, Any]] = {
    "plain": dict(kernel_size=3),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "dilation": dict(kernel_size=3, dilation=2, padding=2),
    "same": dict(kernel_size=3, padding="same"),
    "same-even": dict(kernel_size=2, padding="same"),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=1, padding_mode="replicate"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "same-reflect": dict(kernel_size=3, padding="same", padding_mode="reflect"),
    "no-bias": dict(kernel_size=3, padding=1, bias=False),
    "groups-2": dict(kernel_size=3, padding=1, groups=2),
    "groups-4": dict(kernel_size=1, groups=4),
    "depthwise": dict(kernel_size=3, padding=1, groups=C),
    "depthwise-x2": dict(kernel_size=3, padding=1, groups=C, out_channels=2 * C),
    "depthwise-x3": dict(kernel_size=1, groups=C, out_channels=3 * C, bias=False),
}
TRANSPOSED_FORMS: dict[str, dict[str, Any]] = {
    "plain": dict(kernel_size=3),
    "stride": dict(kernel_size=2, stride=2),
    "output-padding": dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    "dilation": dict(kernel_size=3, dilation=2, bias=False),
    "groups-2": dict(kernel_size=2, stride=2, groups=2),
    "groups-4-wider": dict(kernel_size=1, groups=4, out_channels=16),
    "depthwise": dict(kernel_size=2, stride=2, groups=C),
    "depthwise-x2": dict(kernel_size=2, stride=2, groups=C, out_channels=2 * C),
}


def _conv(kind: type[nn.Module], form: dict[str, Any]) -> nn.Module:
    options = {"out_channels": C, **form}
    return kind(C, **options)  # type: ignore[call-arg]


CONV_ROWS = [
    around(f"conv{d}d-{name}", lambda d=d, form=form: _conv(CONVS[d], form), dims=d, marks=EVEN_SAME)
    for name, form in CONV_FORMS.items()
    for d in (1, 2, 3)
] + [
    around(f"conv_transpose{d}d-{name}", lambda d=d, form=form: _conv(TRANSPOSED[d], form), dims=d)
    for name, form in TRANSPOSED_FORMS.items()
    for d in (1, 2, 3)
]

FUNCTIONAL_ROWS = [
    op("F.conv1d", lambda x, m: F.conv1d(x, m.w, m.b, padding=1), dims=1, w=(6, C, 3), b=(6,)),
    op("F.conv2d", lambda x, m: F.conv2d(x, m.w, m.b, stride=2), w=(6, C, 3, 3), b=(6,)),
    op("F.conv2d-keywords", lambda x, m: F.conv2d(input=x, weight=m.w, bias=None, padding="same"), w=(6, C, 3, 3)),
    op("F.conv2d-groups", lambda x, m: F.conv2d(x, m.w, None, 1, 0, 1, 2), w=(6, C // 2, 1, 1)),
    op("F.conv2d-depthwise", lambda x, m: F.conv2d(x, m.w, groups=x.shape[1]), w=(C, 1, 3, 3)),
    op("F.conv2d-depthwise-constant", lambda x, m: F.conv2d(x, m.w, groups=C), w=(2 * C, 1, 3, 3)),
    op("F.conv2d-depthwise-blur", lambda x, m: F.conv2d(x, m.w.expand(C, 1, 3, 3), groups=C),
       w=lambda: torch.ones(1, 1, 3, 3)),
    op("F.conv2d-depthwise-blur-size", lambda x, m: F.conv2d(x, m.w.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]),
       w=lambda: torch.ones(1, 1, 3, 3)),
    op("F.conv2d-of-sum", lambda x, m: F.conv2d(x, m.w + m.v), w=(6, C, 1, 1), v=(6, C, 1, 1)),
    op("F.conv3d", lambda x, m: F.conv3d(x, m.w), dims=3, w=(6, C, 1, 1, 1)),
    op("F.conv_transpose1d", lambda x, m: F.conv_transpose1d(x, m.w, m.b, 2), dims=1, w=(C, 6, 3), b=(6,)),
    op("F.conv_transpose2d", lambda x, m: F.conv_transpose2d(x, m.w, stride=2, groups=2), w=(C, 3, 3, 3)),
    op("F.conv_transpose3d", lambda x, m: F.conv_transpose3d(x, m.w), dims=3, w=(C, 6, 1, 1, 1)),
    op("F.linear", lambda x, m: F.linear(x.mean((2, 3)), m.w, m.b), tail="linear", w=(6, C), b=(6,)),
    op("torch.conv2d", lambda x, m: torch.conv2d(x, m.w, m.b), w=(6, C, 1, 1), b=(6,)),
    tokens("linear-3d", lambda x, m: m.f(x), f=lambda: nn.Linear(C, 6)),
    op("linear-2d", lambda x, m: m.f(x), dims=0, tail="linear", shape=(3,), f=lambda: nn.Linear(C, 6)),
    op("linear-4d", lambda x, m: m.f(x), dims=0, tail="linear", shape=(4, 5, 3), f=lambda: nn.Linear(C, 6, bias=False)),
    op("linear-on-space", lambda x, m: m.f(x), dims=2, fixed=True, f=lambda: nn.Linear(8, 5)),
    op("bilinear", lambda x, m: m.f(x, x), dims=0, tail="linear", shape=(3,), f=lambda: nn.Bilinear(C, C, 6)),
    tokens("bilinear-narrow-first", lambda x, m: m.f(m.w.expand(*x.shape[:-1], 5), x), w=(5,),
           f=lambda: nn.Bilinear(5, C, 6, bias=False)),
    tokens("bilinear-narrow-second", lambda x, m: m.f(x, x.mean(-1, keepdim=True)), f=lambda: nn.Bilinear(C, 1, 6)),
    tokens("bilinear-uneven", lambda x, m: m.f(torch.cat([x, x.mean(-1, keepdim=True)], -1), x.flip(0).sigmoid()),
           f=lambda: nn.Bilinear(C + 1, C, 6)),
    tokens("bilinear-uneven-second", lambda x, m: F.bilinear(x, torch.cat([x[..., :3], x.sum(-1, keepdim=True)], -1),
                                                             m.w, m.b), w=(6, C, 4), b=(6,)),
    around("channels-last-conv", lambda: nn.Sequential(nn.Conv2d(C, C, 1)).to(memory_format=torch.channels_last)),
    op("unfold-linear", lambda x, m: m.f(F.unfold(x, 3, padding=1).transpose(1, 2)), tail="linear",
       f=lambda: nn.Linear(9 * C, 6)),
]  # fmt: skip

# -- normalisation -----------------------------------------------------------------------------------------------------

NORM_ROWS = [
    *[around(f"batch_norm{d}d", lambda d=d: BATCH[d](C), dims=d) for d in (1, 2, 3)],
    around("batch_norm-cumulative", lambda: nn.BatchNorm2d(C, momentum=None)),
    around("batch_norm-no-affine", lambda: nn.BatchNorm2d(C, affine=False)),
    around("batch_norm-no-statistics", lambda: nn.BatchNorm2d(C, track_running_stats=False)),
    around("sync_batch_norm", lambda: nn.SyncBatchNorm(C)),
    op("batch_norm-2d-input", lambda x, m: m.n(x), dims=0, tail="linear", shape=(3,), n=lambda: nn.BatchNorm1d(C)),
    op("F.batch_norm", lambda x, m: F.batch_norm(x, m.mean, m.var, m.w, m.b, eps=1e-3), w=(C,), b=(C,),
       mean=lambda: torch.zeros(C), var=lambda: torch.ones(C)),
    op("F.batch_norm-training", lambda x, m: F.batch_norm(x, None, None, training=True)),
    *[around(f"instance_norm{d}d-affine{a}-stats{t}", lambda d=d, a=a,
             t=t: INSTANCE[d](C, affine=a, track_running_stats=t),
             dims=d) for d, a, t in [(1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1), (3, 1, 1)]],
    op("F.instance_norm", lambda x, m: F.instance_norm(x, weight=m.w, bias=m.b), w=(C,), b=(C,)),
    *[around(f"group_norm-{g}", lambda g=g: nn.GroupNorm(g, C)) for g in (1, 2, 4, C)],
    around("group_norm-no-affine", lambda: nn.GroupNorm(2, C, affine=False)),
    around("group_norm-1d", lambda: nn.GroupNorm(2, C), dims=1),
    op("F.group_norm", lambda x, m: F.group_norm(x, 4, m.w, m.b, 1e-3), w=(C,), b=(C,)),
    op("torch.group_norm", lambda x, m: torch.group_norm(x, 4, m.w, m.b, 1e-3), w=(C,), b=(C,)),
    op("group_norm-after-cat", lambda x, m: m.n(torch.cat([x, m.c(x)], 1)), n=lambda: nn.GroupNorm(3, 12),
       c=lambda: nn.Conv2d(C, 4, 1)),
    op("group_norm-after-uneven-cat", lambda x, m: m.n(torch.cat([x, torch.fft.fft(x, dim=1).abs()], 1)), "transform",
       n=lambda: nn.GroupNorm(1, 2 * C)),
    tokens("layer_norm", lambda x, m: m.n(x), n=lambda: nn.LayerNorm(C)),
    tokens("layer_norm-no-bias", lambda x, m: m.n(x), n=lambda: nn.LayerNorm(C, bias=False)),
    tokens("layer_norm-no-affine", lambda x, m: m.n(x), n=lambda: nn.LayerNorm(C, elementwise_affine=False)),
    tokens("layer_norm-tokens-too", lambda x, m: m.n(x), n=lambda: nn.LayerNorm((6, C))),
    op("layer_norm-chw", lambda x, m: m.n(x), fixed=True, n=lambda: nn.LayerNorm((C, 8, 8))),
    op("layer_norm-hw", lambda x, m: m.n(x), fixed=True, n=lambda: nn.LayerNorm((8, 8))),
    op("F.layer_norm-shape", lambda x, m: F.layer_norm(x, x.shape[1:])),
    op("F.layer_norm-permuted", lambda x, m: F.layer_norm(x.permute(0, 2, 3, 1), (C,), m.w, m.b).permute(0, 3, 1, 2),
       w=(C,), b=(C,)),
    tokens("rms_norm", lambda x, m: m.n(x), n=lambda: nn.RMSNorm(C, eps=1e-6)),
    tokens("rms_norm-two-dims", lambda x, m: m.n(x), n=lambda: nn.RMSNorm((6, C), eps=1e-6)),
    tokens("F.rms_norm", lambda x, m: F.rms_norm(x, [C], m.w, 1e-5), w=(C,)),
    tokens("rms_norm-by-hand", lambda x, m: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w, w=(C,)),
    around("local_response_norm", lambda: nn.LocalResponseNorm(3), "neighbouring channels"),
    around("cross_map_lrn", lambda: nn.CrossMapLRN2d(3), "no rule", marks=OLD_STYLE),
    around("timm-BatchNormAct2d", lambda: BatchNormAct2d(C)),
    around("timm-BatchNormAct2d-silu", lambda: BatchNormAct2d(C, act_layer=nn.SiLU)),
    around("timm-FrozenBatchNormAct2d", lambda: FrozenBatchNormAct2d(C)),
    around("timm-GroupNormAct", lambda: GroupNormAct(C, num_groups=4)),
    around("timm-GroupNorm1Act", lambda: GroupNorm1Act(C)),
    tokens("timm-LayerNormAct", lambda x, m: m.n(x), n=lambda: LayerNormAct(C)),
    around("timm-LayerNormAct2d", lambda: LayerNormAct2d(C)),
    around("timm-LayerNorm2d", lambda: LayerNorm2d(C)),
    tokens("timm-RmsNorm", lambda x, m: m.n(x), n=lambda: RmsNorm(C)),
    around("timm-RmsNorm2d", lambda: RmsNorm2d(C)),
]  # fmt: skip

# -- activations and dropout -------------------------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ELU(), nn.ELU(inplace=True), nn.SELU(), nn.CELU(), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(), nn.Softplus(2.0, 3.0),
    nn.Softsign(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid(), nn.Hardswish(),
    nn.Hardswish(inplace=True),
    nn.Hardtanh(), nn.Hardtanh(-2.0, 0.5, inplace=True), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink(),
    nn.LeakyReLU(0.3), nn.LeakyReLU(inplace=True), nn.Threshold(0.1, -2.0), nn.Threshold(0.1, 20.0, inplace=True),
    nn.RReLU(), nn.RReLU(inplace=True), nn.PReLU(), nn.PReLU(C), nn.Identity(), nn.Dropout(), nn.Dropout(inplace=True),
    nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Softmin(-1), nn.Softmax(-1), nn.LogSoftmax(2),
    nn.GLU(1), nn.GLU(-1), nn.Hardsigmoid(inplace=True), nn.Mish(inplace=True), nn.SELU(inplace=True),
    nn.CELU(inplace=True), nn.ReLU6(inplace=True),
]  # fmt: skip
FUNCTIONS = """
    relu relu6 elu selu celu gelu silu mish softplus softsign tanh sigmoid logsigmoid hardsigmoid hardswish hardtanh
    hardshrink softshrink tanhshrink leaky_relu rrelu relu_ elu_ selu_ celu_ leaky_relu_ hardtanh_
""".split()
UNARY = """
    abs exp log1p sqrt rsqrt square reciprocal sin cos tanh sigmoid erf floor ceil round neg sign expm1 exp2 atan
    nan_to_num logit frac trunc sinh cosh asinh log log2 log10
""".split()

POINTWISE_ROWS = [
    *[around(f"act-{k}-{a}".replace(" ", ""), lambda a=a: copy.deepcopy(a)) for k, a in enumerate(ACTIVATIONS)],
    around("softmax-channels", lambda: nn.Softmax(1)),
    around("log_softmax-channels", lambda: nn.LogSoftmax(dim=1)),
    around("softmin-channels", lambda: nn.Softmin(dim=1)),
    op("special.softmax",
       lambda x, m: torch.special.softmax(x, 1) + torch.special.log_softmax(x, 1) + x.log_softmax(1)),
    op("log_softmax-uneven", lambda x, m: torch.cat([x, x.mean(1, True)], 1).log_softmax(1)),
    op("log_softmax-dtype", lambda x, m: F.log_softmax(x, dim=1, dtype=torch.float64)),
    op("special.expit", lambda x, m: torch.special.expit(x)),
    op("angle", lambda x, m: torch.angle(x) + torch.complex(x, x.flip(1)).angle()),
    op("bucketize", lambda x, m: x * torch.bucketize(x, m.t, right=True), t=lambda: torch.tensor([-1.0, 0.1, 2.0])),
    around("softmax2d", lambda: nn.Softmax2d()),
    tokens("softmax-last", lambda x, m: x.softmax(-1)),
    tokens("softmax-tokens", lambda x, m: torch.softmax(x, 1)),
    tokens("F.log_softmax-tokens", lambda x, m: F.log_softmax(x, dim=-2)),
    tokens("F.softmin", lambda x, m: F.softmin(x, dim=1)),
    around("dropout1d", lambda: nn.Dropout1d(), dims=1),
    around("dropout3d", lambda: nn.Dropout3d(), dims=3),
    *[op(f"F.{name}", lambda x, m, n=name: getattr(F, n)(x.clone())) for name in FUNCTIONS],
    op("F.threshold", lambda x, m: F.threshold(x, 0.1, 5.0)),
    op("F.glu", lambda x, m: F.glu(x, 1)),
    op("F.glu-cat", lambda x, m: F.glu(torch.cat([x, x.flip(1)], 1), 1)),
    op("F.prelu-shared", lambda x, m: F.prelu(x, m.w), w=(1,)),
    op("F.prelu-channels", lambda x, m: F.prelu(x, m.w), w=(C,)),
    op("torch.prelu-2d", lambda x, m: torch.prelu(x, m.w), dims=0, tail="linear", shape=(3,), w=(C,)),
    op("prelu-of-constant", lambda x, m: F.prelu(x, m.w.abs()), w=(C,)),
    *[op(f"torch.{name}", lambda x, m, n=name: getattr(torch, n)(x.abs() * 0.1 + 0.2)) for name in UNARY],
    *[op(f"x.{name}", lambda x, m, n=name: getattr(x.abs() * 0.1 + 0.2, n)()) for name in UNARY],
    op("x.relu_", lambda x, m: x.relu_()),
    op("x.mul_-twice", lambda x, m: x.mul_(2).add_(1).sigmoid_()),
    op("x.clamp_min", lambda x, m: x.clamp_min(0.1) + x.clamp_max(0.5)),
    op("x.clamp", lambda x, m: x.clamp(-0.5, 0.5) + torch.clamp(x, min=0) + x.clip(max=1)),
    op("x.clamp_", lambda x, m: x.clamp_(-0.5, 0.5)),
    op("clamp-tensors", lambda x, m: x.clamp(m.low, m.high), low=(C, 1, 1), high=(C, 1, 1)),
    op("to-and-float", lambda x, m: x.to(torch.float64).double().contiguous().type_as(x).to(x)),
    op("to-dtype-device", lambda x, m: x.to(dtype=x.dtype, device=x.device)),
    op("detach-clone", lambda x, m: x.detach().clone() + x.data),
    op("zeros_like", lambda x, m: x + torch.zeros_like(x) + torch.ones_like(x) * torch.full_like(x, 2.0)),
    op("new_zeros-size",
       lambda x, m: x + x.new_zeros(x.shape) + x.new_ones(x.size()) + x.new_full((x.shape[1], 1, 1), 2.0)),
    op("torch.zeros-size",
       lambda x, m: x + torch.zeros(x.shape[1], 1, 1, dtype=x.dtype) + torch.ones(x.shape, dtype=x.dtype)),
    op("isnan-where", lambda x, m: torch.where(torch.isnan(x), torch.zeros_like(x), x)),
    op("masked_fill", lambda x, m: x.masked_fill(x > 0.5, 0.25)),
    op("logical", lambda x, m: x * ((x > 0) & (x < 1)) + x * torch.logical_or(x > 2, ~(x > 1))),
    op("gumbel-softmax", lambda x, m: F.gumbel_softmax(x, dim=2), "random"),
    op("F.dropout-always", lambda x, m: F.dropout(x, 0.3), "random"),
    op("F.dropout2d-always", lambda x, m: F.dropout2d(x), "random"),
    op("F.dropout-mode", lambda x, m: F.dropout(x, 0.3, m.training) + F.dropout(x, training=m.training)),
    op("F.rrelu-mode", lambda x, m: F.rrelu(x, training=m.training)),
]  # fmt: skip

# -- pooling, padding, resizing ----------------------------------------------------------------------------------------

POOLS = {
    1: [nn.AvgPool1d(2), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(3), nn.AdaptiveMaxPool1d(3), nn.LPPool1d(2, 2)],
    2: [nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True), nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 1, 1, dilation=2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, None)),
        nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2), nn.LPPool2d(3, 2, ceil_mode=True)],
    3: [nn.AvgPool3d(2), nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool3d((1, 2, 2)), nn.LPPool3d(2, 2)],
}  # fmt: skip

SPATIAL_ROWS = [
    *[around(f"pool-{d}-{k}-{type(p).__name__}", lambda p=p: p, dims=d) for d in POOLS for k, p in enumerate(POOLS[d])],
    op("fractional_max_pool2d", lambda x, m: F.fractional_max_pool2d(x, 2, output_size=4), "random regions"),
    op("fractional_max_pool3d", lambda x, m: F.fractional_max_pool3d(x, 2, output_size=2), "random regions", dims=3),
    op("max_unpool1d", lambda x, m: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2), dims=1),
    op("max_unpool2d", lambda x, m: m.u(*m.p(x)), p=lambda: nn.MaxPool2d(2, return_indices=True),
       u=lambda: nn.MaxUnpool2d(2)),
    op("max_unpool2d-size", lambda x, m: m.u(*m.p(x), output_size=x.size()), fixed=False,
       p=lambda: nn.MaxPool2d(3, 2, return_indices=True), u=lambda: nn.MaxUnpool2d(3, 2)),
    op("max_unpool3d", lambda x, m: m.u(*m.p(x)), dims=3,
       p=lambda: nn.MaxPool3d(2, return_indices=True), u=lambda: nn.MaxUnpool3d(2)),
    op("adaptive_max_pool-indices", lambda x, m: F.adaptive_max_pool2d(x, 2, return_indices=True)[0]),
    tokens("pool-over-channels", lambda x, m: F.avg_pool1d(x, 2), "slides over"),
    op("F.avg_pool2d", lambda x, m: F.avg_pool2d(x, x.shape[-2:])),
    op("F.max_pool2d", lambda x, m: F.max_pool2d(x, 2, stride=1)),
    op("F.adaptive_avg_pool2d", lambda x, m: F.adaptive_avg_pool2d(x, (1, 1))),
    *[op(f"pad-{mode}", lambda x, m, mode=mode: F.pad(x, (1, 1, 2, 0), mode=mode))
      for mode in ("constant", "reflect", "replicate", "circular")],
    op("pad-value", lambda x, m: F.pad(x, (1, 1, -1, 0), value=3.0)),
    op("pad-channels", lambda x, m: F.pad(x, (0, 0, 0, 0, 2, 3))),
    op("pad-channels-and-space", lambda x, m: F.pad(x, (1, 0, 0, 1, 0, 4), "constant", 0)),
    op("pad-channels-value", lambda x, m: F.pad(x, (0, 0, 0, 0, 2, 3), value=1.5)),
    op("pad-channels-crop", lambda x, m: F.pad(x, (0, 0, 0, 0, -2, -1))),
    op("pad-channels-list", lambda x, m: F.pad(x, [0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 4])),
    *[around(f"pad-{type(p).__name__}", lambda p=p: p) for p in (
        nn.ZeroPad2d(1), nn.ConstantPad2d((1, 0, 0, 2), 0.5), nn.ReflectionPad2d(1), nn.ReplicationPad2d(2),
        nn.CircularPad2d(1))],
    around("pad-1d", lambda: nn.ReflectionPad1d(2), dims=1),
    around("pad-3d", lambda: nn.ReplicationPad3d(1), dims=3),
    *[op(f"interpolate-{mode}", lambda x, m, mode=mode: F.interpolate(x, scale_factor=2, mode=mode))
      for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")],
    op("interpolate-align", lambda x, m: F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True)),
    op("interpolate-antialias", lambda x, m: F.interpolate(x, size=(5, 5), mode="bicubic", antialias=True)),
    op("interpolate-size-of", lambda x, m: x + F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:])),
    op("interpolate-linear", lambda x, m: F.interpolate(x, scale_factor=2, mode="linear"), dims=1),
    op("interpolate-trilinear", lambda x, m: F.interpolate(x, scale_factor=2, mode="trilinear"), dims=3),
    around("upsample", lambda: nn.Upsample(scale_factor=2)),
    around("upsample-bilinear", lambda: nn.Upsample(size=(6, 6), mode="bilinear")),
    around("UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    around("UpsamplingBilinear2d", lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    around("pixel_shuffle", lambda: nn.PixelShuffle(2), width=16),
    around("pixel_unshuffle", lambda: nn.PixelUnshuffle(2)),
    op("pixel_unshuffle-and-shuffle", lambda x, m: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)),
    around("channel_shuffle", lambda: nn.ChannelShuffle(2)),
    op("F.channel_shuffle-4", lambda x, m: F.channel_shuffle(x, 4)),
    op("F.unfold", lambda x, m: F.unfold(x, 2, stride=2), dims=2),
    op("F.fold", lambda x, m: F.fold(F.unfold(x, 2), (8, 8), 2), fixed=True),
    op("x.unfold", lambda x, m: x.unfold(2, 2, 2).amax(-1)),
    op("grid_sample", lambda x, m: F.grid_sample(x, m.g.expand(x.shape[0], -1, -1, -1), align_corners=False),
       g=lambda: torch.rand(1, 4, 5, 2) * 2 - 1),
]  # fmt: skip

# -- movement ----------------------------------------------------------------------------------------------------------


def _shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


def _shuffle_constants(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, C // groups, x.shape[2], x.shape[3]).permute(0, 2, 1, 3, 4).flatten(1, 2)


MOVEMENT_ROWS = [
    op("shuffle-by-hand", lambda x, m: _shuffle(x, 2)),
    op("shuffle-by-hand-constants", lambda x, m: _shuffle_constants(x, 4)),
    op("pixel-shuffle-by-hand",
       lambda x, m: x.view(x.shape[0], -1, 2, 2, *x.shape[2:]).permute(0, 1, 4, 2, 5, 3).reshape(
           x.shape[0], -1, x.shape[2] * 2, x.shape[3] * 2), width=16),
    op("flatten", lambda x, m: torch.flatten(x, 1), tail="linear", fixed=True),
    op("flatten-module", lambda x, m: m.f(x), tail="linear", fixed=True, f=nn.Flatten),
    op("flatten-space", lambda x, m: x.flatten(2).transpose(1, 2), tail="linear"),
    op("flatten-batch", lambda x, m: x.permute(0, 2, 3, 1).flatten(0, 2), tail="linear"),
    op("flatten-batch-and-channels", lambda x, m: x.flatten(0, 1).mean((1, 2)).view(-1, C), tail="linear"),
    op("unflatten", lambda x, m: x.unflatten(1, (2, 4)).sum(1)),
    op("unflatten-inferred", lambda x, m: x.unflatten(1, (2, -1)).flatten(1, 2)),
    op("unflatten-module", lambda x, m: m.u(x).amax(2), "reduced", u=lambda: nn.Unflatten(1, (4, 2))),
    op("view-constants", lambda x, m: x.view(-1, C, x.shape[2] * x.shape[3]), dims=2),
    op("view-size-of-batch", lambda x, m: x.view(x.size(0), -1), tail="linear", fixed=True),
    op("view-heads", lambda x, m: x.view(x.shape[0], 2, 4, -1).transpose(2, 3).flatten(2), tail="linear", fixed=True),
    op("view-batch-channels", lambda x, m: x.view(-1, 1, *x.shape[2:]).mul(2).view(-1, C, *x.shape[2:])),
    op("reshape-tuple", lambda x, m: x.reshape((x.shape[0], C, -1)), dims=2),
    op("reshape-shape", lambda x, m: x.reshape(x.shape).view(x.size()).reshape_as(x).view_as(x)),
    op("reshape-arithmetic", lambda x, m: x.reshape(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).mean(2), "reduced"),
    op("reshape-prod", lambda x, m: x.reshape(x.shape[0], math.prod(x.shape[1:])), tail="linear", fixed=True),
    op("reshape-numel", lambda x, m: x.view(x.numel() // (x.shape[2] * x.shape[3]), -1).view(x.shape)),
    op("reshape-int", lambda x, m: x.view(int(x.shape[0]), int(x.shape[1] / 2), 2, *x.shape[2:]).amax(2),
       "another constant"),
    tokens("reshape-heads",
           lambda x, m: x.reshape(x.shape[0], x.shape[1], 2, C // 2).transpose(1, 2).transpose(1, 2).flatten(2)),
    op("permute", lambda x, m: x.permute(0, 2, 3, 1), tail="linear"),
    op("torch.permute", lambda x, m: torch.permute(x, (0, 2, 3, 1)).permute((0, 3, 1, 2))),
    op("permute-dims", lambda x, m: x.permute(dims=(0, 3, 2, 1)).permute(0, 3, -2, 1)),
    op("transpose", lambda x, m: x.transpose(1, -1), tail="linear"),
    op("transpose-keywords", lambda x, m: torch.transpose(x, dim0=1, dim1=3), tail="linear"),
    op("swapaxes", lambda x, m: x.swapaxes(1, 3).swapdims(2, 1).swapdims(1, 2).swapaxes(3, 1)),
    op("T", lambda x, m: x.mean((2, 3)).T.t(), tail="linear"),
    op("mT", lambda x, m: x.mT),
    op("H-movedim", lambda x, m: x.movedim(1, -1), tail="linear"),
    op("torch.movedim", lambda x, m: torch.movedim(x, (1, 2), (2, 1)).moveaxis(2, 1)),
    op("squeeze", lambda x, m: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(2), tail="linear"),
    op("squeeze-tuple", lambda x, m: x.mean((2, 3), True).squeeze((2, 3)), tail="linear"),
    op("squeeze-all", lambda x, m: x.mean((2, 3), True).squeeze().reshape(-1, C), tail="linear"),
    op("unsqueeze", lambda x, m: torch.unsqueeze(x, 1)[:, 0].unsqueeze(-1).squeeze(-1)),
    op("expand", lambda x, m: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 5)),
    op("expand-constants", lambda x, m: x[:, :, None].expand(x.shape[0], C, 2, *x.shape[2:]).flatten(2, 3)),
    op("expand-as", lambda x, m: x.mean((2, 3), keepdim=True).expand_as(x)),
    op("expand-to-shape", lambda x, m: x.mean(1, keepdim=True).expand(x.shape) + x),
    op("expand-parameter", lambda x, m: torch.cat([x, m.e.expand(x.shape[0], -1, *x.shape[2:])], 1), e=(1, 4, 1, 1)),
    tokens("class-token", lambda x, m: torch.cat((m.c.expand(x.shape[0], -1, -1), x), dim=1) + m.p, c=(1, 1, C),
           p=(1, 7, C)),
    op("broadcast_to", lambda x, m: torch.broadcast_to(x.mean((2, 3), True), x.shape)),
    op("repeat", lambda x, m: x.repeat(1, 2, 1, 2)),
    op("repeat-new-dim", lambda x, m: x.repeat(2, 1, 1, 1, 1).mean(0)),
    op("tile", lambda x, m: torch.tile(x, (1, 3, 1, 1)).tile((2, 1))),
    op("repeat_interleave", lambda x, m: x.repeat_interleave(2, 1).repeat_interleave(2, dim=2)),
    op("cat", lambda x, m: torch.cat([x, x.relu()], dim=1)),
    op("cat-three", lambda x, m: torch.cat((x, m.f(x), x[:, :3]), 1), f=lambda: nn.Conv2d(C, 5, 1)),
    op("cat-axis", lambda x, m: torch.concat([x, x * 2], axis=-3)),
    op("cat-space", lambda x, m: torch.cat([x, x.flip(1).flip(1)], 2)),
    op("cat-parameter", lambda x, m: torch.cat([x, m.e.expand(x.shape[0], 4, x.shape[2], x.shape[3])], 1),
       e=(1, 4, 1, 1)),
    op("cat-buffer-space", lambda x, m: torch.cat([x, m.e.expand(x.shape[0], -1, -1, x.shape[3])], 2),
       e=lambda: torch.randn(1, C, 1, 1)),
    op("stack", lambda x, m: torch.stack([x, x.relu()], 1).sum(1)),
    op("stack-last", lambda x, m: torch.stack((x, x.flip(1)), dim=-1).flatten(3)),
    op("stack-channels", lambda x, m: torch.stack([x, x + 1], 2).flatten(1, 2)),
    op("hstack", lambda x, m: torch.hstack([x, x]) + torch.cat([x, x], 1)),
    op("split", lambda x, m: torch.cat(x.split(2, 1)[::-1], 1)),
    op("split-uneven", lambda x, m: torch.cat(list(torch.split(x, 3, dim=1)), 1)),
    op("split-sizes", lambda x, m: torch.cat(x.split([2, 5, 1], 1)[1:], 1)),
    op("split-half", lambda x, m: operator.mul(*x.split(x.shape[1] // 2, dim=1))),
    op("split-space", lambda x, m: sum(x.split([3, x.shape[2] - 3], 2)[0:1])),
    op("split_with_sizes", lambda x, m: torch.split_with_sizes(x, [3, 5], 1)[1]),
    op("chunk", lambda x, m: operator.mul(*x.chunk(2, 1))),
    op("chunk-uneven", lambda x, m: torch.cat(torch.chunk(x, 2, dim=1)[1:], 1), width=5),
    op("chunk-fewer", lambda x, m: sum(p.mean(1, keepdim=True) for p in x.chunk(4, -3)) * x, width=5),
    op("tensor_split", lambda x, m: torch.tensor_split(x, 4, 1)[2]),
    op("tensor_split-places", lambda x, m: torch.tensor_split(x, (3, 5), dim=1)[1]),
    op("hsplit", lambda x, m: operator.mul(*x.hsplit(2)) + torch.hsplit(x, (2, 6))[1]),
    op("hsplit-uneven", lambda x, m: torch.cat(torch.hsplit(torch.cat([x, x.mean(1, True)], 1), 3)[1:], 1)),
    op("vsplit-dsplit", lambda x, m: torch.cat(torch.vsplit(torch.cat([x, x]), 2)[0].dsplit(2), 2)),
    op("unbind-space", lambda x, m: torch.stack(x.unbind(2)[:4], 2), fixed=True),
    op("unbind-channels", lambda x, m: torch.stack(torch.unbind(x, 1), 1), "channels"),
    tokens("unbind-qkv", lambda x, m: sum(x.reshape(x.shape[0], x.shape[1], 2, 4).permute(2, 0, 1, 3).unbind(0))),
    op("iterate-parameter", lambda x, m: sum(a * x for a in m.w), w=(2,)),
    op("iterate-zip", lambda x, m: sum(a * f(x) for a, f in zip(F.softmax(m.w, 0), m.f, strict=True)), w=(2,),
       f=lambda: nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(2))),
    op("iterate-enumerate", lambda x, m: sum(a * x**k for k, a in enumerate(m.g)), g=(3, C, 1, 1)),
    op("iterate-buffer", lambda x, m: sum((b - a) * x for a, b in zip(m.t[:-1], m.t[1:], strict=True)),
       t=lambda: torch.rand(4)),
    op("iterate-list", lambda x, m: list(m.g)[1] * x + next(iter(m.g.flip(0))), g=(2, C, 1, 1)),
    op("iterate-sum", lambda x, m: x * sum(m.g) + operator.mul(*m.g), g=(2, C, 1, 1)),
    op("iterate-range", lambda x, m: sum(m.w[k] * x for k in range(len(m.w))) / len(m.w), w=(3,)),
    op("iterate-reversed", lambda x, m: sum(a * x**k for k, a in enumerate(reversed(m.w))), w=(3,)),
    op("iterate-length", lambda x, m: x * m.g.view(-1, 1, 1) / len(m.g) + x.view(-1, len(m.g), *x.shape[2:]), g=(C,)),
    op("iterate-view", lambda x, m: sum(p.relu() for p in x.unflatten(1, (2, 4)).transpose(0, 1))),
    op("iterate-chunks", lambda x, m: torch.cat([p * (k + 1) for k, p in enumerate(torch.stack(x.split(4, 1)))], 1)),
    op("iterate-channels", lambda x, m: torch.stack([c.relu() for c in x.movedim(1, 0)], 1), "channels"),
    op("narrow", lambda x, m: x.narrow(1, 2, 4)),
    op("torch.narrow", lambda x, m: torch.narrow(x, 1, 0, x.shape[1] // 2)),
    op("slice", lambda x, m: x[:, 2:6]),
    op("slice-open", lambda x, m: x[:, :3].sum(1, keepdim=True) + x[:, 5:].amax(1, keepdim=True) * x),
    op("slice-negative", lambda x, m: x[:, -3:] + x[:, :-5]),
    op("slice-half", lambda x, m: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]),
    op("slice-space", lambda x, m: x[..., ::2, 1:][:, :, :-1]),
    op("slice-step", lambda x, m: torch.cat([x[:, ::2], x[:, 1::2]], 1)),
    op("slice-ellipsis", lambda x, m: x[..., 1:, :][:, :, None].squeeze(2)),
    op("slice-ellipsis-channels-last", lambda x, m: x.permute(0, 2, 3, 1)[..., :5], tail="linear"),
    op("slice-none", lambda x, m: x[:, None, ...][:, 0]),
    op("index-space", lambda x, m: x[:, :, 0], dims=2),
    op("index-token", lambda x, m: x.flatten(2).transpose(1, 2)[:, 0], tail="linear"),
    op("index-channel", lambda x, m: x[:, 2:3] * x + x[:, -1].unsqueeze(1) * x),
    op("select", lambda x, m: x.select(2, 1) * x.select(1, -2).unsqueeze(1)[:, :, 0], dims=2),
    op("index-list", lambda x, m: x[:, [2, 0, 1]]),
    op("index-list-space", lambda x, m: x[:, :, [2, 0, 1]]),
    op("index-tensor", lambda x, m: x[:, m.i], i=lambda: torch.tensor([3, 1, 7, 0])),
    op("index_select-channels", lambda x, m: torch.index_select(x, 1, m.i), i=lambda: torch.randperm(C)),
    op("index_select-space", lambda x, m: x.index_select(2, m.i), i=lambda: torch.tensor([1, 0, 2, 2])),
    tokens("index_add", lambda x, m: torch.zeros_like(x).index_add(1, m.i, x[:, :3]),
           i=lambda: torch.tensor([1, 0, 1])),
    tokens("index_add-in-place", lambda x, m: torch.zeros_like(x).index_add_(1, m.i, x[:, :3], alpha=2),
           i=lambda: torch.tensor([1, 0, 1])),
    tokens("index_add-narrow", lambda x, m: x.index_add(1, m.i, x.new_ones(x.shape[0], 3, C)),
           i=lambda: torch.tensor([1, 0, 1])),
    tokens("index_copy", lambda x, m: x.index_copy(1, m.i, x[:, :2].tanh()), i=lambda: torch.tensor([2, 0])),
    tokens("index_add-channels", lambda x, m: x.index_add(2, m.i, x[..., :3]), "a look-up along the channels",
           i=lambda: torch.tensor([1, 0, 1])),
    tokens("index-list-ellipsis", lambda x, m: x[..., [2, 0], :]),
    tokens("index-list-ellipsis-channels", lambda x, m: x[..., [2, 0, 5]]),
    tokens("index-tensor-ellipsis", lambda x, m: x[..., m.i, :], i=lambda: torch.tensor([1, 0])),
    op("index-list-and-part", lambda x, m: x[:, :, 1:5, [0, 2]]),
    op("index-list-and-part-of-channels", lambda x, m: x[:, 2:, [0, 2]], "part of a widened dimension"),
    op("mask-channels", lambda x, m: x[:, m.k], k=MASK),
    op("mask-channels-computed", lambda x, m: x[:, ~m.k] + x[:, m.i % 3 == 0], k=MASK, i=lambda: torch.arange(C)),
    op("mask-channels-made", lambda x, m: x[:, torch.arange(C) > 2]),
    op("mask-channels-ellipsis", lambda x, m: x[..., m.k, :, :], k=MASK),
    op("mask-nonzero", lambda x, m: x.index_select(1, m.k.nonzero().squeeze(1)), k=MASK),
    op("mask-space", lambda x, m: x[..., m.k], fixed=True, k=MASK),
    op("mask-two-dims", lambda x, m: x[..., :2, :4][..., m.k.view(2, 4)], k=MASK),
    op("mask-parameter", lambda x, m: torch.cat([x, x[:, :5] * m.g[m.k].view(-1, 1, 1)], 1), g=(C,), k=MASK),
    op("setitem-mask", lambda x, m: _filled(x, x > 0.2, 0.5)),
    op("setitem-mask-other-map", lambda x, m: _filled(x, x.flip(1) > 0.2, m.v), v=()),
    op("setitem-mask-narrow", lambda x, m: _filled(x, (x.mean(1, True) > 0).expand_as(x), 0.0)),
    op("setitem-mask-buffer", lambda x, m: _filled(x, (slice(None), m.k), 0.0), k=MASK),
    op("setitem-mask-samples", lambda x, m: _filled(x, x.mean((1, 2, 3)) > 0, 0.0)),
    op("setitem-mask-ellipsis", lambda x, m: _filled(x, (..., x.amax((0, 1)) > 0.5), float(C))),
    op("setitem-mask-positions", lambda x, m: _filled(x, (slice(None), x.mean((0, 2, 3)) > 0), 0.0)),
    op("setitem-mask-part", lambda x, m: _filled(x, (slice(1), m.k), 0.0), "by a mask together", k=MASK),
    op("value-of-buffer", lambda x, m: x * m.t[1].item() + sum(x * t for t in m.t.tolist()), t=lambda: torch.rand(3)),
    op("gather", lambda x, m: x.gather(2, x.argsort(2))),
    tokens("gather-tokens", lambda x, m: torch.gather(x, 1, m.at.expand(x.shape[0], -1, x.shape[-1])), at=POSITIONS),
    tokens("gather-constant", lambda x, m: x.gather(1, m.at.repeat(x.shape[0], 1, C)), at=POSITIONS),
    tokens("gather-channels", lambda x, m: x.gather(2, m.at.expand(x.shape[0], -1, -1)), "a look-up along the channels",
           at=lambda: torch.tensor([[[1, 0, 3]] * 6])),
    tokens("scatter-tokens",
           lambda x, m: x.scatter(1, m.at.expand(x.shape[0], -1, C), torch.sigmoid(x[:, :3])), at=POSITIONS),
    tokens("scatter-add", lambda x, m: torch.scatter_add(x, 1, m.at.expand(x.shape[0], -1, C), x[:, 3:]), at=POSITIONS),
    tokens("scatter-number", lambda x, m: x.scatter(1, m.at.expand(x.shape[0], -1, C), 0.5), at=POSITIONS),
    op("roll-space", lambda x, m: torch.roll(x, (1, -2), (2, 3))),
    op("roll-channels", lambda x, m: x.roll(1, 1)),
    op("roll-channels-and-space", lambda x, m: torch.roll(x, shifts=(3, 1), dims=(1, 2))),
    op("flip-channels", lambda x, m: x.flip(1)),
    op("flip-space", lambda x, m: torch.flip(x, [2, 3]).flip(-1)),
    op("setitem", lambda x, m: _assign(x, slice(None), slice(0, 1), 0.0)),
    op("setitem-channels", lambda x, m: _assign(x, slice(0, 2), slice(None), 0.0)),
    op("setitem-view", lambda x, m: _assign_view(x)),
    op("setitem-base", lambda x, m: _assign_base(x)),
    op("setitem-shift", lambda x, m: _shift(x)),
    op("setitem-twice",
       lambda x, m: _assign(_assign(x, slice(None), slice(0, 1), 0.0), slice(3, None), slice(2, 3), x[:, 3:, :1])),
    op("setitem-tensor", lambda x, m: _assign(x, slice(None), slice(0, 1), x[:, :, 1:2])),
    op("meshgrid-positions", lambda x, m: x + torch.arange(x.shape[2], dtype=x.dtype)[:, None]),
]  # fmt: skip


def _filled(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def _assign_view(x: Tensor) -> Tensor:
    x = x.clone()
    view = x[:, 2:5]
    view[:, :, 0] = 1.0
    return x


def _assign_base(x: Tensor) -> Tensor:
    x = x.clone()
    view = x[:, 2:5]
    x[:, :, 0] = 1.0
    return view + x[:, :3]


def _shift(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2, 1:] = x[:, :2, :-1]
    out[:, 2:4, :-1] = x[:, 2:4, 1:]
    out[:, 4:] = x[:, 4:]
    return out


def _assign(x: Tensor, channels: slice, rows: slice, value: Any) -> Tensor:
    x = x.clone()
    x[:, channels, rows] = value
    return x


# -- broadcasting ------------------------------------------------------------------------------------------------------


def _inplace(x: Tensor, m: Any) -> Tensor:
    x += m.a
    x *= 2
    x -= x.mean()
    x /= 3
    return x


BROADCAST_ROWS = [
    op("add", lambda x, m: x + m.f(x), f=lambda: nn.Conv2d(C, C, 1)),
    op("sub-rsub", lambda x, m: (1 - x) - m.f(x), f=lambda: nn.Conv2d(C, C, 1)),
    op("mul-self", lambda x, m: x * x),
    op("div", lambda x, m: x / (1 + x * x) + 1 / (2 + x.abs())),
    op("pow", lambda x, m: x**2 + torch.pow(x.abs(), 0.5) + 2**x),
    op("floor-mod", lambda x, m: x // 2 + x % 2 + torch.remainder(x, 3)),
    op("gate", lambda x, m: x * m.f(x.mean((2, 3), keepdim=True)).sigmoid(), f=lambda: nn.Conv2d(C, C, 1)),
    op("gate-space", lambda x, m: x * m.f(x).sigmoid(), f=lambda: nn.Conv2d(C, 1, 1)),
    op("layouts", lambda x, m: x + x.flip(1) + x.roll(1, 1)),
    op("addcmul", lambda x, m: torch.addcmul(x, m.g, x, value=0.5), g=(C, 1, 1)),
    op("addcmul-method", lambda x, m: x.addcmul(m.g, m.h).addcdiv(x, m.h.exp()), g=(C, 1, 1), h=(1,)),
    op("lerp", lambda x, m: torch.lerp(x, x.relu(), 0.3) + x.lerp(x * 2, m.w), w=(C, 1, 1)),
    op("maximum", lambda x, m: torch.maximum(x, m.a) + torch.minimum(x, x * 2) + torch.max(x, x.flip(1)), a=(C, 1, 1)),
    op("where", lambda x, m: torch.where(x > 0, x, m.a * x), a=(C, 1, 1)),
    op("where-scalar", lambda x, m: torch.where(x > m.a, x, 0.0).where(x < 1, x * 2), a=(1, C, 1, 1)),
    op("comparison", lambda x, m: x * (x > x.mean((2, 3), keepdim=True)) + (x.ge(0) != x.lt(0.5)).double()),
    op("method-forms", lambda x, m: x.add(m.a).sub(1).mul(m.a).div(2).pow(2).add(x, alpha=0.5), a=(C, 1, 1)),
    op("inplace-operators", _inplace, a=(C, 1, 1)),
    op("inplace-methods", lambda x, m: x.add_(m.a).mul_(m.a).sub_(1).div_(2), a=(C, 1, 1)),
    op("inplace-residual", lambda x, m: m.f(x).add_(x), f=lambda: nn.Conv2d(C, C, 1)),
    *[op(f"parameter-rank-{len(s)}", lambda x, m: x * m.g + m.b, g=s, b=s) for s in ((C, 1, 1), (1, C, 1, 1), (),
         (1,))],
    op("parameter-vector-view", lambda x, m: x * m.g.view(1, -1, 1, 1) + m.b[:, None, None], g=(C,), b=(C,)),
    op("parameter-vector-reshape", lambda x, m: x * m.g.reshape(1, C, 1, 1) + m.b.view(C, 1, 1), g=(C,), b=(C,)),
    op("parameter-gate", lambda x, m: x * torch.sigmoid(m.g).unsqueeze(-1).unsqueeze(-1), g=(C,)),
    op("parameter-space", lambda x, m: x + m.p, fixed=True, p=(1, C, 8, 8)),
    op("parameter-space-narrow", lambda x, m: x + m.p, fixed=True, p=(8, 8)),
    op("parameter-twice", lambda x, m: (x * m.g + 1) * m.g, g=(C, 1, 1)),
    op("parameter-softmax", lambda x, m: x * m.w.softmax(0)[0] + x.relu() * m.w.softmax(0)[1], w=(2,)),
    op("parameter-normalised", lambda x, m: x * (m.w / m.w.sum()), w=(C, 1, 1)),
    op("buffer", lambda x, m: (x - m.mean) / m.std, mean=lambda: torch.randn(C, 1, 1),
       std=lambda: torch.rand(1, C, 1, 1) + 1),
    op("parameter-interpolated", lambda x, m: x + F.interpolate(m.p, size=x.shape[-2:], mode="bilinear"),
       p=(1, C, 4, 4)),
    tokens("layer-scale", lambda x, m: x + m.f(x) * m.g, g=(C,), f=lambda: nn.Linear(C, C)),
    tokens("position-embedding", lambda x, m: x + m.p[:, : x.shape[1]], p=(1, 9, C)),
    op("constant-tensor", lambda x, m: x * torch.arange(1.0, C + 1, dtype=torch.float64).view(1, C, 1, 1)),
    op("scale-by-width", lambda x, m: x * x.shape[1] ** -0.5 + x / math.sqrt(x.shape[1]) + x.size(1)),
    op("scale-by-float-width", lambda x, m: x / float(x.shape[1]) + x * (1.0 / x.shape[1])),
    op("sum-over-width", lambda x, m: x - x.sum(1, keepdim=True) / x.shape[1]),
    op("logaddexp", lambda x, m: torch.logaddexp(x, m.a) + torch.hypot(x, m.a) + torch.atan2(x, m.a), a=(C, 1, 1)),
]  # fmt: skip

# -- reductions --------------------------------------------------------------------------------------------------------

DIMS: dict[str, Any] = {"channels": 1, "space": (2, 3), "channels-and-space": (1, 2, 3), "negative": -3}
REDUCTIONS: dict[str, Any] = {
    "mean": lambda x, d, k: x.mean(d, keepdim=k),
    "torch.mean": lambda x, d, k: torch.mean(x, dim=d, keepdim=k),
    "sum": lambda x, d, k: x.sum(d, k),
    "amax": lambda x, d, k: x.amax(d, keepdim=k),
    "amin": lambda x, d, k: torch.amin(x, d, k),
    "var": lambda x, d, k: x.var(d, keepdim=k),
    "var-biased": lambda x, d, k: x.var(dim=d, unbiased=False, keepdim=k),
    "var-unbiased": lambda x, d, k: x.var(dim=d, unbiased=True, keepdim=k),
    "var-correction": lambda x, d, k: torch.var(x, d, correction=0, keepdim=k),
    "std": lambda x, d, k: torch.std(x, d, keepdim=k),
    "std-correction": lambda x, d, k: torch.std(x, d, correction=2, keepdim=k),
    "var_mean": lambda x, d, k: operator.add(*torch.var_mean(x, d, keepdim=k)),
    "std_mean-biased": lambda x, d, k: operator.add(*torch.std_mean(x, d, correction=0, keepdim=k)),
    "var_mean-biased": lambda x, d, k: operator.sub(*torch.var_mean(x, dim=d, unbiased=False, keepdim=k)),
    "norm": lambda x, d, k: torch.norm(x, 2, d, k),
    "norm-1": lambda x, d, k: torch.norm(x, 1, d, k),
    "norm-3": lambda x, d, k: x.norm(3, d, k),
    "vector_norm": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k),
    "vector_norm-inf": lambda x, d, k: torch.linalg.vector_norm(x, float("inf"), d, k),
    "logsumexp": lambda x, d, k: torch.logsumexp(x, d, k),
}
CONTRACTED = {"var-unbiased": "unbiased"}

REDUCTION_ROWS = [
    op(f"{name}-{where}-keepdim", lambda x, m, f=f, d=d: f(x, d, True) * x,
       "wide" if where == "space" else CONTRACTED.get(name, "wide"))
    for name, f in REDUCTIONS.items() for where, d in DIMS.items()
] + [
    *[op(f"{name}-channels", lambda x, m, f=f: x * f(x, 1, False)[:, None],
         CONTRACTED.get(name, "wide")) for name, f in REDUCTIONS.items()],
    *[op(f"{name}-space", lambda x, m, f=f: f(x, (2, 3), False), tail="linear") for name, f in REDUCTIONS.items()],
    op("mean-all", lambda x, m: x * x.mean() + x.sum() + x.amax() + x.max() + x.norm() + x.min()),
    op("var-all", lambda x, m: x * x.var() + x.std()),
    op("var-all-correction", lambda x, m: x * x.var(correction=0) + torch.std(x, correction=1)),
    op("var-all-biased", lambda x, m: x * x.var(unbiased=False) + torch.var(x, False)),
    op("max-dim", lambda x, m: x * x.max(1, keepdim=True)[0] + x.min(dim=1, keepdim=True).values),
    op("max-dim-unpacked", lambda x, m: x * _first(*torch.max(x, 1, True))),
    op("max-dim-positions", lambda x, m: operator.add(*x.max(1, keepdim=True)) * x, "positions"),
    op("aminmax", lambda x, m: x * operator.sub(*x.aminmax(dim=1, keepdim=True)) + torch.aminmax(x).max),
    op("logsumexp-uneven", lambda x, m: x * torch.cat([x, x.mean(1, True)], 1).logsumexp((1, 2), True)),
    op("special.logsumexp", lambda x, m: x * torch.special.logsumexp(x, 1, keepdim=True)),
    op("count_nonzero", lambda x, m: x * torch.count_nonzero(x.relu(), (2, 3))[:, :, None, None]),
    op("count_nonzero-channels", lambda x, m: x * x.relu().count_nonzero(1).unsqueeze(1), "would change"),
    op("vecdot",
       lambda x, m: x * torch.linalg.vecdot(x, x.flip(1), dim=1)[:, None] + torch.linalg.vecdot(x, x)[..., None]),
    op("cross_entropy", lambda x, m: x * F.cross_entropy(x, x.softmax(1)), "a loss over"),
    op("kl_div", lambda x, m: x * F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"), "a loss over"),
    op("max-dim-space", lambda x, m: x.max(-1)[0].max(-1).values, tail="linear"),
    op("max-dim-indices", lambda x, m: x * x.max(2, keepdim=True).indices),
    op("argmax", lambda x, m: x * x.argmax(1, keepdim=True), "positions"),
    op("argmax-space", lambda x, m: x * x.argmax(2, keepdim=True)),
    op("median", lambda x, m: x * x.median(2, keepdim=True).values),
    op("prod", lambda x, m: x * x.prod(2, keepdim=True)),
    op("prod-channels", lambda x, m: x * x.prod(1, keepdim=True), "would change"),
    op("cumsum", lambda x, m: x.cumsum(2)),
    op("cumsum-channels", lambda x, m: x.cumsum(1), "would change"),
    op("any-all", lambda x, m: x * (x > 0).any(1, keepdim=True) * (x < 100).all(1, keepdim=True)),
    op("sum-of-bools", lambda x, m: x * (x > 0).sum((2, 3), keepdim=True)),
    op("sum-of-bools-channels", lambda x, m: x * (x > 0).sum(1, keepdim=True), "integers"),
    op("mean-of-bools", lambda x, m: x * (x > 0).double().mean(1, keepdim=True)),
    op("normalize", lambda x, m: F.normalize(x)),
    op("normalize-space", lambda x, m: F.normalize(x, dim=(2, 3))),
    op("normalize-p", lambda x, m: F.normalize(x, p=1.0, dim=1, eps=1e-3)),
    tokens("normalize-last", lambda x, m: F.normalize(x, dim=-1, eps=0.5)),
    op("cosine-similarity", lambda x, m: x * F.cosine_similarity(x, x.relu(), dim=1).unsqueeze(1)),
    op("pairwise-distance", lambda x, m: x * F.pairwise_distance(x.flatten(2).mT, x.mean((2, 3))[:, None]).mean()),
    tokens("pairwise-distance-p", lambda x, m: x + F.pairwise_distance(x, x.relu(), p=1.0, eps=0.1, keepdim=True)),
    op("mse-loss", lambda x, m: x * F.mse_loss(x, x.relu())),
    op("mse-loss-sum", lambda x, m: x / (1 + F.mse_loss(x, x.tanh(), reduction="sum"))),
    op("l1-loss-none", lambda x, m: F.l1_loss(x, x.tanh(), reduction="none")),
    op("smooth-l1-loss", lambda x, m: x * F.smooth_l1_loss(x, x.relu(), beta=0.5)),
    op("huber-loss", lambda x, m: x * F.huber_loss(x, x.relu(), reduction="sum", delta=0.7)),
    op("grn", lambda x, m: x * (g := x.norm(p=2, dim=(2, 3), keepdim=True)) / (g.mean(1, keepdim=True) + 1e-6) * m.w,
       w=(1, C, 1, 1)),
    op("spatial-attention", lambda x, m: x * m.f(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)),
       f=lambda: nn.Conv2d(2, 1, 3, padding=1)),
    op("reduce-channels", lambda x, m: m.f(x.mean(1, keepdim=True)), "wide", f=lambda: nn.Conv2d(1, 6, 1)),
]  # fmt: skip

# -- products ----------------------------------------------------------------------------------------------------------


def _first(first: Tensor, _second: Tensor) -> Tensor:
    return first


def _attention(x: Tensor, m: Any) -> Tensor:
    q, k, v = m.f(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    a = (q @ k.transpose(-2, -1) * 4**-0.5).softmax(-1)
    return (a @ v).transpose(1, 2).reshape(x.shape[0], -1, 8)


PRODUCT_ROWS = [
    tokens("matmul", lambda x, m: x @ x.transpose(1, 2) @ x),
    tokens("torch.matmul-parameter", lambda x, m: torch.matmul(x, m.w) + m.b, w=(C, 6), b=(6,)),
    tokens("matmul-parameter-left", lambda x, m: (m.w @ x.transpose(1, 2)).transpose(1, 2), w=(6, C)),
    tokens("matmul-parameter-transposed", lambda x, m: x @ m.w.t(), w=(6, C)),
    tokens("matmul-over-tokens", lambda x, m: m.w @ x, w=(5, 6)),
    tokens("matmul-vector", lambda x, m: x * (x @ m.w).unsqueeze(-1), w=(C,)),
    tokens("bmm", lambda x, m: torch.bmm(torch.bmm(x, x.transpose(1, 2)), x)),
    op("mm", lambda x, m: torch.mm(x, m.w).mm(m.v), dims=0, tail="linear", shape=(3,), w=(C, 6), v=(6, 5)),
    op("addmm", lambda x, m: torch.addmm(m.b, x, m.w), dims=0, tail="linear", shape=(3,), w=(C, 6), b=(6,)),
    op("addmm-beta", lambda x, m: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), dims=0, tail="linear", shape=(3,),
       w=(C, 6), b=(6,)),
    tokens("baddbmm", lambda x, m: torch.baddbmm(x, x @ x.transpose(1, 2), x)),
    tokens("attention", _attention, f=lambda: nn.Linear(C, 24)),
    op("channel-attention", lambda x, m: ((f := x.flatten(2)) @ f.transpose(1, 2)).softmax(-1) @ f,
       tail="conv"),
    tokens("tensordot", lambda x, m: torch.tensordot(x, m.w, 1), w=(C, 6)),
    tokens("tensordot-lists", lambda x, m: torch.tensordot(x.unflatten(-1, (2, 4)), m.w, dims=([2, 3], [1, 2])),
           w=(6, 2, 4)),
    tokens("tensordot-numbers", lambda x, m: torch.tensordot(m.w, x, dims=([0], [-1])).movedim(0, -1), w=(C, 6)),
    tokens("einsum", lambda x, m: torch.einsum("bnc,bmc->bnm", x, x) @ x),
    tokens("einsum-parameter", lambda x, m: torch.einsum("bnc,cd->bnd", x, m.w), w=(C, 6)),
    tokens("einsum-parameter-ellipsis", lambda x, m: torch.einsum("...c,dc->...d", x, m.w), w=(6, C)),
    op("einsum-conv", lambda x, m: torch.einsum("bchw,oc->bohw", x, m.w), w=(6, C)),
    op("einsum-scale", lambda x, m: torch.einsum("bchw,c->bchw", x, m.w), w=(C,)),
    op("einsum-implicit", lambda x, m: torch.einsum("bchw,c", x, m.w).permute(0, 1, 2).unsqueeze(1) * x, w=(C,)),
    op("einsum-sum", lambda x, m: torch.einsum("bchw->bc", x), tail="linear"),
    op("einsum-list", lambda x, m: torch.einsum("bchw,bc->bchw", [x, x.mean((2, 3))])),
    tokens("einsum-heads", lambda x, m: torch.einsum("bnhd,hde->bnhe", x.unflatten(-1, (2, 4)), m.w).flatten(2),
           w=(2, 4, 5)),
    tokens("einsum-two-outputs", lambda x, m: torch.einsum("bnc,chd->bnhd", x, m.w).flatten(2), w=(C, 2, 3)),
    tokens("einsum-two-inputs", lambda x, m: torch.einsum("bnhd,hdc->bnc", x.unflatten(-1, (2, 4)), m.w), w=(2, 4, 6)),
    tokens("einsum-both-inputs-wide", lambda x, m: torch.einsum("bnh,bnd,hdc->bnc", x, x.tanh(), m.w), w=(C, C, 6)),
    tokens("complex-pairs", lambda x, m: torch.view_as_real(
               torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(m.r, m.a)).flatten(2),
           r=(4,), a=(4,)),
    tokens("einsum-three", lambda x, m: torch.einsum("bnc,c,cd->bnd", x, m.v, m.w), w=(C, 6), v=(C,)),
    op("outer", lambda x, m: x * torch.outer(m.a, m.b), fixed=True, a=(8,), b=(8,)),
]  # fmt: skip

# -- weights -----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.f(x).relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _old_weight_norm(module: nn.Module, **options: Any) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(module, **options)


WEIGHT_ROWS = [
    around("twice", lambda: Twice(nn.Conv2d(C, C, 1))),
    around("twice-norm", lambda: Twice(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))),
    tokens("tied", lambda x, m: m.f(x), f=Tied),
    tokens("tied-transposed", lambda x, m: F.linear(F.linear(x, m.w).relu(), m.w.t()), w=(6, C)),
    tokens("tied-transposed-T", lambda x, m: F.linear(F.linear(x, m.w.T).relu(), m.w), w=(C, 6)),
    op("tied-conv-and-transposed", lambda x, m: F.conv_transpose2d(F.conv2d(x, m.w), m.w), w=(6, C, 1, 1)),
    around("standardised", lambda: Standardised(C, 6, 3)),
    around("timm-StdConv2d", lambda: StdConv2d(C, 6, 3)),
    around("timm-StdConv2d-groups", lambda: StdConv2d(C, 6, 3, groups=2)),
    around("timm-ScaledStdConv2d", lambda: ScaledStdConv2d(C, 6, 3)),
    around("timm-ScaledStdConv2d-depthwise", lambda: ScaledStdConv2d(C, C, 3, groups=C)),
    around("weight_norm-old", lambda: _old_weight_norm(nn.Conv2d(C, 6, 3))),
    around("weight_norm-old-dim1", lambda: _old_weight_norm(nn.Conv2d(C, 6, 3), dim=1)),
    around("weight_norm-old-all", lambda: _old_weight_norm(nn.Conv2d(C, 6, 3), dim=None)),
    around("weight_norm", lambda: P.weight_norm(nn.Conv2d(C, 6, 3))),
    around("weight_norm-transposed", lambda: P.weight_norm(nn.ConvTranspose2d(C, 6, 2), dim=1)),
    tokens("weight_norm-linear", lambda x, m: m.f(x), f=lambda: P.weight_norm(nn.Linear(C, 6))),
    around("spectral_norm", lambda: P.spectral_norm(nn.Conv2d(C, 6, 3))),
    around("masked-weight", lambda: MaskedConv(C, 6)),
]  # fmt: skip


class MaskedConv(nn.Conv2d):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, 3, padding=1)
        mask = torch.ones(1, 1, 3, 3)
        mask[..., 2, :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


# -- whole networks: inputs, outputs, unknown operators ----------------------------------------------------------------


class Named(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Output:
    a: Tensor
    b: Tensor


@dataclass
class Record(dict[str, Any]):
    """A dict that is read by attribute as well, and leaves out what is None (transformers' ModelOutput)."""

    a: Any = None
    b: Any = None

    def __post_init__(self) -> None:
        self.update({name: value for name, value in vars(self).items() if value is not None})


class Heads(nn.Module):
    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.first, self.pack = nn.Conv2d(3, C, 1), pack
        self.a, self.b = nn.Conv2d(C, 4, 1), nn.Conv2d(C, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        return self.pack(self.a(x), self.b(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tail = nn.Conv2d(3, C, 1), nn.Linear(5, C), nn.Conv2d(C, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.tail(self.a(x).relu() * self.b(y)[:, :, None, None])


class Passing(nn.Module):
    """An inner module that returns a structure of wide values."""

    def __init__(self, pack: Any, use: Any) -> None:
        super().__init__()
        self.inner, self.use = Heads(pack), use
        self.tail = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.use(self.inner(x)))


class Embedded(nn.Module):
    def __init__(self, table: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.tail = table or nn.Embedding(5, C), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.tail(x.mean(1) if x.dim() == 3 else x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(x)


class SizeDependent(nn.Module):
    """Control flow on a resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) if x.shape[-1] > 9 else self.f(x).relu()


IMAGE = ((3, 8, 8),)
OTHER = ((3, 10, 6),)

WHOLE_ROWS = [
    whole("output-tuple", lambda: Heads(lambda a, b: (a, b)), IMAGE, OTHER),
    whole("output-list", lambda: Heads(lambda a, b: [a, b]), IMAGE, OTHER),
    whole("output-dict", lambda: Heads(lambda a, b: {"a": a, "b": b}), IMAGE, OTHER),
    whole("output-nested", lambda: Heads(lambda a, b: {"x": (a, [b, a])}), IMAGE, OTHER),
    whole("output-OrderedDict", lambda: Heads(lambda a, b: OrderedDict(a=a, b=b)), IMAGE, OTHER),
    whole("output-NamedTuple", lambda: Heads(lambda a, b: Named(a, b)), IMAGE, OTHER),
    whole("output-dataclass", lambda: Heads(lambda a, b: Output(a, b)), IMAGE, OTHER),
    whole("output-wide", lambda: Heads(lambda a, b: (a, b.relu(), b.mean(1))), IMAGE, OTHER),
    whole("inputs-two", Two, ((3, 8, 8), (5,)), ((3, 6, 4), (5,)), expect="wide"),
    whole("inner-tuple", lambda: Passing(lambda a, b: (a, b), lambda o: o[0]), IMAGE, OTHER, expect="wide"),
    whole("inner-dict", lambda: Passing(lambda a, b: {"a": a}, lambda o: o["a"]), IMAGE, OTHER, expect="wide"),
    whole("inner-list", lambda: Passing(lambda a, b: [a, b], lambda o: o[-2]), IMAGE, OTHER, expect="wide"),
    whole("inner-OrderedDict", lambda: Passing(lambda a, b: OrderedDict(a=a, b=b), lambda o: o["a"]), IMAGE, OTHER,
          expect="wide"),
    whole("inner-NamedTuple", lambda: Passing(lambda a, b: Named(a, b), lambda o: o.a), IMAGE, OTHER, expect="wide"),
    whole("inner-dataclass", lambda: Passing(lambda a, b: Output(a, b), lambda o: o.a), IMAGE, OTHER, expect="wide"),
    whole("embedding", Embedded, ((7,),), ((4,),), expect="wide", kind="int"),
    whole("output-dict-dataclass", lambda: Heads(lambda a, b: Record(a, b)), IMAGE, OTHER),
    whole("output-dict-dataclass-wide", lambda: Heads(lambda a, b: Record(a, b.relu())), IMAGE, OTHER),
    whole("inner-dict-dataclass", lambda: Passing(lambda a, b: Record(a), lambda o: o.a + o["a"]), IMAGE, OTHER,
          expect="wide"),
    op("fft2", lambda x, m: torch.fft.fft2(x).real),
    op("fft2-channels", lambda x, m: torch.fft.fft2(x, dim=(1, 2)).real, "a transform"),
    op("fftn-last", lambda x, m: torch.fft.ifftn(torch.fft.fftn(x, dim=(3, 2)), s=x.shape[2:]).real),
    op("fftn-all", lambda x, m: torch.fft.fftn(x).imag, "a transform"),
    op("rfft", lambda x, m: torch.fft.irfft(torch.fft.rfft(x) * 2, n=x.shape[-1])),
    op("rfft2", lambda x, m: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho"), s=x.shape[-2:], norm="ortho")),
    op("fft-channels", lambda x, m: torch.fft.fft(x, dim=1).real, "a transform"),
    op("sort", lambda x, m: torch.sort(x, 2)[0]),
    op("sort-method", lambda x, m: x.sort(dim=-1, descending=True).values),
    op("sort-channels", lambda x, m: torch.sort(x, 1)[0], "positions"),
    op("kthvalue", lambda x, m: torch.kthvalue(x, 2, 2)[0].unsqueeze(2)),
    op("kthvalue-keepdim", lambda x, m: x.kthvalue(2, dim=3, keepdim=True).values),
    op("kthvalue-channels", lambda x, m: torch.kthvalue(x, 2, 1, keepdim=True)[0], "positions"),
    op("topk", lambda x, m: x.topk(2, 2)[0]),
    op("topk-channels", lambda x, m: x.topk(2, 1)[0], "positions"),
    op("cummax", lambda x, m: torch.cummax(x, 3).values),
    op("finfo", lambda x, m: x.masked_fill(x.mean(1, True) > 0.2, torch.finfo(x.dtype).min).clamp(-9, 9)),
    op("as_tensor", lambda x, m: torch.as_tensor(m.f(x)) + torch.as_tensor(x.shape[1], dtype=x.dtype),
       f=lambda: nn.Conv2d(C, C, 1)),
    op("tensor-of-a-size", lambda x, m: x / torch.sqrt(torch.tensor(x.shape[1] * 3, dtype=x.dtype))),
    tokens("cdist", lambda x, m: torch.cdist(x, x) @ x, "no rule"),
    tokens("inverse",
           lambda x, m: torch.linalg.inv(x.transpose(1, 2) @ x + torch.eye(C, dtype=x.dtype)) + x.mean(1, True), ""),
    around("drop-path", lambda: DropPath(0.3)),
    op("random-sizes",
       lambda x, m: x + torch.rand(x.shape, dtype=x.dtype) + torch.randn(x.size(0), x.size(1), 1, 1, dtype=x.dtype)),
    op("arange-channels", lambda x, m: x + torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)),
    op("eye", lambda x, m: x.mean((2, 3)) @ torch.eye(x.shape[1], dtype=x.dtype), "reduced", tail="linear"),
    tokens("linspace", lambda x, m: x + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)),
    around("squeeze-excite", lambda: SqueezeExcite(C)),
    around("blur-pool", lambda: BlurPool2d(C)),
    around("leaf-of-sizes", SizeDependent),
    around("autograd-function", Custom, "no rule"),
    op("random-noise", lambda x, m: x + torch.randn_like(x), "random"),
    op("kron", lambda x, m: torch.kron(x, torch.ones(1, 1, 2, 2, dtype=x.dtype)), "no rule"),
]  # fmt: skip

# -- torch's attention and recurrent modules (see test_torch_modules for their options) --------------------------------


def _packed(x: Tensor, m: Any) -> Tensor:
    lengths = x.new_full((x.shape[0],), 4).long()
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    return pad_packed_sequence(m.f(packed)[0], batch_first=True)[0]


MODULE_ROWS = [
    tokens("multihead", lambda x, m: m.f(x, x, x)[0], f=lambda: nn.MultiheadAttention(C, 2, batch_first=True)),
    tokens("multihead-sequence-first", lambda x, m: m.f(x, x, x)[0], f=lambda: nn.MultiheadAttention(C, 4)),
    tokens("multihead-cross", lambda x, m: m.f(x[:, :2], x, x, need_weights=False)[0],
           f=lambda: nn.MultiheadAttention(C, 2, batch_first=True, add_bias_kv=True)),
    tokens("multihead-three", lambda x, m: m.f(x, x.tanh(), x.relu())[0],
           f=lambda: nn.MultiheadAttention(C, 2, batch_first=True)),
    tokens("multihead-three-weights", lambda x, m: m.f(x, x[..., :3], x[..., 2:])[0],
           f=lambda: nn.MultiheadAttention(C, 2, batch_first=True, kdim=3, vdim=6)),
    tokens("lstm", lambda x, m: m.f(x)[0], f=lambda: nn.LSTM(C, 6, 2, batch_first=True, bidirectional=True)),
    tokens("lstm-projected-states", lambda x, m: m.f(x, (m.h, m.c))[0],
           f=lambda: nn.LSTM(C, 6, proj_size=3), h=(1, 6, 3), c=(1, 6, 6), marks=PROJECTED),
    tokens("gru", lambda x, m: m.f(x)[0], f=lambda: nn.GRU(C, 6, 2, batch_first=True, bias=False)),
    tokens("rnn", lambda x, m: m.f(x)[0], f=lambda: nn.RNN(C, 6, nonlinearity="relu")),
    tokens("gru-packed", _packed, f=lambda: nn.GRU(C, 6, batch_first=True)),
    op("lstm_cell", lambda x, m: m.f(x)[0], dims=0, tail="linear", shape=(3,), f=lambda: nn.LSTMCell(C, 6)),
    op("gru_cell", lambda x, m: m.f(x, m.f(x)), dims=0, tail="linear", shape=(3,), f=lambda: nn.GRUCell(C, 6)),
    op("rnn_cell", lambda x, m: m.f(x, m.g(x)), dims=0, tail="linear", shape=(3,), f=lambda: nn.RNNCell(C, 6),
       g=lambda: nn.Linear(C, 6)),
    whole("embedding-bag", lambda: Embedded(nn.EmbeddingBag(5, C)), ((7,),), ((4,),), expect="wide", kind="int"),
]  # fmt: skip

ROWS: list[Row] = [
    *CONV_ROWS, *FUNCTIONAL_ROWS, *NORM_ROWS, *POINTWISE_ROWS, *SPATIAL_ROWS, *MOVEMENT_ROWS, *BROADCAST_ROWS,
    *REDUCTION_ROWS, *PRODUCT_ROWS, *WEIGHT_ROWS, *WHOLE_ROWS, *MODULE_ROWS,
]  # fmt: skip

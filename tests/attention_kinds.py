"""Attention of other kinds: inside windows, over channels, with grouped queries, without softmax, on fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attention_networks import Attention, C, parameter
from torch import Tensor, nn

H, W = 4, 6
AREA = 2
"""Side of a window."""


class Windows(nn.Module):
    """Attention inside windows (shifted, or taken from a grid), or along rows and columns."""

    def __init__(self, o: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.view = o["kind"], o["divide"]
        self.attention = Attention(o, {"axial": W}.get(self.kind, AREA * AREA))
        self.columns = Attention({**o, "bias": "none", "rotary": "none"}, H) if self.kind == "axial" else None
        area = torch.zeros(1, H, W, 1)
        for k, (rows, cols) in enumerate([(slice(-1, None), slice(None)), (slice(None), slice(-1, None))], 1):
            area[:, rows, cols] += k
        places = self.partition(area).flatten(1)
        self.register_buffer("mask", places[:, None] != places[:, :, None] if self.kind == "shifted" else None)

    def partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        if self.kind == "grid":
            x = x.view(b, AREA, h // AREA, AREA, w // AREA, c).permute(0, 2, 4, 1, 3, 5)
        elif self.view == "view":
            x = x.reshape(b, h // AREA, AREA, w // AREA, AREA, c).transpose(2, 3)
        else:
            x = x.view(b, h // AREA, AREA, w // AREA, AREA, c).permute(0, 1, 3, 2, 4, 5).contiguous()
        return x.reshape(-1, AREA * AREA, c) if self.kind == "grid" else x.view(-1, AREA * AREA, c) if (
            self.view != "view") else x.flatten(0, 2).flatten(1, 2)  # fmt: skip

    def reverse(self, windows: Tensor, h: int, w: int) -> Tensor:
        c = windows.shape[-1]
        x = windows.view(-1, h // AREA, w // AREA, AREA, AREA, c)
        if self.kind == "grid":
            return x.permute(0, 3, 1, 4, 2, 5).contiguous().view(-1, h, w, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.view(b, H, W, c)
        if self.columns is not None:
            x = x + self.attention(x.reshape(b * H, W, c)).view(b, H, W, c)
            x = self.columns(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, W)).transpose(1, 2)
            return x.reshape(b, n, c)
        if self.kind == "shifted":
            x = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
        windows = self.partition(x)
        hidden = None
        if self.mask is not None:
            hidden = self.mask.repeat(windows.shape[0] // self.mask.shape[0], 1, 1).unsqueeze(1)
        x = self.reverse(self.attention(windows, hidden=hidden), H, W)
        if self.kind == "shifted":
            x = torch.roll(x, shifts=(1, 1), dims=(1, 2))
        return x.view(b, H * W, c)


class Other(nn.Module):
    """Attention over channels, with grouped queries, without softmax, with pooled tokens, of torch."""

    def __init__(self, o: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.h, self.d = o["kind"], o["heads"], C // o["heads"]
        self.g = {"mqa": 1}.get(self.kind, 2)
        if "qa" in self.kind:
            self.q, self.kv = nn.Linear(C, C), nn.Linear(C, 2 * self.g * self.d)
        elif self.kind == "module":
            self.module = nn.MultiheadAttention(C, self.h, batch_first=True)
        elif self.kind in ("restormer", "image"):
            self.qkv = nn.Conv2d(C, 3 * C, 1)
            self.local = nn.Conv2d(3 * C, 3 * C, 3, padding=1, groups=3 * C)
        else:
            self.qkv = nn.Linear(C, 3 * C, bias=False)
        if self.kind == "pooled_all":
            self.pools = nn.ModuleList(nn.Conv2d(self.d, self.d, 3, s, 1, groups=self.d) for s in (1, 2, 2))
            self.norms = nn.ModuleList(nn.LayerNorm(self.d) for _ in range(3))
        self.temperature = nn.Parameter(torch.rand(self.h, 1, 1) + 0.5)
        if self.kind != "module":
            self.out = nn.Linear(C, C)

    def pooled(self, x: Tensor, k: int) -> Tensor:
        b, h, _n, d = x.shape
        x = self.pools[k](x.reshape(b * h, H, W, d).permute(0, 3, 1, 2))
        return self.norms[k](x.reshape(b, h, d, -1).transpose(2, 3))

    def on_image(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.local(self.qkv(x.transpose(1, 2).reshape(b, c, H, W)))
        if self.kind == "restormer":
            q, k, v = (t.reshape(b, self.h, -1, H * W) for t in qkv.chunk(3, dim=1))
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            y = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1) @ v
            return self.out(y.reshape(b, c, n).transpose(1, 2))
        q, k, v = qkv.view(b, self.h, 3 * self.d, n).split(self.d, dim=2)
        y = v @ ((q.transpose(-2, -1) @ k) * self.d**-0.5).softmax(-1).transpose(-2, -1)
        return self.out(y.view(b, c, H, W).flatten(2).transpose(1, 2))

    def grouped(self, x: Tensor) -> Tensor:
        b, n, _c = x.shape
        q = self.q(x).view(b, n, self.h, self.d).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.g, self.d).permute(2, 0, 3, 1, 4)
        if self.kind == "gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        if self.kind == "gqa_repeat":
            k = k.repeat_interleave(self.h // self.g, dim=1)
            v = v[:, :, None].expand(-1, -1, self.h // self.g, -1, -1).reshape(b, self.h, n, self.d)
        return ((q @ k.transpose(2, 3)) / self.d**0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        kind, (b, n, c) = self.kind, x.shape
        if kind == "module":
            return self.module(x, x, x, need_weights=False)[0]
        if kind in ("restormer", "image"):
            return self.on_image(x)
        if "qa" in kind:
            return self.out(self.grouped(x))
        qkv = self.qkv(x).reshape(b, n, 3, self.h, c // self.h)
        if kind == "xcit":
            q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
            weight = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
            return self.out((weight.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if kind == "davit":
            weight = (q * n**-0.5).transpose(-1, -2) @ k
            y = (weight.softmax(dim=-1) @ v.transpose(-1, -2)).transpose(-1, -2)
        elif kind == "linear_softmax":
            y = torch.einsum("bhnd,bhde->bhne", q.softmax(-1), torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v))
        elif kind == "linear_relu":
            q, k = F.relu(q) + 0.1, F.relu(k) + 0.1
            y = F.pad(v, (0, 1), value=1.0)
            y = torch.matmul(q, k.transpose(-1, -2) @ y)
            y = y[..., :-1] / (y[..., -1:] + 1e-6)
        else:
            q, k, v = (self.pooled(t, i) for i, t in enumerate((q, k, v)))
            y = F.scaled_dot_product_attention(q, k, v) + q
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class Few(nn.Module):
    """Keys and values from fewer tokens: a strided convolution of them, or learned latents in between."""

    def __init__(self, o: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(o, H * W)
        self.latents = parameter(1, 5, C) if o["kind"] == "latents" else None
        self.fewer = nn.Conv2d(C, C, 2, stride=2) if self.latents is None else None
        self.norm = nn.LayerNorm(C)
        self.read = Attention(o, 5) if self.latents is not None else None

    def forward(self, x: Tensor) -> Tensor:
        b, _n, c = x.shape
        if self.latents is not None:
            latents = self.read(self.latents.expand(b, -1, -1), self.norm(x))
            return self.attention(x, latents)
        few = self.fewer(x.permute(0, 2, 1).reshape(b, c, H, W)).reshape(b, c, -1).permute(0, 2, 1)
        return self.attention(x, self.norm(few))

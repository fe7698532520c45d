"""Small transformers drawn at random, from the many ways in which people write attention.

A ``Recipe`` (attention_blocks.py) is a choice for every ingredient; ``build()`` makes the network, ``sample()`` its
inputs. Here is attention between tokens; other kinds (windows, channels, latents, ...) are in attention_kinds.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 24
HEADS = (2, 3, 6, 1)
FUSED = ("five", "indexed", "chunk", "split", "heads_first", "part_sizes", "in_proj", "cat_bias", "narrow",
         "heads_three", "three_last")  # fmt: skip
CROSS = ("separate", "kv", "rows", "einsum")

CHOICES: dict[str, tuple[Any, ...]] = {
    "heads": HEADS,
    "project": (*FUSED, *CROSS),
    "divide": ("reshape", "view", "unflatten", "unflatten_rest", "stack", "tokens_last", "width_first"),
    "norm": ("none", "none", "layer", "rms", "l2", "l2_by_hand", "rms_by_hand", "full"),
    "rotary": ("none", "none", "half", "pairs", "rotate_pairs", "computed", "half_of_them", "complex"),
    "scale": ("default", "constant", "size", "temperature", "heads_scale"),
    "bias": ("none", "none", "table", "parameter", "mlp", "alibi", "levit", "embedding", "padded", "decomposed", "shaw",
             "lepe"),
    "causal": ("none", "none", "none", "flag", "created"),
    "product": ("sdpa", "sdpa", "matmul", "scaled_q", "einsum", "einsum_tokens", "bmm", "baddbmm", "by_hand", "double",
                "sigmoid"),
    "talking": ("none", "none", "none", "linear", "conv", "before", "after"),
    "merge": ("reshape", "view", "flatten", "einsum", "cat"),
    "gate": ("none", "none", "sigmoid", "heads"),
}  # fmt: skip


def parameter(*shape: int, scale: float = 0.5) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * scale)


class Attention(nn.Module):
    """Attention of ``x`` to itself or to ``context``, [B, N, C]; ``hidden`` is true for tokens that are not seen."""

    def __init__(self, o: Mapping[str, Any], n: int, prefix: int = 0) -> None:
        super().__init__()
        self.o, self.h, self.d, self.n, self.prefix = o, o["heads"], C // o["heads"], n, prefix
        self._projections()
        self._extras()
        self._biases()
        if o["merge"] != "einsum":
            self.out = nn.Linear(C, C)

    def _projections(self) -> None:
        how, h, d = self.o["project"], self.h, self.d
        if how == "in_proj":
            self.in_weight, self.in_bias = parameter(3 * C, C, scale=0.2), parameter(3 * C)
        elif how == "rows":
            self.wq, self.wk, self.wv = (parameter(C, C, scale=0.2) for _ in range(3))
        elif how == "einsum":
            self.wq, self.wk, self.wv = (parameter(C, h, d, scale=0.2) for _ in range(3))
        elif how == "cat_bias":
            self.qkv, self.q_bias, self.v_bias = nn.Linear(C, 3 * C, bias=False), parameter(C), parameter(C)
            self.register_buffer("k_bias", torch.zeros(C), persistent=False)
        elif how in ("separate", "kv"):
            self.q, self.kv = nn.Linear(C, C, bias=False), nn.Linear(C, 2 * C)
            if how == "separate":
                self.kv = nn.ModuleList(nn.Linear(C, C) for _ in range(2))  # type: ignore[assignment]
        else:
            self.qkv = nn.Linear(C, 3 * C)
        if self.o["merge"] == "einsum":
            self.wo = parameter(h, d, C, scale=0.2)

    def _extras(self) -> None:
        o, h, d = self.o, self.h, self.d
        full = C if o["norm"] == "full" else d
        if o["norm"] in ("layer", "full"):
            self.q_norm, self.k_norm = nn.LayerNorm(full), nn.LayerNorm(full)
        elif o["norm"] == "rms":
            self.q_norm, self.k_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)  # type: ignore[assignment]
        elif o["norm"] == "rms_by_hand":
            self.g_q, self.g_k = parameter(d), parameter(d)
        if o["scale"] == "temperature":
            self.temperature = nn.Parameter(torch.rand(h, 1, 1) - 1.0)
        elif o["scale"] == "heads_scale":
            self.temperature = nn.Parameter(torch.rand(1, h, 1, 1) * 0.5)
        size = d // 2 if o["rotary"] == "half_of_them" else d
        angle = torch.arange(self.n)[:, None] * torch.rand(max(size // 2, 1)) * 0.5
        if o["rotary"] == "computed":
            self.register_buffer("frequency", angle[1].clone())
        elif o["rotary"] == "complex":
            self.register_buffer("turn", torch.view_as_real(torch.polar(torch.ones_like(angle), angle)))
        elif o["rotary"] != "none":
            full_angle = angle.repeat_interleave(2, -1) if "pairs" in o["rotary"] else torch.cat([angle, angle], -1)
            self.register_buffer("cos", full_angle.cos())
            self.register_buffer("sin", full_angle.sin())
        linear = nn.Linear if o["talking"] == "linear" else lambda a, b: nn.Conv2d(a, b, 1)
        if o["talking"] in ("linear", "conv", "before"):
            self.before = linear(h, h)  # type: ignore[operator]
        if o["talking"] in ("linear", "conv", "after"):
            self.after = linear(h, h)  # type: ignore[operator]
        if o["gate"] != "none":
            self.gate = nn.Linear(C, C if o["gate"] == "sigmoid" else h)

    def _biases(self) -> None:
        how, h, n = self.o["bias"], self.h, self.n
        distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        if how == "parameter":
            self.bias = parameter(h, n, n)
        elif how in ("table", "levit"):
            self.table = parameter(n, h) if how == "table" else parameter(h, n)
        elif how == "padded":
            self.bias = parameter(h, n - self.prefix, n - self.prefix)
        elif how == "embedding":
            self.near = nn.Embedding(n, h)
        elif how == "mlp":
            self.near = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, h, bias=False))  # type: ignore[assignment]
            self.register_buffer("places", torch.randn(n, 2))
        elif how == "alibi":
            self.register_buffer("slopes", -(0.5 ** torch.arange(1, h + 1).view(h, 1, 1)) * distance)
        elif how in ("decomposed", "shaw"):
            self.table = parameter(n, self.d)
        elif how == "lepe":
            self.local = nn.Conv1d(C, C, 3, padding=1, groups=C)
        self.register_buffer("distance", distance, persistent=False)
        self.register_buffer("future", distance.new_ones(n, n, dtype=torch.bool).triu(1), persistent=False)

    # -- queries, keys, values -----------------------------------------------------------------------------------------

    def divide(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, heads, N, C / heads]."""
        b, n, c = x.shape
        how = self.o["divide"]
        if how == "reshape":
            return x.reshape(b, n, self.h, c // self.h).transpose(1, 2)
        if how == "view":
            return x.view(b, -1, self.h, self.d).permute(0, 2, 1, 3)
        if how == "unflatten":
            return x.unflatten(-1, (self.h, self.d)).transpose(1, 2)
        if how == "unflatten_rest":
            return torch.unflatten(x, 2, (self.h, -1)).permute(0, 2, 1, 3).contiguous()
        if how == "width_first":
            return x.reshape(b, n, self.d, self.h).permute(0, 3, 1, 2)
        if how == "stack":
            return torch.stack(x.chunk(self.h, dim=-1), dim=1)
        return x.transpose(1, 2).reshape(b, self.h, self.d, n).transpose(-2, -1)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        how, (b, n, _c), h, d = self.o["project"], x.shape, self.h, self.d
        if how == "einsum":
            q = torch.einsum("bnc,chd->bhnd", x, self.wq)
            k, v = (torch.einsum("b n c, c h d -> b h n d", context, w) for w in (self.wk, self.wv))
            return q, k, v
        if how == "rows":
            return self.divide(x @ self.wq), self.divide(torch.matmul(context, self.wk.t())), self.divide(
                F.linear(context, self.wv)
            )  # fmt: skip
        if how == "separate":
            return self.divide(self.q(x)), self.divide(self.kv[0](context)), self.divide(self.kv[1](context))
        if how == "kv":
            kv = self.kv(context).reshape(b, -1, 2, h, d).permute(2, 0, 3, 1, 4)
            return self.divide(self.q(x)), kv[0], kv[1]
        if how == "in_proj":
            qkv = F.linear(x, self.in_weight, self.in_bias)
        elif how == "cat_bias":
            qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        else:
            qkv = self.qkv(x)
        if how == "five":
            return qkv.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        if how == "indexed":
            qkv = qkv.view(b, n, 3, h, -1).transpose(1, 3)
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if how == "heads_first":
            return qkv.reshape(b, n, h, 3 * d).transpose(1, 2).chunk(3, dim=-1)
        if how == "part_sizes":
            return qkv.view(b, n, h, -1).permute(0, 2, 1, 3).split([d, d, d], dim=3)
        if how == "heads_three":
            return qkv.reshape(b, n, h, 3, d).permute(3, 0, 2, 1, 4).unbind(dim=0)
        if how == "three_last":
            qkv = qkv.view(b, n, h, d, 3).permute(4, 0, 2, 1, 3)
            return qkv[0], qkv[1], qkv[2]
        if how == "narrow":
            return tuple(self.divide(part) for part in (qkv[..., :C], qkv[:, :, C : 2 * C], qkv.narrow(-1, 2 * C, C)))
        parts = qkv.split(C, dim=2) if how == "split" else qkv.chunk(3, dim=-1)
        return tuple(self.divide(part) for part in parts)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        how = self.o["norm"]
        if how in ("layer", "rms"):
            return self.q_norm(q), self.k_norm(k)
        if how == "full":
            heads, n = self.h, q.shape[2]
            q = self.q_norm(q.transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1)).transpose(1, 2)
            k = self.k_norm(k.transpose(1, 2).flatten(2)).reshape(k.shape[0], -1, heads, self.d).transpose(1, 2)
            return q[:, :, :n], k
        if how == "l2":
            return F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if how == "l2_by_hand":
            return q / q.norm(dim=-1, keepdim=True).clamp_min(1e-6), k * (k * k).sum(-1, keepdim=True).rsqrt()
        if how == "rms_by_hand":
            q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * self.g_q
            return q, k / (k.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * (1 + self.g_k)
        return q, k

    def turned(self, x: Tensor) -> Tensor:
        """Rotary position embedding."""
        how, n = self.o["rotary"], x.shape[-2]
        if how == "none":
            return x
        if how == "complex":
            pairs = torch.view_as_complex(x.contiguous().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.view_as_complex(self.turn)[:n]).flatten(3)
        if how == "computed":
            angle = torch.outer(torch.arange(n, device=x.device).to(self.frequency), self.frequency)
            angle = torch.cat((angle, angle), dim=-1)
            cos, sin = angle.cos()[None, None], angle.sin()[None, None]
        else:
            cos, sin = self.cos[:n], self.sin[:n]
        if how == "half_of_them":
            turned, rest = x[..., : self.d // 2], x[..., self.d // 2 :]
            a, b = turned.chunk(2, dim=-1)
            return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], dim=-1)
        if how == "pairs":
            a, b = x[..., ::2], x[..., 1::2]
            cos, sin = cos[..., ::2], sin[..., ::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        if how == "rotate_pairs":
            return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    # -- scores --------------------------------------------------------------------------------------------------------

    def bias_of(self, q: Tensor) -> Tensor | None:
        how, h, n = self.o["bias"], self.h, self.n
        if how == "table":
            return self.table[self.distance.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if how == "levit":
            return self.table[:, self.distance]
        if how == "parameter":
            return self.bias
        if how == "padded":
            return F.pad(self.bias, [self.prefix, 0, self.prefix, 0])
        if how == "embedding":
            return self.near(self.distance).permute(2, 0, 1)[None]
        if how == "mlp":
            table = 4 * torch.sigmoid(self.near(self.places)).view(-1, h)
            return table[self.distance.flatten()].view(n, n, h).permute(2, 0, 1)
        if how == "alibi":
            return self.slopes
        if how == "decomposed":
            return torch.einsum("bhnd,nmd->bhnm", q, self.table[self.distance])
        if how == "shaw":
            return q @ self.table.transpose(0, 1)
        return None

    def scaled(self, q: Tensor) -> tuple[Tensor, float | None]:
        how = self.o["scale"]
        if how == "temperature":
            return q * self.temperature.clamp(max=4.0).exp(), 1.0
        if how == "heads_scale":
            return q * self.temperature, 1.0
        if how == "size":
            return q, 1.0 / math.sqrt(q.size(-1))
        return q, 0.3 if how == "constant" else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        how, bias = self.o["product"], self.bias_of(q)
        q, scale = self.scaled(q)
        masks = [] if hidden is None else [hidden]
        flag = self.o["causal"] == "flag"
        if self.o["causal"] == "created":
            masks.append(~torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril())
        if how == "sdpa":
            flag = flag and bias is None and not masks
            if self.o["causal"] == "flag" and not flag:
                masks.append(self.future)
            add = bias
            for mask in masks:
                add = (~mask if add is None else add.logical_and(~mask) if add.dtype == torch.bool
                       else add.masked_fill(mask, float("-inf")))  # fmt: skip
            return F.scaled_dot_product_attention(q, k, v, attn_mask=add, is_causal=flag, scale=scale)
        scores = self.scores(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if self.o["talking"] in ("linear", "conv", "before"):
            scores = self.mixed(self.before, scores)
        for mask in [*masks, self.future] if flag else masks:
            scores = scores.masked_fill(mask, float("-inf"))
        weight = self.weights(scores)
        if self.o["talking"] in ("linear", "conv", "after"):
            weight = self.mixed(self.after, weight)
        weight = F.dropout(weight, 0.1, self.training)
        if how in ("einsum", "einsum_tokens"):
            return torch.einsum("bhij,bhjd->bhid", weight, v)
        if how in ("bmm", "baddbmm"):
            y = torch.bmm(weight.flatten(0, 1), v.reshape(-1, *v.shape[2:]))
            return y.view(-1, self.h, *y.shape[1:])
        return weight @ v

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        how = self.o["product"]
        if how == "scaled_q":
            return torch.matmul(q * scale, k.transpose(-2, -1))
        if how == "einsum":
            return torch.einsum("b h i d, b h j d -> b h i j", q, k) * scale
        if how == "einsum_tokens":
            return torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2) * scale, k.transpose(1, 2))
        if how in ("bmm", "baddbmm"):
            b, h, n, d = q.shape
            q, k = q.reshape(b * h, n, d), k.reshape(b * h, -1, d).transpose(1, 2)
            if how == "bmm":
                return torch.bmm(q, k).view(b, h, n, -1) * scale
            return torch.baddbmm(q.new_zeros(1, 1, 1), q, k, beta=0.0, alpha=scale).view(b, h, n, k.shape[-1])
        return (q @ k.mT if how == "by_hand" else q @ k.transpose(-2, -1)) * scale

    def weights(self, scores: Tensor) -> Tensor:
        how = self.o["product"]
        if how == "by_hand":
            scores = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
            return scores / scores.sum(dim=-1, keepdim=True)
        if how == "double":
            return F.softmax(scores, dim=-1, dtype=torch.float64).type_as(scores)
        if how == "sigmoid":
            return torch.sigmoid(scores - math.log(scores.shape[-1]))
        return scores.softmax(-1) if how == "matmul" else torch.softmax(scores, dim=-1)

    def mixed(self, layer: nn.Module, scores: Tensor) -> Tensor:
        """Talking heads: every pair of tokens mixes its heads."""
        if self.o["talking"] != "linear":
            return layer(scores)
        return layer(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def merged(self, y: Tensor) -> Tensor:
        """[B, heads, N, C / heads] to [B, N, C], and the last projection."""
        how, (b, h, n, _d) = self.o["merge"], y.shape
        if how == "einsum":
            return torch.einsum("bhnd,hdc->bnc", y, self.wo)
        if how == "view":
            return self.out(y.permute(0, 2, 1, 3).contiguous().view(b, n, -1))
        if how == "flatten":
            return self.out(y.transpose(1, 2).flatten(2))
        if how == "cat":
            return self.out(torch.cat([y[:, k] for k in range(self.h)], dim=-1))
        return self.out(y.transpose(1, 2).reshape(b, n, h * self.d))

    def forward(self, x: Tensor, context: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, x if context is None else context)
        q, k = self.normed(q, k)
        y = self.attend(self.turned(q), self.turned(k), v, hidden)
        if self.o["gate"] == "heads":
            y = y * torch.sigmoid(self.gate(x)).transpose(1, 2).unsqueeze(-1)
        if self.o["bias"] == "lepe":
            y = y + self.divide(self.local(v.transpose(1, 2).flatten(2).transpose(1, 2)).transpose(1, 2))
        y = self.merged(y)
        return y * torch.sigmoid(self.gate(x)) if self.o["gate"] == "sigmoid" else y

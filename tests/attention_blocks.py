"""What stands around the attention of a drawn transformer: windows, channels, latents, tokens, masks, pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attention_networks import CHOICES, CROSS, FUSED, Attention, C, parameter
from hypothesis import strategies as st
from torch import Tensor, nn

H, W = 4, 6
AREA = 2
"""Side of a window."""

AROUND: dict[str, tuple[Any, ...]] = {
    "kind": ("self",) * 6 + ("window", "shifted", "grid", "axial", "xcit", "davit", "restormer", "gqa", "gqa_repeat",
             "mqa", "linear_softmax", "linear_relu", "pooled_kv", "pooled_all", "latents", "image", "module"),
    "stem": ("conv", "conv", "channels_last", "overlapping", "patches", "unfold"),
    "position": ("none", "add", "add", "resampled", "sincos", "embedding", "factorised", "conditional"),
    "tokens": ("none", "class", "class", "registers", "class_behind"),
    "given": ("none", "none", "none", "where", "hidden", "gather", "select", "multiply"),
    "block": ("pre", "pre", "pre_scaled", "post", "rms", "parallel"),
    "mlp": ("gelu", "gelu", "swiglu", "packed", "local"),
    "pool": ("mean", "class", "max", "query", "scores", "mean_patches"),
    "depth": (1, 1, 1, 2),
}  # fmt: skip
WINDOWS = ("window", "shifted", "grid", "axial")
OWN = ("xcit", "davit", "restormer", "gqa", "gqa_repeat", "mqa", "linear_softmax", "linear_relu", "pooled_all",
       "image", "module")  # fmt: skip
PLAIN = {"project": "five", "divide": "reshape", "norm": "none", "rotary": "none", "scale": "default", "bias": "none",
         "causal": "none", "product": "matmul", "talking": "none", "merge": "reshape", "gate": "none"}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A choice for every ingredient; what does not go together has been made plain."""

    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options if v not in ("none", PLAIN.get(k)))

    @property
    def o(self) -> dict[str, Any]:
        return dict(self.options)

    def build(self, seed: int = 0) -> Transformer:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network = Transformer(self.o)
            for p in network.parameters():
                if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                    nn.init.normal_(p, 1.0 if bool(p.flatten()[0] == 1) else 0.0, 0.3)
        return network.double().eval()

    def sample(self, batch: int = 2, seed: int = 1) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 3, 2 * H, 2 * W, generator=g, dtype=torch.float64)
        given = self.o["given"]
        if given == "none":
            return (x,)
        if given == "select":
            return x, torch.randperm(H * W, generator=g)[:7]
        if given == "gather":
            return x, torch.stack([torch.randperm(H * W, generator=g)[:7] for _ in range(batch)])
        hidden = torch.rand(batch, H * W, generator=g) < 0.4
        hidden[:, :2] = False
        return x, hidden


def recipe(**options: Any) -> Recipe:
    """The recipe of these choices; the others are the plainest."""
    plain = {"heads": 3, **PLAIN, **{k: v[0] for k, v in AROUND.items()}}
    return settled({**plain, **options})


def settled(o: Mapping[str, Any]) -> Recipe:
    """Make plain what the other choices leave no room for."""
    o = dict(o)
    kind, fixed = o["kind"], {}
    if kind in OWN:
        fixed.update(PLAIN)
    if kind in ("pooled_kv", "latents"):
        fixed.update(rotary="none", bias="none", causal="none")
        if o["project"] in FUSED:
            fixed["project"] = CROSS[len(o["divide"]) % 2]
    if o["product"] == "sdpa":
        fixed["talking"] = "none"
    if o["causal"] == "flag" and kind in WINDOWS:
        fixed["causal"] = "none"
    if o["product"] == "sdpa" and o["bias"] in ("decomposed", "shaw"):
        fixed["causal"] = "none"
    if kind != "self" or o["given"] in ("gather", "select"):
        fixed["given"] = o["given"] if o["given"] not in ("gather", "select", "hidden") else "none"
        if kind == "self":
            fixed.update(given=o["given"], bias="none", rotary="none", causal="none")
    if kind not in ("self", "xcit", "gqa", "gqa_repeat", "mqa", "module", "linear_softmax", "linear_relu", "latents"):
        fixed["tokens"] = "none"
    if o["position"] == "conditional" or o["mlp"] == "local":
        fixed["tokens"] = "none"
        if fixed.get("given", o["given"]) in ("gather", "select"):
            fixed.update(position="add", mlp="gelu")
    if kind in ("gqa", "gqa_repeat", "mqa"):
        fixed["heads"] = 6
    if fixed.get("tokens", o["tokens"]) not in ("class", "class_behind") and o["pool"] == "class":
        fixed["pool"] = "mean"
    return Recipe(tuple({**o, **fixed}.items()))


@st.composite
def recipes(draw: Any) -> Recipe:
    """Hypothesis strategy of whole networks."""
    return settled({key: draw(st.sampled_from(values)) for key, values in {**AROUND, **CHOICES}.items()})


# -- attention of other kinds ------------------------------------------------------------------------------------------


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


# -- the network -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fc1 = nn.Linear(C, 2 * C if how != "packed" else 4 * C)
        self.gate = nn.Linear(C, 2 * C) if how == "swiglu" else None
        self.local = nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C) if how == "local" else None
        self.fc2 = nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.gate is not None:
            return self.fc2(F.silu(self.gate(x)) * y)
        if self.how == "packed":
            a, b = y.chunk(2, dim=-1)
            return self.fc2(F.gelu(a) * b)
        if self.local is not None:
            y = self.local(y.transpose(1, 2).unflatten(2, (H, W))).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(y))


class Block(nn.Module):
    def __init__(self, o: Mapping[str, Any], n: int, prefix: int) -> None:
        super().__init__()
        self.how = o["block"]
        kind = o["kind"]
        self.attention = (Windows(o) if kind in WINDOWS else Few(o) if kind in ("pooled_kv", "latents")
                          else Other(o) if kind in OWN else Attention(o, n, prefix))  # fmt: skip
        self.takes_mask = kind == "self"
        self.mlp = Mlp(o["mlp"])
        norm = nn.RMSNorm if self.how == "rms" else nn.LayerNorm
        self.norm1, self.norm2 = norm(C), norm(C)
        if self.how == "pre_scaled":
            self.gamma1, self.gamma2 = parameter(C), parameter(1, 1, C)

    def attended(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        return self.attention(x, hidden=hidden) if self.takes_mask else self.attention(x)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        if self.how == "post":
            x = self.norm1(x + self.attended(x, hidden))
            return self.norm2(x + self.mlp(x))
        if self.how == "parallel":
            y = self.norm1(x)
            return x + self.attended(y, hidden) + self.mlp(self.norm2(x))
        if self.how == "pre_scaled":
            x = x + self.gamma1 * self.attended(self.norm1(x), hidden)
            return x + self.mlp(self.norm2(x)).mul(self.gamma2)
        x = x + self.attended(self.norm1(x), hidden)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, o: Mapping[str, Any]) -> None:
        super().__init__()
        self.o, stem = o, o["stem"]
        self.prefix = {"class": 1, "class_behind": 1, "registers": 3}.get(o["tokens"], 0)
        if stem in ("patches", "unfold"):
            self.stem: nn.Module = nn.Linear(12, C)
        else:
            kernel = 3 if stem == "overlapping" else 2
            self.stem = nn.Conv2d(3, C, kernel, stride=2, padding=kernel // 2 if kernel == 3 else 0)
        self._positions(o["position"])
        if self.prefix:
            self.extra = parameter(1, self.prefix, C)
        if o["given"] == "where":
            self.masked = parameter(C)
        n = (7 if o["given"] in ("gather", "select") else H * W) + self.prefix
        self.blocks = nn.ModuleList(Block(o, n, self.prefix) for _ in range(o["depth"]))
        self.norm = nn.LayerNorm(C)
        if o["pool"] == "query":
            self.query, self.kv = parameter(1, 1, C), nn.Linear(C, 2 * C)
        elif o["pool"] == "scores":
            self.kv = nn.Linear(C, 1)
        self.head = nn.Linear(C, 5)

    def _positions(self, how: str) -> None:
        if how in ("add", "sincos"):
            self.position = parameter(1, H * W, C)
            if how == "sincos":
                self.position = nn.Parameter(self.position.sin(), requires_grad=False)
        elif how == "resampled":
            self.position = parameter(1, 4, C)
        elif how == "embedding":
            self.places: nn.Module = nn.Embedding(H * W, C)
        elif how == "factorised":
            self.rows, self.columns = parameter(H, 1, C), parameter(1, W, C)
        elif how == "conditional":
            self.places = nn.Conv2d(C, C, 3, padding=1, groups=C)

    def tokens(self, x: Tensor) -> Tensor:
        how, b = self.o["stem"], x.shape[0]
        if how == "patches":
            x = x.view(b, 3, H, 2, W, 2).permute(0, 2, 4, 3, 5, 1)
            return self.stem(x.reshape(b, H * W, 12))
        if how == "unfold":
            return self.stem(F.unfold(x, 2, stride=2).transpose(1, 2))
        x = self.stem(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2) if how == "channels_last" else x.flatten(2).transpose(1, 2)

    def placed(self, x: Tensor) -> Tensor:
        how = self.o["position"]
        if how in ("add", "sincos"):
            return x + self.position
        if how == "resampled":
            grid = self.position.reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(H, W), mode="bicubic", antialias=True, align_corners=False)
            return x + grid.permute(0, 2, 3, 1).flatten(1, 2)
        if how == "embedding":
            return x + self.places(torch.arange(x.shape[1], device=x.device))
        if how == "factorised":
            return x + (self.rows + self.columns).flatten(0, 1)
        if how == "conditional":
            y = self.places(x.transpose(1, 2).reshape(x.shape[0], -1, H, W))
            return x + y.flatten(2).transpose(1, 2)
        return x

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        how, x = self.o["given"], self.tokens(x)
        hidden = None
        if how == "where":
            x = torch.where(given.unsqueeze(-1), self.masked.view(1, 1, -1), x)
        elif how == "multiply":
            x = x * (~given).unsqueeze(-1).to(x.dtype)
        elif how == "hidden":
            behind = self.o["tokens"] == "class_behind"
            hidden = F.pad(given, (0, self.prefix) if behind else (self.prefix, 0))[:, None, None, :]
        x = self.placed(x)
        if how == "gather":
            x = torch.gather(x, 1, given.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        elif how == "select":
            x = x.index_select(1, given)
        if self.prefix:
            extra = self.extra.expand(x.shape[0], -1, -1)
            x = torch.cat([x, extra] if self.o["tokens"] == "class_behind" else (extra, x), dim=1)
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        how, x = self.o["pool"], self.norm(x)
        if how == "class":
            return x[:, -1] if self.o["tokens"] == "class_behind" else x[:, 0]
        if how == "max":
            return x.amax(dim=1)
        if how == "query":
            k, v = self.kv(x).chunk(2, dim=-1)
            q = self.query.expand(x.shape[0], -1, -1)
            return F.scaled_dot_product_attention(q, k, v).squeeze(1)
        if how == "scores":
            return (F.softmax(self.kv(x), dim=1).transpose(-1, -2) @ x).squeeze(-2)
        return x.mean(1) if how == "mean" else x[:, self.prefix :].mean(dim=1)

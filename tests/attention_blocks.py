"""What stands around the attention of a drawn transformer: tokens, positions, masks, blocks, pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attention_kinds import Few, H, Other, W, Windows
from attention_networks import CHOICES, CROSS, FUSED, Attention, C, parameter
from hypothesis import strategies as st
from torch import Tensor, nn

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

"""Robust vision transformers (RVT): convolutional patch embedding and MLP, no class token, no position embedding.

Source: Mao et al., "Towards Robust Vision Transformer" (CVPR 2022). The variants plus have position-aware attention
scaling, the others not; GPD trains ``rvt_tiny`` with ``rvt_small`` as the static teacher. PyTorch's first values.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, empty, nn
from torch.nn import functional as F

from reparam.distill.models.base import IMAGENET, ImageClassifier

__all__ = ["RobustVisionTransformer"]

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Images ``[N, in_chans, H, W]`` to a map ``[N, dim, H / 16, W / 16]``."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 32, 7, 2, 2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(32, dim, 4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Self-attention over tokens ``[N, L, dim]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        query, key, value = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.mix(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class ScaledAttention(Attention):
    """Attention whose logits are multiplied by a learnt factor in (0, 1) for each head and pair of ``tokens``."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__(dim, heads)
        self.scaling = nn.Parameter(empty(heads, tokens, tokens))
        nn.init.trunc_normal_(self.scaling, std=0.02)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[2] != self.scaling.shape[1]:
            raise ValueError(
                f"position-aware attention scaling was made for {self.scaling.shape[1]} tokens, the image gives "
                f"{query.shape[2]}; build the model with img_size=N for images of N x N"
            )
        logits = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        return (logits * self.scaling.sigmoid()).softmax(-1) @ value


class PlainMlp(nn.Module):
    """Two 1x1 convolutions with bias over a map ``[N, dim, H, W]``: linear layers over the tokens."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU())
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.fc1(x))))


class ConvMlp(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution, each with bias and batch norm, over a map ``[N, dim, H, W]``."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.GELU())
        self.spatial = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden), nn.GELU()
        )
        self.fc2 = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.spatial(self.drop(self.fc1(x)))))


class RVTBlock(nn.Module):
    """Attention and MLP, both behind a layer norm and with a residual: a map ``[N, dim, H, W]``."""

    def __init__(self, dim: int, attention: Attention, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        grid = self.norm2(tokens).transpose(1, 2).unflatten(2, (height, width))
        return tokens.transpose(1, 2).unflatten(2, (height, width)) + self.drop_path(self.mlp(grid))


class RobustVisionTransformer(ImageClassifier):
    """RVT: images ``[N, in_chans, H, W]``, sides of 15 or more, to logits ``[N, num_classes]``.

    Args:
        dims: channels of the stages; between two stages a strided grouped convolution doubles them.
        heads: attention heads of the stages.
        depths: blocks of the stages.
        num_classes: number of logits.
        in_chans: image channels.
        drop_rate: dropout in the MLPs.
        drop_path_rate: block ``k`` of ``n`` is skipped with probability ``drop_path_rate k / n`` in training.
        scaled_blocks: how many blocks at the start have position-aware attention scaling; they belong to the first
            stage, and to images of one size.
        img_size: side, or height and width, of these images.
        conv_mlp: False makes the MLPs two linear layers per token.
    """

    classifier_name = "head"

    def __init__(
        self,
        dims: tuple[int, ...],
        heads: tuple[int, ...],
        depths: tuple[int, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        scaled_blocks: int = 0,
        img_size: int | tuple[int, int] = 224,
        conv_mlp: bool = True,
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.patch_embed = PatchEmbed(in_chans, dims[0])
        rates = iter([drop_path_rate * index / sum(depths) for index in range(sum(depths))])
        self.stages = nn.Sequential()
        self.pools = nn.Sequential()
        for index, (dim, head, depth) in enumerate(zip(dims, heads, depths, strict=True)):
            if index:
                self.pools.append(nn.Conv2d(dims[index - 1], dim, 3, 2, 1, groups=dims[index - 1]))
            blocks = nn.Sequential()
            for block in range(depth):
                scaled = index == 0 and block < scaled_blocks
                attention = ScaledAttention(dim, head, _tokens(img_size)) if scaled else Attention(dim, head)
                mlp = (ConvMlp if conv_mlp else PlainMlp)(dim, 4 * dim, drop_rate)
                blocks.append(RVTBlock(dim, attention, mlp, next(rates)))
            self.stages.append(blocks)
        self.norm = nn.LayerNorm(dims[-1], eps=_EPS)
        self.add_classifier(dims[-1])

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map ``[N, dims[-1], H', W']``: sides of 1/16 of the image, halved per transition."""
        x = self.stages[0](self.patch_embed(x))
        for pool, stage in zip(self.pools, self.stages[1:], strict=True):
            x = stage(pool(x))
        return x

    def forward_neck(self, x: Tensor) -> Tensor:
        """Return the normalised average ``[N, dims[-1]]`` of a feature map."""
        return self.norm(super().forward_neck(x))

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay besides norms and biases: none.

        The authors' list names a position embedding, which the networks do not have.
        """
        return set()


def _tokens(size: int | tuple[int, int]) -> int:
    """Positions of the map that `PatchEmbed` makes of an image."""
    height, width = (size, size) if isinstance(size, int) else size
    return _positions(height) * _positions(width)


def _positions(side: int) -> int:
    after_conv = (side - 3) // 2 + 1
    after_pool = (after_conv - 1) // 2 + 1
    return after_pool // 4


def _config(side: int, fixed: bool = False) -> dict[str, Any]:
    settings = {"pool_size": (side, side), "interpolation": "bicubic", "crop_pct": 0.9, "fixed_input_size": fixed}
    return {**IMAGENET, **settings, "first_conv": "patch_embed.proj.0", "classifier": "head"}


default_cfgs = generate_default_cfgs(
    {
        "rvt_tiny": _config(7),
        "rvt_tiny_plus": _config(7, fixed=True),
        "rvt_small": _config(14),
        "rvt_small_plus": _config(14, fixed=True),
        "rvt_base": _config(14),
    }
)
_TINY: dict[str, Any] = {"dims": (192, 384), "heads": (6, 12), "depths": (10, 2)}
_SMALL: dict[str, Any] = {"dims": (384,), "heads": (6,), "depths": (12,)}
_BASE: dict[str, Any] = {"dims": (768,), "heads": (12,), "depths": (12,), "conv_mlp": False}


@register_model
def rvt_tiny(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-tiny, 10 blocks of 192 and 2 of 384 channels: 8,646,376 parameters for 1000 classes."""
    return _build("rvt_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def rvt_tiny_plus(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-tiny with position-aware attention scaling in 10 blocks: 10,951,336 parameters for 1000 classes."""
    return _build("rvt_tiny_plus", pretrained, **{**_TINY, "scaled_blocks": 10, **kwargs})


@register_model
def rvt_small(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-small, 12 blocks of 384 channels: 22,148,392 parameters for 1000 classes."""
    return _build("rvt_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def rvt_small_plus(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-small with position-aware attention scaling in 5 blocks: 23,300,872 parameters for 1000 classes."""
    return _build("rvt_small_plus", pretrained, **{**_SMALL, "scaled_blocks": 5, **kwargs})


@register_model
def rvt_base(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-base, 12 blocks of 768 channels with linear MLPs: 86,223,784 parameters for 1000 classes.

    The paper's count of 86.2 million is that of linear MLPs; with convolutional ones (``conv_mlp=True``), as in the
    authors' code, there are 86,758,312.
    """
    return _build("rvt_base", pretrained, **{**_BASE, **kwargs})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> RobustVisionTransformer:
    model: RobustVisionTransformer = build_model_with_cfg(RobustVisionTransformer, variant, pretrained, **kwargs)
    return model

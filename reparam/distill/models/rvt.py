"""Robust vision transformers (RVT): convolutional patch embedding and MLP, no class token, no position embedding.

Source: Mao et al., "Towards Robust Vision Transformer" (CVPR 2022), without position-aware attention scaling, as GPD
trains them. PyTorch's first values.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
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
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


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
    """Attention and convolutional MLP, both behind a layer norm and with a residual: a map ``[N, dim, H, W]``."""

    def __init__(self, dim: int, heads: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = ConvMlp(dim, 4 * dim, drop)
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
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.patch_embed = PatchEmbed(in_chans, dims[0])
        rates = iter([drop_path_rate * index / sum(depths) for index in range(sum(depths))])
        self.stages = nn.Sequential()
        self.pools = nn.Sequential()
        for index, (dim, head, depth) in enumerate(zip(dims, heads, depths, strict=True)):
            if index:
                self.pools.append(nn.Conv2d(dims[index - 1], dim, 3, 2, 1, groups=dims[index - 1]))
            self.stages.append(nn.Sequential(*(RVTBlock(dim, head, drop_rate, next(rates)) for _ in range(depth))))
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


def _config(side: int) -> dict[str, Any]:
    settings = {"pool_size": (side, side), "interpolation": "bicubic", "crop_pct": 0.9}
    return {**IMAGENET, **settings, "first_conv": "patch_embed.proj.0", "classifier": "head"}


default_cfgs = generate_default_cfgs({"rvt_tiny": _config(7), "rvt_small": _config(14)})


@register_model
def rvt_tiny(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-tiny, 10 blocks of 192 and 2 of 384 channels: 8,646,376 parameters for 1000 classes."""
    sizes = {"dims": (192, 384), "heads": (6, 12), "depths": (10, 2)}
    return _build("rvt_tiny", pretrained, **{**sizes, **kwargs})


@register_model
def rvt_small(pretrained: bool = False, **kwargs: Any) -> RobustVisionTransformer:
    """RVT-small, 12 blocks of 384 channels: 22,148,392 parameters for 1000 classes."""
    sizes = {"dims": (384,), "heads": (6,), "depths": (12,)}
    return _build("rvt_small", pretrained, **{**sizes, **kwargs})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> RobustVisionTransformer:
    model: RobustVisionTransformer = build_model_with_cfg(RobustVisionTransformer, variant, pretrained, **kwargs)
    return model

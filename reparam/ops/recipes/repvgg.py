"""RepVGG: the kernel, a 1x1 and, where shapes allow, the input itself, each behind a norm.

Source: RepVGG (CVPR 2021).
"""

from __future__ import annotations

from reparam.ops.expressions import Expression, Sum
from reparam.ops.recipes.conditions import three_taps
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site


@recipe("repvgg", fits=three_taps)
def repvgg(site: Site) -> Expression:
    """Return KxK, 1x1 and identity."""
    parts = [site.normed_origin()]
    parts += [site.point("point.weight", strided=True).normed("point.norm", site.start(1.0))]
    if site.keeps_shape:
        parts += [site.identity("identity.weight", strided=True).normed("identity.norm", site.start(1.0))]
    return Sum(tuple(parts))

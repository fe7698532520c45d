"""MobileOne: several kernels of the same size, a 1x1 and, where shapes allow, the input itself, each behind a norm.

Source: MobileOne (CVPR 2023).
"""

from __future__ import annotations

from reparam.errors import InputError
from reparam.ops.expressions import Expression, Sum
from reparam.ops.recipes.conditions import odd_kernel
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site


@recipe("mobileone", fits=odd_kernel)
def mobileone(site: Site, *, branches: int = 4) -> Expression:
    """Return ``branches`` kernels of the full size (the operator's own is one of them), 1x1 and identity."""
    if branches < 1:
        raise InputError(f"mobileone has at least one branch, not {branches}")
    parts = [site.normed_origin()]
    parts += [site.full(f"copy{k}.weight").normed(f"copy{k}.norm", site.start(1.0)) for k in range(1, branches)]
    if max(site.size, default=1) > 1:
        parts += [site.point("point.weight", strided=True).normed("point.norm", site.start(1.0))]
    if site.keeps_shape:
        parts += [site.identity("identity.weight", strided=True).normed("identity.norm", site.start(1.0))]
    return Sum(tuple(parts))

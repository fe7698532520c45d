"""ACB: the kernel and one of a single row per dimension, each behind a norm.

Source: ACNet (ICCV 2019), asymmetric convolution block.
"""

from __future__ import annotations

from reparam.ops.expressions import Expression, Sum
from reparam.ops.recipes.conditions import wide_kernel
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site, Unfit


def _fits(site: Site) -> str:
    several = sum(k > 1 for k in site.size) > 1
    return wide_kernel(site) or ("" if several else "a kernel that is wide in one dimension only")


@recipe("acb", fits=_fits)
def acb(site: Site) -> Expression:
    """Return KxK, 1xK and Kx1; in three dimensions one row along each."""
    if not site.dims:
        raise Unfit("a linear layer; acb writes one row per spatial dimension, and there is none")
    rows = [tuple(k if d == dim else 1 for d, k in enumerate(site.size)) for dim in range(site.dims)]
    parts = [
        site.sized(f"row{dim}.weight", row).normed(f"row{dim}.norm", site.start(1.0)) for dim, row in enumerate(rows)
    ]
    return Sum((site.normed_origin(), *parts))

"""Conditions that recipes share: which operators they are meant for."""

from __future__ import annotations

from reparam.ops.recipes.site import Site


def wide_kernel(site: Site) -> str:
    """Convolutions with an odd kernel of 3 or more taps."""
    if not site.dims or "transpose" in site.operator:
        return f"a {site.operator}; the recipe is for convolutions"
    if max(site.size) < 3:
        return "a kernel of one tap"
    return "an even kernel" if any(k % 2 == 0 for k in site.size) else ""


def three_taps(site: Site) -> str:
    """Convolutions with 3 taps in each dimension."""
    return wide_kernel(site) or ("" if set(site.size) == {3} else "a kernel that is not 3 wide in each dimension")

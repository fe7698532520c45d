"""Conditions that recipes share: which operators they are meant for."""

from __future__ import annotations

from reparam.ops.recipes.site import Site


def odd_kernel(site: Site) -> str:
    """Convolutions with an odd kernel."""
    return _convolution(site) or ("an even kernel" if any(k % 2 == 0 for k in site.size) else "")


def wide_kernel(site: Site) -> str:
    """Convolutions with an odd kernel of 3 or more taps."""
    one = "" if _convolution(site) or max(site.size) >= 3 else "a kernel of one tap"
    return one or odd_kernel(site)


def _convolution(site: Site) -> str:
    plain = site.dims and "transpose" not in site.operator
    return "" if plain else f"a {site.operator}; the recipe is for convolutions"


def three_taps(site: Site) -> str:
    """Convolutions with 3 taps in each dimension."""
    return wide_kernel(site) or ("" if set(site.size) == {3} else "a kernel that is not 3 wide in each dimension")

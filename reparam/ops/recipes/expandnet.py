"""ExpandNets: a layer as three in a row with more channels in between, linear all through.

Source: ExpandNets (NeurIPS 2020): ``"cl"`` puts 1x1 layers in front and behind, ``"ck"`` writes a kernel of 5 or more
taps as a row of kernels with 3. The layer itself stays as a second branch, whose scale starts at 0 from scratch.
"""

from __future__ import annotations

from dataclasses import replace

from reparam.errors import InputError
from reparam.ops.expressions import Expression, Sequence
from reparam.ops.recipes.conditions import wide_kernel
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site, Unfit, linear_


def _fits(site: Site) -> str:
    return wide_kernel(site) or ("groups" if site.groups > 1 else "")


@recipe("expandnet", fits=_fits)
def expandnet(site: Site, *, rate: int = 4, variant: str = "cl") -> Expression:
    """Return the layer, and the same as a row of layers with ``rate`` times the channels in between."""
    if variant not in ("cl", "ck") or rate < 1:
        raise InputError(f"expandnet has rate >= 1 and variant 'cl' or 'ck', not {rate} and {variant!r}")
    wide_in, wide_out = rate * site.inputs, rate * site.outputs
    if variant == "cl":
        first = site.point("row.first", outputs=wide_in, start=linear_)
        row = (
            first
            >> site.full("row.middle", wide_in, wide_out, start=linear_)
            >> site.point("row.last", inputs=wide_out)
        )
    else:
        row = _threes(site, wide_out)
    return site.origin(scale=0.0) + row.scaled("row.scale", site.start(1.0))


def _threes(site: Site, wide: int) -> Expression:
    """Write a kernel of 2n + 1 taps as n kernels of 3; the last has the stride."""
    if len(set(site.size)) != 1 or site.size[0] < 5 or site.size[0] % 2 == 0:
        raise Unfit("variant 'ck' is for square kernels with an odd number of taps from 5 on")
    count = (site.size[0] - 1) // 2
    three = (3,) * site.dims
    parts = []
    for k in range(count):
        inputs = site.inputs if k == 0 else wide
        outputs = site.outputs if k == count - 1 else wide
        start = None if k == count - 1 else linear_
        layer = replace(site.full(f"row.layer{k}", inputs, outputs, start=start), size=three)
        parts.append(layer if k == count - 1 else replace(layer, stride=(1,) * site.dims))
    return Sequence(tuple(parts))

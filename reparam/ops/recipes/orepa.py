"""OREPA: six linear branches with a scale each, one convolution in training.

Source: Online Convolutional Re-parameterization (CVPR 2022), as GPD (ICLR 2025) uses it: no norms in the block, for
convolutions with 3 taps and stride 1. ``pointwise="published"`` is the paper's 1x1 branch, ``"released"`` the
second full kernel that GPD's released code has in its place.
"""

from __future__ import annotations

from reparam.errors import InputError
from reparam.ops.expressions import Expression, Sum
from reparam.ops.recipes.conditions import three_taps
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site, zeros_

_SEPARABLE = 8
"""Depthwise filters per input channel in the separable branch."""


def _fits(site: Site) -> str:
    return three_taps(site) or ("a stride" if set(site.stride) - {1} else "")


@recipe("orepa", fits=_fits)
def orepa(site: Site, *, branches: int = 6, pointwise: str = "published") -> Expression:
    """Return the first ``branches`` of the six branches.

    Origin; 1x1 then average; 1x1 then frequency prior; 1x1 (identity plus residual) then KxK; 1x1; depthwise then 1x1.
    """
    if pointwise not in ("published", "released"):
        raise InputError(f"pointwise must be 'published' or 'released', not {pointwise!r}")
    if not 1 <= branches <= 6:
        raise InputError(f"orepa has 1 to 6 branches, not {branches}")
    published = pointwise == "published"
    point = site.point("point.weight", strided=True) if published else site.full("point.weight")
    entry = site.point("serial.residual", outputs=site.inputs, start=zeros_) + site.identity("serial.identity")
    filters = _SEPARABLE * site.inputs
    depthwise = site.full("separable.depthwise", outputs=filters, depthwise=True)
    parts = [
        site.origin(scale=0.25),
        (site.point("average.point") >> site.average("average.window")).scaled("average.scale", site.start(0.25)),
        # From scratch the prior starts at 0 as well.
        (site.point("frequency.point") >> site.frequency("frequency.prior")).scaled("frequency.scale", 0.0),
        (entry >> site.full("serial.weight")).scaled("serial.scale", site.start(0.5)),
        point.scaled("point.scale", site.start(1.0 if published else 0.05)),
        (depthwise >> site.point("separable.point", inputs=filters)).scaled("separable.scale", site.start(0.5)),
    ]
    return Sum(tuple(parts[:branches]))

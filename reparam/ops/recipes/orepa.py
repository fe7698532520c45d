"""OREPA: six linear branches with a scale each, one convolution in training.

Source: Online Convolutional Re-parameterization (CVPR 2022), as GPD (ICLR 2025) uses it: no norms in the block, for
convolutions with 3 taps and stride 1. ``pointwise="published"`` is the paper's 1x1 branch, ``"released"`` the
second full kernel that GPD's released code has in its place. ``orepa_small`` is a cheaper variant of the same branches.
"""

from __future__ import annotations

from reparam.errors import InputError
from reparam.ops.expressions import Expression, Sum
from reparam.ops.recipes.conditions import three_taps
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site, linear_, zeros_

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
    point: Expression = site.point("point.weight", strided=True) if published else site.full("point.weight")
    entry = site.point("serial.residual", outputs=site.inputs, start=zeros_) + site.identity("serial.identity")
    point = point.scaled("point.scale", site.start(1.0 if published else 0.05))
    filters = _SEPARABLE * site.inputs
    depthwise = site.full("separable.depthwise", outputs=filters, depthwise=True)
    separable = depthwise >> site.point("separable.point", inputs=filters)
    return Sum(blocks(site, entry, site.inputs, point, separable)[:branches])


@recipe("orepa_small", fits=_fits)
def orepa_small(site: Site, *, bottleneck: int = 8) -> Expression:
    """Return six branches like OREPA's for a fraction of their weights and of the work of merging them.

    ``orepa`` has 30 C² weights per 3x3 layer of C channels, 17 of them in its serial and its separable branch, and the
    serial one takes 9 C³ of the multiply-adds of merging. Here the 1x1 in front of the KxK leads to ``C / bottleneck``
    channels, and the separable branch is a 1x1 with one depthwise filter per output behind it: 14.25 C² weights, the
    layer's own 9 C² among them, and 9/8 C³ multiply-adds. Own variant of reparam; docs/benchmarks.md says what it
    costs.
    """
    if bottleneck < 1:
        raise InputError(f"bottleneck is at least 1, not {bottleneck}")
    inner = site.groups * max(1, site.inputs // site.groups // bottleneck)
    entry = site.point("serial.point", outputs=inner, start=linear_)
    point = site.point("point.weight", strided=True).scaled("point.scale", site.start(1.0))
    depthwise = site.full("separable.depthwise", site.outputs, site.outputs, depthwise=True)
    return Sum(blocks(site, entry, inner, point, site.point("separable.point", start=linear_) >> depthwise))


def blocks(
    site: Site, entry: Expression, inner: int, point: Expression, separable: Expression
) -> tuple[Expression, ...]:
    """Return the six branches: ``entry`` to ``inner`` channels leads to the fourth, then come the last two."""
    return (
        site.origin(scale=0.25),
        (site.point("average.point") >> site.average("average.window")).scaled("average.scale", site.start(0.25)),
        # From scratch the prior starts at 0 as well.
        (site.point("frequency.point") >> site.frequency("frequency.prior")).scaled("frequency.scale", 0.0),
        (entry >> site.full("serial.weight", inputs=inner)).scaled("serial.scale", site.start(0.5)),
        point,
        separable.scaled("separable.scale", site.start(0.5)),
    )

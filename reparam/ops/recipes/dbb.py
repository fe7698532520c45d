"""DBB: the kernel, a 1x1, a 1x1 in front of a kernel and a 1x1 in front of average pooling, norms behind each.

Source: Diverse Branch Block (CVPR 2021); depthwise convolutions have no 1x1 branch, pooling without a 1x1, and twice
the channels inside.
"""

from __future__ import annotations

from reparam.ops.expressions import Expression, Sum
from reparam.ops.recipes.conditions import wide_kernel
from reparam.ops.recipes.registry import recipe
from reparam.ops.recipes.site import Site, zeros_


@recipe("dbb", fits=wide_kernel)
def dbb(site: Site) -> Expression:
    """Return the four branches."""
    inner = site.inputs * (2 if site.depthwise else 1)
    entry = site.point("serial.residual", outputs=inner, start=zeros_) + site.identity("serial.identity", inner)
    serial = entry.normed("serial.inner") >> site.full("serial.weight", inputs=inner)
    pooled: Expression = site.average("average.window")
    parts = [site.normed_origin()]
    if site.depthwise and site.inputs == site.outputs:
        pass
    else:
        parts += [site.point("point.weight", strided=True).normed("point.norm", site.start(1.0))]
        pooled = site.point("average.point").normed("average.inner") >> pooled
    parts += [serial.normed("serial.norm", site.start(1.0)), pooled.normed("average.norm", site.start(1.0))]
    return Sum(tuple(parts))

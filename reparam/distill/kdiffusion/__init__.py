"""Kdiffusion: a step of a diffusion from noise to the teacher's feature is learned by each of ``m`` parallel heads.

The heads themselves are a pass over the student, `reparam.passes.heads`, and are merged into one operator behind the
training.

| what | file | public names |
|---|---|---|
| the posterior's coefficients | ``posterior.py`` | ``coefficients``, ``diffusion``, ``Diffusion`` |
| settings, one for each point on which the paper is silent | ``options.py`` | ``Options`` |
| losses as pure functions | ``steps.py`` | ``chain``, ``trace``, ``guided``, ``average``, ``permutation``, ``scaled`` |
| one layer with its connector | ``layer.py`` | ``LayerLoss``, ``check_joinable`` |

Silent points that are no option here: the optimiser belongs to the run; the kind of the heads (convolution or linear)
is that of the operator they replace; where the norm sits behind the merge, and which of the features enters the next
layer (their mean), is up to `reparam.passes.heads`.

Source: Kdiffusion. Its equation 10 gives one expression for two coefficients; `diffusion` has the right ones.
"""

from reparam.distill.kdiffusion.layer import LayerLoss, check_joinable
from reparam.distill.kdiffusion.options import Options
from reparam.distill.kdiffusion.posterior import SCHEDULES, Diffusion, coefficients, diffusion
from reparam.distill.kdiffusion.steps import Scaled, Trace, average, chain, guided, permutation, scaled, trace

__all__ = [
    "SCHEDULES",
    "Diffusion",
    "LayerLoss",
    "Options",
    "Scaled",
    "Trace",
    "average",
    "chain",
    "check_joinable",
    "coefficients",
    "diffusion",
    "guided",
    "permutation",
    "scaled",
    "trace",
]

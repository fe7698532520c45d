"""Branch recipes, one file each. A recipe is an expression in the algebra of kernels."""

from reparam.ops.recipes import acb, dbb, expandnet, mobileone, orepa, repvgg
from reparam.ops.recipes.registry import Recipe, get, names, recipe
from reparam.ops.recipes.site import INITS, Site, Unfit

__all__ = [
    "INITS",
    "Recipe",
    "Site",
    "Unfit",
    "acb",
    "dbb",
    "expandnet",
    "get",
    "mobileone",
    "names",
    "orepa",
    "recipe",
    "repvgg",
]

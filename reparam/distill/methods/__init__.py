"""Training methods: one file each, with a pure step function and an entry in the registry."""

from reparam.distill.methods import baseline, gpd
from reparam.distill.methods.base import Method, Networks, Part, get_method, register

__all__ = ["Method", "Networks", "Part", "baseline", "get_method", "gpd", "register"]

"""reparam: model surgery by structural reparameterization.

Rewrite a network into a larger one that computes exactly the same function, train both with shared parameters, and
take the small one out again.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.deploy.export import export
    from reparam.deploy.parity import ExportReport
    from reparam.ops.recipes import Recipe, recipe
    from reparam.passes.check import Report, check
    from reparam.passes.expand import expand, plan
    from reparam.passes.files import load, save
    from reparam.passes.fold import fold
    from reparam.passes.plan import Plan
    from reparam.passes.tap import tap
    from reparam.passes.view import extract, student_view

__version__ = "0.1.0"

__all__ = [
    "ExportReport",
    "Plan",
    "Recipe",
    "Report",
    "check",
    "expand",
    "export",
    "extract",
    "fold",
    "load",
    "plan",
    "recipe",
    "save",
    "student_view",
    "tap",
]

_HOMES = {
    "ExportReport": "deploy.parity",
    "Plan": "plan",
    "Recipe": "ops.recipes",
    "Report": "check",
    "check": "check",
    "expand": "expand",
    "export": "deploy.export",
    "extract": "view",
    "fold": "fold",
    "load": "files",
    "plan": "expand",
    "recipe": "ops.recipes",
    "save": "files",
    "student_view": "view",
    "tap": "tap",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that ``reparam --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reparam' has no attribute {name!r}")
    home = _HOMES[name] if "." in _HOMES[name] else f"passes.{_HOMES[name]}"
    globals()[name] = value = getattr(import_module(f"reparam.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

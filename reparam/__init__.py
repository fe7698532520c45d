"""reparam: model surgery by structural reparameterization.

Rewrite a network into a larger one that computes exactly the same function, train both with shared parameters, and
take the small one out again.
"""

from reparam.passes.check import Report, check
from reparam.passes.expand import expand, plan
from reparam.passes.files import load, save
from reparam.passes.plan import Plan
from reparam.passes.tap import tap
from reparam.passes.view import extract, student_view

__version__ = "0.1.0"

__all__ = ["Plan", "Report", "check", "expand", "extract", "load", "plan", "save", "student_view", "tap"]

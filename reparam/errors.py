"""Exceptions that reparam raises on bad input.

Every message names the module path, the operator, the reason and the way out, as far as each applies.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReparamError(Exception):
    """Base class of every error that reparam raises itself."""


class InputError(ReparamError, ValueError):
    """An argument of a public function has the wrong value."""


class ModelError(ReparamError, ValueError):
    """The model cannot be handled: wrapped, lazy, quantized, without parameters, or with bad weights."""


class CaptureError(ReparamError, RuntimeError):
    """The forward pass of the model cannot be recorded as a graph."""


class GuardError(ReparamError, AssertionError):
    """A recorded graph runs for a size or an argument that it was not recorded for."""


class VerificationError(ReparamError, RuntimeError):
    """Student and teacher differ at a graph node."""


class KernelError(ReparamError, ValueError):
    """A composition of linear operators that is no single one, or would be wrong at a border."""


class FormatError(ReparamError, ValueError):
    """A file (safetensors, plan JSON, checkpoint) is damaged, of an unknown version, or does not fit."""


class DataError(ReparamError, ValueError):
    """A data set is missing, empty or malformed."""


class TrainingError(ReparamError, RuntimeError):
    """Training cannot go on; the message names epoch and step."""


class StoppedError(TrainingError):
    """Training was asked to stop (SIGTERM) and has saved its state."""


def near_matches(word: str, candidates: Iterable[str], count: int = 5) -> str:
    """Return ``"; did you mean 'a', 'b'?"`` for the candidates that look like ``word``, or an empty string."""
    names = list(dict.fromkeys(candidates))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    close += [name for name in names if word and word in name and name not in close][: count - len(close)]
    return f"; did you mean {', '.join(repr(name) for name in close)}?" if close else ""

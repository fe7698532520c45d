"""Why parts of a model keep their width: a plan's contractions, narrow layers and leaves, grouped and made comparable.

The same reason in forty blocks is one line with a count. So paths lose the folders of this machine, module paths and
other numbers their digits.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from reparam.passes.plan import Plan

LONGEST = 300

_FILE = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:,;'\"()]*\.py\b")
_PATH = re.compile(r"(?<![\w.])(?:(?:[A-Za-z]:)?[/\\]|~/)[^\s:,;'\"()]+")
_DOTTED = re.compile(r"\b[A-Za-z_]\w*(?:\.\w+)+")
_NUMBERED = re.compile(r"(?<=[A-Za-z0-9_])_\d+(?=_|\b)")
_NUMBER = re.compile(r"(?<![\w.:*])\d+(?:\.\d+)?(?![\w.])")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def contractions(plan: Plan, model: nn.Module) -> list[dict[str, Any]]:
    """Return operator, reason and count of everything that runs at the student's width, the most frequent first."""
    modules = dict(model.named_modules())
    return _grouped(
        (_operator(c.operator, modules), reason_text(c.reason), short_source(c.source)) for c in plan.contractions
    )


def narrow_layers(plan: Plan) -> list[dict[str, Any]]:
    """Return how many layers, with how many weight values, keep their width, by reason."""
    layers: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for layer in plan.layers:
        if not layer.widened:
            reason = reason_text(layer.reason)
            layers[reason] += 1
            values[reason] += math.prod(layer.shape)
    return [{"reason": reason, "layers": layers[reason], "values": n} for reason, n in values.most_common()]


def opaque_leaves(plan: Plan, model: nn.Module) -> list[dict[str, Any]]:
    """Return class, reason and count of the modules that were kept whole and made values narrow."""
    contracted = {c.operator for c in plan.contractions}
    modules = dict(model.named_modules())
    found: Counter[tuple[str, str]] = Counter()
    for path, reason in plan.leaves.items():
        if path in contracted:
            found[_operator(path, modules), reason_text(reason)] += 1
    return [{"module": m, "reason": reason, "count": n} for (m, reason), n in found.most_common()]


def reason_text(text: str) -> str:
    """Return a reason without digits of paths and sizes, so that the same one in another block is the same text."""
    text = _ADDRESS.sub("...", short_text(text))
    text = _DOTTED.sub(lambda match: re.sub(r"\.\d+(?=\.|$)", ".*", match[0]), text)
    return _NUMBER.sub("N", _NUMBERED.sub("_*", text))


def short_text(text: str) -> str:
    """Return a message on one line, of bounded length, without the folders of this machine."""
    text = _FILE.sub(lambda match: _relative(match[0]), " ".join(text.split()))
    text = _PATH.sub(_without_folder, text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def short_source(source: str) -> str:
    """Return ``file:line`` with the file relative to the folder that its package lies in."""
    path, colon, line = source.rpartition(":")
    return f"{_relative(path)}:{line}" if colon and line.isdigit() else source


def _relative(path: str) -> str:
    """Return a file relative to the folder that its package lies in; outside all of them, its name."""
    file = Path(path)
    inside = [file.relative_to(root) for root in sys.path if root and file.is_relative_to(root)]
    return min(inside, key=lambda p: len(p.parts), default=Path(file.name)).as_posix()


def _without_folder(match: re.Match[str]) -> str:
    """Return the name of a file of this machine; a text that only looks like a path stays."""
    path = Path(match[0]).expanduser()
    return path.name if path.exists() or (len(path.parts) > 2 and path.parent.exists()) else match[0]


def _operator(name: str, modules: dict[str, Any]) -> str:
    """Return the class of a module that is named by its path, anything else as it is."""
    return type(modules[name]).__name__ if name and name in modules else name


def _grouped(found: Any) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], str] = {}
    for operator, reason, source in found:
        counts[operator, reason] += 1
        places.setdefault((operator, reason), source)
    return [{"operator": o, "reason": r, "count": n, "first": places[o, r]} for (o, r), n in counts.most_common()]

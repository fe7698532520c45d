"""Layers and their ratios: which entry of a mapping decides a layer, and what the layers of a stream agree on."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from reparam.errors import InputError, near_matches
from reparam.passes.capture import Capture
from reparam.passes.ratios import Choice, Ratios
from reparam.passes.skeleton import canonical_names
from reparam.passes.state import Meeting
from reparam.passes.streams import described

_KINDS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase,
          nn.MultiheadAttention)  # fmt: skip


def find_layers(capture: Capture, met: Iterable[str]) -> list[str]:
    """Return the weights that have a ratio, in the model's order.

    Args:
        capture: the recorded student.
        met: the weights that the rules met; those of modules that no rule saw (unused, inside leaves) are added.
    """
    root, names = capture.root, canonical_names(capture.root)
    found = set(met)
    for path, module in root.named_modules():
        inside = any(leaf in ("", path) or path.startswith(f"{leaf}.") for leaf in capture.leaves)
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if parameter.dim() >= 2 and (inside or isinstance(module, _KINDS)):
                found.add(names[name])
    return [name for name, first in names.items() if name == first and name in found]


def resolve(
    ratio: Mapping[str, int], root: nn.Module, layers: Sequence[str], met: Sequence[Meeting], ignored: Collection[str]
) -> Ratios:
    """Decide the ratio of every layer.

    Args:
        ratio: the mapping.
        root: the student.
        layers: all layers.
        met: which layers meet where.
        ignored: parameters that keep their shape.

    Raises:
        InputError: an entry decides no layer, or two entries contradict each other along a stream.
    """
    entries = _assign(ratio, root, layers, ignored)
    choices = {name: Choice(ratio[entry], entry) for name, entry in entries.items()}
    streams = _Streams(choices, layers)
    for meeting in met:
        streams.join(meeting)
    streams.check()
    decided: dict[str, Choice] = {}
    for name in layers:
        leader = None if name in ignored else streams.leader(name)
        follows = Choice() if leader is None else Choice(choices[leader].ratio, None, leader)
        decided[name] = choices.get(name, follows)
    return Ratios(1, decided)


def _assign(
    ratio: Mapping[str, int], root: nn.Module, layers: Sequence[str], ignored: Collection[str]
) -> dict[str, str]:
    """Return which entry decides each layer; every entry must decide one."""
    names = canonical_names(root)
    modules = [path for path, _module in root.named_modules() if path]
    taken: dict[str, str] = {}
    for entry in ratio:
        found = matching(entry, modules, names)
        if not found:
            near = near_matches(entry.removeprefix("re:"), [*modules, *names])
            raise InputError(f"ratio entry {entry!r} matches no module or parameter{near}")
        mine = [name for name in layers if name in found]
        if not mine:
            raise InputError(
                f"ratio entry {entry!r} matches no layer (the weight of a convolution, a linear, an embedding or a "
                f"recurrent layer), only {_some(sorted(found))}; these follow the layers around them, so name those"
            )
        free = [name for name in mine if name not in ignored]
        if not free:
            raise InputError(f"ratio entry {entry!r} matches only layers that ignore=... keeps: {_some(mine)}; drop it")
        free = [name for name in free if name not in taken]
        if not free:
            earlier = dict.fromkeys(taken[name] for name in mine if name in taken)
            raise InputError(
                f"ratio entry {entry!r} decides no layer: the first entry that matches counts, and "
                f"{_some(list(map(repr, earlier)))} stands before it and matches {_some(mine)}; move it to the front"
            )
        taken.update(dict.fromkeys(free, entry))
    return taken


def matching(entry: str, modules: Iterable[str], names: Mapping[str, str]) -> set[str]:
    """Return the parameters that an entry names, by their first names, or by a module above them."""
    if entry.startswith("re:"):
        fits = re.compile(entry.removeprefix("re:")).fullmatch
    else:
        fits = re.compile(fnmatch.translate(entry)).match
    above = tuple(f"{path}." for path in modules if fits(path))
    return {first for name, first in names.items() if name.startswith(above) or fits(name)}


def _some(names: Sequence[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# -- streams -------------------------------------------------------------------------------------------------------


class _Streams:
    """Sets of layers that meet, and the first contradiction between two entries."""

    def __init__(self, choices: Mapping[str, Choice], layers: Sequence[str]) -> None:
        self.choices, self.order = choices, {name: k for k, name in enumerate(layers)}
        self.members: dict[str, list[str]] = {}
        self.contradiction: tuple[str, str, Meeting] | None = None

    def stream(self, name: str) -> list[str]:
        """Return the layers in the stream of ``name``, in the model's order."""
        return sorted(self.members.get(name, [name]), key=lambda n: self.order[n])

    def leader(self, name: str) -> str | None:
        """Return the layer that decides the stream of ``name``: itself, or the first that an entry decides."""
        return next((n for n in [name, *self.stream(name)] if n in self.choices), None)

    def join(self, meeting: Meeting) -> None:
        """Make one stream of two; in the order of the graph, the first contradiction is kept."""
        one, two = (self.members.setdefault(name, [name]) for name in (meeting.first, meeting.second))
        if one is two:
            return
        a, b = self.leader(meeting.first), self.leader(meeting.second)
        if a is not None and b is not None and self.choices[a].ratio != self.choices[b].ratio:
            self.contradiction = self.contradiction or (a, b, meeting)
        one += two
        self.members.update(dict.fromkeys(two, one))

    def check(self) -> None:
        """Refuse a stream in which two entries ask for different ratios."""
        if self.contradiction is None:
            return
        first, second, meeting = self.contradiction
        one, two = self._said(first, meeting.first), self._said(second, meeting.second)
        raise InputError(
            f"the ratios contradict each other: {one} and {two} meet at {described(meeting.node)}, where their values "
            "need equally many replicas. Give the layers of this stream the same ratio: "
            f"{_some(self.stream(first), 12)}"
        )

    def _said(self, leader: str, name: str) -> str:
        said = f"{leader} (entry {self.choices[leader].entry!r}: {self.choices[leader].ratio})"
        return said if name == leader else f"{said}, in whose stream {name} is,"

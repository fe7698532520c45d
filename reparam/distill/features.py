"""Feature maps and embeddings of a network beside its logits, where a method asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reparam.distill.methods.base import Continued, Distiller, Outputs, logits_in
from reparam.errors import InputError
from reparam.passes.grids import Layout, layout_of
from reparam.passes.heads import Heads, head_names
from reparam.passes.stages import Stages, stages
from reparam.passes.tap import tap

_WAY_OUT = "use a method that compares logits, such as kd, dkd or dist"


@dataclass(frozen=True)
class Needs:
    """What a method asks for beside logits.

    Attributes:
        features: whether it asks for feature maps.
        embedding: whether it asks for the vectors that enter the classifier.
        heads: whether it asks for the maps of parallel heads, of networks that have some.
    """

    features: bool = False
    embedding: bool = False
    heads: bool = False

    def stages(self, network: nn.Module, example: Tensor, name: str = "") -> Wanted | None:
        """Find what is asked for in a network; None if that is nothing.

        Args:
            network: a student or a static teacher; of a dynamic teacher the student, whose names it shares.
            example: images ``[N, C, H, W]``.
            name: of the model, for messages.

        Raises:
            InputError: the network has fewer than two feature maps, or no classifier, and the method asks for them.
        """
        if not (self.features or self.embedding or self.heads):
            return None
        found = stages(network, example)
        label = f"{name} ({found.model})" if name and name != found.model else found.model
        if self.features and not found.features:
            raise InputError(
                f"{label}: a method that needs features from a model without any: {found.reason}; {_WAY_OUT}"
            )
        if self.embedding and found.embedding is None:
            raise InputError(
                f"{label}: a method that needs the input of the classifier from a model without one: {found.reason}; "
                f"{_WAY_OUT}"
            )
        return Wanted(found, self.features, self.embedding, _heads_of(network, found) if self.heads else ())


def needs(kind: type[Distiller]) -> Needs:
    """Return what a method asks for beside logits."""
    return Needs(kind.wants_features, kind.wants_embedding, kind.wants_heads)


@dataclass(frozen=True)
class HeadTaps:
    """Where the parallel heads at the end of a stage are.

    Attributes:
        names: what to tap, one per head.
        rows: whether their channels are last, as those of linear layers.
        grid: height and width of the stage.
    """

    names: tuple[str, ...] = ()
    rows: bool = False
    grid: tuple[int, int] = (1, 1)

    def to_map(self, value: Tensor, images: Tensor) -> Tensor:
        """Return the value of a head as ``[N, C, H, W]``, or a vector as it is.

        Raises:
            InputError: it is neither a map nor tokens of a grid, one for each image.
        """
        size = (images.shape[2], images.shape[3])
        layout = Layout("last" if self.rows else "first") if value.dim() in (2, 4) else None
        if value.dim() == 3:
            found = layout_of(tuple(value.shape), size, [self.grid])
            layout = None if found is None else found[0]
        if layout is None or len(value) != len(images):
            raise InputError(
                f"the heads {', '.join(self.names[:1])}, ... return {list(value.shape)} for {len(images)} images, "
                "which is no map for each of them; choose other stages (--head-stages)"
            )
        return value if value.dim() == 2 else layout.to_map(value, size)


def _heads_of(network: nn.Module, found: Stages) -> tuple[HeadTaps, ...]:
    """The heads at the end of each stage."""
    modules = {path: module for path, module in network.named_modules() if isinstance(module, Heads)}
    taps = {
        module.place.stage: (head_names(network)[path], not module.place.geometry["stride"])
        for path, module in modules.items()
    }
    lost = set(taps) - set(found.features)
    if lost:
        raise InputError(
            f"{found.model}: with heads its stage {', '.join(sorted(lost))} is not found again, so they would learn "
            "nothing; name other stages with --head-stages"
        )
    pairs = zip(found.features, found.sizes, strict=True)
    return tuple(HeadTaps(*taps[name], size) if name in taps else HeadTaps() for name, size in pairs)


@dataclass(frozen=True)
class Wanted:
    """What to observe in a network.

    Attributes:
        stages: where it is.
        features: whether to return feature maps.
        embedding: whether to return the input of the classifier.
        heads: of each stage; empty where nobody asked.
    """

    stages: Stages
    features: bool
    embedding: bool
    heads: tuple[HeadTaps, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What to tap."""
        embedding = (self.stages.embedding,) if self.embedding and self.stages.embedding else ()
        heads = tuple(name for taps in self.heads for name in taps.names)
        return (*(self.stages.features if self.features else ()), *embedding, *heads)


class Observed(nn.Module):
    """A network that returns `Outputs`: images ``[N, C, H, W]`` to logits and what else is wanted.

    Where nothing else is wanted this is a plain call. The network is no submodule: its parameters are not listed a
    second time, and its mode is its own.

    Args:
        network: a student, a student's view, a dynamic teacher (with the student's names) or a static teacher. A
            compiled network runs without compilation where something else is wanted.
        wanted: see `Needs.stages`; None for logits alone.
    """

    def __init__(self, network: nn.Module, wanted: Wanted | None = None) -> None:
        super().__init__()
        self.wanted = wanted if wanted is not None and wanted.names else None
        if self.wanted is not None:
            # The hooks of a tap would be compiled in, or be passed over.
            network = getattr(network, "_orig_mod", network)
            network = tap(network, self.wanted.names)
        self._network = (network,)

    def forward(self, images: Tensor) -> Outputs:
        """Run the network."""
        if self.wanted is None:
            return Outputs(logits_in(self._network[0](images)))
        output, values = self._network[0](images)
        found, size = self.wanted.stages, (images.shape[2], images.shape[3])
        features: tuple[Tensor, ...] = ()
        if self.wanted.features:
            pairs = zip(found.features, found.layouts, strict=True)
            features = tuple(layout.to_map(values[name], size) for name, layout in pairs)
        embedding = None
        if self.wanted.embedding and found.embedding is not None:
            embedding = found.embedding_layout.to_vector(values[found.embedding])
        heads = tuple(tuple(taps.to_map(values[name], images) for name in taps.names) for taps in self.wanted.heads)
        return Outputs(logits_in(output), features, embedding, heads)


class _Reached(Exception):
    """The value that was asked for has been computed."""


def continued(network: nn.Module, wanted: Wanted, normalised: Callable[[Tensor], Tensor], example: Tensor) -> Continued:
    """Return what runs a static teacher with another value in the place of one of its features.

    The network runs from its images on and stops at its next feature, so that nothing has to be known about its code.
    No gradient is computed for what lies in front of the feature. As all that it knows of the images comes through
    that feature, one image will do there; where its code asks them for more, as the first run here shows, it gets all.

    Args:
        network: in eval mode, without gradients.
        wanted: its stages.
        normalised: gives images the teacher's normalisation.
        example: images ``[N, C, H, W]``; two at least show whether one image will do.
    """
    return _Continuation(network, wanted, normalised, example)


class _Continuation:
    """See `continued`."""

    def __init__(
        self, network: nn.Module, wanted: Wanted, normalised: Callable[[Tensor], Tensor], example: Tensor
    ) -> None:
        self._network, self._normalised = network, normalised
        self._names, self._layouts = wanted.stages.features, wanted.stages.layouts
        self._calls = dict.fromkeys(self._names, 0)
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name in self._names:
                self._hook(stack, name, lambda *_, name=name: self._calls.update({name: self._calls[name] + 1}))
            known = Observed(network, wanted)(normalised(example))
        values = [*known.features, known.logits]
        self._brief = frozenset(level for level, layout in enumerate(self._layouts) if not layout.prefix)
        self._brief = frozenset(
            level for level in self._brief if self._needs_one(example, level, values[level], values[level + 1])
        )

    def __call__(self, images: Tensor, level: int, value: Tensor) -> Tensor:
        """What the network makes of ``value`` as its feature of that level: its next feature, or its logits."""
        seen = dict.fromkeys(self._names, 0)
        found: list[Tensor] = []

        def last(name: str) -> bool:
            seen[name] += 1
            return seen[name] == self._calls[name]

        def put(_module: nn.Module, _given: Any, output: Tensor) -> Tensor | None:
            if not last(self._names[level]):
                return None
            # A copy, which the network may change in place.
            return self._layouts[level].from_map(value, output).to(output.dtype).clone()

        def take(_module: nn.Module, _given: Any, output: Tensor) -> None:
            if last(self._names[level + 1]):
                found.append(self._layouts[level + 1].to_map(output, (images.shape[2], images.shape[3])).clone())
                raise _Reached

        with contextlib.ExitStack() as stack:
            self._hook(stack, self._names[level], put)
            if level + 1 < len(self._names):
                self._hook(stack, self._names[level + 1], take)
            try:
                return logits_in(self._network(self._normalised(images[:1] if level in self._brief else images)))
            except _Reached:
                return found[0]

    def _hook(self, stack: contextlib.ExitStack, name: str, hook: Callable[..., Any]) -> None:
        stack.callback(self._network.get_submodule(name).register_forward_hook(hook).remove)

    def _needs_one(self, images: Tensor, level: int, value: Tensor, expected: Tensor) -> bool:
        """Whether the network makes the same of a feature when it has seen one image only."""
        try:
            with torch.no_grad():
                found = self(images, level, value)
        except Exception:  # its own code, which counts the images
            return False
        return (
            len(images) > 1 and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
        )


__all__ = ["HeadTaps", "Needs", "Observed", "Wanted", "continued", "needs"]

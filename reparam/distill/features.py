"""Feature maps and embeddings of a network beside its logits, where a method asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from reparam.distill.methods.base import Distiller, Outputs, logits_in
from reparam.errors import InputError
from reparam.passes.stages import Stages, stages
from reparam.passes.tap import tap

_WAY_OUT = "use a method that compares logits, such as kd, dkd or dist"


@dataclass(frozen=True)
class Needs:
    """What a method asks for beside logits.

    Attributes:
        features: whether it asks for feature maps.
        embedding: whether it asks for the vectors that enter the classifier.
    """

    features: bool = False
    embedding: bool = False

    def stages(self, network: nn.Module, example: Tensor, name: str = "") -> Wanted | None:
        """Find what is asked for in a network; None if that is nothing.

        Args:
            network: a student or a static teacher; of a dynamic teacher the student, whose names it shares.
            example: images ``[N, C, H, W]``.
            name: of the model, for messages.

        Raises:
            InputError: the network has fewer than two feature maps, or no classifier, and the method asks for them.
        """
        if not (self.features or self.embedding):
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
        return Wanted(found, self.features, self.embedding)


def needs(kind: type[Distiller]) -> Needs:
    """Return what a method asks for beside logits."""
    return Needs(kind.wants_features, kind.wants_embedding)


@dataclass(frozen=True)
class Wanted:
    """What to observe in a network.

    Attributes:
        stages: where it is.
        features: whether to return feature maps.
        embedding: whether to return the input of the classifier.
    """

    stages: Stages
    features: bool
    embedding: bool

    @property
    def names(self) -> tuple[str, ...]:
        """What to tap."""
        embedding = (self.stages.embedding,) if self.embedding and self.stages.embedding else ()
        return (*(self.stages.features if self.features else ()), *embedding)


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
        return Outputs(logits_in(output), features, embedding)


__all__ = ["Needs", "Observed", "Wanted", "needs"]

"""Which models a coverage run goes through: names, groups, example inputs and builders.

A family is a module of timm. Its smallest network is found by building every candidate on the meta device, with a hook
that gives up as soon as a network has clearly more parameters than the smallest one so far: half a minute for timm's
1,371 names, where building all of them takes two. The answer goes into the result file and is used again from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reparam.errors import InputError, near_matches
from reparam.models import load_model

TIMM, OTHER = "timm", "other"

_TORCHVISION = {
    "classification": "torchvision.models",
    "segmentation": "torchvision.models.segmentation",
    "video": "torchvision.models.video",
    "optical_flow": "torchvision.models.optical_flow",
    "detection": "torchvision.models.detection",
}

GROUPS = (TIMM, *(f"torchvision {kind}" for kind in _TORCHVISION), OTHER)
"""All groups, in the order of the page."""

CHOICES = ("all", TIMM, "torchvision", *_TORCHVISION)
"""What ``--group`` takes."""

_CLIP, _FRAMES = 64, 8
_IMAGE = 128  # side of detection images and of the images of optical flow, which refuses smaller ones
_SMALL = ("test", "nano", "pico", "femto", "atto", "tiny", "xx", "mini", "small", "_s", "_t", "_0", "18", "10")
_SLACK = 1.5


class Entry(NamedTuple):
    """One model of a run.

    Args:
        name: what ``reparam plan`` takes as MODEL.
        group: one of `GROUPS`.
        family: the module of timm that defines it.
        parameters: their number where it is known beforehand, else 0.
        inputs: shapes of the positional inputs, a list of shapes where an input is a list of tensors; empty: the
            library finds an input.
        options: keyword arguments of the builder that differ from its defaults.
    """

    name: str
    group: str
    family: str = ""
    parameters: int = 0
    inputs: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}


def build(entry: Entry) -> nn.Module:
    """Return the network with random weights, in eval mode; nothing is downloaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model libraries
        if entry.group.startswith("torchvision"):
            from torchvision import models

            model: nn.Module = models.get_model(entry.name.rpartition(":")[2], weights=None, **entry.options)
        else:
            _register_own()
            model = load_model(entry.name)
    return model.eval()


def example(entry: Entry, device: str | None = None) -> Any:
    """Return the example input, float32, or None where the library finds one."""

    def tensors(spec: Any) -> Any:
        if isinstance(spec, list):
            return [tensors(item) for item in spec]
        if device == "meta":
            return torch.empty(spec, device="meta")
        return torch.randn(spec, generator=generator)

    generator = torch.Generator().manual_seed(1)
    given: tuple[Tensor | list[Tensor], ...] = tuple(tensors(spec) for spec in entry.inputs)
    return given or None


# timm ----------------------------------------------------------------------------------------------------------------


def families() -> dict[str, list[str]]:
    """Return the names of every family of timm that are not deprecated; networks registered by others are left out."""
    import timm

    found = {}
    for family in timm.list_modules():
        names = [n for n in timm.list_models(module=family) if _is_of_timm(timm.model_entrypoint(n))]
        if names:
            found[family] = names
    return found


def every_timm_model() -> list[Entry]:
    """Return an entry for each of timm's names."""
    return [Entry(name, TIMM, family) for family, names in families().items() for name in names]


def smallest_of_each_family(
    known: Mapping[str, Any] | None = None, tell: Callable[[str], None] = lambda family: None
) -> list[Entry]:
    """Return the network with the fewest parameters of every family.

    Args:
        known: family -> [name, parameters], as an earlier run found them with this version of timm.
        tell: called with the name of a family when the search comes to it.
    """
    if known:
        return [Entry(name, TIMM, family, parameters) for family, (name, parameters) in known.items()]
    entries = []
    for family, names in families().items():
        tell(family)
        entries.append(smallest(family, names))
    return entries


def smallest(family: str, names: Iterable[str]) -> Entry:
    """Return the network with the fewest parameters; the first in the alphabet of several."""
    best: tuple[int, str] | None = None
    for name in sorted(names, key=_promise):
        # Parameters that are replaced while a network is built are counted twice at first, hence the slack.
        count = _parameters(name, _SLACK * best[0] if best else float("inf"))
        if count is not None:
            best = min(best, (count, name)) if best else (count, name)
    assert best is not None
    return Entry(best[1], TIMM, family, best[0])


def _promise(name: str) -> tuple[int, int, str]:
    """Order names so that small networks tend to come first."""
    return -sum(word in name for word in _SMALL), len(name), name


class _TooLargeError(Exception):
    """The network under construction cannot be the smallest."""


def _parameters(name: str, bound: float) -> int | None:
    """Count the parameters of a network, or return None as soon as there are more than ``bound``."""
    seen: dict[int, nn.Parameter] = {}
    total = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if parameter is not None and id(parameter) not in seen:
            seen[id(parameter)] = parameter  # kept alive, so that its id stays its own
            total += parameter.numel()
            if total > bound:
                raise _TooLargeError

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model = build(Entry(name, TIMM))
    except Exception as error:
        if _is_too_large(error):
            return None
        raise
    finally:
        handle.remove()
    return sum(p.numel() for p in model.parameters())


def _is_too_large(error: BaseException | None) -> bool:
    """Whether the hook stopped the construction; `load_model` wraps what a builder raises."""
    return error is not None and (isinstance(error, _TooLargeError) or _is_too_large(error.__cause__))


def _is_of_timm(builder: Callable[..., Any]) -> bool:
    return builder.__module__.startswith("timm.")


def _register_own() -> None:
    """Register the networks of the papers with timm."""
    import reparam.distill.models  # noqa: F401


# torchvision ---------------------------------------------------------------------------------------------------------


def torchvision_models(kinds: Iterable[str] = tuple(_TORCHVISION)) -> list[Entry]:
    """Return an entry for every network of torchvision of these kinds, quantized ones left out."""
    import importlib

    from torchvision import models

    found = []
    for kind in kinds:
        module = importlib.import_module(_TORCHVISION[kind])
        for name in models.list_models(module=module):
            inputs, options = _torchvision_call(kind, name)
            weights = list(models.get_model_weights(name))
            parameters = weights[0].meta.get("num_params", 0) if weights else 0
            spec = f"{_TORCHVISION[kind]}:{name}"
            found.append(Entry(spec, f"torchvision {kind}", "", parameters, inputs, options))
    return found


def _torchvision_call(kind: str, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return input shapes and options of a network: as small as its code and its weights' own description allow."""
    if kind == "segmentation":
        return (), {"weights_backbone": None}
    if kind == "video":
        from torchvision import models

        meta = next(iter(models.get_model_weights(name))).meta
        side = max(_CLIP, *meta.get("min_size", (1, 1)))
        return ((1, 3, max(_FRAMES, meta.get("min_temporal_size", 1)), side, side),), {}
    if kind == "optical_flow":
        return ((1, 3, _IMAGE, _IMAGE), (1, 3, _IMAGE, _IMAGE)), {}
    if kind == "detection":
        # They resize every image; the single shot ones to a fixed size, the others as these options say.
        sizes = {} if name.startswith("ssd") else {"min_size": _IMAGE, "max_size": _IMAGE}
        return ([(3, _IMAGE, _IMAGE)],), {"weights_backbone": None, **sizes}
    if name == "inception_v3":
        return ((1, 3, 299, 299),), {"init_weights": False}  # its auxiliary head needs the size it was made for
    return (), {"init_weights": False} if name == "googlenet" else {}


# Names ---------------------------------------------------------------------------------------------------------------


def named(names: Iterable[str]) -> list[Entry]:
    """Return the entries of models that a user names, each once.

    Raises:
        InputError: no such model; near matches are listed.
    """
    return [_named(name) for name in dict.fromkeys(names)]


def _named(name: str) -> Entry:
    if name.startswith("torchvision.models"):
        known = {entry.name: entry for entry in torchvision_models()}
        short = {entry.name.rpartition(":")[2]: entry for entry in known.values()}
        found = known.get(name) or short.get(name.rpartition(":")[2])
        if found is None:
            raise InputError(f"torchvision has no model {name!r}{near_matches(name, known)}")
        return found
    if ":" in name:
        return Entry(name, OTHER)
    import timm

    _register_own()
    if not timm.is_model(name):
        raise InputError(f"timm {timm.__version__} has no model {name!r}{near_matches(name, timm.list_models())}")
    builder = timm.model_entrypoint(name)
    family = builder.__module__.rpartition(".")[2]
    return Entry(name, TIMM, family) if _is_of_timm(builder) else Entry(name, OTHER, family)


def chosen(group: str) -> list[str]:
    """Return the kinds of torchvision's networks that a ``--group`` stands for."""
    if group in ("all", "torchvision"):
        return list(_TORCHVISION)
    return [group] if group in _TORCHVISION else []

"""Recipes by name: which branches replace an operator, and for which operators they are meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from reparam.errors import InputError, ReparamError, near_matches
from reparam.ops.expressions import Expression
from reparam.ops.recipes.checks import check_expression
from reparam.ops.recipes.site import Site

Build = Callable[..., Expression]
Option = int | float | str | bool


@dataclass(frozen=True)
class _Entry:
    build: Build
    fits: Callable[[Site], str]
    options: Mapping[str, Option]


_RECIPES: dict[str, _Entry] = {}


def recipe(name: str, fits: Callable[[Site], str]) -> Callable[[Build], Build]:
    """Register a recipe under a name.

    The decorated function takes a :class:`~reparam.ops.recipes.site.Site` and keyword options with defaults, and
    returns an expression; it raises :class:`~reparam.ops.recipes.site.Unfit` where there is none.

    Args:
        name: for ``expand(..., branches=name)``; letters, digits, ``-`` and ``_``.
        fits: the recipe's own condition: returns why it is not meant for an operator, an empty string where it is.

    Raises:
        InputError: the name is taken or no name, or an option has no default.

    >>> @reparam.recipe("twice", fits=lambda site: "")           # doctest: +SKIP
    ... def twice(site):
    ...     return site.origin() + site.full("other").scaled("other.scale", site.start(1.0))
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"a recipe's name has letters, digits, '-' and '_' only, not {name!r}")

    def register(build: Build) -> Build:
        known = _RECIPES.get(name)
        same = known is not None and _place(known.build) == _place(build)  # a cell of a notebook, run again
        if known is not None and not same:
            raise InputError(f"there is a recipe {name!r} already")
        options = list(inspect.signature(build).parameters.values())[1:]
        missing = [option.name for option in options if option.default is inspect.Parameter.empty]
        if missing:
            raise InputError(f"recipe {name!r}: option {missing[0]!r} needs a default")
        _RECIPES[name] = _Entry(build, fits, {option.name: option.default for option in options})
        return build

    return register


def _place(build: Build) -> tuple[str, str]:
    return build.__module__, build.__qualname__


@dataclass(frozen=True)
class Recipe:
    """A recipe with its options. Immutable; ``str(recipe)`` is read by :func:`get` again.

    Args:
        name: as registered.
        options: those that differ from the defaults.
    """

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def expression(self, site: Site) -> Expression:
        """Return the branches for an operator.

        Raises:
            Unfit: there are none.
            InputError: the recipe is wrong.
        """
        try:
            found = _RECIPES[self.name].build(site, **self.options)
        except ReparamError:
            raise
        except Exception as error:
            raise InputError(f"recipe {str(self)!r}, layer {site.name}: {type(error).__name__}: {error}") from error
        return check_expression(found, site, str(self))

    def unfit(self, site: Site) -> str:
        """Return why the recipe is not meant for an operator, an empty string where it is."""
        reason = _RECIPES[self.name].fits(site)
        if not isinstance(reason, str):
            raise InputError(
                f"recipe {self.name!r}: fits returned {reason!r} for {site.name}; it returns why the recipe is not "
                "meant for the layer, an empty string where it is"
            )
        return reason


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(_RECIPES)


def get(value: Any) -> Recipe:
    """Return a recipe from its name, with options behind a colon: ``"orepa:branches=4"``.

    Raises:
        InputError: unknown name (near matches are listed) or option, or a value of another type.
    """
    if isinstance(value, Recipe):
        _entry(value.name)
        return value
    if not isinstance(value, str):
        raise InputError(f"a branch recipe is a name or a Recipe, not {type(value).__name__}; there are {_known()}")
    name, _, rest = value.partition(":")
    entry = _entry(name)
    options: dict[str, Option] = {}
    for word in filter(None, rest.split(",")):
        key, equals, text = word.partition("=")
        if not equals or key not in entry.options:
            has = ", ".join(f"{k}={v}" for k, v in entry.options.items()) or "none"
            raise InputError(f"recipe {name!r} has no option {word!r}; its options and their defaults: {has}")
        options[key] = _read(name, key, text, entry.options[key])
    return Recipe(name, options)


def _entry(name: str) -> _Entry:
    if name not in _RECIPES:
        raise InputError(
            f"unknown branch recipe {name!r}{near_matches(name, _RECIPES)}; there are {_known()}. Recipes of your own "
            "are registered with @reparam.recipe before they are used"
        )
    return _RECIPES[name]


def _known() -> str:
    return ", ".join(names())


def _read(recipe_name: str, key: str, text: str, default: Option) -> Option:
    kind = type(default)
    try:
        return {"True": True, "true": True, "False": False, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise InputError(f"recipe {recipe_name!r}: option {key} is of type {kind.__name__}, not {text!r}") from error

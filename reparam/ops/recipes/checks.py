"""What every recipe must keep to: one origin, names of its own for its tensors, channels that fit."""

from __future__ import annotations

from collections.abc import Iterator

from reparam.errors import InputError
from reparam.ops.expressions import Expression, Origin, Sequence, Sum, Weight, Wrapped
from reparam.ops.recipes.site import Site


def check_expression(expression: object, site: Site, recipe: str) -> Expression:
    """Return what a recipe returned, if it can stand in place of an operator.

    Args:
        expression: what it returned.
        site: the operator.
        recipe: its name, for messages.

    Raises:
        InputError: it cannot.
    """
    where = f"recipe {recipe!r}, layer {site.name}"
    if not isinstance(expression, Expression):
        raise InputError(
            f"{where}: it returned {type(expression).__name__}, not operators of the site (site.origin() + ...)"
        )
    for part in _inside(expression):
        if not isinstance(part, Expression):
            raise InputError(f"{where}: {type(part).__name__} stands where an operator of the site is needed")
    origins = sum(isinstance(part, Origin) for part in _inside(expression))
    if origins != 1:
        raise InputError(f"{where}: it uses site.origin() {origins} times; the layer's own weight is used once")
    _check_names([name for name, _slot in expression.slots()], where)
    outputs = _outputs(expression, site.inputs, where)
    if outputs != site.outputs:
        raise InputError(f"{where}: it returns {outputs} channels, the layer has {site.outputs}")
    return expression


def _inside(expression: object) -> Iterator[object]:
    """Yield an expression and all its parts."""
    yield expression
    if isinstance(expression, (Sequence, Sum)):
        for part in expression.parts:
            yield from _inside(part)
    elif isinstance(expression, Wrapped):
        yield from _inside(expression.part)


def _check_names(names: list[str], where: str) -> None:
    """Refuse names that two tensors share, or that cannot be names of tensors."""
    above = {name[:k] for name in names for k, letter in enumerate(name) if letter == "."}
    for name in names:
        if not all(name.split(".")):
            raise InputError(f"{where}: {name!r} is no name for a tensor; names look like 'point.weight'")
        if names.count(name) > 1 or name in above:
            raise InputError(f"{where}: two operators share the name {name!r}; give each a name of its own")


def _outputs(expression: Expression, inputs: int, where: str) -> int:
    """Return the output channels for this many inputs."""
    if isinstance(expression, Weight):
        if expression.inputs != inputs:
            named = expression.name or "site.origin()"
            raise InputError(f"{where}: {named} takes {expression.inputs} channels and gets {inputs}")
        return expression.channels
    if isinstance(expression, Sequence):
        for part in expression.parts:
            inputs = _outputs(part, inputs, where)
        return inputs
    if isinstance(expression, Wrapped):
        return _outputs(expression.part, inputs, where)
    assert isinstance(expression, Sum)
    found = {_outputs(part, inputs, where) for part in expression.parts}
    if len(found) > 1:
        raise InputError(f"{where}: branches of {' and '.join(map(str, sorted(found)))} channels cannot be added")
    return found.pop()

"""YAML without surprises: plain values only, every key once, and numbers that mean what they look like.

PyYAML follows YAML 1.1, in which ``1e-4`` is text, ``010`` is 8, ``no`` is false and ``1:30`` is 90. Here plain values
are read by the core schema of YAML 1.2: ``true`` and ``false``, decimal numbers, ``null``, and text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml  # type: ignore[import-untyped]

from reparam.errors import InputError

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_RESOLVERS = (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+", list("-+0123456789")),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - how PyYAML wants it

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"found a reference *{event.anchor}", event)
        if event.tag not in (None, "!"):
            self._refuse(f"found the tag {event.tag}", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                self._refuse(f"found the key {key!r} a second time", key_node)
            seen.append(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_decimal(self, node: Any) -> int:
        return int(self.construct_scalar(node), 10)

    def _refuse(self, problem: str, place: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


for _tag, _pattern, _firsts in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _firsts)
_Loader.add_constructor(_INT, _Loader.construct_decimal)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_yaml(text: str, where: str) -> Any:
    """Return the mappings, lists, texts, numbers, truth values and nulls that ``text`` holds.

    Args:
        text: one document.
        where: what messages call it.

    Raises:
        InputError: not YAML, several documents, a key that is there twice, a tag (``!!python/...``), or a reference.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            f"{where}{place}: {reason}; a recipe is plain YAML: keys, texts, numbers, true, false, null and lists"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply for a recipe") from error


def write_yaml(content: dict[str, Any]) -> str:
    """Return ``content`` as YAML that `read_yaml` reads back to the same values."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text

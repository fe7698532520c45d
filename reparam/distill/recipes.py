"""Recipes: the settings of published trainings as files, with the numbers that they are said to reach.

A recipe is a YAML file. Those of the package lie in ``recipe_files/<group>/<name>.yaml`` and are called
``<group>/<name>``; files that begin with an underscore are parts that others extend. Defaults of `TrainConfig` < what a
recipe extends < the recipe < what the user says.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reparam.distill.config import TrainConfig, declared
from reparam.distill.plain_yaml import read_yaml, write_yaml
from reparam.distill.ranges import flag
from reparam.distill.values import converted, shown
from reparam.errors import InputError, near_matches

VERSION = 1
FOLDER = Path(__file__).parent / "recipe_files"
_ENDINGS = (".yaml", ".yml")
_KEYS = ("version", "description", "source", "reference", "extends", "needs", "settings")


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, and where they come from.

    Attributes:
        name: ``group/name``, or the path of the user's file.
        description: what is trained, and every choice that the source leaves open.
        source: paper, table and row, or the program whose settings these are.
        reference: published numbers, such as ``top1`` in percent; empty where there are none.
        settings: what differs from the defaults of `TrainConfig`, with what the recipe extends filled in.
        needs: settings that the user has to give, and what they are.
    """

    name: str
    description: str
    source: str
    reference: Mapping[str, Any]
    settings: Mapping[str, Any]
    needs: Mapping[str, str] = field(default_factory=dict)


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    found = (path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))
    return tuple(sorted(name for name in found if not name.rpartition("/")[2].startswith("_")))


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe of the package by its name, or a file that ends in ``.yaml`` or ``.yml`` by its path.

    Raises:
        InputError: unknown name or setting (near matches are listed), another format version, a value of the wrong
            type, a file that is no plain YAML, or recipes that extend each other in a circle.
    """
    path = _find(os.fspath(name_or_path), recipe_names())
    chain = _chain(path)
    top = chain[0]
    settings: dict[str, Any] = {}
    needs: dict[str, Any] = {}
    for entry in reversed(chain):
        settings.update(entry.settings)
        needs.update(entry.needs)
    source = next((entry.source for entry in chain if entry.source), "")
    open_needs = {key: text for key, text in needs.items() if settings.get(key) is None}
    return Recipe(top.name, top.description, source, top.reference, settings, open_needs)


def apply_recipe(recipe: Recipe, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the settings of a run: defaults, then the recipe's, then ``overrides``.

    Args:
        recipe: what `load_recipe` returned.
        overrides: settings by name, with values of their types; those of the recipe do not matter then.

    Raises:
        InputError: an override is unknown or of the wrong type, a setting that the recipe needs is missing, or the
            settings contradict each other.
    """
    given = _checked(dict(overrides or {}), f"recipe {recipe.name}, override")
    missing = {key: text for key, text in recipe.needs.items() if key not in given}
    if missing:
        wanted = "; ".join(f"{flag(key)}: {text}" for key, text in missing.items())
        raise InputError(f"recipe {recipe.name} cannot know some of its settings, add {wanted}")
    return TrainConfig(**{**recipe.settings, **given})


def dump_recipe(config: TrainConfig, description: str) -> str:
    """Return all settings of a run as a recipe file, which `load_recipe` and `apply_recipe` read back as ``config``."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    return write_yaml({"version": VERSION, "description": description, "settings": settings})


# Files ---------------------------------------------------------------------------------------------------------------


def _find(name: str, known: tuple[str, ...], beside: Path | None = None) -> Path:
    """The file of a name; a path is relative to the folder ``beside``, or to the current one."""
    if name.endswith(_ENDINGS):
        path = (beside or Path()) / Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"no such recipe file: {path}")
        return path
    parts = tuple(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/_*.yaml")) if beside else ()
    if name not in (*known, *parts):
        turned = re.sub(r"(\w+)\+gpd", r"gpd+\1", name)  # the papers write DKD+GPD, --method and recipes gpd+dkd
        hint = near_matches(turned, known) or f"; groups: {', '.join(sorted({entry.split('/')[0] for entry in known}))}"
        raise InputError(f"unknown recipe {name!r}{hint} (your own recipe is a file that ends in .yaml)")
    return FOLDER / f"{name}.yaml"


def _chain(path: Path) -> list[Recipe]:
    """The recipe in a file, what it extends, what that extends, and so on."""
    known = recipe_names()
    found: list[Recipe] = []
    paths: list[Path] = []
    while True:
        recipe, parent = _read(path)
        found.append(recipe)
        paths.append(path.resolve())
        if parent is None:
            return found
        path = _find(parent, known, beside=path.parent)
        if path.resolve() in paths:
            names = [entry.name for entry in found[paths.index(path.resolve()) :]]
            raise InputError(f"recipes extend each other in a circle: {' -> '.join([*names, names[0]])}")


def _read(path: Path) -> tuple[Recipe, str | None]:
    """One file, checked, and the name of what it extends."""
    packaged = path.resolve().is_relative_to(FOLDER.resolve())
    name = path.resolve().relative_to(FOLDER.resolve()).with_suffix("").as_posix() if packaged else str(path)
    where = f"recipe {name}"
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where} cannot be read as text: {error}") from error
    content = _mapping(content, where, "the file")
    _check_version(content, where)
    for key in content:
        if key not in _KEYS:
            hint = near_matches(str(key), _KEYS)
            raise InputError(f"{where}: unknown entry {key!r}{hint}; entries: {', '.join(_KEYS)}")
    texts = {key: _text(content.get(key), where, key) for key in ("description", "source", "extends")}
    needs = _mapping(content.get("needs"), where, "needs")
    _check_names(needs, f"{where}, needs")
    needs = {key: _text(value, where, f"needs.{key}") for key, value in needs.items()}
    settings = _checked(_mapping(content.get("settings"), where, "settings"), f"{where}, settings")
    reference = _mapping(content.get("reference"), where, "reference")
    if not texts["description"] and not path.stem.startswith("_"):
        raise InputError(f"{where} has no description; say what it trains, in one line or several")
    recipe = Recipe(name, texts["description"], texts["source"], reference, settings, needs)
    return recipe, texts["extends"] or None


def _check_version(content: Mapping[str, Any], where: str) -> None:
    version = content.get("version")
    if version is None:
        raise InputError(f"{where} does not say which format it has; its first line should be version: {VERSION}")
    if version != VERSION or isinstance(version, bool):
        raise InputError(
            f"{where} was written for another version of reparam: format {version!r}, this one reads {VERSION}; "
            "install that version, or write the settings anew"
        )


def _mapping(value: Any, where: str, what: str) -> dict[str, Any]:
    if value is None and what != "the file":
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {what} must be a mapping (lines of 'key: value'), got {shown(value)}")
    return value


def _text(value: Any, where: str, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {what} must be text, got {shown(value)}; put it in quotes")
    return (value or "").strip()


# Values --------------------------------------------------------------------------------------------------------------


def _check_names(settings: Mapping[Any, Any], where: str) -> None:
    names = [entry.name for entry in dataclasses.fields(TrainConfig)]
    for name in settings:
        if name not in names:
            hint = near_matches(str(name).replace("-", "_"), names)
            raise InputError(f"{where}: no setting {name!r}{hint} (reparam train --help-all lists them)")


def _checked(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings with values of the types that `TrainConfig` declares."""
    _check_names(settings, where)
    return {name: converted(value, declared()[name], f"{where}: {name}") for name, value in settings.items()}

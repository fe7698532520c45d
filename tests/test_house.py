"""The rules of the house that a reader of a single file cannot see: imports, docstrings, sizes, what is shipped."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import reparam

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "reparam"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

ROOMS = {
    "errors": set(),
    "weight_files": {"errors"},
    "models": {"errors", "weight_files"},
    "ops": {"errors"},
    "passes": {"errors", "ops", "weight_files"},
    "distill": {"errors", "ops", "passes", "models", "weight_files", "provenance", ""},
    "coverage": {"errors", "passes", "models", "distill", "provenance", ""},
    "bench": {"errors", "ops", "passes", "models", "distill", "provenance", "arguments", ""},
    "arguments": {"errors", "models", "distill"},
    "deploy": {"errors", "passes", "models", "weight_files", "arguments"},
    "cli": {
        "errors",
        "ops",
        "passes",
        "models",
        "weight_files",
        "distill",
        "coverage",
        "bench",
        "arguments",
        "deploy",
        "",
    },
    "provenance": {""},
    "": {"errors", "ops", "passes", "deploy"},
}
"""What each room may import from the package besides itself; the empty name is the public surface."""

PUBLIC = {"plan", "Plan", "expand", "extract", "student_view", "tap", "check", "save", "load", "export"}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return {"__init__.py": "", "__main__.py": "cli"}.get(first, first.removesuffix(".py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imported(path):
        head, _, rest = name.partition(".")
        if head == "reparam":
            room = rest.partition(".")[0]
            yield line, room if room in ROOMS else ""


# Imports -------------------------------------------------------------------------------------------------------------


def test_every_file_has_a_room() -> None:
    assert {room_of(path) for path in FILES} <= set(ROOMS)
    assert {"cli", "models", "errors", "ops", "passes", "distill"} <= {room_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_one_way(path: Path) -> None:
    allowed = ROOMS[room_of(path)] | {room_of(path)}
    wrong = [f"line {line}: reparam.{room}" for line, room in imported_rooms(path) if room not in allowed]
    assert not wrong


def test_the_import_test_sees_imports() -> None:
    assert {"errors", "weight_files"} <= {room for _, room in imported_rooms(PACKAGE / "cli.py")}


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.name)
def test_ops_know_no_graph(path: Path) -> None:
    assert not [name for _, name in imported(path) if name.startswith("torch.fx")]


def test_the_core_needs_torch_numpy_and_safetensors_only() -> None:
    core = [path for path in FILES if room_of(path) in {"", "errors", "ops", "passes"}]
    heads = {name.partition(".")[0] for path in core for _, name in imported(path)}
    assert not heads & {"timm", "torchvision", "sklearn", "tqdm"} - optional_imports(core)


def optional_imports(paths: list[Path]) -> set[str]:
    """Modules imported inside a ``try`` that catches ImportError, or looked up in ``sys.modules``."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Try):
                inner = [child for statement in node.body for child in ast.walk(statement)]
                found |= {child.module.partition(".")[0] for child in inner
                          if isinstance(child, ast.ImportFrom) and child.module}  # fmt: skip
                found |= {alias.name.partition(".")[0] for child in inner
                          if isinstance(child, ast.Import) for alias in child.names}  # fmt: skip
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_star_imports(path: Path) -> None:
    assert not [name for _, name in imported(path) if name.endswith(".*")]


# Documentation -------------------------------------------------------------------------------------------------------


def test_the_public_surface() -> None:
    assert set(reparam.__all__) >= PUBLIC
    assert set(reparam.__all__) <= set(dir(reparam))


@pytest.mark.parametrize("name", sorted(set(getattr(reparam, "__all__", PUBLIC)) - {"__version__"}))
def test_public_names_are_documented_and_typed(name: str) -> None:
    thing = getattr(reparam, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(entry.annotation is not inspect.Parameter.empty for entry in signature.parameters.values())
    for key, member in vars(thing).items() if inspect.isclass(thing) else []:
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{name}.{key}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_modules_and_public_definitions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]


def test_the_api_page_lists_the_public_surface() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: reparam\.(\w+)$", page, re.MULTILINE)) >= set(reparam.__all__)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_stay_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400


# What is shipped -----------------------------------------------------------------------------------------------------


def test_the_package_is_typed_and_says_so() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert setup()["options.package_data"]["reparam"] == "py.typed"


def test_versions_match() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(\d+\.\d+\.\d+[^\]]*)\]", changelog, re.MULTILINE)
    assert latest is not None
    assert reparam.__version__ == setup()["metadata"]["version"] == latest[1]


def test_the_console_script_is_the_command_line() -> None:
    scripts = setup()["options.entry_points"]["console_scripts"].split("=")
    module, _, function = scripts[1].strip().partition(":")
    assert scripts[0].strip() == "reparam"
    assert callable(getattr(importlib.import_module(module), function))


def test_extras() -> None:
    extras = {name: value.split() for name, value in setup()["options.extras_require"].items()}
    assert set(extras) == {"train", "tensorboard", "export", "test", "dev"}
    assert {"reparam[train]", "reparam[export]"} <= set(extras["test"])
    assert "reparam[test]" in extras["dev"]


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages([str(PACKAGE)], "reparam."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_the_licence_is_the_one_the_metadata_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert setup()["metadata"]["license"] == "Apache-2.0"
    assert "Apache License" in text and "Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text

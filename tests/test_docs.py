"""README and docs: every Python block runs, the set-up stays two lines, the pictures are the script's."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "text", "json"}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """First line and text of every block of a language."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[2] == language]
    return [(text.count("\n", 0, match.start(3)) + 1, match[3]) for match in found]


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_pages_with_code_are_found() -> None:
    assert {page.name for page in PYTHON_PAGES} >= {"README.md", "index.md", "getting-started.md", "concepts.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_a_known_language(page: Path) -> None:
    assert {match[2] for match in BLOCK.finditer(page.read_text(encoding="utf-8"))} <= LANGUAGES


def slender(create: Callable[..., Any]) -> Callable[..., Any]:
    """``timm.create_model`` with a ResNet-18 of the same layers, but an eighth of the channels behind its stem."""

    def made(name: str, **options: Any) -> Any:
        return create(name, **{**({"channels": (8, 16, 32, 64)} if name == "resnet18" else {}), **options})

    return made


@pytest.mark.parametrize("widths", ["slender", pytest.param("full", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(page: Path, widths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if widths == "slender":
        monkeypatch.setattr(timm, "create_model", slender(timm.create_model))
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page.stem.replace("-", "_")}
    for line, source in blocks(page, "python"):
        tree = ast.increment_lineno(ast.parse(source), line - 1)
        exec(compile(tree, str(page), "exec"), namespace)


# The first two commands of the README -------------------------------------------------------------------------------


def test_readme_sets_up_with_two_one_line_commands() -> None:
    (_, first), (_, second), *_ = blocks(ROOT / "README.md", "bash")
    for command in (first, second):
        assert len(command.strip().splitlines()) == 1
        assert command.startswith("python3 -m venv ")
        assert "sudo" not in command
    assert first.strip().endswith('pip install -e ".[train]" && reparam train')
    assert 'pip install -e ".[test]"' in second


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = blocks(ROOT / "README.md", "bash")[1][1].strip().split(" && ")[-1]
    assert f"\nstep {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# Links and pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target


def test_pictures_are_what_the_script_draws() -> None:
    script = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    drawn = {name: str(draw()) for name, draw in script["PICTURES"].items()}
    assert {path.stem for path in (DOCS / "pictures").glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == svg


# The pages against the program ---------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {page.name}" in navigation for page in DOCS.glob("*.md"))

"""What the committed results of ``reparam coverage`` must say.

python tests/test_coverage_results.py --update   # bring tests/contracted.json in line with them
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from reparam.coverage import command
from reparam.coverage.results import EXACT, is_exact, returns

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "coverage.json"
PLANS = RESULT.with_name("coverage_plan_all.json")
UPDATE = "python tests/test_coverage_results.py --update"
CONTRACTED = Path(__file__).parent / "contracted.json"


def committed(path: Path = RESULT) -> dict[str, Any]:
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not there yet; docs/cli.md says how to make it")
    return json.loads(path.read_text())


def contracted(data: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Model -> what it contracts and why, in the order of the alphabet."""
    found = {}
    for row in data["rows"]:
        pairs = sorted({(entry["operator"], entry["reason"]) for entry in row.get("contractions", [])})
        if pairs:
            found[row["name"]] = [{"operator": operator, "reason": reason} for operator, reason in pairs]
    return dict(sorted(found.items()))


def flat(listed: dict[str, list[dict[str, str]]]) -> set[tuple[str, str, str]]:
    return {(name, entry["operator"], entry["reason"]) for name, entries in listed.items() for entry in entries}


def test_nothing_is_contracted_but_what_is_listed() -> None:
    """A shrinking list is progress; a growing one fails here."""
    found, listed = flat(contracted(committed())), flat(json.loads(CONTRACTED.read_text()))
    assert not found - listed, f"a new contraction; if it cannot be helped: {UPDATE}"
    assert not listed - found, f"no longer contracted; remove it from the list: {UPDATE}"


def test_the_page_is_what_the_json_says() -> None:
    committed()
    text = (ROOT / "docs" / "coverage.md").read_text()
    assert text == command.page_of(RESULT), "run the command at the end of docs/coverage.md again: it writes the page"


def test_the_committed_json_holds_no_folder() -> None:
    committed()
    for path in (RESULT, PLANS):
        assert not re.search(r'[" (]/(home|root|usr|work|tmp|opt|Users)/', path.read_text() if path.exists() else "")


def test_every_family_of_timm() -> None:
    found = [row for row in committed()["rows"] if row["group"] == "timm"]
    assert len({row["family"] for row in found}) >= 98
    assert not [row["name"] for row in found if not is_exact(row)]
    assert not [row["name"] for row in found if not returns(row)]
    assert sum(row["coverage"] >= 0.95 for row in found) >= 90
    assert not [row["name"] for row in found if row["coverage"] < 0.6]


def test_the_time_that_the_families_take_on_a_quiet_machine() -> None:
    found = committed(RESULT.with_name("coverage_timm_quiet.json"))["rows"]
    assert len(found) >= 98 and statistics.median(row["seconds"]["expand"] for row in found) <= 3
    assert all(row["seconds"]["expand"] <= 60 for row in found)


@pytest.mark.parametrize(
    ("kind", "number"),
    [("classification", 80), ("segmentation", 6), ("video", 9), ("optical_flow", 2), ("detection", 12)],
)
def test_torchvision(kind: str, number: int) -> None:
    found = [row for row in committed()["rows"] if row["group"] == f"torchvision {kind}"]
    assert len(found) >= number
    assert not [row["name"] for row in found if row["worst_error"] > EXACT]
    assert not [row["name"] for row in found if not returns(row)]


def test_every_name_of_timm_can_be_planned() -> None:
    data = committed(PLANS)
    assert data["plan_only"] and len(data["rows"]) >= 1371
    assert not [(row["name"], row["error"]["message"]) for row in data["rows"] if row["status"] != "ok"]
    assert data["wall_seconds"] < 30 * 60 and data["jobs"] <= 2


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    CONTRACTED.write_text(json.dumps(contracted(json.loads(RESULT.read_text())), indent=1) + "\n")
    print(f"wrote {CONTRACTED}")

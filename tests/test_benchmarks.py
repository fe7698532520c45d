"""The committed measurements: the results page says what they say, and none is over its budget."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.fixture
def results_page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("results_page")


def test_results_page_is_what_the_json_says(results_page):
    text = results_page.PAGE.read_text()
    assert results_page.page(text) == text, "run: python benchmarks/results_page.py"


def test_there_are_results():
    assert {"surgery.json", "random_networks.json"} <= {path.name for path in RESULTS}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_provenance(path):
    data = json.loads(path.read_text())
    assert {"command", "commit", "versions", "device", "date"} <= set(data)
    assert len(data["commit"]) == 40


def test_budgets_of_surgery():
    data = json.loads((BENCHMARKS / "results" / "surgery.json").read_text())
    assert data["model"] == "resnet18" and data["input"][-1] == 224
    assert data["seconds"]["expand"]["median"] <= 2.0
    assert data["large"]["parameters"] >= 1e9
    assert data["large"]["plan_seconds"] <= 30
    assert data["large"]["peak_memory_mib"] < 2048


def test_random_networks_without_mismatch():
    data = json.loads((BENCHMARKS / "results" / "random_networks.json").read_text())
    assert data["networks"] >= 10_000
    assert data["mismatches"] == 0

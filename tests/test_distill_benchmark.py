"""The benchmark that docs/results.md comes from: provenance in its file, no paths of the measuring machine."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
from test_distill_data import write_npz

from reparam.distill.config import TrainConfig

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compare_training.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("compare_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_result_file(tmp_path, benchmark, monkeypatch, capsys):
    spec, result = write_npz(tmp_path / "secret.npz"), tmp_path / "result.json"
    words = [str(SCRIPT), "--data", spec, "--epochs", "1", "--seeds", "3", "--result", str(result)]
    monkeypatch.setattr("sys.argv", words)
    assert benchmark.main() == 0
    content = json.loads(result.read_text())
    assert content["command"] == (
        "python benchmarks/compare_training.py --data npz:PATH --epochs 1 --seeds 3 --result PATH"
    )
    assert {"commit", "date", "device", "versions", "verdict", "config"} <= set(content)
    assert [arm["seeds"] for arm in content["arms"]] == [[3], [3], [3]]
    assert str(tmp_path) not in result.read_text()
    assert "GPD minus the best baseline" in capsys.readouterr().out


def test_the_arms_for_large_gaps(benchmark):
    import evidence

    options = argparse.Namespace(assistant="a", assistant_epochs=3, gap_recipe="cifar100/plain10-plain2-gapkd")
    arms = evidence.gap_arms(TrainConfig(epochs=80), options)
    taught = {arm.name: arm.changes for arm in arms if arm.static}
    assert [arm.name for arm in arms if not arm.static] == ["baseline"] and len(arms) == 11
    weights = {"ce_weight": 3.1028, "alpha": 5.8755, "beta": 9.0903, "distill_warmup": 16, "tau_max": 25.0}
    for name, assistant in (("Gap-KD", "a"), ("Gap-KD, grown assistant", "expand:2"), ("GPD + Gap-KD", "a")):
        assert taught[name] == {
            "method": "gpd+gapkd" if "GPD" in name else "gapkd",
            **weights,
            "assistant": assistant,
            "assistant_epochs": 3,
        }
    on_request = [arm.name for arm in arms[evidence.SUITES["gap"].default_arms :]]
    assert [name for name in taught if "GPD" in name or "weight" in name] == on_request
    lighter = {"ce_weight": 1.0, "alpha": 1.0, "beta": 2.0}
    assert taught["Gap-KD, weights 1 1 2"] == {**taught["Gap-KD"], **lighter}
    for changes in taught.values():
        TrainConfig(**changes, teacher="t", teacher_checkpoint="c")

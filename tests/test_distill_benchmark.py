"""The benchmark that docs/results.md comes from: provenance in its file, no paths of the measuring machine."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_distill_data import write_npz

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

"""End to end on photographs: ResNet-18 and RVT-tiny, the three scenarios, every method, two steps each.

Needs a folder with train/ and val/, one folder of images per class: that named by the environment variable
REPARAM_PHOTOGRAPHS, or ``shared/data/photographs`` beside the repository; skipped without one.
"""

import json
import os
from pathlib import Path

import pytest

from reparam.cli import main
from reparam.distill.methods.base import distillers, get_distiller

BESIDE = Path(__file__).parents[2] / "shared" / "data" / "photographs"
PHOTOGRAPHS = Path(os.environ.get("REPARAM_PHOTOGRAPHS", BESIDE))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_curves"),
    pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs REPARAM_PHOTOGRAPHS, a folder of photographs"),
]

MODELS = ("resnet18", "rvt_tiny")
RECIPES = {
    "resnet18": [],
    "rvt_tiny": "--optimizer adamw --auto-augment rand-m9-mstd0.5-inc1 --erase 0.25".split(),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Links to two training photographs and one for the test of each class."""
    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 2), ("val", 1)):
        for folder in sorted(path for path in (PHOTOGRAPHS / split).iterdir() if path.is_dir()):
            target = root / split / folder.name
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                (target / image.name).symlink_to(image.resolve())
    return root


def train(few, output, model, *words):
    base = ["--data", f"folder:{few}", "--image-size", "64", "--batch-size", "8"]
    line = ["train", *base, "--model", model, *RECIPES.get(model, []), "--fast-dev-run", "--quiet"]
    assert main([*line, "--device", "cpu", "--output", str(output), *words]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["parity_passed"] and summary["steps"] == 2 and summary["data"]["classes"] == 10
    return summary


@pytest.fixture(scope="module")
def static(tmp_path_factory, few):
    """A run that trained the static teacher."""
    output = tmp_path_factory.mktemp("photographs") / "static"
    train(few, output, "resnet10t", "--method", "baseline")
    return ["--teacher", "resnet10t", "--teacher-checkpoint", str(output)]


@pytest.mark.parametrize("model", MODELS)
def test_from_scratch_and_fine_tuned(tmp_path, few, model):
    mixed = ["--mixup", "0.8", "--cutmix", "1.0"] if model == "rvt_tiny" else ["--branches", "acb"]
    summary = train(few, tmp_path / "scratch", model, "--ema", "0.9", *mixed)
    assert summary["teacher_top1"] is not None and summary["student_ema_top1"] is not None
    start = str(tmp_path / "scratch" / "student.safetensors")
    summary = train(few, tmp_path / "tuned", model, "--checkpoint", start, "--lr", "0.001")
    assert summary["teacher_top1"] is not None


def one_teacher():
    return [name for name in distillers() if get_distiller(name).assistants == 0]


CASES = [(model, f"gpd+{name}" if gpd else name) for model in MODELS for name in one_teacher() for gpd in (False, True)]


def _marked(number, model, method):
    """Every twelfth case in every run, with both networks, under GPD and without it; all of them when asked for.

    The default run has every method on folders of drawn images as well (test_scenarios.py).
    """
    turn = (number // 2) % 2
    chosen = ("gpd" in method) == bool(turn) and (model == "resnet18") == bool((number // 4) % 2) and number % 3 == 0
    chosen = chosen and method != "gpd+kdiffusion"  # a minute for one case
    return pytest.param(model, method, marks=() if chosen else pytest.mark.thorough)


@pytest.mark.parametrize(("model", "method"), [_marked(number, *case) for number, case in enumerate(CASES)])
def test_every_method(tmp_path, few, static, model, method):
    summary = train(few, tmp_path / "run", model, "--method", method, *static)
    assert (summary["teacher_top1"] is not None) == method.startswith("gpd")

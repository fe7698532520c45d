"""The options of ``reparam train`` and the settings that they make."""

import argparse

import pytest

from reparam.distill.command import add_arguments, config_from, run
from reparam.distill.config import TrainConfig, options
from reparam.distill.methods import get_method, register
from reparam.errors import InputError


def parser():
    made = argparse.ArgumentParser(prog="reparam train")
    add_arguments(made)
    return made


def test_no_arguments_are_the_defaults():
    assert config_from(parser().parse_args([])) == TrainConfig()


def test_every_setting_has_an_option_with_help():
    text = " ".join(parser().format_help().split())
    for name in options():
        assert "--" + name.replace("_", "-") in text
    assert "(default: 40)" in text and "(default: digits)" in text and "%%" not in text
    for title in ("data:", "student:", "teacher and loss:", "recipe:", "run:", "comparison:"):
        assert title in text


def test_options_reach_the_settings():
    line = "--data npz:x.npz --ratio 3 --lr 0.2 --no-flip --baseline --optimizer adamw --limit-train 50 --quiet"
    config = config_from(parser().parse_args(line.split()))
    assert config == TrainConfig(
        data="npz:x.npz", ratio=3, lr=0.2, flip=False, baseline=True, optimizer="adamw", limit_train=50, quiet=True
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0}, "--ratio must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"lr": -0.1}, "--lr must be positive, got -0.1"),
        ({"lr": float("nan")}, "--lr must be positive, got nan"),
        ({"kd_weight": -1}, "--kd-weight must be at least 0"),
        ({"label_smoothing": 1.0}, r"--label-smoothing must lie in \[0, 1\), got 1.0"),
        ({"optimizer": "lion"}, "--optimizer must be one of sgd, adamw, got 'lion'"),
        ({"warmup_epochs": 40}, "--warmup-epochs 40 leaves nothing of --epochs 40"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)


def test_run_returns_zero_and_writes(tmp_path, capsys):
    line = f"--epochs 1 --limit-train 100 --baseline --output {tmp_path / 'run'}"
    assert run(parser().parse_args(line.split())) == 0
    assert "student (extracted)" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").is_file()


def test_run_compares(tmp_path, capsys):
    line = f"--epochs 1 --limit-train 50 --compare --seeds 4 --output {tmp_path / 'run'}"
    assert run(parser().parse_args(line.split())) == 0
    assert "GPD minus the best baseline" in capsys.readouterr().out


def test_seeds_need_compare():
    with pytest.raises(InputError, match="--seeds belongs to --compare; a single run takes --seed"):
        run(parser().parse_args(["--seeds", "0,1"]))
    with pytest.raises(SystemExit):
        parser().parse_args(["--compare", "--seeds", "a,b"])


def test_registry():
    with pytest.raises(InputError, match=r"unknown method 'gdp'; did you mean 'gpd'\?; known methods: baseline, gpd"):
        get_method("gdp")
    with pytest.raises(InputError, match="a method named 'gpd' is registered already"):
        register(get_method("gpd"))

"""The options of ``reparam train`` and the settings that they make."""

import argparse

import numpy as np
import pytest
from training import facts

from reparam.distill.command import add_arguments, config_from, run
from reparam.distill.config import TrainConfig, options
from reparam.distill.methods import Distiller, distiller, distillers, get_distiller
from reparam.distill.ranges import cut_off
from reparam.distill.report import opening
from reparam.errors import InputError


def parser(everything=False):
    made = argparse.ArgumentParser(prog="reparam train")
    add_arguments(made, everything)
    return made


def flag(name):
    return "--" + name.replace("_", "-")


def test_no_arguments_are_the_defaults():
    assert config_from(parser().parse_args([])) == TrainConfig()


def test_every_setting_has_an_option_with_help():
    text = " ".join(parser(everything=True).format_help().split())
    for name in options():
        assert flag(name) in text.replace(",", " ").split(), name
    assert "(default: 40)" in text and "(default: digits)" in text and "%%" not in text
    for title in ("data:", "student:", "static teacher:", "method:", "recipe:", "computation:", "run:", "comparison:"):
        assert title in text


def test_short_help_leaves_rare_settings_out():
    words = parser().format_help().replace(",", " ").split()
    shown = {name for name in options() if flag(name) in words}
    rare = {name for name, (option, _) in options().items() if option.rare}
    assert not shown & rare and shown | rare == set(options())
    assert 25 <= len(shown) <= 45 and {"data", "model", "method", "teacher", "resume", "ema"} <= shown


def test_help_all_shows_everything_and_leaves(capsys):
    with pytest.raises(SystemExit) as left:
        parser().parse_args(["--help-all"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "--on-nan" in shown and shown.startswith("usage: reparam train")
    assert "--on-nan" not in parser().format_help()


def test_rare_options_work_without_being_shown():
    config = config_from(
        parser().parse_args("--on-nan rollback --save-steps 5 --schedule multistep --milestones 3,6".split())
    )
    assert (config.on_nan, config.save_steps, config.milestones) == ("rollback", 5, (3, 6))


def test_options_reach_the_settings():
    line = "--data npz:x.npz --lr 0.2 --no-flip --method baseline --optimizer adamw --limit-train 50 --quiet"
    config = config_from(parser().parse_args(line.split()))
    assert config == TrainConfig(
        data="npz:x.npz", lr=0.2, flip=False, method="baseline", optimizer="adamw", limit_train=50, quiet=True
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--method baseline --ratio 3", "--ratio would have no effect: --method has no gpd"),
        ("--no-teacher-distill", "--teacher-distill would have no effect: --method has no loss against a static"),
        ("--kd-loss mse --kd-weight 0", "--kd-loss would have no effect: --kd-weight 0 leaves out the loss"),
        ("--kd-loss mse --kd-smoothing 0.2", "--kd-smoothing would have no effect: it belongs to --kd-loss sce"),
        (
            "--student-temperature 4 --assistant-checkpoint a --tau-max 9 --method gapkd --teacher t --assistant a",
            "--tau-max would have no effect: the student has --student-temperature",
        ),
        (
            "--prefactor --beta 0 --method gapkd --teacher t --assistant a",
            "--prefactor would have no effect: --beta 0 leaves",
        ),
        (
            "--assistant-epochs 3 --assistant-checkpoint a --method gapkd --teacher t --assistant a",
            "--assistant-epochs would have no effect: the assistants are trained already",
        ),
        ("--ema-warmup", "--ema-warmup would have no effect: there is no --ema"),
        ("--nesterov --optimizer adamw", "--nesterov would have no effect"),
        ("--milestones 3,6", "--milestones would have no effect"),
        ("--decay-epochs 3", "--decay-epochs would have no effect"),
        ("--min-lr 0.1 --schedule step", "--min-lr would have no effect"),
        ("--epochs 3 --schedule multistep --milestones 1,3", "--milestones .*: the run ends before the last of them"),
        ("--epochs 2 --schedule step --decay-epochs 2", "--decay-epochs .*: the run ends before the first decay"),
        ("--epochs 2 --kd-start-epoch 3", "--kd-start-epoch would have no effect: the run ends before that epoch"),
        ("--method annealing --teacher t --epochs 9 --anneal-epochs 9", "--anneal-epochs .* before its second phase"),
        ("--method kd --teacher t --tau-schedule constant --tau-min 3", "--tau-min .*: a constant temperature stays"),
        ("--method kdiffusion --teacher t --beta 0 --guide-from last", "--guide-from .*: --beta 0 leaves out"),
    ],
)
def test_options_without_effect_are_refused(line, message):
    with pytest.raises(InputError, match=message):
        config_from(parser().parse_args(line.split()))


def test_a_recipe_may_hold_settings_that_another_method_leaves_unused():
    config = config_from(parser().parse_args("--recipe digits/resnet8_w8-gpd --method baseline".split()))
    assert config.baseline


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("--recipe cifar100/resnet20-baseline", None),
        ("--recipe cifar100/resnet20-baseline --epochs 60 --milestones 37,45,52", None),
        ("--recipe cifar100/resnet20-baseline --epochs 60 --schedule cosine", None),
        ("--recipe cifar100/resnet20-baseline --epochs 60", "--milestones 150,180,210 with --epochs 60: the run ends"),
        ("--epochs 1 --schedule step", "--decay-epochs 1.0 with --epochs 1: the run ends before the first decay"),
    ],
)
def test_a_shorter_run_says_what_it_leaves_out(line, note):
    config = config_from(parser().parse_args(line.split())).resolved()
    assert [text.startswith(note or "") for text in cut_off(config)] == ([] if note is None else [True])
    shown = opening(config, facts(), {"student": 10, "teacher": None}, "cpu")
    assert ("note     " in shown) == (note is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0}, "--ratio must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"lr": -0.1}, "--lr must be positive, got -0.1"),
        ({"lr": float("nan")}, "--lr must be a number, got the number nan"),
        ({"kd_weight": float("inf")}, "--kd-weight must be a number, got the number inf"),
        ({"epochs": "5"}, "--epochs must be a whole number, got the text '5'"),
        ({"epochs": 2.5}, "--epochs must be a whole number, got the number 2.5"),
        ({"method": None}, "--method must be text, got nothing"),
        ({"seed": 2**32}, "--seed must be at most 4294967295, got 4294967296"),
        ({"threads": 10**6}, "--threads must be at most"),
        (
            {"schedule": "multistep", "milestones": (3, 1)},
            "--milestones 3,1: name epochs from 1 on, each once and in o",
        ),
        ({"schedule": "multistep", "milestones": (0, 1)}, "--milestones 0,1: name epochs from 1 on"),
        ({"lr": 0.1, "min_lr": 0.3}, "--min-lr 0.3 is above --lr 0.1"),
        ({"lr": 0.1, "warmup_lr": 0.3}, "--warmup-lr 0.3 is above --lr 0.1"),
        ({"widen": 2}, "--widen trains a widened network for itself, and --method gpd widens its student"),
        ({"method": "gdp"}, "unknown method 'gdp'; did you mean 'gpd'"),
        ({"kd_weight": -1}, "--kd-weight must be at least 0"),
        ({"label_smoothing": 1.0}, r"--label-smoothing must lie in \[0, 1\), got 1.0"),
        ({"optimizer": "lion"}, "--optimizer must be one of sgd, adamw, got 'lion'"),
        ({"warmup_epochs": 40}, "--warmup-epochs 40 leaves nothing of --epochs 40"),
        ({"cooldown_epochs": 39}, "--cooldown-epochs 39 leaves nothing of --epochs 40"),
        ({"method": "dkd"}, "--method dkd: dkd compares with a static teacher; name it with --teacher"),
        ({"method": "gpd+kd"}, r"--method gpd\+kd: kd compares with a static teacher; name it with --teacher"),
        ({"method": "gpd", "teacher": "x"}, r"--teacher x: --method gpd uses no static teacher; write gpd\+dkd"),
        ({"method": "baseline", "teacher": "x"}, "--method baseline uses no static teacher; write dkd"),
        ({"method": "gpd+baseline"}, r"--method is baseline, gpd, one loss .*; got 'gpd\+baseline'"),
        ({"method": "kd+dkd", "teacher": "x"}, r"got 'kd\+dkd'"),
        ({"method": "gpd+gpd"}, r"got 'gpd\+gpd'"),
        ({"method": ""}, "got ''"),
        ({"teacher_checkpoint": "x"}, "--teacher-checkpoint holds the weights .* name its network with --teacher"),
        ({"checkpoint": "x", "pretrained": True}, "--checkpoint and --pretrained were both given"),
        ({"schedule": "multistep"}, "--schedule multistep needs --milestones"),
        ({"accumulate": 3}, "--accumulate 3 does not divide --batch-size 64"),
        ({"branch_init": "student"}, "--branch-init says how branches start, and there are none; add --branches"),
        ({"ema": 1.0}, r"--ema must lie in \[0, 1\), got 1.0"),
        ({"on_nan": "ignore"}, "--on-nan must be one of stop, rollback, got 'ignore'"),
        ({"precision": "int8"}, "--precision must be one of fp32, tf32, bf16, fp16, fp64, got 'int8'"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)


def test_numbers_of_numpy_are_numbers():
    config = TrainConfig(lr=np.float32(0.5), epochs=np.int64(3), kd_weight=2, milestones=[1, 2], schedule="multistep")
    assert config == TrainConfig(lr=0.5, epochs=3, kd_weight=2.0, milestones=(1, 2), schedule="multistep")
    assert [type(v) for v in (config.lr, config.epochs, config.kd_weight)] == [float, int, float]


def test_run_returns_zero_and_writes(tmp_path, capsys):
    line = f"--epochs 1 --limit-train 100 --method baseline --output {tmp_path / 'run'}"
    assert run(parser().parse_args(line.split())) == 0
    assert "student extracted" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").is_file()


def test_run_compares(tmp_path, capsys):
    line = f"--epochs 1 --limit-train 50 --compare --seeds 4 --output {tmp_path / 'run'}"
    assert run(parser().parse_args(line.split())) == 0
    assert "GPD minus the best baseline" in capsys.readouterr().out


def test_every_seed_is_checked_before_the_first_run(tmp_path, capsys):
    line = f"--epochs 1 --compare --seeds 1,99999999999 --output {tmp_path / 'run'}"
    with pytest.raises(InputError, match="--seed must be at most"):
        run(parser().parse_args(line.split()))
    assert "runs of" not in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "text"), [("--milestones", "1,x"), ("--head-weights", "1,,2")])
def test_lists_that_are_none(option, text, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([option, text])
    assert f"'{text}' is not a list of" in capsys.readouterr().err


def test_a_default_rate_counts_too():
    with pytest.raises(InputError, match=r"--min-lr 0\.5 is above --lr 0\.1"):
        TrainConfig(min_lr=0.5).resolved()


def test_seeds_need_compare():
    with pytest.raises(InputError, match="--seeds belongs to --compare; a single run takes --seed"):
        run(parser().parse_args(["--seeds", "0,1"]))
    with pytest.raises(SystemExit):
        parser().parse_args(["--compare", "--seeds", "a,b"])


def test_registry():
    with pytest.raises(InputError, match=r"unknown method 'dk'; did you mean .*dkd.*\?; known methods: .*baseline"):
        get_distiller("dk")
    with pytest.raises(InputError, match=r"cannot be named 'dkd': the name is taken"):
        distiller("dkd")(Distiller)
    for name in ("gpd", "baseline", "a+b"):
        with pytest.raises(InputError, match="the name is taken or holds a \\+"):
            distiller(name)(Distiller)
    assert {"kd", "dkd", "lskd", "dist"} <= set(distillers())


def test_the_help_names_every_loss():
    text = options()["method"][0].help
    ours = [name for name in distillers() if get_distiller(name).__module__.startswith("reparam.")]  # docs add one
    assert len(ours) > 10 and all(name in text for name in ours)

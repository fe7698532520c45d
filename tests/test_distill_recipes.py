"""Recipes: every file resolves and is what its source says; the format, its strictness, inheritance and round trips."""

from __future__ import annotations

import configparser
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

import reparam.distill.methods
import reparam.distill.models  # noqa: F401 - registers the networks
from reparam.distill.chain import _check
from reparam.distill.config import TrainConfig
from reparam.distill.methods.base import distillers
from reparam.distill.plain_yaml import read_yaml, write_yaml
from reparam.distill.recipes import FOLDER, Recipe, apply_recipe, dump_recipe, load_recipe, recipe_names
from reparam.errors import InputError

ROOT = Path(__file__).parent.parent
NAMES = recipe_names()
every = pytest.mark.parametrize("name", NAMES)


VARIANTS: dict[str, Callable[[TrainConfig], bool]] = {
    "released": lambda found: (found.method, found.tau_schedule, found.student_temperature) == ("gapkd", "dtm", 4.0),
    "expand2": lambda found: found.assistant == "expand:2",
    "multi": lambda found: (found.method, found.head_stages, found.beta) == ("kdiffusion", "all", 0.0),
    "single": lambda found: (found.method, found.head_stages, found.beta) == ("kdiffusion", "last", 0.0),
}
VARIANTS |= {f"heads{n}": lambda found, n=n: VARIANTS["single"](found) and found.heads == n for n in (2, 4, 8, 16)}
"""What stands behind the method in some names, and what it says."""


packaged = functools.cache(load_recipe)
"""Recipes of the package do not change while the tests run, and each of them is looked at many times."""


def config(name: str, **overrides: Any) -> TrainConfig:
    """The settings of a recipe, with a word for everything that only the user can know."""
    recipe = packaged(name)
    return apply_recipe(recipe, {**dict.fromkeys(recipe.needs, "FILE"), **overrides})


def values(name: str, *names: str) -> tuple[Any, ...]:
    found = config(name)
    return tuple(getattr(found, key) for key in names)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def own(folder: Path, settings: str, more: str = "") -> Path:
    lines = "".join(f"  {line}\n" for line in settings.splitlines())
    return write(folder, "own.yaml", f"version: 1\ndescription: mine\n{more}settings:\n{lines}")


# The files of the package --------------------------------------------------------------------------------------------


def test_how_many_there_are() -> None:
    groups = [name.partition("/")[0] for name in NAMES]
    found = {group: groups.count(group) for group in set(groups)}
    large_gaps = {"cifar100": 3 + 7 + 6 + 4, "cifar10": 4 + 6 + 6, "fashion-mnist": 1 + 4}
    kdiffusion = 5 * 4 + 2 * 4
    assert found == {
        "imagenet": 24 + 2 * 5 + 2 * 2,
        "imagenet100": 5,
        "cifar100": 12 * 6 + 9 * 2 + 6 + large_gaps["cifar100"] + kdiffusion,
        "cifar10": large_gaps["cifar10"],
        "fashion-mnist": 28 + large_gaps["fashion-mnist"],
        "digits": 3,
    }


@every
def test_a_recipe_resolves_to_known_networks_and_methods(name: str) -> None:
    recipe = packaged(name)
    found = config(name).resolved()
    assert recipe.name == name and len(recipe.description) > 20 and len(recipe.source) > 20
    assert timm.is_model(found.model) and (found.teacher is None or timm.is_model(found.teacher))
    assert found.assistant in (None, "expand:2") or all(map(timm.is_model, found.assistant.split(",")))
    assert (found.assistant is not None) == (found.method in ("gapkd", "takd", "dgkd"))
    if found.assistant is not None:
        _check(found)
    assert set(found.method.split("+")) <= {*distillers(), "gpd", "baseline"}
    assert set(recipe.needs) <= {"checkpoint", "teacher_checkpoint", "assistant_checkpoint"}
    assert all(isinstance(value, (int, float, str)) for value in recipe.reference.values())
    assert recipe.reference.get("epochs", found.epochs) == found.epochs
    assert found.output is None and found.seed == 0 and found.device == "auto"


@every
def test_a_name_says_what_the_recipe_is(name: str) -> None:
    """``group/[teacher-]student-method[-variant][-finetune|-short|-long]``, the variant "nobranches" or as above."""
    found = config(name)
    group, _, rest = name.partition("/")
    words = rest.split("-")
    if words[-1] in ("short", "long"):
        assert found.epochs == {"short": 15, "long": 75}[words.pop()] and group == "fashion-mnist"
    finetune = words[-1] == "finetune"
    assert finetune == (found.pretrained or found.checkpoint is not None)
    words = words[:-1] if finetune else words
    bare = words[-1] == "nobranches"
    words = words[:-1] if bare else words
    assert (found.branches is not None) == (found.gpd and not bare and "rvt" not in name)
    words, variant = (words[:-1], words[-1]) if words[-1] in VARIANTS else (words, "")
    if variant:
        assert VARIANTS[variant](found)
    method = found.method.split("-")
    assert words[-len(method) :] == method
    words = words[: -len(method)]
    networks = [network for network in (found.teacher, found.model) if network is not None]
    assert words == [re.sub(r"^cifar(100?)?_|\.\w+$", "", network) for network in networks]
    assert found.assistant_checkpoint is None
    assert found.data == {"digits": "digits", **dict.fromkeys(("imagenet", "imagenet100"), "folder:")}.get(
        group, f"{group}:"
    )


@every
def test_who_needs_weights_says_so(name: str) -> None:
    """A static teacher has timm's weights, or the recipe asks for them; the same for what is fine-tuned."""
    recipe, found = packaged(name), config(name)
    if found.teacher is not None:
        thousand = timm.models.is_model_pretrained(found.teacher)
        assert ("teacher_checkpoint" in recipe.needs) != (thousand and not name.startswith("imagenet100/"))
    if name.endswith("finetune"):
        assert ("checkpoint" in recipe.needs) != timm.models.is_model_pretrained(found.model)
    if recipe.needs:
        with pytest.raises(InputError, match=r"cannot know some of its settings, add --(teacher-)?checkpoint: \w+"):
            apply_recipe(recipe)


@every
def test_a_dumped_recipe_reads_back(name: str, tmp_path: Path) -> None:
    found = config(name, output="runs/a b: #1", seed=7)
    text = dump_recipe(found, "a run: of 'yesterday'")
    again = load_recipe(write(tmp_path, "recipe.yaml", text))
    assert apply_recipe(again) == found and again.description == "a run: of 'yesterday'"
    resolved = found.resolved()
    assert apply_recipe(load_recipe(write(tmp_path, "recipe.yaml", dump_recipe(resolved, "x")))) == resolved


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_no_file_repeats_what_it_inherits(path: Path, tmp_path: Path) -> None:
    content = read_yaml(path.read_text(encoding="utf-8"), path.name)
    if "extends" in content:
        probe = own(tmp_path, "seed: 0", f"extends: {content['extends']}\n")
        inherited = load_recipe(probe).settings
        listed = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in content.get("settings", {}).items()}  # fmt: skip
        assert not [key for key, value in listed.items() if key in inherited and inherited[key] == value]


def test_the_files_are_shipped() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    pattern = parser["options.package_data"]["reparam.distill"].strip()
    shipped = set((ROOT / "reparam" / "distill").glob(pattern))
    present = {path for path in FOLDER.rglob("*") if path.is_file()}
    assert shipped == present and len(present) > len(NAMES)


# What the sources say ------------------------------------------------------------------------------------------------


def test_imagenet_convolutional_recipe() -> None:
    for student in ("resnet18", "mobilenet_v1"):
        common = "optimizer lr weight_decay decay_norms nesterov batch_size epochs milestones decay_rate".split()
        expected = ("sgd", 0.1, 1e-4, True, False, 512, 100, (30, 60, 90), 0.1)
        for name in (f"imagenet/{student}-gpd", f"imagenet/{student}-baseline"):
            assert values(name, *common) == expected
            assert values(name, "clip_grad", "ema", "warmup_epochs", "label_smoothing") == (5.0, 0.99996, 0, 0.0)
        gpd = values(f"imagenet/{student}-gpd", "ratio", "kd_weight", "kd_loss", "kd_smoothing", "branches")
        assert gpd == (2, 3.0, "sce", 0.1, "orepa:pointwise=released")
        finetune = values(f"imagenet/{student}-gpd-finetune", "lr", "epochs", "milestones", "branch_init", "clip_grad")
        assert finetune == (0.01, 50, (30,), "student", 5.0)


def test_imagenet_rvt_recipe() -> None:
    numbers = "optimizer lr weight_decay batch_size epochs cooldown_epochs schedule min_lr warmup_epochs warmup_lr"
    expected = ("adamw", 2e-3, 0.05, 2048, 310, 10, "cosine", 1e-5, 5, 1e-6)
    images = "auto_augment interpolation erase mixup cutmix mix_prob mix_switch_prob repeats"
    for name in ("baseline", "gpd"):
        assert values(f"imagenet/rvt_tiny-{name}", *numbers.split()) == expected
        found = values(f"imagenet/rvt_tiny-{name}", *images.split())
        assert found == ("rand-m9-mstd0.5-inc1", "bicubic", 0.25, 0.8, 1.0, 1.0, 0.5, 3)
        found = values(f"imagenet/rvt_tiny-{name}", "drop_path", "clip_grad", "ema", "branches", "label_smoothing")
        assert found == (0.0, 0.0, 0.99996, None, 0.1)
        assert values(f"imagenet/rvt_tiny-{name}-finetune", "lr", "epochs", "cooldown_epochs") == (2e-4, 60, 10)


@pytest.mark.parametrize(
    ("name", "top1", "batch", "lr", "numbers"),
    [
        ("resnet34-resnet18-dkd", 71.70, 512, 0.2, {"temperature": 1.0, "alpha": 1.0, "beta": 0.5, "ema": 0.0}),
        ("resnet34-resnet18-gpd+dkd", 72.71, 512, 0.1, {"temperature": 1.0, "beta": 0.5, "ema": 0.99996, "ratio": 2}),
        ("resnet34-resnet18-kd", 70.66, 512, 0.2, {"temperature": 1.0, "ce_weight": 0.5, "distill_weight": 0.5}),
        ("resnet34-resnet18-at", 70.69, 512, 0.2, {"distill_weight": 1000.0, "ema": 0.0}),
        ("resnet34-resnet18-crd", 71.17, 256, 0.1, {"distill_weight": 0.8}),
        ("resnet34-resnet18-rkd", 70.40, 256, 0.1, {"distill_weight": 1.0}),
        ("resnet34-resnet18-dist", 72.07, 256, 0.1, {"distill_weight": 2.0, "temperature": 1.0}),
        ("resnet50-mobilenet_v1-kd", 68.58, 512, 0.2, {"teacher": "resnet50.tv_in1k", "distill_weight": 0.5}),
        ("resnet50-mobilenet_v1-at", 69.56, 512, 0.2, {"distill_weight": 1000.0, "clip_grad": 0.0}),
        ("resnet50-mobilenet_v1-crd", 71.37, 256, 0.1, {"distill_weight": 0.8}),
        ("resnet50-mobilenet_v1-rkd", 68.5, 256, 0.1, {"distill_weight": 1.0}),
        ("resnet50-mobilenet_v1-dist", 73.24, 256, 0.1, {"distill_weight": 2.0, "temperature": 1.0}),
        ("resnet34-resnet18-reviewkd", 71.61, 256, 0.1, {"distill_weight": 1.0, "clip_grad": 0.0}),
        ("resnet34-resnet18-gpd+reviewkd", 72.50, 256, 0.1, {"distill_weight": 1.0, "clip_grad": 5.0}),
        ("resnet50-mobilenet_v1-dkd", 72.05, 512, 0.2, {"temperature": 1.0, "beta": 2.0}),
        ("resnet50-mobilenet_v1-gpd+dkd", 73.63, 512, 0.1, {"temperature": 1.0, "beta": 2.0}),
        ("resnet50-mobilenet_v1-reviewkd", 72.56, 256, 0.1, {"distill_weight": 8.0}),
        ("resnet50-mobilenet_v1-gpd+reviewkd", 73.21, 256, 0.1, {"distill_weight": 1.0}),
        ("rvt_small-rvt_tiny-dkd", 79.12, 2048, 2e-3, {"temperature": 1.0, "beta": 0.5, "mixup": 0.8}),
        ("rvt_small-rvt_tiny-gpd+dkd", 80.14, 2048, 2e-3, {"temperature": 1.0, "beta": 0.5, "kd_weight": 3.0}),
        ("rvt_small-rvt_tiny-reviewkd", 78.92, 2048, 2e-3, {"distill_weight": 1.0}),
        ("rvt_small-rvt_tiny-gpd+reviewkd", 80.01, 2048, 2e-3, {"distill_weight": 1.0}),
        ("resnet18-baseline", 70.07, 512, 0.1, {"method": "baseline"}),
        ("resnet18-gpd", 71.87, 512, 0.1, {}),
        ("resnet18-baseline-finetune", 70.23, 512, 0.01, {"model": "resnet18.tv_in1k", "pretrained": True}),
        ("resnet18-gpd-finetune", 71.12, 512, 0.01, {"model": "resnet18.tv_in1k", "pretrained": True}),
        ("mobilenet_v1-baseline", 71.68, 512, 0.1, {}),
        ("mobilenet_v1-gpd", 73.07, 512, 0.1, {}),
        ("mobilenet_v1-baseline-finetune", 69.01, 512, 0.01, {}),
        ("mobilenet_v1-gpd-finetune", 69.47, 512, 0.01, {}),
        ("rvt_tiny-baseline", 78.45, 2048, 2e-3, {}),
        ("rvt_tiny-gpd", 79.85, 2048, 2e-3, {}),
        ("rvt_tiny-baseline-finetune", 78.61, 2048, 2e-4, {}),
        ("rvt_tiny-gpd-finetune", 78.84, 2048, 2e-4, {}),
    ],
)
def test_imagenet_rows(name: str, top1: float, batch: int, lr: float, numbers: dict[str, Any]) -> None:
    found = config(f"imagenet/{name}")
    assert load_recipe(f"imagenet/{name}").reference["top1"] == top1
    assert (found.batch_size, found.lr) == (batch, lr)
    assert {key: getattr(found, key) for key in numbers} == numbers


CIFAR = [
    ("resnet56-resnet20", 72.34, 69.06, 70.66, 69.21, 71.16, 71.97, 2.0, 0.6, 0.05),
    ("resnet110-resnet32", 74.31, 71.14, 73.08, 71.06, 73.48, 74.11, 2.0, 1.0, 0.05),
    ("resnet32x4-resnet8x4", 79.42, 72.50, 73.33, 73.50, 75.51, 76.32, 8.0, 5.0, 0.05),
    ("wrn_40_2-wrn_16_2", 75.61, 73.26, 74.92, 73.58, 75.48, 76.23, 6.0, 5.0, 0.05),
    ("wrn_40_2-wrn_40_1", 75.61, 71.98, 73.54, 72.24, 74.14, 74.81, 6.0, 5.0, 0.05),
    ("vgg13-vgg8", 74.64, 70.36, 72.98, 71.02, 73.94, 74.68, 6.0, 1.0, 0.05),
    ("resnet110-resnet20", 74.31, 69.06, 70.67, 68.99, 71.46, None, 2.0, 1.0, 0.05),
    ("resnet32x4-shufflenet_g3", 79.42, 70.50, 74.07, 73.59, 75.11, 76.45, 8.0, 5.0, 0.01),
    ("wrn_40_2-shufflenet_g3", 75.61, 70.50, 74.83, 73.73, 76.05, 76.70, 8.0, 5.0, 0.01),
    ("vgg13-mobilenetv2_half", 74.64, 64.60, 67.37, 64.14, 69.73, 69.71, 6.0, 1.0, 0.01),
    ("resnet50-mobilenetv2_half", 79.34, 64.60, 67.35, 63.16, 69.11, 70.35, 8.0, 1.0, 0.01),
    ("resnet32x4-shufflenetv2", 79.42, 71.82, 74.45, 73.54, 75.65, 77.07, 8.0, 8.0, 0.01),
]


@pytest.mark.parametrize("row", CIFAR, ids=[row[0] for row in CIFAR])
def test_cifar100_rows(row: tuple[Any, ...]) -> None:
    pair, teacher, student, kd, fitnet, crd, dkd, beta, weight, lr = row
    first, _, second = pair.partition("-")
    references = {"kd": kd, "fitnet": fitnet, "crd": crd, "dkd": dkd}
    assert {m: load_recipe(f"cifar100/{pair}-{m}").reference.get("top1") for m in references} == references
    assert load_recipe(f"cifar100/{first}-baseline").reference["top1"] == teacher
    assert load_recipe(f"cifar100/{second}-baseline").reference["top1"] == student
    methods = ("kd", "dkd", "gpd+dkd", "reviewkd", "crd", "fitnet")
    for name in (*(f"{pair}-{method}" for method in methods), f"{second}-baseline", f"{second}-gpd"):
        found = values(
            f"cifar100/{name}", "lr", "epochs", "batch_size", "weight_decay", "milestones", "warmup_epochs", "shift"
        )
        assert found == (lr, 240, 64, 5e-4, (150, 180, 210), 0, 4)
        assert values(f"cifar100/{name}", "clip_grad", "ema") == (5.0 if "gpd" in name else 0.0, 0.0)
    assert values(f"cifar100/{pair}-kd", "temperature", "ce_weight", "distill_weight") == (4.0, 0.1, 0.9)
    for method in ("dkd", "gpd+dkd"):
        numbers = values(f"cifar100/{pair}-{method}", "temperature", "alpha", "beta", "distill_warmup", "ce_weight")
        assert numbers == (4.0, 1.0, beta, 20, 1.0)
    assert values(f"cifar100/{pair}-reviewkd", "distill_weight", "distill_warmup") == (weight, 20)
    assert values(f"cifar100/{pair}-crd", "distill_weight") == (0.8,)
    assert values(f"cifar100/{pair}-fitnet", "distill_weight") == (100.0,)


GAPS = [
    ("cifar100/resnet110-resnet8", 61.37, 61.41, 61.82, 63.99, (8.949, 1.917, 5.051, 7, 20.0)),
    ("cifar10/resnet110-resnet8", 87.44, 87.89, 88.47, 90.18, (0.68, 8.3, 6.2, 7, 24.0)),
    ("cifar100/plain10-plain2", 51.53, 51.62, 51.85, 53.79, (3.1028, 5.8755, 9.0903, 33, 25.0)),
    ("cifar10/plain10-plain2", 72.75, 72.43, 72.63, 73.25, (3.1, 5.88, 9.09, 33, 20.0)),
]


@pytest.mark.parametrize("row", GAPS, ids=[row[0] for row in GAPS])
def test_large_gaps(row: tuple[Any, ...]) -> None:
    """Gap-KD, tables 3 and 4."""
    stem, student, kd, takd, gapkd, numbers = row
    group, _, pair = stem.partition("/")
    first, _, second = pair.partition("-")
    references = {"kd": kd, "takd": takd, "gapkd": gapkd, "gapkd-released": gapkd, "annealing": None}
    assert {m: load_recipe(f"{stem}-{m}").reference.get("top1") for m in references} == references
    assert load_recipe(f"{group}/{second}-baseline").reference["top1"] == student
    plain = second == "plain2"
    schedule = (160, 0.01, 0.0, "constant", None) if plain else (240, 0.05, 5e-4, "multistep", (150, 180, 210))
    for name in (*(f"{pair}-{method}" for method in references), f"{second}-baseline"):
        found = values(f"{group}/{name}", "epochs", "lr", "weight_decay", "schedule", "milestones")
        assert found == schedule
        common = values(f"{group}/{name}", "batch_size", "clip_grad", "shift", "flip", "data")
        assert common == (64, 0.0, 4, True, f"{group}:")
    teacher = values(f"{group}/{first}-baseline", "epochs", "lr", "weight_decay")
    assert teacher == ((160, 0.01, 5e-4) if plain else (240, 0.05, 5e-4))
    assistant = f"{group}_plain4" if plain else "cifar_resnet20"
    for method in ("gapkd", "gapkd-released", "takd"):
        assert values(f"{stem}-{method}", "assistant", "assistant_epochs") == (assistant, None)
    names = ("ce_weight", "alpha", "beta", "distill_warmup", "tau_max", "tau_min", "tau_schedule")
    assert values(f"{stem}-gapkd", *names) == (*numbers, 1.0, "dtm")
    paper = config(f"{stem}-gapkd")
    assert config(f"{stem}-gapkd-released") == dataclasses.replace(paper, student_temperature=4.0)
    assert paper.student_temperature is paper.prefactor is None
    for method in ("kd", "takd"):
        assert values(f"{stem}-{method}", "temperature", "ce_weight", "distill_weight") == (4.0, 0.1, 0.9)
    assert values(f"{stem}-annealing", "anneal_epochs") == (None,)  # two thirds
    assert load_recipe(f"{stem}-dgkd").reference == {}
    between = ",".join(f"{group}_plain{n}" for n in (8, 6, 4)) if plain else "cifar_resnet56,cifar_resnet20"
    found = values(f"{stem}-dgkd", "assistant", "temperature", "ce_weight", "epochs", "lr", "data")
    assert found == (between, 4.0, 0.1, *schedule[:2], f"{group}:")
    for method in references:
        needed = load_recipe(f"{stem}-{method}").needs["teacher_checkpoint"]
        assert f"{group}/" in needed and ("baseline" in needed)


def test_large_gaps_between_families() -> None:
    """Gap-KD, table 1."""
    for teacher, assistant, kd, gapkd in (
        ("resnet110", "resnet56", 68.95, 69.68),
        ("resnet32x4", "resnet8x4", 66.83, 69.55),
    ):
        stem = f"cifar100/{teacher}-mobilenetv2_half"
        assert load_recipe(f"{stem}-kd").reference["top1"] == kd
        assert load_recipe(f"{stem}-gapkd").reference["top1"] == gapkd
        assert values(f"{stem}-gapkd", "assistant", "lr", "ce_weight") == (f"cifar_{assistant}", 0.01, 8.949)
    assert load_recipe("cifar100/resnet110-resnet8-dkd").reference["top1"] == 58.91


KDIFFUSION = [
    ("resnet32x4-shufflenet_g3", 75.01, 76.62, 77.90, 78.14),
    ("wrn_40_2-shufflenet_g3", 75.32, 75.83, 76.83, 77.26),
    ("vgg13-mobilenetv2_half", 66.45, 69.14, 69.91, 70.49),
    ("resnet50-mobilenetv2_half", 67.56, 69.20, 69.95, 71.14),
    ("resnet32x4-shufflenetv2", 75.46, 76.87, 77.34, 77.84),
]


@pytest.mark.parametrize("row", KDIFFUSION, ids=[row[0] for row in KDIFFUSION])
def test_kdiffusion_rows(row: tuple[Any, ...]) -> None:
    """Kdiffusion, table 2."""
    pair, average, single, multi, guide = row
    references = {"-average": average, "-single": single, "-multi": multi, "": guide}
    found = {end: load_recipe(f"cifar100/{pair}-kdiffusion{end}").reference["top1"] for end in references}
    assert found == references
    for end, stages, beta in (
        ("-average", "last", None),
        ("-single", "last", 0.0),
        ("-multi", "all", 0.0),
        ("", "all", 1.0),
    ):
        numbers = values(
            f"cifar100/{pair}-kdiffusion{end}", "heads", "head_stages", "beta", "lr", "epochs", "ce_weight"
        )
        assert numbers == (10, stages, beta, 0.01, 240, 1.0)


@pytest.mark.parametrize(
    ("pair", "references"),
    [
        ("resnet32x4-shufflenet_g3", (74.85, 75.96, 76.28, 76.80)),
        ("resnet50-mobilenetv2_half", (67.87, 68.46, 68.91, 70.16)),
    ],
)
def test_kdiffusion_ablation(pair: str, references: tuple[float, ...]) -> None:
    """Kdiffusion, number of features at a single layer: nothing but that number differs from the row with 10."""
    single = config(f"cifar100/{pair}-kdiffusion-single")
    for count, top1 in zip((2, 4, 8, 16), references, strict=True):
        name = f"cifar100/{pair}-kdiffusion-heads{count}"
        assert config(name) == dataclasses.replace(single, heads=count)
        assert load_recipe(name).reference["top1"] == top1


SWIN = "imagenet100/swin_base_patch4_window7_224"


@pytest.mark.parametrize(
    ("stem", "teacher", "references"),
    [
        ("imagenet/resnet50-mobilenet_v1", "resnet50.tv_in1k", {"single": 73.48, "multi": 73.62}),
        ("imagenet/resnet34-resnet18", "resnet34.tv_in1k", {"single": 71.68, "multi": 72.04}),
        (f"{SWIN}-mobilenetv2_100", "swin_base_patch4_window7_224", {"multi": 86.20}),
        (f"{SWIN}-mobilenetv3_large_100", "swin_base_patch4_window7_224", {"multi": 87.88}),
        (f"{SWIN}-resnet18", "swin_base_patch4_window7_224", {"multi": 86.30}),
        (f"{SWIN}-shufflenet_g3", "swin_base_patch4_window7_224", {"multi": 78.04}),
        (f"{SWIN}-shufflenetv2", "swin_base_patch4_window7_224", {"multi": 80.68}),
    ],
)
def test_kdiffusion_on_imagenet(stem: str, teacher: str, references: dict[str, float]) -> None:
    """Kdiffusion, the tables of ImageNet and ImageNet-100."""
    for end, top1 in references.items():
        assert load_recipe(f"{stem}-kdiffusion-{end}").reference["top1"] == top1
        found = values(f"{stem}-kdiffusion-{end}", "teacher", "heads", "alpha", "beta", "batch_size", "lr", "epochs")
        assert found == (teacher, 10, 1.0, 0.0, 256, 0.1, 100)
        assert values(f"{stem}-kdiffusion-{end}", "clip_grad", "ema", "milestones") == (0.0, 0.0, (30, 60, 90))


def test_small_recipes() -> None:
    without_options = config("digits/resnet8_w8-gpd-nobranches").resolved()
    default = TrainConfig().resolved()
    assert dataclasses.replace(without_options, shift=None, flip=None) == default
    short, long = (config(f"fashion-mnist/resnet20-resnet8_w8-gpd+dkd-{length}") for length in ("short", "long"))
    assert dataclasses.replace(short, epochs=75, distill_warmup=6) == long
    assert (short.epochs, short.limit_train, short.beta, short.branches) == (15, 10000, 2.0, "orepa")
    taught = [config(f"fashion-mnist/plain10-plain2-{method}-short") for method in ("gapkd", "takd", "kd")]
    assert {(found.model, found.teacher, found.lr, found.epochs) for found in taught} == {
        ("cifar10_plain2", "cifar10_plain10", 0.01, 15)
    }
    grown = config("fashion-mnist/plain10-plain2-gapkd-expand2-short")
    assert dataclasses.replace(grown, assistant="cifar10_plain4") == taught[0]
    assert values("fashion-mnist/plain2-baseline-long", "model", "lr", "epochs") == ("cifar10_plain2", 0.01, 75)


# Names, paths, inheritance -------------------------------------------------------------------------------------------


def test_defaults_then_recipe_then_overrides(tmp_path: Path) -> None:
    path = own(tmp_path, "lr: 1e-4\nmethod: baseline\nmilestones: [3, 5]")
    recipe = load_recipe(path)
    assert recipe == Recipe(str(path), "mine", "", {}, {"lr": 1e-4, "method": "baseline", "milestones": (3, 5)})
    assert load_recipe(str(path)) == recipe
    found = apply_recipe(recipe, {"lr": 1, "seed": 3, "milestones": None})
    assert (found.lr, found.seed, found.milestones, found.method, found.epochs) == (1.0, 3, None, "baseline", 40)
    assert isinstance(found.lr, float)


def test_extending(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "version: 1\ndescription: a\nsource: here\nreference: {top1: 1}\n"
          "needs: {checkpoint: some weights}\nsettings: {lr: 0.5, epochs: 9, branches: orepa}\n")  # fmt: skip
    b = write(tmp_path, "b.yaml", "version: 1\ndescription: b\nextends: a.yaml\nsettings: {lr: 2, branches: null}\n")
    found = load_recipe(b)
    assert found.settings == {"lr": 2.0, "epochs": 9, "branches": None} and found.description == "b"
    assert found.source == "here" and not found.reference and found.needs == {"checkpoint": "some weights"}
    given = write(tmp_path, "c.yaml", "version: 1\ndescription: c\nextends: b.yaml\nsettings: {checkpoint: w.pt}\n")
    assert not load_recipe(given).needs and apply_recipe(load_recipe(given)).checkpoint == "w.pt"
    packaged = own(tmp_path, "seed: 5", "extends: cifar100/_base\n")
    assert apply_recipe(load_recipe(packaged)).milestones == (150, 180, 210)
    assert apply_recipe(load_recipe(own(tmp_path, "seed: 5", "extends: imagenet/resnet18-gpd\n"))).batch_size == 512


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "a"}, r"recipes extend each other in a circle: \S*a.yaml -> \S*a.yaml"),
        ({"a": "b", "b": "c", "c": "b"}, r"in a circle: \S*b.yaml -> \S*c.yaml -> \S*b.yaml"),
        ({"a": "missing"}, "no such recipe file: .*missing.yaml"),
    ],
)
def test_circles(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, parent in files.items():
        write(tmp_path, f"{name}.yaml", f"version: 1\ndescription: x\nextends: {parent}.yaml\n")
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar100/resnet32x4-resnet8x4-dkd+gpd",
            "unknown recipe .*did you mean 'cifar100/resnet32x4-resnet8x4-gpd[+]dkd'",
        ),
        ("resnet18-gpd", "did you mean 'imagenet/resnet18-gpd'"),
        (
            "zzz",
            "unknown recipe 'zzz'; groups: cifar10, cifar100, digits, fashion-mnist, imagenet, imagenet100 .*in .yaml",
        ),
        ("", "unknown recipe ''"),
        ("cifar100/_base", "unknown recipe"),
        ("../recipe_files/digits/resnet8_w8-gpd", "unknown recipe"),
        ("nowhere.yaml", "no such recipe file: nowhere.yaml"),
    ],
)
def test_unknown_recipes(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(name)


# The format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("learning_rate: 1", "no setting 'learning_rate'"),
        ("batchsize: 1", "no setting 'batchsize'; did you mean 'batch_size'"),
        ("batch-size: 1", "did you mean 'batch_size'"),
        ("1: 2", "no setting 1"),
        ("epochs: '40'", "settings: epochs must be a whole number, got the text '40'; write 40, without quotes"),
        ("epochs: 40.0", "epochs must be a whole number, got the number 40.0"),
        ("epochs: true", "epochs must be a whole number, got true"),
        ("epochs: null", "epochs must be a whole number, got nothing; leave the line out for the default"),
        ("lr: '1e-4'", "lr must be a number, got the text '1e-4'; write 1e-4, without quotes"),
        ("lr: false", "lr must be a number, got false"),
        ("lr: .nan", "lr must be a number, got the number nan"),
        ("lr: .inf", "lr must be a number, got the number inf"),
        ("lr: fast", "lr must be a number, got the text 'fast'$"),
        ("lr: [1]", r"lr must be a number, got \[1\]"),
        ("lr: 1:30", "lr must be a number, got the text '1:30'"),
        ("pretrained: 1", "pretrained must be true or false, got the number 1"),
        ("pretrained: yes", "pretrained must be true or false, got the text 'yes'"),
        ("model: 18", "model must be text, got the number 18; write '18', with quotes"),
        ("teacher: true", "teacher must be text, got true; write 'true', with quotes"),
        ("milestones: 30,60", "milestones must be a list of numbers, got the text '30,60'"),
        ("milestones: [30, 60.5]", "milestones, an entry must be a whole number"),
        ("milestones: [true]", "milestones, an entry must be a whole number, got true"),
        ("lr: 1\nlr: 2", "line 5, column 3: found the key 'lr' a second time"),
        ("model: !!python/object/apply:os.getcwd []", "found the tag tag:yaml.org,2002:python/object/apply:os.getcwd"),
        ("model: !include x", "found the tag !include"),
        ("lr: !!int abc", "found the tag"),
        ("model: &a x\nteacher: *a", "found a reference [*]a"),
        ("<<: {lr: 1}", "no setting '<<'"),
        ("? [lr]\n: 1", "unhashable key"),
        ("model: [", "expected the node content"),
        ("\tlr: 1", "found character .* that cannot start any token"),
    ],
)
def test_settings_that_are_refused(settings: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(own(tmp_path, settings))
    assert "own.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description: x\n", "does not say which format it has; its first line should be version: 1"),
        ("version: 2\ndescription: x\n", "written for another version of reparam: format 2, this one reads 1"),
        ("version: '1'\ndescription: x\n", "another version of reparam: format '1'"),
        ("version: true\ndescription: x\n", "another version of reparam: format True"),
        ("version: 1\n", "has no description"),
        ("version: 1\ndescription: 3\n", "description must be text, got the number 3; put it in quotes"),
        ("version: 1\ndescription: x\nsetting: {}\n", "unknown entry 'setting'; did you mean 'settings'"),
        ("version: 1\ndescription: x\nsettings: [lr]\n", r"settings must be a mapping \(lines of 'key: value'\)"),
        ("version: 1\ndescription: x\nneeds: {weights: x}\n", "needs: no setting 'weights'"),
        ("version: 1\ndescription: x\nextends: [a, b]\n", "extends must be text"),
        ("", "the file must be a mapping .*, got nothing"),
        ("just text", "the file must be a mapping .*, got the text 'just text'"),
        ("a: 1\n---\nb: 2\n", "expected a single document|but found another document"),
        ("version: 1\ndescription: x\nreference: " + 5000 * "[", "nested too deeply"),
        ("version: 1\ndescription: x\nreference: {top1: " + 5000 * "1" + "}\n", "limit"),
    ],
)
def test_files_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, "own.yaml", text))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="cannot be read as text"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lrr": 1.0}, "recipe digits/resnet8_w8-gpd, override: no setting 'lrr'; did you mean 'lr'"),
        ({"lr": "0.1"}, "override: lr must be a number, got the text '0.1'"),
        ({"lr": -1}, "--lr must be positive"),
        ({"method": "dkd"}, "dkd compares with a static teacher; name it with --teacher"),
    ],
)
def test_overrides_that_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_recipe(load_recipe("digits/resnet8_w8-gpd"), overrides)


def test_values_mean_what_they_look_like() -> None:
    text = "{a: 1e-4, b: 010, c: no, d: 1_000, e: 0x10, f: 2020-01-01, g: -.5, h: ~, i: +3, j: 1., k: 'true', l: on}"
    found = read_yaml(text, "x")
    expected = {"a": 1e-4, "b": 10, "c": "no", "d": "1_000", "e": "0x10", "f": "2020-01-01", "g": -0.5, "h": None}
    assert found == {**expected, "i": 3, "j": 1.0, "k": "true", "l": "on"}
    assert read_yaml(write_yaml(found), "x") == found


def test_strange_texts_survive(tmp_path: Path) -> None:
    for text in (
        "1e-4",
        "true",
        "null",
        "~",
        "",
        " x ",
        "a: b",
        "- a",
        "#",
        "é\n\u2028",
        "'\"",
        "!tag",
        "&a",
        "*a",
        "%",
    ):
        found = TrainConfig(teacher="t", method="kd", output=text, milestones=(1,), min_lr=1e-30, resume=None)
        assert apply_recipe(load_recipe(write(tmp_path, "r.yaml", dump_recipe(found, "x")))) == found


def test_a_list_of_numbers_that_are_not_whole(tmp_path: Path) -> None:
    recipe = load_recipe("cifar100/resnet32x4-shufflenet_g3-kdiffusion")
    needed = {"teacher_checkpoint": "runs/teacher", "data": "cifar100:x"}
    config = apply_recipe(recipe, {**needed, "head_weights": (1.0, 0.5, 2.0)})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(config, "Heads of unequal weight."))
    assert apply_recipe(load_recipe(str(path)), {}).head_weights == (1.0, 0.5, 2.0)

"""Logits by t-SNE: the picture, its seed, what it shows of a run, and input that is refused."""

import pytest
import torch

from reparam.cli import main
from reparam.distill import evaluation
from reparam.distill.config import TrainConfig
from reparam.distill.figures import _embedded, draw_tsne
from reparam.distill.trainer import train
from reparam.errors import InputError


def blobs(count=60, classes=3, seed=0):
    """Logits of a network that is nearly always right, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.randn(count, classes, generator=generator) + 8 * torch.eye(classes)[labels], labels


def test_picture_is_the_same_every_time(tmp_path):
    logits, labels = blobs()
    state = torch.get_rng_state()
    for name in ("one.png", "two.png"):
        draw_tsne({"student": logits, "teacher": logits * 2 + 1}, labels, tmp_path / name, ["a", "b", "c"])
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content == (tmp_path / "two.png").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_classes_stay_together():
    logits, labels = blobs()
    places = _embedded("student", logits, labels)
    assert places.shape == (60, 2)
    distances = torch.cdist(places, places).fill_diagonal_(float("inf"))
    assert (labels[distances.argmin(dim=1)] == labels).float().mean() > 0.9


def test_more_classes_than_colours(tmp_path):
    logits, labels = blobs(48, 12)
    draw_tsne({"student": logits}, labels, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.randn(9, 3), torch.zeros(9), "needs 10 images or more, got 9"),
        (torch.randn(12, 3), torch.zeros(11), r"logits are \[12, 3\] and labels \[11\]"),
        (torch.randn(12), torch.zeros(12), r"logits are \[12\]"),
        (torch.full((12, 3), float("nan")), torch.zeros(12), "not finite"),
        (torch.ones(12, 3), torch.zeros(12), "the same for all images"),
    ],
)
def test_bad_logits(logits, labels, message, tmp_path):
    with pytest.raises(InputError, match=message):
        draw_tsne({"student": logits}, labels, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_no_network(tmp_path):
    with pytest.raises(InputError, match="one network or more"):
        draw_tsne({}, torch.zeros(12), tmp_path / "x.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, and a student that learned from it and from a dynamic teacher."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"limit_train": 100, "batch_size": 50, "epochs": 1, "quiet": True}
    train(TrainConfig(model="cifar_resnet8", method="baseline", output=str(folder / "teacher"), **common))
    taught = {"teacher": "cifar_resnet8", "teacher_checkpoint": str(folder / "teacher"), "method": "gpd+kd"}
    train(TrainConfig(output=str(folder / "run"), **taught, **common))
    return folder


def test_picture_of_a_run(runs, tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(evaluation, "TSNE_IMAGES", 40)
    monkeypatch.setattr(evaluation, "TSNE_CLASSES", 4)
    draw = evaluation.draw_tsne

    def spy(logits, labels, path, classes):
        seen.update(logits=logits, labels=labels, classes=classes)
        draw(logits, labels, path, classes)

    monkeypatch.setattr(evaluation, "draw_tsne", spy)
    assert main(["evaluate", str(runs / "run"), "--tsne", str(tmp_path / "x.png"), "--device", "cpu"]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert list(seen["logits"]) == ["student cifar_resnet8_w8", "dynamic teacher", "teacher cifar_resnet8"]
    assert {tuple(value.shape) for value in seen["logits"].values()} == {(40, 10)}
    assert seen["labels"].bincount().tolist() == [10, 10, 10, 10]
    assert "t-SNE of 40 test images of 4 classes" in capsys.readouterr().out


def test_run_whose_teacher_is_gone(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TSNE_IMAGES", 20)
    (runs / "teacher").rename(runs / "moved")
    try:
        assert main(["evaluate", str(runs / "run"), "--tsne", str(tmp_path / "x.png"), "--device", "cpu"]) == 0
    finally:
        (runs / "moved").rename(runs / "teacher")
    assert "without the static teacher: " in capsys.readouterr().out
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("name", ["x.pdf", "x", "missing/x.png"])
def test_names_that_are_refused(runs, tmp_path, name, capsys):
    assert main(["evaluate", str(runs / "run"), "--tsne", str(tmp_path / name)]) == 2
    assert "name a file that ends in .png, in a folder that exists" in capsys.readouterr().err


def test_too_few_images(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TSNE_IMAGES", 9)
    monkeypatch.setattr(evaluation, "TSNE_CLASSES", 9)
    assert main(["evaluate", str(runs / "run"), "--tsne", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
    assert "needs 10 images or more, got 9" in capsys.readouterr().err

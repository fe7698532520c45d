"""Image folders: worker processes, repeated augmentation, unreadable images, and timm's transforms."""

from __future__ import annotations

import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loaders import CPU, all_same

from reparam.distill.config import TrainConfig
from reparam.distill.data import _read_image, load_source
from reparam.distill.loaders import Shard, make_loader
from reparam.distill.sampling import Positions
from reparam.errors import DataError

TRAIN, TEST = 20, 8
REASON = "UnidentifiedImageError"


@pytest.fixture
def root(tmp_path):
    """Two classes with ten training and four test images each; the number of an image is its grey value."""
    for split, count in (("train", TRAIN), ("val", TEST)):
        for index in range(count):
            folder = tmp_path / split / ("cat" if index < count // 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (5 * index,) * 3).save(folder / f"{index:02}.png")
    return tmp_path


def damage(root, split, *numbers):
    paths = sorted((root / split).rglob("*.png"))
    for number in numbers:
        paths[number].write_bytes(b"no image")
    return [str(paths[number]) for number in numbers]


def loader_of(root, world=1, rank=0, **settings):
    config = TrainConfig(**{"batch_size": 4, "image_size": 8, "seed": 5, **settings})
    return make_loader(load_source(f"folder:{root}"), config, torch.nn.Identity(), CPU, Shard(rank, world))


def numbers(images, facts):
    """Read the number of each image from its grey value."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (facts.mean, facts.std))
    return ((images * std + mean) * 255 / 5).round().long()[:, 0, 4, 4].tolist()


def test_folder_batches(root):
    loader = loader_of(root)
    assert loader.steps == 5 and loader.facts.image_shape == (3, 8, 8)
    batch = next(iter(loader.train(1)))
    assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.float32
    assert numbers(batch.images, loader.facts) == batch.indices.tolist()
    images, labels = (torch.cat(parts) for parts in zip(*loader.test(), strict=True))
    assert numbers(images, loader.facts) == list(range(TEST)) and labels.tolist() == [0] * 4 + [1] * 4


def test_normalisation_on_the_device_and_in_the_transform_agree(root):
    """Random erasing moves it into the transform, where it must give the same bits."""
    plain, erased = loader_of(root, flip=False).train(1), loader_of(root, flip=False, erase=1e-9).train(1)
    for before, after in zip(plain, erased, strict=True):
        assert torch.equal(before.images, after.images)


# Workers ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_change_nothing(root):
    """Also in later epochs of the same workers, after a start in the middle, and after an epoch was given up."""
    damage(root, "train", 3, 11)
    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.5, "mixup": 0.8, "max_bad_images": 2}
    with pytest.warns(UserWarning, match="is not a readable image") as caught:
        alone, helped = loader_of(root, **settings), loader_of(root, workers=2, **settings)
        assert all_same(alone.train(1), helped.train(1))
    assert len([entry for entry in caught if "readable" in str(entry.message)]) == 4
    assert all_same(alone.train(2, 3), helped.train(2, 3))
    next(iter(helped.train(3)))
    assert all_same(alone.train(3, order=1), helped.train(3, order=1))
    for first, second in zip(alone.test(), helped.test(), strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_an_unreadable_image_in_a_worker(root):
    (path,) = damage(root, "train", 7)
    with pytest.raises(DataError) as caught:
        list(loader_of(root, workers=2).train(1))
    assert str(caught.value).startswith(f"folder: {path} is not a readable image ({REASON}); repair or remove it")
    assert "--max-bad-images" in str(caught.value) and "Traceback" not in str(caught.value)


# Repeated augmentation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "batch", "repeats"), [(24, 12, 3), (50, 16, 3), (40, 12, 2), (7, 6, 4), (30, 10, 7)]
)
def test_repeats(images, batch, repeats):
    """Each chosen image appears so often in the epoch, spread over its batch; only the last one may lack some."""
    positions = Positions(images, batch, images // batch, repeats, 0, Shard())
    sequence = positions.sequence(1, 0)
    assert sequence.shape == (images // batch, batch)
    counts = sequence.flatten().bincount(minlength=images)
    total = images // batch * batch
    assert sorted(counts[counts > 0].tolist(), reverse=True) == (
        [repeats] * (total // repeats) + [total % repeats] * (total % repeats > 0)
    )
    assert not torch.equal(sequence, positions.sequence(2, 0))
    for world in range(repeats, batch + 1):
        if batch % world == 0:
            for part in sequence.view(-1, batch // world):
                assert len(part.unique()) == len(part)


def test_copies_of_an_image_are_augmented_differently(root):
    loader = loader_of(root, batch_size=6, repeats=3, crop_scale=0.1, auto_augment="rand-m9-mstd0.5-inc1")
    assert loader.steps == 3
    copies: dict[int, list[torch.Tensor]] = {}
    for batch in loader.train(1):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            copies.setdefault(index, []).append(image)
    assert [len(images) for images in copies.values()] == [3] * 6
    assert sum(not torch.equal(images[0], images[1]) for images in copies.values()) >= 3
    shards = [list(loader_of(root, 3, rank, batch_size=6, repeats=3).train(1)) for rank in range(3)]
    for batches in zip(*shards, strict=True):
        assert len({tuple(batch.indices.tolist()) for batch in batches}) == 1


# Unreadable images --------------------------------------------------------------------------------------------------


def test_an_unreadable_image_ends_the_run_by_default(root):
    (path,) = damage(root, "train", 4)
    with pytest.raises(
        DataError, match=re.escape(path) + r" is not .* \(UnidentifiedImageError\); repair or remove it, or allow"
    ):
        list(loader_of(root).train(1))
    Image.effect_noise((90, 90), 60).save(path, "JPEG")
    Path(path).write_bytes(Path(path).read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"is not .* \(truncated\)"):
        list(loader_of(root).train(1))
    (path,) = damage(root, "val", 2)
    with pytest.raises(DataError, match=re.escape(path)):
        list(loader_of(root).test())


def test_sixteen_bits_become_eight(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = np.asarray(_read_image(str(tmp_path / "ramp.png")))
    assert image.shape == (16, 16, 3) and np.array_equal(image[..., 1], ramp >> 8)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "ramp.tiff")
    with pytest.raises(DataError, match=r"ramp.tiff is not .* \(its values, mode F, have no known range\); convert it"):
        _read_image(str(tmp_path / "ramp.tiff"))


def test_one_class_is_nothing_to_tell_apart(root):
    for path in [*(root / "train" / "dog").iterdir(), *(root / "val" / "dog").iterdir()]:
        path.unlink()
    for split in ("train", "val"):
        (root / split / "dog").rmdir()
    with pytest.raises(DataError, match="has one class, 'cat'"):
        load_source(f"folder:{root}")


def test_the_next_readable_image_takes_its_place(root):
    paths = damage(root, "train", 9, 10, TRAIN - 1)
    loader = loader_of(root, max_bad_images=3)
    with pytest.warns(UserWarning) as caught:
        epoch = list(loader.train(1))
    assert sorted(str(entry.message) for entry in caught) == [
        f"folder: {path} is not a readable image ({REASON}); another image takes its place" for path in paths
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = list(loader.train(1))  # named and counted once
    assert all_same(epoch, again)
    indices = torch.cat([batch.indices for batch in epoch])
    expected = sorted([*range(9), *range(11, TRAIN - 1), 11, 11, 0])
    assert sorted(indices.tolist()) == expected
    for batch in epoch:
        assert numbers(batch.images, loader.facts) == batch.indices.tolist()
        assert torch.equal(batch.labels, loader.labels[batch.indices])


def test_too_many_unreadable_images(root):
    paths = damage(root, "train", 2, 3, 15)
    loader = loader_of(root, max_bad_images=2, batch_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="3 unreadable images, --max-bad-images allows 2") as caught:
            list(loader.train(1))
    assert all(f"{path} ({REASON})" in str(caught.value) for path in paths)


def test_unreadable_test_images_are_left_out(root):
    damage(root, "val", 0, 1, 2, 3, 6)
    loader = loader_of(root, max_bad_images=5)
    with pytest.warns(UserWarning, match="the test leaves it out"):
        batches = list(loader.test())
    assert [labels.tolist() for _, labels in batches] == [[1, 1, 1]]
    assert numbers(batches[0][0], loader.facts) == [4, 5, 7]


def test_training_and_test_images_are_counted_together(root):
    damage(root, "train", 1)
    damage(root, "val", 1)
    loader = loader_of(root, max_bad_images=1)
    with pytest.warns(UserWarning, match="takes its place"):
        list(loader.train(1))
    with pytest.raises(DataError, match="2 unreadable images"):
        list(loader.test())


def test_no_readable_image_at_all(root):
    damage(root, "train", *range(TRAIN))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="none of the training images is readable"):
            list(loader_of(root, max_bad_images=TRAIN).train(1))


# Transforms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["rand-m0-n8-p1", "rand-m10-n8-p1-inc1", "v0", "original", "3a", "augmix-m10-w3-d3"])
def test_policies_at_their_extremes(root, policy):
    """timm lets posterize keep 0 bits, which Pillow refuses since version 13."""
    loader = loader_of(root, auto_augment=policy)
    transform = loader._train.dataset._transform
    state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    for shade in range(120):
        image = transform(Image.new("RGB", (12, 12), (2 * shade, shade, 9)))
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    random.setstate(state[0])
    np.random.set_state(state[1])

"""Batches: the same ones whatever the number of processes and wherever an epoch is started, and what is refused."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays, load_source
from reparam.distill.loaders import Batch, Shard, augment, make_loader
from reparam.distill.mixing import Erasing
from reparam.distill.sampling import Positions
from reparam.errors import InputError

CPU = torch.device("cpu")
KINDS = ("resident", "resident erased", "folder", "folder erased")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 13 training and 5 test images, all different, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 5)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (14 + index, 18, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:02}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def arrays():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (36, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(36) % 2
    return Arrays("noise", ("a", "b"), images[:26], labels[:26], images[26:], labels[26:], shift=2, flip=True)


@pytest.fixture
def make(folder, arrays):
    """Return a function that makes the loader of a kind."""

    def made(kind, world=1, rank=0, **settings):
        settings = {"batch_size": 12, "seed": 3, **settings}
        if "erased" in kind:
            settings["erase"] = 0.6
        if "folder" not in kind:
            return make_loader(arrays, TrainConfig(**settings), torch.nn.Identity(), CPU, Shard(rank, world))
        settings.setdefault("auto_augment", "rand-m9-mstd0.5-inc1")
        config = TrainConfig(image_size=10, **settings)
        return make_loader(load_source(folder), config, torch.nn.Identity(), CPU, Shard(rank, world))

    return made


def same(first: Batch, second: Batch) -> bool:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def all_same(first, second) -> bool:
    first, second = list(first), list(second)
    return len(first) == len(second) > 0 and all(same(a, b) for a, b in zip(first, second, strict=True))


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        None,
        torch.cat([part.indices for part in parts]),
    )


# What is random depends on what -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_shards_of_a_step_are_the_batch_of_one_process(make, kind, world):
    whole = list(make(kind).train(4, order=1))
    shards = [list(make(kind, world, rank).train(4, order=1)) for rank in range(world)]
    assert len(whole) == 2 and all(len(shard) == 2 for shard in shards)
    assert all(len(batch.labels) == 12 // world for shard in shards for batch in shard)
    for step, batch in enumerate(whole):
        assert same(batch, joined([shard[step] for shard in shards]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_an_epoch_goes_on_at_any_step(make, kind, mixing):
    whole = list(make(kind, batch_size=6, **mixing).train(2))
    assert len(whole) == 4
    for start in range(4):
        loader = make(kind, batch_size=6, **mixing)
        assert all_same(whole[start:], loader.train(2, start))
        assert all_same(whole[start:], loader.train(2, start))
    assert not list(make(kind, batch_size=6, **mixing).train(2, 4))


def test_skipping_reads_nothing(make, monkeypatch):
    loader = make("folder", batch_size=4)
    read = []
    images = loader._train.dataset._folder
    monkeypatch.setattr(images, "loader", lambda path, load=images.loader: read.append(path) or load(path))
    assert len(list(loader.train(1, start=5))) == 1
    assert len(read) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_seed_epoch_and_order_each_change_order_and_augmentation(make, kind):
    """Compared image by image: the same image in another epoch is augmented in another way."""
    loader = make(kind)
    draws = [loader.train(1), loader.train(2), loader.train(1, order=1), make(kind, seed=4).train(1)]
    epochs = [joined(list(batches)) for batches in draws]
    for index, first in enumerate(epochs):
        for second in epochs[index + 1 :]:
            assert not torch.equal(first.indices, second.indices)
            places = {int(image): place for place, image in enumerate(second.indices)}
            both = [(place, places[int(image)]) for place, image in enumerate(first.indices) if int(image) in places]
            equal = [torch.equal(first.images[here], second.images[there]) for here, there in both]
            assert len(equal) > 12 and sum(equal) < len(equal) / 2


def test_no_two_images_share_a_seed():
    seeds = [
        image
        for seed, epoch, order, step in itertools.product(range(3), range(1, 4), range(2), range(4))
        for image in Positions(40, 10, 4, 1, seed, Shard()).image_seeds(epoch, order, step)
    ]
    assert len(set(seeds)) == len(seeds) == 720 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == 720  # what NumPy and torch's CPU generator look at


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_neither_used_nor_changed(make, kind):
    loader = make(kind, mixup=0.8, cutmix=1.0)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, _ = list(loader.train(1)), list(loader.test())
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        draw()
    assert all_same(first, make(kind, mixup=0.8, cutmix=1.0).train(1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_each_image_once_with_its_label(make, kind):
    loader = make(kind, batch_size=13)
    epoch = joined(list(loader.train(1)))
    assert sorted(epoch.indices.tolist()) == list(range(26))
    assert loader.labels.shape == (26,) and loader.labels.dtype == torch.int64
    assert torch.equal(loader.labels[epoch.indices], epoch.labels) and len(set(epoch.labels.tolist())) == 2


@pytest.mark.parametrize("kind", ["resident", "folder"])
def test_the_test_set_is_dealt_out_without_padding(make, kind):
    images = torch.cat([images for images, _ in make(kind).test()])
    labels = torch.cat([labels for _, labels in make(kind).test()])
    assert len(labels) == 10
    for world in (2, 3, 4):
        for rank in range(world):
            batches = list(make(kind, world, rank).test())
            assert torch.equal(torch.cat([part for part, _ in batches]), images[rank::world])
            assert torch.equal(torch.cat([part for _, part in batches]), labels[rank::world])


# Batches ------------------------------------------------------------------------------------------------------------


def test_resident_batches():
    loader = make_loader(load_source("digits"), TrainConfig(batch_size=100, seed=3), torch.nn.Identity(), CPU)
    assert loader.steps == 8 and loader.facts.image_shape == (1, 8, 8)
    assert [len(batch.labels) for batch in loader.train(1)] == [100] * 8
    images = torch.cat([images for images, _ in loader.test()])
    assert images.shape == (899, 1, 8, 8) and images.mean().abs() < 0.1 and abs(images.std() - 1) < 0.1


def test_indices_and_labels_stay_with_their_images():
    source = load_source("digits")
    assert isinstance(source, Arrays)
    loader = make_loader(source, TrainConfig(shift=0, batch_size=449), torch.nn.Identity(), CPU)
    for batch in loader.train(1):
        pixels = (batch.images * loader.facts.std[0] + loader.facts.mean[0]).mul(255).round().to(torch.uint8)
        assert torch.equal(pixels, source.x_train[batch.indices])
        assert torch.equal(batch.labels, source.y_train[batch.indices])


def test_image_size_of_resident_data():
    loader = make_loader(load_source("digits"), TrainConfig(image_size=12), torch.nn.Identity(), CPU)
    assert next(iter(loader.train(1))).images.shape == (64, 1, 12, 12)


@pytest.mark.parametrize("kind", ["resident", "folder"])
def test_size_of_the_batch(make, kind):
    """A batch larger than the training set is cut down to what all processes, pairs and parts can share."""
    for settings, size in (
        ({"batch_size": 64}, 26),
        ({"batch_size": 64, "world": 4}, 24),
        ({"batch_size": 64, "world": 4, "mixup": 0.1}, 24),
        ({"batch_size": 60, "world": 5, "cutmix": 1.0}, 20),
        ({"batch_size": 64, "accumulate": 4}, 24),
        ({"batch_size": 64, "world": 2, "accumulate": 8, "mixup": 1.0}, 16),
    ):
        loader = make(kind, **settings)
        assert (loader.batch_size, loader.steps) == (size, 1)
        assert len(next(iter(loader.train(1))).labels) == size // settings.get("world", 1)


@pytest.mark.parametrize("kind", ["resident", "folder"])
def test_limit_of_batches(make, kind):
    whole = list(make(kind, batch_size=4).train(1))
    for limit, steps in ((1, 1), (3, 3), (100, 6)):
        loader = make(kind, batch_size=4, limit_batches=limit)
        assert loader.steps == steps
        assert all_same(whole[:steps], loader.train(1))


def test_augment_moves_and_mirrors_each_image_on_its_own():
    images = torch.arange(1.0, 1 + 64 * 2 * 5 * 6).reshape(64, 2, 5, 6)
    generator = torch.Generator().manual_seed(0)
    assert augment(images, 0, False, generator) is images
    moved = augment(images, 1, True, generator)
    seen = set()
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for before, after in zip(padded, moved, strict=True):
        candidates = {
            (row, column, flip): (crop.flip(2) if flip else crop)
            for row in range(3)
            for column in range(3)
            for flip in (False, True)
            for crop in [before[:, row : row + 5, column : column + 6]]
        }
        matches = [key for key, candidate in candidates.items() if torch.equal(candidate, after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 12


def test_erasing_fills_one_rectangle_with_noise():
    images = torch.full((200, 3, 16, 16), 9.0)
    erased = Erasing(0.5)(images, range(200))
    changed = (erased != images).any(dim=1)
    touched = changed.flatten(1).any(dim=1)
    assert 70 < touched.sum() < 130 and bool((images == 9).all())
    for picture, region in zip(erased[touched], changed[touched], strict=True):
        rows, columns = region.any(dim=1).nonzero(), region.any(dim=0).nonzero()
        box = picture[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert int(region.sum()) == box[0].numel()
        assert bool((box != 9).all()) and box.unique().numel() == box.numel()
    assert torch.equal(erased[7:9], Erasing(0.5)(images[7:9], range(7, 9)))


# Mixing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_mixup(make, kind):
    plain, seen = make(kind, world=2, rank=1), set()
    mixed = make(kind, world=2, rank=1, mixup=0.8)
    for epoch in range(8):
        for before, after in zip(plain.train(epoch), mixed.train(epoch), strict=True):
            hot = torch.nn.functional.one_hot(before.labels, 2).float()
            changed = (before.labels != before.labels.flip(0)).nonzero().flatten()
            if not len(changed):
                continue
            share = after.targets[changed[0], before.labels[changed[0]]]
            seen.add(round(float(share), 4))
            torch.testing.assert_close(after.targets, share * hot + (1 - share) * hot.flip(0))
            torch.testing.assert_close(after.images, share * before.images + (1 - share) * before.images.flip(0))
            torch.testing.assert_close(after.targets.sum(dim=1), torch.ones(6))
            assert torch.equal(after.indices, before.indices)
            assert torch.equal(after.labels, before.labels if share > 0.5 else before.labels.flip(0))
    assert len(seen) > 8 and min(seen) < 0.4 and max(seen) > 0.6


def test_cutmix(make):
    plain, mixed, seen = make("resident"), make("resident", cutmix=1.0), set()
    for epoch in range(8):
        for before, after in zip(plain.train(epoch), mixed.train(epoch), strict=True):
            own = (after.images == before.images).all(dim=1)
            other = (after.images == before.images.flip(0)).all(dim=1)
            assert bool((own | other).all())
            share = own[(before.images != before.images.flip(0)).any(dim=1).flatten(1).all(dim=1)].float().mean()
            if share.isnan():
                continue
            hot = torch.nn.functional.one_hot(before.labels, 2).float()
            torch.testing.assert_close(after.targets, share * hot + (1 - share) * hot.flip(0))
            seen.add(round(float(share), 4))
    assert len(seen) > 2


def test_processes_mix_on_their_own_and_smoothing_is_in_the_targets(make):
    seen = []
    for rank in (0, 1):
        targets = torch.cat([batch.targets for batch in make("resident", 2, rank, mixup=0.8).train(1)])
        seen.append({round(value, 5) for value in targets.flatten().tolist()} - {0.0, 1.0})
    assert seen[0] and seen[1] and not seen[0] & seen[1]
    unmixed = next(iter(make("resident", mixup=0.8, label_smoothing=0.1, mix_prob=0.0).train(1)))
    plain = next(iter(make("resident").train(1)))
    assert torch.equal(unmixed.images, plain.images) and torch.equal(unmixed.labels, plain.labels)
    expected = 0.9 * torch.nn.functional.one_hot(plain.labels, 2) + 0.05
    torch.testing.assert_close(unmixed.targets, expected)
    assert plain.targets is None


def test_switch_between_mixup_and_cutmix(make):
    cutmix = next(iter(make("resident", cutmix=1.0).train(1))).images
    plain = next(iter(make("resident").train(1))).images
    assert not torch.equal(cutmix, plain)
    for share, kept in ((0.0, False), (1.0, True)):
        both = next(iter(make("resident", mixup=0.8, cutmix=1.0, mix_switch_prob=share).train(1))).images
        assert bool(((both == plain) | (both == plain.flip(0))).all()) is kept


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_augment": "rand-m9"}, "--auto-augment rand-m9 is for folder data and has no effect on noise"),
        ({"crop_scale": 0.5}, "--crop-scale 0.5 is for folder data"),
        ({"crop_pct": 0.5}, "--crop-pct 0.5 is for folder data"),
        ({"color_jitter": 0.4}, "--color-jitter 0.4 is for folder data"),
        ({"interpolation": "bicubic"}, "--interpolation bicubic is for folder data"),
        ({"repeats": 3}, "--repeats 3 is for folder data"),
        ({"max_bad_images": 1}, "--max-bad-images 1 is for folder data"),
    ],
)
def test_settings_without_effect_on_resident_data(make, settings, message):
    with pytest.raises(InputError, match=message):
        make("resident", **settings)


@pytest.mark.parametrize("kind", ["resident", "folder"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world": 5}, "--batch-size 12 is the size over all processes, and 5 .* change it to 10 or 15, or .*torchrun"),
        ({"world": 4, "mixup": 0.8}, "--batch-size 12 must give each process an even number, not 3"),
        ({"batch_size": 13, "cutmix": 0.8}, "--batch-size 13 must give each process an even number, not 13"),
        ({"world": 11, "batch_size": 22}, "26 training and 10 test images are too few for 11 processes"),
        ({"world": 3, "batch_size": 90, "accumulate": 10}, "too few for 3 processes with --accumulate 10"),
        ({"mix_prob": 0.5}, "--mix-prob 0.5 has no effect without --mixup or --cutmix"),
        ({"mixup": 0.8, "mix_switch_prob": 0.1}, "--mix-switch-prob 0.1 chooses between --mixup and --cutmix"),
    ],
)
def test_impossible_settings(make, kind, settings, message):
    with pytest.raises(InputError, match=message):
        make(kind, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 1}, "--shift is for data sets that fit into memory"),
        ({"auto_augment": "rand-q9"}, "--auto-augment 'rand-q9' is no policy of timm's; examples: rand-m9"),
        ({"auto_augment": "none"}, "--auto-augment 'none' is no policy"),
        ({"color_jitter": 0.4}, "--color-jitter 0.4 has no effect with --auto-augment"),
    ],
)
def test_impossible_settings_of_folder_data(make, settings, message):
    with pytest.raises(InputError, match=message):
        make("folder", **settings)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_impossible_shards(rank, world):
    with pytest.raises(InputError, match=f"rank {rank} is not one of {world} processes"):
        Shard(rank, world)


def test_the_crop_of_test_images(make):
    """A share of the shorter side: the model's, or the one that is asked for; training images do not change."""
    own, wide, tight = (make("folder", auto_augment=None, crop_pct=share) for share in (None, 1.0, 0.5))
    seen = [next(iter(loader.test()))[0] for loader in (own, wide, tight)]
    assert not torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[2])
    batches = [next(iter(loader.train(1))).images for loader in (own, wide)]
    assert torch.equal(*batches)


def test_replaced_settings_change_the_batches_they_name(make):
    """Each augmentation of folder data does something; a setting that is not passed on would not."""
    plain = {"auto_augment": None}
    before = next(iter(make("folder", **plain).train(1))).images
    assert torch.equal(before, next(iter(make("folder", **plain).train(1))).images)
    for change in (
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "augmix-m3-w3"},
        {"color_jitter": 0.4},
        {"crop_scale": 0.9},
        {"interpolation": "bicubic"},
        {"interpolation": "random"},
        {"flip": False},
        {"erase": 0.9},
    ):
        assert not torch.equal(before, next(iter(make("folder", **{**plain, **change}).train(1))).images), change

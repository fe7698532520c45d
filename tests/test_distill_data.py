"""Reading data by its short name: what is read, and the message for everything that cannot be."""

import gzip
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from reparam.distill.data import Arrays, Folders, balanced_subset, load_source, load_test
from reparam.errors import DataError


def npz_arrays(train=20, test=10, classes=4, size=8, channels=3):
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (train, size, size, channels), np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": generator.integers(0, 256, (test, size, size, channels), np.uint8),
        "y_test": np.arange(test) % classes,
    }


def write_npz(path, **changes):
    arrays = {**npz_arrays(), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return f"npz:{path}"


def write_folder(root, classes=("cat", "dog"), splits=("train", "val"), images=3, size=12):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                Image.new("RGB", (size, size), (60 * label, 10 * index, 90)).save(folder / f"{index}.png")
    return f"folder:{root}"


def idx(array):
    header = struct.pack(">I", 0x0800 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion(root, packed):
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 30), ("t10k", 20)):
        images = np.arange(count * 28 * 28, dtype=np.uint64).reshape(count, 28, 28) % 251
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            file = root / f"{split}-{name}-ubyte"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                file.write_bytes(idx(array))


def test_digits():
    source = load_source("digits")
    assert isinstance(source, Arrays)
    assert source.x_train.shape == (898, 1, 8, 8) and source.x_test.shape == (899, 1, 8, 8)
    assert source.x_train.dtype == torch.uint8 and source.x_train.max() == 255
    assert len(source.classes) == 10 and not source.flip
    counts = source.y_test.bincount()
    assert counts.min() >= 85 and counts.sum() == 899
    assert torch.equal(load_source("digits").x_test, source.x_test)


def test_npz(tmp_path):
    source = load_source(write_npz(tmp_path / "a.npz"))
    assert isinstance(source, Arrays)
    assert source.x_train.shape == (20, 3, 8, 8) and source.in_chans == 3 and len(source.classes) == 4
    assert torch.equal(source.x_train[3, 1], torch.from_numpy(npz_arrays()["x_train"][3, :, :, 1]))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_plain_packed_and_in_torchvisions_layout(tmp_path, packed, below):
    write_fashion(tmp_path / below, packed)
    source = load_source(f"fashion-mnist:{tmp_path}")
    assert isinstance(source, Arrays)
    assert source.x_train.shape == (30, 1, 28, 28) and source.x_test.shape == (20, 1, 28, 28)
    assert source.classes[0] == "T-shirt/top" and source.x_train[0, 0, 0, 5] == 5
    assert source.y_train.tolist() == [index % 10 for index in range(30)]


@pytest.mark.parametrize(("name", "class_name"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_through_torchvision(tmp_path, monkeypatch, name, class_name):
    dataset = getattr(torchvision.datasets, class_name)
    count = len(dataset.train_list) and (10 if name == "cifar10" else 100)

    def load(self, root, train):
        self.data = np.zeros((count, 32, 32, 3), np.uint8)
        self.targets = list(range(count))
        self.classes = [f"class {index}" for index in range(count)]

    monkeypatch.setattr(dataset, "__init__", load)
    (tmp_path / dataset.base_folder).mkdir()
    for path in (tmp_path, tmp_path / dataset.base_folder / ""):
        (tmp_path / dataset.base_folder / "file").touch()
        source = load_source(f"{name}:{path}")
        assert isinstance(source, Arrays)
        assert source.x_train.shape == (count, 3, 32, 32) and source.flip and source.shift == 4


def test_cifar_damaged(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="needs the unpacked folder cifar-10-batches-py with unchanged files"):
        load_source(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("second", ["val", "test"])
def test_folder(tmp_path, second):
    source = load_source(write_folder(tmp_path, splits=("train", second)))
    assert isinstance(source, Folders)
    assert source.classes == ("cat", "dog") and len(source.train) == 6 and len(source.test) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown data 'digit'; did you mean 'digits'?; known: digits, fashion-mnist:DIR"),
        ("cifar:x", "unknown data 'cifar:x'; did you mean 'cifar10', 'cifar100'?"),
        ("digits:x", "unknown data 'digits:x'"),
        ("cifar10", "data 'cifar10' lacks its path: write cifar10:DIR"),
        ("npz:", "data 'npz:' lacks its path: write npz:FILE"),
        ("folder:MISSING", "folder: no such folder: MISSING"),
        ("cifar100:MISSING", "cifar100: no such folder: MISSING"),
        ("npz:MISSING", "npz: no such file: MISSING"),
    ],
)
def test_unknown_or_missing(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_source(spec)
    assert message in str(caught.value)


def test_empty_folders(tmp_path):
    with pytest.raises(DataError, match=r"the folder .* is empty"):
        load_source(f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="train is empty; it needs one folder of images per class"):
        load_source(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz; looked in"):
        load_source(f"fashion-mnist:{tmp_path}")


def test_folder_without_a_split(tmp_path):
    spec = write_folder(tmp_path, splits=("train",))
    with pytest.raises(DataError, match=r"needs train/ and val/ \(or test/\).*val is missing"):
        load_source(spec)


def test_test_images_alone(tmp_path):
    """Nothing of training needs to exist; the images and labels are those that a run would be tested on."""
    both = [write_npz(tmp_path / "both.npz"), write_folder(tmp_path / "both"), f"fashion-mnist:{tmp_path / 'f'}"]
    write_fashion(tmp_path / "f", False)
    whole = [load_source(spec) for spec in both]
    for path in (tmp_path / "f").glob("train-*"):
        path.unlink()
    alone = [write_npz(tmp_path / "test.npz", x_train=None, y_train=None)]
    alone += [write_folder(tmp_path / "alone", splits=("test",)), both[2]]
    for spec, expected in zip(alone, whole, strict=True):
        found = load_test(spec, len(expected.classes))
        assert found.classes == expected.classes and found.in_chans == expected.in_chans
        if isinstance(found, Arrays):
            assert torch.equal(found.x_test, expected.x_test) and torch.equal(found.y_test, expected.y_test)
        else:
            assert found.test.targets == expected.test.targets
    assert torch.equal(load_test("digits", 10).x_test, load_source("digits").x_test)


@pytest.mark.parametrize(
    ("spec", "classes", "message"),
    [
        ("digits", 9, "data 'digits' has 10 classes, and the networks tell 9 apart"),
        ("FOLDER", 3, "has 2 classes, and the networks tell 3 apart"),
        ("NPZ", 3, "y_test has labels from 0 to 3, the training data has classes 0 to 2"),
        ("nope", 3, "unknown data 'nope'"),
    ],
)
def test_test_images_of_other_classes(tmp_path, spec, classes, message):
    made = {"FOLDER": write_folder(tmp_path, splits=("val",)), "NPZ": write_npz(tmp_path / "a.npz")}
    with pytest.raises(DataError, match=message):
        load_test(made.get(spec, spec), classes)


def test_folder_with_a_class_without_images(tmp_path):
    spec = write_folder(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "train" / "eel" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images in .*train for class 'eel'"):
        load_source(spec)


def test_folder_with_different_classes(tmp_path):
    spec = write_folder(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(DataError, match="only in the first: 'cat'; only in the second: 'cow'"):
        load_source(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test; it has x_train, y_train, x_test"),
        (
            {"x_train": np.zeros((20, 8, 8, 3), np.float32)},
            r"x_train .* must be uint8 .* got float32",
        ),
        ({"x_test": np.zeros((10, 8, 8), np.uint8)}, r"x_test .* got uint8 \[10, 8, 8\]"),
        ({"y_train": np.zeros((20, 4), np.int64)}, r"y_train .* must be integer labels \[N\], got int64 \[20, 4\]"),
        ({"y_train": np.linspace(0, 1, 20)}, "y_train .* got float64"),
        ({"y_train": np.arange(19) % 4}, "x_train has 20 images and y_train 19 labels"),
        ({"x_test": np.zeros((10, 9, 8, 3), np.uint8)}, r"training images are \[8, 8, 3\], test images \[9, 8, 3\]"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, np.int64)}, "x_train has 0 images"),
        ({"y_train": np.arange(20) % 4 * 2}, r"no training images for class 1, 3, 5 of 7"),
        ({"y_test": np.arange(10)}, "y_test has labels from 0 to 9, the training data has classes 0 to 3"),
        ({"y_train": np.arange(20) % 4 - 1}, "y_train has labels from -1 to 2"),
        ({"y_train": np.array([object()] * 20)}, "damaged or not an npz file"),
    ],
)
def test_malformed_npz(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_source(write_npz(tmp_path / "bad.npz", **changes))


def test_truncated_files(tmp_path):
    spec = write_npz(tmp_path / "cut.npz")
    content = (tmp_path / "cut.npz").read_bytes()
    for size in (0, 7, len(content) // 2):
        (tmp_path / "cut.npz").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"cut\.npz is damaged or not an npz file"):
            load_source(spec)
    (tmp_path / "cut.npz").write_text("no arrays at all")
    with pytest.raises(DataError, match=r"cut\.npz is damaged.*holds pickled objects or is no npz file"):
        load_source(spec)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match="holds a single array"):
        load_source(f"npz:{tmp_path / 'single.npy'}")
    write_fashion(tmp_path / "fashion", packed=True)
    images = tmp_path / "fashion" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_source(f"fashion-mnist:{tmp_path / 'fashion'}")


def test_limit_is_balanced_and_the_same_every_time():
    source = load_source("digits", limit_train=105)
    assert isinstance(source, Arrays)
    counts = source.y_train.bincount()
    assert counts.sum() == 105 and counts.max() - counts.min() <= 1
    assert torch.equal(source.x_train, load_source("digits", limit_train=105).x_train)
    labels = torch.tensor([0] * 50 + [1] * 3)
    assert labels[balanced_subset(labels, 20)].bincount().tolist() == [17, 3]
    assert not torch.equal(balanced_subset(labels, 20, seed=1), balanced_subset(labels, 20, seed=2))


def test_limit_of_folders(tmp_path):
    source = load_source(write_folder(tmp_path), limit_train=4)
    assert isinstance(source, Folders)
    assert sorted(source.train.targets) == [0, 0, 1, 1] and len(source.train) == 4


@pytest.mark.parametrize(("limit", "message"), [(9, "leaves out whole classes"), (899, "has only 898 training images")])
def test_limit_out_of_range(limit, message):
    with pytest.raises(DataError, match=message):
        load_source("digits", limit_train=limit)


def test_image_that_cannot_be_read(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.png").write_bytes(b"no image")
    source = load_source(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"x\.png is not a readable image .*repair or remove it"):
        source.train[0]
    missing = tmp_path / "train" / "a" / "x.png"
    missing.unlink()
    with pytest.raises(DataError, match=r"x\.png is not a readable image \(No such file"):
        source.train[0]

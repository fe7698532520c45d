"""Image classification data by a short name: ``digits``, ``cifar10:DIR``, ``folder:DIR``, ``npz:FILE`` ...

``load_source`` reads and checks the data; small sets become resident uint8 tensors (`Arrays`), image folders stay on
disk (`Folders`). Turning a source into batches is the business of ``reparam.distill.loaders``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reparam.distill.array_files import read_idx, read_npz
from reparam.errors import DataError, near_matches


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set held in memory.

    Attributes:
        name: the kind of data, without its path.
        classes: name of each class.
        x_train: uint8 images ``[N, C, H, W]``.
        y_train: int64 class indices ``[N]``.
        x_test: uint8 images ``[M, C, H, W]``.
        y_test: int64 class indices ``[M]``.
        shift: default random shift of training images, in pixels.
        flip: whether training images are mirrored at random by default.
    """

    name: str
    classes: tuple[str, ...]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    shift: int
    flip: bool

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return int(self.x_train.shape[1])


@dataclass(frozen=True, eq=False)
class Folders:
    """Two image folders, one sub-folder per class; the data sets are torchvision's ``ImageFolder``."""

    name: str
    classes: tuple[str, ...]
    train: Any
    test: Any
    in_chans: int = 3


Source = Arrays | Folders


@dataclass(frozen=True)
class Facts:
    """What a run reports about its data: counts, image shape ``(C, H, W)``, normalisation of images in [0, 1]."""

    name: str
    classes: int
    train_images: int
    test_images: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int | None
    flip: bool


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, in units of full scale."""


class UnreadableImage(DataError):
    """An image file that cannot be decoded.

    Args:
        path: the file.
        reason: what is wrong with it, in a word or two.
        way_out: what to do.
    """

    def __init__(self, path: str, reason: str, way_out: str = "repair or remove it") -> None:
        super().__init__(f"folder: {path} is not a readable image ({reason}); {way_out}")
        self.path, self.reason = path, reason


def load_source(spec: str, limit_train: int | None = None) -> Source:
    """Read the data set that ``spec`` names.

    Args:
        spec: ``digits``, or a kind and a path: ``fashion-mnist:DIR``, ``cifar10:DIR``, ``cifar100:DIR``,
            ``folder:DIR``, ``npz:FILE``.
        limit_train: keep only so many training images, class balanced; the choice does not depend on any seed.

    Raises:
        DataError: unknown kind, missing path, or files that are missing, damaged, empty or inconsistent.
    """
    source = _read(spec, None)
    if len(source.classes) < 2:
        raise DataError(f"data {spec!r} has one class, {source.classes[0]!r}; there is nothing to tell apart")
    return source if limit_train is None else _limited(source, limit_train)


def load_test(spec: str, classes: int) -> Source:
    """Read the test images alone; those of training need not exist, and the source has the test images in their place.

    Args:
        spec: see `load_source`.
        classes: how many the networks to be tested tell apart.

    Raises:
        DataError: see `load_source`; or the data has another number of classes.
    """
    source = _read(spec, classes)
    if len(source.classes) != classes:
        raise DataError(
            f"data {spec!r} has {len(source.classes)} classes, and the networks tell {classes} apart; name test data "
            "with the same classes as the data of the run"
        )
    return source


def _read(spec: str, tested: int | None) -> Source:
    """Read both parts of a data set, or the test images alone, for networks with ``tested`` classes."""
    kind, separator, path = spec.partition(":")
    if kind == "digits" and not separator:
        return _digits(tested)
    if kind in _READERS and path:
        return _READERS[kind](Path(path).expanduser(), tested)
    if kind in _READERS:
        what = "FILE" if kind == "npz" else "DIR"
        raise DataError(f"data {spec!r} lacks its path: write {kind}:{what}")
    hint = near_matches(kind, ["digits", *_READERS])
    known = ", ".join(["digits", *(f"{name}:{'FILE' if name == 'npz' else 'DIR'}" for name in _READERS)])
    raise DataError(f"unknown data {spec!r}{hint}; known: {known}")


def _parts(tested: int | None, train: Any, test: Any) -> tuple[Any, ...]:
    """What to read; the first part of it is trained on, the last one is the test, and they may be the same."""
    return (train, test) if tested is None else (test,)


def _digits(tested: int | None) -> Arrays:
    """Return scikit-learn's 1,797 digits: 8x8 grey images, half of each class for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    split = train_test_split(images, digits.target, test_size=0.5, stratify=digits.target, random_state=0)
    x_train, x_test, y_train, y_test = split
    parts = _parts(tested, (x_train, y_train), (x_test, y_test))
    return _arrays("digits", parts, shift=1, flip=False, classes=[str(digit) for digit in range(10)])


def _fashion_mnist(root: Path, tested: int | None) -> Arrays:
    """Read the four idx files, plain or gzipped, in ``root`` or in torchvision's ``root/FashionMNIST/raw``."""
    from torchvision.datasets import FashionMNIST

    _require_folder(root, "fashion-mnist")
    folders = [root, root / "raw", root / "FashionMNIST" / "raw"]
    splits = _parts(tested, "train", "t10k")
    images = [read_idx(_idx_file(folders, split, "images"))[..., None] for split in splits]
    labels = [read_idx(_idx_file(folders, split, "labels")) for split in splits]
    parts = list(zip(images, labels, strict=True))
    return _arrays("fashion-mnist", parts, shift=2, flip=True, classes=FashionMNIST.classes)


def _idx_file(folders: Sequence[Path], split: str, kind: str) -> Path:
    name = f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(f"fashion-mnist: no file {name} or {name}.gz; looked in {looked}")


def _cifar(name: str, class_name: str, root: Path, tested: int | None) -> Arrays:
    """Read CIFAR's Python version through torchvision, which compares checksums before it unpickles."""
    import torchvision

    dataset = getattr(torchvision.datasets, class_name)
    _require_folder(root, name)
    root = root.parent if root.name == dataset.base_folder else root
    try:
        read = [dataset(root, train=train) for train in _parts(tested, True, False)]
    except RuntimeError as error:
        raise DataError(
            f"{name}: {root} needs the unpacked folder {dataset.base_folder} with unchanged files "
            f"(from {dataset.url}): {error}"
        ) from error
    parts = [(part.data, np.asarray(part.targets)) for part in read]
    return _arrays(name, parts, shift=4, flip=True, classes=read[0].classes)


def _npz(path: Path, tested: int | None) -> Arrays:
    parts = read_npz(path, _parts(tested, "train", "test"))
    classes = None if tested is None else [str(index) for index in range(tested)]
    return _arrays("npz", parts, shift=parts[0][0].shape[1] // 8, flip=False, classes=classes)


def _folder(root: Path, tested: int | None) -> Folders:
    from torchvision.datasets import ImageFolder

    _require_folder(root, "folder")
    train_root = root / "train"
    test_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    roots = _parts(tested, train_root, test_root)
    needed = " and ".join(_parts(tested, "train/", "val/ (or test/)"))
    for split in roots:
        if not split.is_dir():
            raise DataError(f"folder: {root} needs {needed}, each with one folder per class; {split} is missing")
        _check_classes(split)
    read = [ImageFolder(split, loader=_read_image) for split in roots]
    train, test = read[0], read[-1]
    if train.classes != test.classes:
        only_train, only_test = set(train.classes) - set(test.classes), set(test.classes) - set(train.classes)
        raise DataError(
            f"folder: {train_root} and {test_root} have different classes; "
            f"only in the first: {_listed(only_train)}; only in the second: {_listed(only_test)}"
        )
    return Folders("folder", tuple(train.classes), train, test)


def _read_image(path: str) -> Any:
    """Read one image; PIL's own message says neither what was being read nor what to do."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                reason = f"its values, mode {image.mode}, have no known range"
                raise UnreadableImage(path, reason, "convert it to 8 or 16 bits")
            return _in_colour(image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they like: OSError, ValueError, struct.error
        reason = "truncated" if "truncated" in str(error) else getattr(error, "strerror", None) or type(error).__name__
        raise UnreadableImage(path, reason) from error


def _in_colour(image: Any) -> Any:
    """Return an image of 8 bits in RGB; PIL would cut everything above 255 off one of 16 bits."""
    if image.mode.startswith("I;16"):
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _check_classes(split: Path) -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry for entry in split.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"folder: {split} is empty; it needs one folder of images per class")
    empty = [
        entry.name for entry in classes if not any(file.suffix.lower() in IMG_EXTENSIONS for file in entry.rglob("*"))
    ]
    if empty:
        raise DataError(
            f"folder: no images in {split} for class {_listed(empty)} (looked for {', '.join(IMG_EXTENSIONS)}); "
            "add images or remove the folder"
        )


def _require_folder(root: Path, kind: str) -> None:
    if not root.is_dir():
        raise DataError(f"{kind}: no such folder: {root}")
    if not any(root.iterdir()):
        raise DataError(f"{kind}: the folder {root} is empty")


def _arrays(
    name: str,
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    shift: int,
    flip: bool,
    classes: Sequence[str] | None = None,
) -> Arrays:
    """Check sizes and labels, and turn images ``[N, H, W, C]`` into tensors ``[N, C, H, W]``.

    Args:
        name: the kind of data.
        parts: images and labels, of training and test, or of the test alone (see `_parts`).
        shift: see `Arrays`.
        flip: see `Arrays`.
        classes: their names; default: those that the labels of training count.
    """
    (x_train, y_train), (x_test, y_test) = parts[0], parts[-1]
    for split, images, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(images) == 0 or len(images) != len(labels):
            raise DataError(f"{name}: x_{split} has {len(images)} images and y_{split} {len(labels)} labels")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(f"{name}: training images are {list(x_train.shape[1:])}, test images {list(x_test.shape[1:])}")
    count = len(classes) if classes is not None else int(max(y_train.max(), 0)) + 1
    _check_labels(name, y_train if len(parts) > 1 else None, y_test, count)
    names = tuple(classes) if classes is not None else tuple(str(index) for index in range(count))
    train, test = (_channels_first(x_train), _labels(y_train)), (_channels_first(x_test), _labels(y_test))
    return Arrays(name, names, *train, *test, shift=shift, flip=flip)


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _check_labels(name: str, y_train: np.ndarray | None, y_test: np.ndarray, count: int) -> None:
    if y_train is not None:
        present = set(np.unique(y_train).tolist())
        missing = [index for index in range(count) if index not in present]
        if missing:
            raise DataError(
                f"{name}: no training images for class {_listed(missing)} of {count} (classes count from 0)"
            )
    for split, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels is not None and (labels.min() < 0 or labels.max() >= count):
            raise DataError(
                f"{name}: {split} has labels from {labels.min()} to {labels.max()}, "
                f"the training data has classes 0 to {count - 1}"
            )


def _limited(source: Source, count: int) -> Source:
    """Keep ``count`` training images, as many of each class as there are, chosen by a fixed seed."""
    labels = source.y_train if isinstance(source, Arrays) else torch.tensor(source.train.targets)
    if count < len(source.classes):
        raise DataError(f"--limit-train {count} leaves out whole classes: {source.name} has {len(source.classes)}")
    if count > len(labels):
        raise DataError(f"--limit-train {count}: {source.name} has only {len(labels)} training images")
    keep = balanced_subset(labels, count)
    if isinstance(source, Arrays):
        kept = {"x_train": source.x_train[keep], "y_train": source.y_train[keep]}
        return Arrays(**{**source.__dict__, **kept})
    source.train.samples = [source.train.samples[index] for index in keep.tolist()]
    source.train.targets = [target for _, target in source.train.samples]
    source.train.imgs = source.train.samples
    return source


def balanced_subset(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return sorted indices of ``count`` images whose classes differ in size by at most one where the data allows it.

    Args:
        labels: class indices ``[N]``.
        count: number of images to keep, at most N.
        seed: which images are drawn.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return order[rank[order].argsort(stable=True)][:count].sort().values


def _listed(names: Sequence[Any] | set[str]) -> str:
    shown = [repr(name) if isinstance(name, str) else str(name) for name in sorted(names)]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") if shown else "none"


_READERS: dict[str, Callable[[Path, int | None], Source]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": functools.partial(_cifar, "cifar10", "CIFAR10"),
    "cifar100": functools.partial(_cifar, "cifar100", "CIFAR100"),
    "folder": _folder,
    "npz": _npz,
}

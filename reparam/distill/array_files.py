"""Arrays from files: idx as MNIST has it, plain or gzipped, and npz. Nothing in a file is executed."""

from __future__ import annotations

import gzip
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reparam.errors import DataError


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of images ``[N, H, W]`` or labels ``[N]`` with torchvision, which needs it unpacked."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    read = read_image_file if "images" in path.name else read_label_file
    try:
        if path.suffix != ".gz":
            return np.asarray(read(str(path)))
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder, path.stem)
            plain.write_bytes(gzip.decompress(path.read_bytes()))
            return np.asarray(read(str(plain)))
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged or not an idx file: {error or type(error).__name__}") from error


def read_npz(path: Path, splits: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read images ``x_SPLIT`` and labels ``y_SPLIT`` of splits from an npz file; pickled content is refused."""
    if not path.is_file():
        raise DataError(f"npz: no such file: {path}")
    names = [f"{letter}_{split}" for split in splits for letter in "xy"]
    try:
        with path.open("rb") as file:
            arrays = _members(path, names, np.load(file, allow_pickle=False))
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        reason = "it holds pickled objects or is no npz file; write plain arrays with numpy.savez"
        reason = reason if "pickle" in str(error) else str(error)
        raise DataError(f"npz: {path} is damaged or not an npz file: {reason}") from error
    for split in splits:
        _check_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
    return [(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in splits]


def _members(path: Path, names: Sequence[str], content: Any) -> dict[str, np.ndarray]:
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise DataError(f"npz: {path} holds a single array; it needs {', '.join(names)}")
    missing = [name for name in names if name not in content.files]
    if missing:
        raise DataError(f"npz: {path} lacks {', '.join(missing)}; it has {', '.join(content.files) or 'nothing'}")
    return {name: content[name] for name in names}


def _check_split(path: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(
            f"npz: x_{split} in {path} must be uint8 images [N, H, W, C], got {images.dtype} {list(images.shape)}"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"npz: y_{split} in {path} must be integer labels [N], got {labels.dtype} {list(labels.shape)}")

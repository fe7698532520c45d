"""Options that several commands share, and what they stand for. torch waits until a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.errors import InputError, near_matches

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL_HELP = "timm name, path/to/file.py:callable, or package.module:callable"


class Parser(argparse.ArgumentParser):
    """Refuses unknown options with the usage of the command that was given, and near matches."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ``ArgumentParser``."""
        found, rest = super().parse_known_args(args, namespace)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            word = unknown[0].partition("=")[0]
            self.error(f"unknown option {word}{near_matches(word, self._option_string_actions)}")
        return found, rest


# Options -------------------------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, *, checkpoint: bool = True) -> None:
    """Add MODEL, how to build it and, with ``checkpoint``, where its weights come from."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    if checkpoint:
        parser.add_argument("--checkpoint", metavar="FILE", help="weights to load: safetensors or torch.save")
        parser.add_argument("--pretrained", action="store_true", help="load the pretrained weights (may download)")
    add_building(parser, ema=checkpoint)


def add_building(parser: argparse.ArgumentParser, *, ema: bool = True) -> None:
    """Add the options that say how a model is built."""
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes to build the model with")
    parser.add_argument("--in-chans", type=int, metavar="N", help="number of input channels to build the model with")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random weights and noise (default 0)")
    if ema:
        parser.add_argument("--ema", action="store_true", help="read the averaged weights of a checkpoint")


def add_input_size(parser: argparse.ArgumentParser) -> None:
    """Add the shape of one sample."""
    parser.add_argument("--input-size", type=_size, metavar="C,H,W", help="shape of one sample, without the batch")


def _size(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 3,224,224")
    return sizes


# What they stand for -------------------------------------------------------------------------------------------------


def load(
    options: argparse.Namespace, spec: str, checkpoint: str | None = None, *, ema: bool | None = None
) -> nn.Module:
    """Return the model that ``spec`` names, built and loaded as the options say."""
    import torch

    import reparam.distill.models  # noqa: F401 (registers the networks of the papers with timm)
    from reparam.models import load_model

    torch.manual_seed(options.seed)
    wants_ema = getattr(options, "ema", False) if ema is None else ema and checkpoint is not None
    return load_model(
        spec,
        num_classes=options.num_classes,
        in_chans=options.in_chans,
        checkpoint=checkpoint,
        pretrained=getattr(options, "pretrained", False),
        ema=wants_ema,
    )


def example(options: argparse.Namespace) -> Tensor | None:
    """Return an input of the size that was given, or None."""
    if options.input_size is None:
        return None
    import torch

    return torch.randn(2, *options.input_size, generator=torch.Generator().manual_seed(options.seed))


def parameters(model: nn.Module) -> str:
    """Return the number of parameters for people to read."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


def require_folder(path: str) -> None:
    """Fail before the work, not after it."""
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {Path(path).parent}")

"""One training run from settings to files. The methods decide what is learned; this module only drives them."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

import reparam.distill.models  # noqa: F401  (registers the networks with timm)
from reparam.distill import evaluate, files, report
from reparam.distill.config import TrainConfig
from reparam.distill.data import Arrays, Source, load_source
from reparam.distill.files import RunFolder, open_run_folder
from reparam.distill.loaders import Loader, epoch_seed, make_loader, seed_everything
from reparam.distill.methods.base import Method, Networks, Part, get_method
from reparam.distill.optim import make_optimizer, make_scheduler
from reparam.distill.students import build_student, check_fit
from reparam.errors import InputError, TrainingError


@dataclass
class Run:
    """Everything alive during a run; ``steps`` and ``epoch`` count what is finished."""

    config: TrainConfig
    method: Method
    networks: Networks
    loader: Loader
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    folder: RunFolder
    progress: report.Progress
    steps: int = 0
    epoch: int = 0


def train(
    config: TrainConfig,
    *,
    student: nn.Module | None = None,
    source: Source | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a student as ``config`` says and write everything into its output folder.

    Args:
        config: the settings.
        student: the network to train, untouched by a run with a teacher; default: the one that ``config`` names.
        source: the data, if it is loaded already.
        command: what the user typed, for config.json.

    Returns:
        The content of summary.json.

    Raises:
        DataError: the data cannot be used.
        InputError: a setting is wrong, or the output folder holds another run.
        ModelError: the network does not fit the data.
        TrainingError: a loss or a weight became NaN or Inf; the files of the last good epoch are kept.
    """
    started = time.perf_counter()
    config = config.resolved()
    files.check_output(config)
    with _threads_restored():
        run, blank = _start(config, student, source, command)
        try:
            _checkpoint(run)
            for _ in range(config.epochs):
                _epoch(run)
        finally:
            run.progress.close()
        summary = _finish(run, blank, started)
    run.progress.say(report.closing(summary, run.folder.path))
    return summary


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" prefers a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    return device


def versions() -> dict[str, str]:
    """Return the versions of Python, reparam and the libraries that a run depends on."""
    found = {"python": platform.python_version()}
    for package in ("reparam", "torch", "timm", "torchvision", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _start(
    config: TrainConfig, student: nn.Module | None, source: Source | None, command: Sequence[str]
) -> tuple[Run, nn.Module]:
    """Load and check everything; return the run, and an untrained copy of the student for the final check."""
    device = resolve_device(config.device)
    source = source if source is not None else load_source(config.data, config.limit_train)
    _set_threads(config, source)
    seed_everything(config.seed)
    student = student if student is not None else build_student(config, len(source.classes), source.in_chans)
    student.to(device)
    loader = make_loader(source, config, student, device)
    example = next(iter(loader.test()))[0][:2]
    check_fit(student, example, loader.facts, config.model)
    blank = copy.deepcopy(student)
    method = get_method(config.method)
    networks = method.prepare(student, example, config)
    optimizer = make_optimizer(networks.owner, config)
    scheduler = make_scheduler(optimizer, config, loader.steps)
    folder = open_run_folder(config)
    folder.write_config(config, versions(), command)
    progress = report.Progress(config.epochs, loader.steps, config.quiet)
    progress.say(report.opening(config, loader.facts, _parameters(networks), str(device)))
    return Run(config, method, networks, loader, optimizer, scheduler, folder, progress), blank


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_threads(config: TrainConfig, source: Source) -> None:
    tiny = isinstance(source, Arrays) and source.x_train[0, 0].numel() <= 16 * 16 and config.image_size is None
    if config.threads or tiny:
        torch.set_num_threads(config.threads or 1)


def _epoch(run: Run) -> None:
    """Train for one epoch, evaluate, and write metrics and checkpoint."""
    started = time.perf_counter()
    epoch, lr = run.epoch + 1, run.optimizer.param_groups[0]["lr"]
    seed_everything(epoch_seed(run.config.seed, epoch))
    meter = _Meter(run, epoch)
    run.networks.train()
    for images, labels in run.loader.train(epoch):
        _step(run, images, labels, meter)
    meter.check()
    if not evaluate.all_finite(run.networks.owner):
        raise _diverged(run, f"a weight became NaN or Inf in epoch {epoch}, by step {run.steps}")
    run.epoch = epoch
    row = {"epoch": epoch, "step": run.steps, "lr": lr, **meter.averages(), **_accuracies(run)}
    row["seconds"] = round(time.perf_counter() - started, 3)
    run.folder.add_metrics(row)
    _checkpoint(run)
    run.progress.epoch(row)


def _step(run: Run, images: Tensor, labels: Tensor, meter: _Meter) -> None:
    run.optimizer.zero_grad(set_to_none=True)
    for part in run.method.step(run.networks, images, labels, run.config):
        meter.add(part, labels)
        part.loss.backward()
    if run.config.clip_grad:
        nn.utils.clip_grad_norm_(run.networks.owner.parameters(), run.config.clip_grad)
    run.optimizer.step()
    run.steps += 1
    run.scheduler.step_update(run.steps)
    run.progress.step()


class _Meter:
    """Collects losses and training accuracy of an epoch without waiting for the device at every step."""

    def __init__(self, run: Run, epoch: int) -> None:
        self._run, self._epoch = run, epoch
        self._losses: dict[str, list[Tensor]] = {name: [] for name in run.method.parts}
        self._correct: dict[str, list[Tensor]] = {name: [] for name in run.method.parts}
        self._seen = 0
        self._checked = 0

    def add(self, part: Part, labels: Tensor) -> None:
        """Take in one loss; on the CPU it is checked at once, elsewhere every 50 steps."""
        self._losses[part.network].append(part.loss.detach())
        self._correct[part.network].append((part.logits.detach().argmax(dim=1) == labels).float().mean())
        self._seen += 1
        if part.loss.device.type == "cpu" or self._seen % 50 == 0:
            self.check()

    def check(self) -> None:
        """Raise if a loss since the last check was NaN or Inf; the message names the first one."""
        for step in range(self._checked, max(map(len, self._losses.values()))):
            for name, losses in self._losses.items():
                if step < len(losses) and not math.isfinite(value := losses[step].item()):
                    where = f"epoch {self._epoch}, step {step + 1} of {self._run.loader.steps}"
                    raise _diverged(self._run, f"the {name}'s loss is {value} in {where}")
        self._checked = min(map(len, self._losses.values()))

    def averages(self) -> dict[str, float]:
        """Return mean loss and training accuracy in percent of each network."""
        averages = {}
        for name in self._losses:
            averages[f"{name}_loss"] = torch.stack(self._losses[name]).mean().item()
            averages[f"{name}_train_top1"] = 100 * torch.stack(self._correct[name]).mean().item()
        return averages


def _diverged(run: Run, what: str) -> TrainingError:
    kept = f"the weights after epoch {run.epoch}" if run.epoch else "the initial weights (no epoch was finished)"
    return TrainingError(
        f"{what}; {run.folder.path / files.STUDENT} keeps {kept}. "
        f"Try a smaller --lr (now {run.config.lr:g}), --clip-grad or more --warmup-epochs"
    )


def _accuracies(run: Run) -> dict[str, float]:
    run.networks.train(False)
    accuracies = {"student_top1": evaluate.top1(run.networks.student, run.loader.test())}
    if run.networks.teacher is not None:
        accuracies["teacher_top1"] = evaluate.top1(run.networks.teacher, run.loader.test())
    return accuracies


def _checkpoint(run: Run) -> None:
    run.folder.save_networks(run.networks.extract(), run.networks.teacher)


def _parameters(networks: Networks) -> dict[str, int | None]:
    teacher = networks.teacher
    return {
        "student": evaluate.count_parameters(networks.extract()),
        "teacher": None if teacher is None else evaluate.count_parameters(teacher),
    }


def _finish(run: Run, blank: nn.Module, started: float) -> dict[str, Any]:
    """Load the written student into a fresh network, measure it, and write summary.json."""
    device = next(run.networks.owner.parameters()).device
    blank.load_state_dict(load_file(run.folder.path / files.STUDENT), strict=True)
    exported = blank.to(device).eval()
    run.networks.train(False)
    parity = evaluate.parity(run.networks.student, exported, run.loader.test())
    best = max(run.folder.rows, key=lambda row: row["student_top1"])
    summary = {
        "student_top1": evaluate.top1(exported, run.loader.test()),
        "teacher_top1": run.folder.rows[-1].get("teacher_top1"),
        "baseline": run.config.baseline,
        "method": run.method.name,
        "parity": parity.as_dict(),
        "parity_passed": parity.passed,
        "seconds": round(time.perf_counter() - started, 2),
        "parameters": _parameters(run.networks),
        "epochs": run.epoch,
        "steps": run.steps,
        "best_student_top1": best["student_top1"],
        "best_epoch": best["epoch"],
        "data": asdict(run.loader.facts),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "config": asdict(run.config),
        "versions": versions(),
    }
    files.write_json(run.folder.path / files.SUMMARY, summary)
    return summary

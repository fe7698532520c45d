"""``reparam coverage``: the options and what they start. torch and timm wait until a run starts."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.errors import InputError

if TYPE_CHECKING:
    from reparam.coverage.catalogue import Entry
    from reparam.coverage.results import Results

_DESCRIPTION = """\
Plan, expand, verify and extract a list of models, with random weights, each in a process of its own, and write what
became of them. Without MODEL: the smallest network of each family of timm, and the networks of torchvision. A run that
was ended goes on where it stopped; exit code 1 if a model fails, is not exact, or does not come back."""

_EPILOG = """\
examples:
  reparam coverage resnet18 convnext_atto torchvision.models:googlenet
  reparam coverage --output coverage.json --page coverage.md
  reparam coverage --plan-only --all --output coverage_plan_all.json"""

_CHOICES = ("all", "timm", "torchvision", "classification", "segmentation", "video", "optical_flow", "detection")
"""The choices of the catalogue, written out because that imports torch; a test compares them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``reparam coverage`` to ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="*", help="timm name, path/to/file.py:callable, or package.module:callable")
    add("--ratio", type=int, default=2, metavar="R", help="replicas of every channel (default 2)")
    add("--group", choices=_CHOICES, help="which of the default models (default: all)")
    add("--all", action="store_true", help="all of timm's models instead of the smallest of each family")
    add("--plan-only", action="store_true", help="plan on the meta device, and do nothing else")
    add("--jobs", type=int, default=2, metavar="N", help="processes at a time (default 2)")
    add("--time-limit", type=float, default=120, metavar="S", help="seconds for each model (default 120)")
    add("--output", default="coverage.json", metavar="FILE", help="result file (default coverage.json)")
    add("--page", metavar="FILE", help="also write the results as a page in Markdown")
    add("--again", action="store_true", help="measure the models again that are in the result file")
    add("--retry", action="store_true", help="measure those again that failed or ran out of time")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure what the parsed options say and return the exit code."""
    _check(options)
    _require_libraries()
    from reparam.coverage.results import is_good

    results = _opened(options)
    entries = _entries(options, results)
    waiting = [entry for entry in entries if _is_wanted(results.rows.get(entry.name), options)]
    kept = len(entries) - len(waiting)
    if kept:
        print(f"{kept} of {len(entries)} models are in {options.output} already (--again measures them again)")
    _measure(waiting, options, results)
    if options.page:
        write_page(results.path, Path(options.page))
        print(f"wrote {options.page}")
    rows = [results.rows[entry.name] for entry in entries]
    print(_closing(rows, options.plan_only))
    return 0 if all(is_good(row, options.plan_only) for row in rows) else 1


def write_page(output: Path, target: Path) -> None:
    """Write the page of a result file; a plan-only result beside it, ``<name>_plan_all.json``, is summed up in it."""
    target.write_text(page_of(output), encoding="utf-8")


def page_of(output: Path) -> str:
    """Return the page of a result file, see `write_page`."""
    from reparam.coverage.page import page
    from reparam.coverage.results import read

    beside = output.with_name(f"{output.stem}_plan_all.json")
    return page(read(output), read(beside) if beside.exists() else None)


# Before a run --------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    if options.models and (options.all or options.group):
        raise InputError(f"{'--all' if options.all else '--group'} chooses the models; leave out their names")
    if options.all and options.group not in (None, "timm"):
        raise InputError(f"--all means all models of timm, so it does not go with --group {options.group}")
    for name in ("ratio", "jobs", "time_limit"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be larger than 0, not {getattr(options, name)}")


def _require_libraries() -> None:
    for module in ("timm", "torchvision", "tqdm"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise InputError(f"coverage needs {error.name}; pip install 'reparam[train]'") from error


def _opened(options: argparse.Namespace) -> Results:
    from reparam.coverage.results import check_writable, open_results

    settings = {"ratio": options.ratio, "plan_only": options.plan_only, "seed": 0}
    if options.page:
        check_writable(Path(options.page))
    more = {"jobs": options.jobs, "threads": _threads(options.jobs), "time_limit": options.time_limit}
    return open_results(Path(options.output), settings, _command(options), more, options.again)


def _threads(jobs: int) -> int:
    import torch

    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // jobs))


def _command(options: argparse.Namespace) -> str:
    """Return the command without the folders of this machine, so that it can be published."""
    words = ["reparam", "coverage", *map(_public, options.models)]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(options, name)
        # How a run is resumed says nothing about its results.
        if value != default and name not in ("models", "again", "retry"):
            flag = f"--{name.replace('_', '-')}"
            words += (
                [flag] if value is True else [flag, _public(f"{value:g}" if isinstance(value, float) else str(value))]
            )
    return shlex.join(words)


def _public(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _entries(options: argparse.Namespace, results: Results) -> list[Entry]:
    from reparam.coverage import catalogue

    if options.models:
        return catalogue.named(options.models)
    if options.all:
        return catalogue.every_timm_model()
    group = options.group or "all"
    found: list[Entry] = []
    if group in ("all", "timm"):
        found += _families(results)
    return found + catalogue.torchvision_models(catalogue.chosen(group))


def _families(results: Results) -> list[Entry]:
    from reparam.coverage.catalogue import smallest_of_each_family

    if not results.families:
        print("looking for the smallest network of each family of timm (once; half a minute)", flush=True)
    found = smallest_of_each_family(results.families)
    results.families = {entry.family: [entry.name, entry.parameters] for entry in found}
    return found


def _is_wanted(row: Mapping[str, Any] | None, options: argparse.Namespace) -> bool:
    if row is None or options.again:
        return True
    return bool(options.retry and row["status"] != "ok")


# A run ---------------------------------------------------------------------------------------------------------------


def _measure(entries: Sequence[Entry], options: argparse.Namespace, results: Results) -> None:
    from reparam.coverage.measure import Settings
    from reparam.coverage.runner import Progress, run_all

    settings = Settings(**results.settings, threads=results.header["threads"])
    progress = Progress(len(entries))
    try:
        # Closing it ends the processes, also where this one is interrupted.
        with contextlib.closing(run_all(entries, settings, options.jobs, options.time_limit)) as finished:
            for entry, row in finished:
                results.add(row)
                progress.step(_line(entry.name, row))
    finally:
        progress.close()


def _line(name: str, row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        error = row["error"]
        return (
            f"{name}: {row['status'].upper()} after {row['total_seconds']:.1f} s: {error['type']}: {error['message']}"
        )
    parts = [f"{row['coverage']:.1%} widened"]
    if "worst_error" in row:
        parts += [f"worst node error {row['worst_error']:.1e}", f"round trip {row['round_trip']}"]
    places = sum(entry["count"] for entry in row["contractions"])
    parts += [f"{places} contractions"] if places else []
    steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in row["seconds"].items() if step != "build")
    return f"{name}: {', '.join(parts)}; {steps}"


def _closing(rows: Sequence[Mapping[str, Any]], plan_only: bool) -> str:
    from reparam.coverage.results import is_exact, returns

    done = [row for row in rows if row["status"] == "ok"]
    text = f"{len(rows)} models, {len(rows) - len(done)} with an error or out of time"
    if not plan_only:
        text += f", {sum(map(is_exact, rows))} exact, {sum(map(returns, rows))} back after the round trip"
    if done:
        shares = [row["coverage"] for row in done]
        text += f"; {sum(s >= 0.95 for s in shares)} at least 95% widened, the least {min(shares):.1%}"
        step = "plan" if plan_only else "expand"
        text += f"; {step} {statistics.median(row['seconds'][step] for row in done):.1f} s in the median"
    return text

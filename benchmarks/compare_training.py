"""GPD against the plain student at lr and ratio^2 lr, several seeds; the numbers of docs/results.md.

    python benchmarks/compare_training.py --data digits
    python benchmarks/compare_training.py --data fashion-mnist:DIR --limit-train 10000

Takes every option of ``reparam train`` and writes one JSON file into benchmarks/results/ (or ``--result FILE``). Paths
on the measuring machine are left out of it: of ``--data`` only the kind is kept. Stopped by SIGTERM, the same command
goes on with ``--output`` and ``--resume auto``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

from reparam.distill import files
from reparam.distill.command import add_arguments, config_from
from reparam.distill.compare import compare
from reparam.distill.distributed import resolve_device
from reparam.errors import StoppedError


def main() -> int:
    parser = argparse.ArgumentParser(prog="compare_training.py")
    add_arguments(parser)
    parser.add_argument("--result", type=Path, help="JSON file to write (default: in benchmarks/results/)")
    arguments = parser.parse_args()
    config = config_from(arguments)
    kind = config.data.partition(":")[0]
    name = f"compare_training-{kind}-{config.model.rpartition(':')[2]}-{config.epochs}-epochs.json"
    kept = config.output
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, output=kept or str(Path(folder, "runs")))
        try:
            content = compare(config, arguments.seeds or (0, 1, 2))
        except StoppedError as error:
            print(error if kept else "stopped by SIGTERM; only with --output is there a way to go on")
            return 143
    origin = record.provenance(command(kind, "compare_training.py"), resolve_device(config.device))
    target = arguments.result or record.RESULTS / name
    files.write_json(target, {**_without_paths(content, kind), **origin})
    print(f"result: {target}")
    return 0


def command(kind: str, script: str, hidden: Sequence[str] = ("--output", "--result")) -> str:
    """The command that runs, without the measuring machine's paths."""
    words = ["python", f"benchmarks/{script}", *sys.argv[1:]]
    return " ".join(
        "PATH" if index and words[index - 1] in hidden else _only_kind(word, kind) for index, word in enumerate(words)
    )


def _only_kind(word: str, kind: str) -> str:
    return f"{word.partition(kind)[0]}{kind}:PATH" if f"{kind}:" in word else word


def _without_paths(content: dict[str, Any], kind: str) -> dict[str, Any]:
    config = {key: value for key, value in content["config"].items() if key not in ("output", "checkpoint")}
    measured = {key: value for key, value in content.items() if key not in ("command", "config")}
    return {**measured, "config": {**config, "data": kind}}


if __name__ == "__main__":
    sys.exit(main())

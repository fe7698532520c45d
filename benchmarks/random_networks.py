"""Expand random networks and check every law; writes benchmarks/results/random_networks.json.

    python benchmarks/random_networks.py                    # 10,000 networks, 2 processes
    python benchmarks/random_networks.py --only 1234        # one network: print it, and shrink it where it fails

Network k is a function of k: its ratio is 2, 3 or 4 in turn. Finished networks are kept in a file (``--state``), and a
run that is started again goes on behind them; the file belongs to one commit of the code.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import record
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import random_checks
import random_networks

RATIOS = (2, 3, 4)


def measure(seed: int) -> dict[str, Any]:
    """Check one network; never raises."""
    torch.set_num_threads(1)
    program = random_networks.program_of(seed)
    row: dict[str, Any] = {"seed": seed, "kinds": list(random_checks.kinds(program)), "form": program.form}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row.update(dataclasses.asdict(random_checks.check(program, ratio_of(seed))))
    except Exception as error:
        row["mismatch"] = f"{type(error).__name__}: {error}"[:600]
    row["seconds"] = round(time.perf_counter() - start, 4)
    return row


def ratio_of(seed: int) -> int:
    return RATIOS[seed % 3]


def look_at(seed: int) -> int:
    """Print one network; where it fails, also the smallest network that fails in the same way."""
    program, ratio = random_networks.program_of(seed), ratio_of(seed)
    message = random_checks.failure(program, ratio)
    print(f"network {seed}, ratio {ratio}: {message or 'every law holds'}\n{program}")
    if message is None:
        return 0
    kind = message[:40]
    small = random_networks.shrink(program, lambda p: (random_checks.failure(p, ratio) or "")[:40] == kind)
    print(f"\nsmallest that fails like this: {random_checks.failure(small, ratio)}\n{small}")
    return 1


def run(first: int, count: int, processes: int, state: Path) -> list[dict[str, Any]]:
    """Check networks ``first`` ... ``first + count - 1``; those in ``state`` are not run again."""
    rows = {row["seed"]: row for row in map(json.loads, state.read_text().splitlines())} if state.exists() else {}
    todo = [seed for seed in range(first, first + count) if seed not in rows]
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=2000) as pool, state.open("a") as file:
        for done, row in enumerate(pool.imap_unordered(measure, todo, chunksize=8), 1):
            rows[row["seed"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            if "mismatch" in row:
                print(f"network {row['seed']}: {row['mismatch'][:300]}", flush=True)
            if done % 200 == 0 or done == len(todo):
                print(f"{done}/{len(todo)} networks", flush=True)
    return [rows[seed] for seed in range(first, first + count)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if "mismatch" not in row]
    coverage = sorted(row["coverage"] for row in good)
    trained = [row["train"] for row in good if row["train"] is not None]
    cuts = statistics.quantiles(coverage, n=20) if len(coverage) > 1 else [0.0] * 19
    words = [word for row in rows for word in row["kinds"]]
    return {
        "networks": len(rows),
        "mismatches": len(rows) - len(good),
        "mismatch_seeds": [row["seed"] for row in rows if "mismatch" in row],
        "ratios": dict(collections.Counter(str(ratio_of(row["seed"])) for row in rows)),
        "worst_node_error": max((row["node"] for row in good), default=0.0),
        "worst_output_error": max((row["output"] for row in good), default=0.0),
        "worst_gradient_error": max((row["gradient"] for row in good), default=0.0),
        "worst_train_error": max(trained, default=0.0),
        "compared_in_train_mode": len(trained),
        "compared_at_another_resolution": sum(row["resolution"] for row in good),
        "networks_with_widened_weights": sum(c > 0 for c in coverage),
        "networks_with_any_widened_parameter": sum(row["widened"] for row in good),
        "coverage_quantiles": {f"{5 * (k + 1)}%": round(cut, 4) for k, cut in enumerate(cuts)},
        "coverage_mean": round(statistics.fmean(coverage), 4) if coverage else 0.0,
        "seconds_per_network": record.spread([row["seconds"] for row in rows]),
        "steps": len(words),
        "forms": dict(collections.Counter(row["form"] for row in rows)),
        "operators": dict(collections.Counter(word.split()[0] for word in words).most_common()),
        "variants": dict(collections.Counter(words).most_common()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="random_networks.py", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: 0)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--state", type=Path, help="file of finished networks (default: one per commit, in the temp folder)"
    )
    parser.add_argument("--only", type=int, help="look at one network instead")
    parser.add_argument("--no-result", action="store_true", help="do not write the result file")
    arguments = parser.parse_args()
    if arguments.only is not None:
        return look_at(arguments.only)
    commit = record.git("rev-parse", "--short", "HEAD") or "unknown"
    state = arguments.state or Path(tempfile.gettempdir(), f"reparam-random-networks-{commit}.jsonl")
    print(f"finished networks are kept in {state}", flush=True)
    content = summary(run(arguments.first, arguments.networks, arguments.processes, state))
    command = f"python benchmarks/random_networks.py --networks {arguments.networks}"
    command += f" --first {arguments.first}" if arguments.first else ""
    if not arguments.no_result:
        print(f"wrote {record.write('random_networks.json', {**record.provenance(command), **content})}")
    print(f"{len(content['mismatch_seeds'])} mismatches, worst node {content['worst_node_error']:.1e}")
    return int(content["mismatches"] > 0)


if __name__ == "__main__":
    sys.exit(main())

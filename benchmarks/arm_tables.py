"""Tables of the arms that evidence.py measured: results of one comparison in one table, paired with its baselines.

Runs take hours, so that a comparison grows over several calls, each with its own JSON: more seeds, or arms that look
for a reason. Results with equal settings are one comparison.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from reparam.distill.config import completed

Result = dict[str, Any]

SCORES = ("student_top1", "student_ema_top1", "teacher_top1")
SUITES = ("evidence", "gap")
"""What the names of such results begin with."""


def pooled(results: Mapping[str, Result]) -> list[tuple[list[str], Result]]:
    """Return results with the names of their files, those of one comparison as one result.

    Raises:
        ValueError: Two files have the same seed of the same arm.
    """
    found: list[tuple[list[str], Result]] = []
    for name, data in results.items():
        same = next((place for place in found if name.startswith(SUITES) and _same(place[1], data)), None)
        if same is None:
            found.append(([name], data))
        else:
            place = found.index(same)
            found[place] = [*same[0], name], _merged(same[1], data, name)
    return found


def _same(one: Result, other: Result) -> bool:
    how = ("compute", "gap_recipe", "assistant", "device")
    if "arms" not in one or any(one.get(key) != other.get(key) for key in how):
        return False
    first, second = (completed(each["config"]) for each in (one, other))
    if any(first[key] != second.get(key) for key in first.keys() - {"seed"}) or second.keys() != first.keys():
        return False
    static = [each["static"] for each in (one, other) if "static" in each]
    return len({(each["model"], each["epochs"]) for each in static}) < 2


def _merged(one: Result, other: Result, name: str) -> Result:
    arms = {arm["name"]: arm for arm in one["arms"]}
    for arm in other["arms"]:
        before = arms.get(arm["name"])
        arms[arm["name"]] = arm if before is None else _row(before, arm, name)
    scores = sorted({score for each in (one, other) for score in _static_scores(each)})
    static = one.get("static", other.get("static"))
    pooled_static = {} if static is None else {"static": {**static, "top1": scores}}
    return {**one, "arms": sorted(arms.values(), key=_place), **pooled_static}


def _place(arm: Result) -> tuple[bool, int]:
    """Plain training first, shorter runs before longer ones; the others as they come."""
    plain = arm["name"].startswith("baseline")
    return not plain, arm["epochs"] if plain else 0


def _static_scores(data: Result) -> list[float]:
    top1 = data.get("static", {}).get("top1", [])
    return top1 if isinstance(top1, list) else [top1]


def _row(one: Result, other: Result, name: str) -> Result:
    twice = set(one["seeds"]) & set(other["seeds"])
    if twice:
        raise ValueError(f"{name} has seeds {sorted(twice)} of the arm {one['name']!r}, which another result has too")
    seeds = one["seeds"] + other["seeds"]
    order = sorted(range(len(seeds)), key=seeds.__getitem__)
    row = {**one, "seeds": sorted(seeds), "seconds": _in_order(one["seconds"] + other["seconds"], order)}
    for key in SCORES:
        row.pop(key, None)  # of some seeds alone it would stand for all
        if key in one and key in other:
            row[key] = spread(_in_order(one[key]["values"] + other[key]["values"], order))
    if "assistants" in one:
        row["assistants"] = [
            {
                **a,
                "top1": spread(_in_order(a["top1"]["values"] + b["top1"]["values"], order)),
                "seconds": _in_order(a["seconds"] + b["seconds"], order),
            }
            for a, b in zip(one["assistants"], other["assistants"], strict=True)
        ]
    return row


def _in_order(values: list[float], order: list[int]) -> list[float]:
    return [values[place] for place in order]


def spread(values: list[float]) -> Result:
    """Return these values with their mean and, of two or more, their standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.mean(values), "std": std}


def best_baseline(data: Result) -> Result | None:
    """Return the arm of plain training, for as many epochs as the others, that has the highest mean."""
    epochs = data["config"]["epochs"]
    plain = [arm for arm in data["arms"] if arm["name"].startswith("baseline") and arm["epochs"] == epochs]
    return max(plain, key=lambda arm: arm["student_top1"]["mean"], default=None)


def paired(arm: Result, baseline: Result | None) -> str:
    """Return the mean difference of an arm to a baseline over the seeds that both have, and its standard error."""
    if baseline is None or arm is baseline:
        return ""
    plain = dict(zip(baseline["seeds"], baseline["student_top1"]["values"], strict=True))
    scores = zip(arm["seeds"], arm["student_top1"]["values"], strict=True)
    found = [score - plain[seed] for seed, score in scores if seed in plain]
    if len(found) < 2:
        return f"{found[0]:+.2f}" if found else ""
    return f"{statistics.mean(found):+.2f} ({statistics.stdev(found) / len(found) ** 0.5:.2f})"


def evidence(data: Result) -> str:
    """Return the table of the suite ``gpd``."""
    config, baseline = data["config"], best_baseline(data)
    lines = [
        f"### Arms on {config['data']}: {config['model']}, {config['epochs']} epochs{_images(config)}\n",
        "| arm | epochs | seeds | student top-1 (%) | to the best baseline | averaged weights | dynamic teacher "
        "| s per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in data["arms"]:
        student, averaged, teacher = (_shown(arm.get(key)) for key in SCORES)
        seconds = sum(arm["seconds"]) / len(arm["seconds"])
        cells = (arm["name"], str(arm["epochs"]), str(len(arm["seeds"])), student, paired(arm, baseline), averaged)
        lines.append(f"| {' | '.join((*cells, teacher, f'{seconds:.0f}'))} |")
    return "\n".join([*lines, *_static(data), ""])


def gap(data: Result) -> str:
    """Return the table of the suite ``gap``."""
    config, baseline = data["config"], best_baseline(data)
    static = data["static"]["model"] if "static" in data else "none"
    lines = [
        f"### Large gaps on {config['data']}: {static} -> {config['model']}, {config['epochs']} epochs"
        f"{_images(config)}\n",
        "| arm | seeds | student top-1 (%) | to the baseline | assistant | its top-1 | dynamic teacher "
        "| s per run, assistant included |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in data["arms"]:
        assistants = arm.get("assistants", [])
        names = ", ".join(f"{one['name']} ({one['parameters']:,} parameters)" for one in assistants)
        scores = ", ".join(_shown(one["top1"]) for one in assistants)
        runs = [arm["seconds"], *(one["seconds"] for one in assistants)]
        seconds = sum(sum(each) for each in runs) / len(arm["seconds"])
        student, teacher = _shown(arm.get("student_top1")), _shown(arm.get("teacher_top1"))
        cells = (arm["name"], str(len(arm["seeds"])), student, paired(arm, baseline), names, scores, teacher)
        lines.append(f"| {' | '.join((*cells, f'{seconds:.0f}'))} |")
    return "\n".join([*lines, *_static(data), ""])


def _static(data: Result) -> list[str]:
    if "static" not in data:
        return []
    scores = " and ".join(f"{score:.2f}%" for score in _static_scores(data))
    return [f"\nStatic teacher: {data['static']['model']}, {data['static']['epochs']} epochs, {scores}."]


def _images(config: Result) -> str:
    size = f", {config['limit_train']:,} training images" if config.get("limit_train") else ""
    return size + (f" of {config['image_size']} px" if config.get("image_size") else "")


def _shown(found: Result | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.2f}" if found["std"] is None else f"{found['mean']:.2f} ± {found['std']:.2f}"

"""What online branches cost: a training step of the plain network, of one with branches, and of one that runs them.

    python benchmarks/branches.py

Branches without norms are merged to one kernel in every step. The third network is the second with every branch really
run as convolutions. Writes benchmarks/results/branches-MODEL-RECIPE.json. The three are run in turn, so that a noisy
machine shows in all of them; figures are ratios of medians.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import record
import timm
import torch
from torch import nn

import reparam


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--recipe", default="orepa")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write (default: benchmarks/results)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)
    plain = timm.create_model(arguments.model, num_classes=10).to(device).train()
    for parameter in plain.parameters():
        if parameter.dim() == 1 and not parameter.any():
            nn.init.uniform_(parameter, 0.5, 1.5)  # residual branches that start at 0 would hide a difference
    teacher = reparam.expand(plain, 1, branches=arguments.recipe, init="scratch", example_input=x[:2], verify=False)
    networks = {"plain": plain, "merged": reparam.student_view(teacher), "run": side_by_side(teacher)}
    error = difference(networks["merged"], networks["run"], x)
    seconds = measured(networks, x, labels, arguments.runs)
    medians = {name: record.spread(values) for name, values in seconds.items()}
    run, merged, alone = (medians[name]["median"] for name in ("run", "merged", "plain"))
    forward, merge = teacher.plan.multiply_adds[0], sum(b.merge_multiply_adds for b in teacher.plan.branches)
    content = {
        **record.provenance(command(arguments), device),
        "model": arguments.model,
        "recipe": arguments.recipe,
        "batch": arguments.batch,
        "size": arguments.size,
        "layers_with_branches": len(teacher.plan.branches),
        "relative_difference_of_outputs": error,
        "seconds_per_training_step": medians,
        "run_over_merged": round(run / merged, 3),
        "merged_over_plain": round(merged / alone, 3),
        "multiply_adds": {"forward pass of the batch": arguments.batch * forward, "merging, forward": merge},
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()},
        "threads": torch.get_num_threads(),
    }
    name = f"branches-{arguments.model}-{arguments.recipe}{'' if device.type == 'cpu' else '-' + device.type}.json"
    print(record.write(name, content, arguments.folder))
    print(
        f"branches run / merged {run / merged:.2f}, merged / plain {merged / alone:.2f}, outputs differ by {error:.1e}"
    )


def command(arguments: argparse.Namespace) -> str:
    words = [f"--{name} {getattr(arguments, name)}" for name in ("model", "recipe", "batch", "size", "runs", "device")]
    return f"python benchmarks/branches.py {' '.join(words)}"


def side_by_side(teacher: nn.Module) -> nn.Module:
    """Return the same network, sharing all parameters, with every branch run as convolutions."""
    view = copy.deepcopy(reparam.student_view(teacher))
    for branch in view._narrow.branches:
        branch.running = True
    return view.train()


def difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        one, two = a(x), b(x)
    return float((one - two).abs().max() / one.abs().max())


def measured(networks: dict[str, nn.Module], x: Any, labels: Any, runs: int) -> dict[str, list[float]]:
    """Return the seconds of SGD steps, the networks in turn."""
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for name, net in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for run in range(runs + 1):
        for name, net in networks.items():
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(net(x), labels)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()

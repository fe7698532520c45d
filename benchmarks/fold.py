"""Folding: norms left, errors and inference time, beside timm's own fusion and torch.fx's.

    python benchmarks/fold.py

Writes benchmarks/results/fold.json, or fold-batchN.json. Norm statistics and affine parameters are drawn, so that no
fold is trivial. Errors are relative to the largest output of the network in float64. Times are ratios of medians, runs
interleaved.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.overrides import TorchFunctionMode

from reparam.passes.fold import fold, fold_with_report

MODELS = """
repvgg_a0 mobileone_s0 fastvit_t8 repvit_m1 repghostnet_050 ghostnetv3_050 levit_128s efficientvit_m0 shvit_s1
tiny_vit_5m_224 efficientformerv2_s0 nextvit_small lcnetv2_base efficientvim_m1 iformer_t starnet_s1 hgnetv2_b0
resnet18 resnet50 efficientnet_b0 mobilenetv3_large_100 densenet121 regnetx_002 edgenext_xx_small
""".split()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write (default: benchmarks/results)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = {}
    for name in arguments.models:
        rows[name] = measure(name, device, arguments.batch, arguments.runs)
        print(name, rows[name], flush=True)
    named = "" if arguments.models == MODELS else f"{' '.join(arguments.models)} "
    options = f"{named}--runs {arguments.runs} --batch {arguments.batch} --device {device.type}"
    result = {
        **record.provenance(f"python benchmarks/fold.py {options}", device),
        "threads": torch.get_num_threads(),
        "batch": arguments.batch,
        "models": rows,
    }
    name = f"fold{'' if arguments.batch == 1 else f'-batch{arguments.batch}'}"
    print(record.write(f"{name}{'' if device.type == 'cpu' else '-cuda'}.json", result, arguments.folder))


def measure(name: str, device: torch.device, batch: int, runs: int) -> dict[str, Any]:
    """Return the numbers of one model."""
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).eval().to(device)
    x = torch.randn(batch, *model.pretrained_cfg["input_size"], device=device)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = double(x.double())
    start = time.perf_counter()
    folded, report = fold_with_report(model)
    seconds = time.perf_counter() - start
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "reparam": fold,
        "timm": lambda m: reparameterize_model(copy.deepcopy(m)),
        "torch.fx": lambda m: optimization.fuse(copy.deepcopy(m)),
    }
    return {
        "fold_seconds": round(seconds, 2),
        "norms_before": norms(model, x),
        "linear_operators": list(report.linear),
        "same_class": type(folded) is type(model),
        "float32_error_of_the_model": error(model, x, exact),
        **{kind: numbers(make, model, double, x, exact, runs) for kind, make in makers.items()},
    }


def numbers(
    make: Callable[[nn.Module], nn.Module], model: nn.Module, double: nn.Module, x: Tensor, exact: Tensor, runs: int
) -> dict[str, Any]:
    """Return norms left, errors and time of one way to fold."""
    try:
        # timm leaves float32 layers in a float64 network.
        single, wide = make(model), make(double).double()
        return {
            "norms": norms(single, x),
            "float32_error": error(single, x, exact),
            "float64_error": error(wide, x.double(), exact),
            "time_ratio": ratio(model, single, x, runs),
        }
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"}


def randomise(model: nn.Module) -> nn.Module:
    """Draw the statistics and affine parameters of norms."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
                if module.weight is not None:
                    module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                    module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return model


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count norms."""
        self.count += func in (F.batch_norm, F.instance_norm)
        return func(*args, **(kwargs or {}))


def norms(model: nn.Module, x: Tensor) -> int:
    """Return how many norms run."""
    with torch.no_grad(), _Calls() as calls:
        model(x)
    return calls.count


def error(model: nn.Module, x: Tensor, exact: Tensor) -> float:
    """Return the error relative to the largest value."""
    with torch.no_grad():
        return float(f"{(model(x) - exact).abs().max() / exact.abs().max():.3g}")


def ratio(model: nn.Module, folded: nn.Module, x: Tensor, runs: int) -> dict[str, float]:
    """Return the time of the folded model relative to that of the model, runs side by side."""
    times: dict[nn.Module, list[float]] = {model: [], folded: []}
    with torch.no_grad():
        for run in range(runs + 2):
            for network, seconds in times.items():
                start = time.perf_counter()
                network(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                if run > 1:
                    seconds.append(time.perf_counter() - start)
    before, after = times[model], times[folded]
    pairs = [b / a for a, b in zip(before, after, strict=True)]
    return {
        "median": round(statistics.median(after) / statistics.median(before), 3),
        "low": round(min(pairs), 3),
        "high": round(max(pairs), 3),
        "seconds_before": round(statistics.median(before), 5),
    }


if __name__ == "__main__":
    main()

"""``reparam bench fold``: norms left, errors and inference time, beside timm's own fusion and torch.fx's.

Norm statistics and affine parameters are drawn, so that no fold is trivial. Errors are relative to the largest output
of the network in float64. Times are ratios of medians, runs interleaved.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.overrides import TorchFunctionMode

from reparam.bench import records
from reparam.bench.subjects import device_of
from reparam.bench.timing import Job, interleaved, ratio, spread
from reparam.distill.runs import threads_restored
from reparam.models import load_model
from reparam.passes.fold import fold, fold_with_report
from reparam.passes.tf32 import tf32

MODELS = """
repvgg_a0 mobileone_s0 fastvit_t8 repvit_m1 repghostnet_050 ghostnetv3_050 levit_128s efficientvit_m0 shvit_s1
tiny_vit_5m_224 efficientformerv2_s0 nextvit_small lcnetv2_base efficientvim_m1 iformer_t starnet_s1 hgnetv2_b0
resnet18 resnet50 efficientnet_b0 mobilenetv3_large_100 densenet121 regnetx_002 edgenext_xx_small
""".split()


def run(options: argparse.Namespace) -> int:
    """Measure what the options say, write the JSON, and return the exit code."""
    folder, device = records.folder_of(options), device_of(options.device)
    names = options.models or MODELS
    for name in names:
        load_model(name)  # an unknown name is found now, not after minutes
    rows = {}
    with threads_restored(), tf32(False):
        if options.threads:
            torch.set_num_threads(options.threads)
        for name in names:
            rows[name] = measure(name, device, options.batch, options.runs)
            print(name, rows[name], flush=True)
        content = {**records.origin(options, device), "kind": "fold", "batch": options.batch, "models": rows}
    # A few networks are no run over the list, whose file they must not replace.
    some = "".join(f"-{records.public(name)}" for name in names) if len(names) <= 3 else ""
    name = (
        f"fold{some}{'' if options.batch == 1 else f'-batch{options.batch}'}{'' if device.type == 'cpu' else '-cuda'}"
    )
    print(f"wrote {records.write(folder, name, content)}")
    return 0


def measure(name: str, device: torch.device, batch: int, runs: int) -> dict[str, Any]:
    """Return the numbers of one model."""
    torch.manual_seed(0)
    model = randomise(load_model(name)).eval().to(device)
    x = torch.randn(batch, *vars(model)["pretrained_cfg"]["input_size"], device=device)
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
            "time_ratio": time_ratio(model, single, x, runs),
        }
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"}


def randomise(model: nn.Module) -> nn.Module:
    """Draw the statistics and affine parameters of norms."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in map(_any, model.modules()):
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
                if module.weight is not None:
                    module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                    module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return model


def _any(module: nn.Module) -> Any:
    return module


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


def time_ratio(model: nn.Module, folded: nn.Module, x: Tensor, runs: int) -> dict[str, float]:
    """Return the time of the folded model relative to that of the model, runs side by side."""
    jobs = {"before": Job(lambda: model(x)), "after": Job(lambda: folded(x))}
    with torch.no_grad():
        times = interleaved(jobs, runs, device=x.device)
    found = ratio(times["after"], times["before"])
    return {
        "median": round(found["of_medians"], 3),
        "low": round(found["low"], 3),
        "high": round(found["high"], 3),
        "seconds_before": spread(times["before"].seconds)["median"],
    }

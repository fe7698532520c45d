"""How long the import of reparam takes beyond that of torch, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from reparam.bench.timing import spread

_CODE = """
import json, sys, time
start = time.perf_counter()
import torch
torch_there = time.perf_counter()
import reparam
there = time.perf_counter()
for name in reparam.__all__:
    getattr(reparam, name)
end = time.perf_counter()
heavy = [name for name in ("timm", "torchvision", "sklearn", "matplotlib") if name in sys.modules]
print(json.dumps({"torch": torch_there - start, "reparam": there - torch_there, "all": end - torch_there,
                  "heavy": heavy}))
"""


def imports(runs: int) -> dict[str, Any]:
    """Measure ``import torch``, behind it ``import reparam``, and that with every public name touched.

    Public names are imported when they are first used. All are measured in the same process, a fresh one each time;
    the first warms the disk's cache and is dropped.
    """
    found = []
    for _ in range(runs + 1):
        done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {
        "torch_seconds": spread(one["torch"] for one in found[1:]),
        "reparam_seconds": spread(one["reparam"] for one in found[1:]),
        "every_name_seconds": spread(one["all"] for one in found[1:]),
        "also_imported": sorted({name for one in found for name in one["heavy"]}),
    }

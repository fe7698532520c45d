"""How the tests share the machine: one process per core, one thread in each of them."""

from __future__ import annotations

import os

import pytest

MEMORY = 3 * 2**30
"""What one process of tests may need, with the processes that its tests start."""

# Before anything imports torch, and inherited by the processes that tests start. The tensors of tests are small: a
# second thread gives next to nothing, and where others want its core too, threads spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for ``-n auto``; none where files are named, since starting them takes longer than most files."""
    if config.args_source is pytest.Config.ArgsSource.ARGS and any(".py" in name for name in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else cores * MEMORY
    return max(1, min(cores, memory // MEMORY))


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without a plot of their curves, for tests of something else: drawing takes longer than a short run."""
    from reparam.distill import finish

    monkeypatch.setattr(finish, "_draw", lambda folder: None)

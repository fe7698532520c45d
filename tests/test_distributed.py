"""Two processes: the same numbers as one, statistics of the whole batch, NaN and death in one of them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from training import NETS, assert_same_run, last_state, metrics
from two_processes import codes, two_processes

from reparam.cli import main
from reparam.distill import engine, finish
from reparam.distill.distributed import SyncStatistics
from reparam.distill.methods.base import Batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

WORKER = str(Path(__file__).with_name("training_worker.py"))
BASE = ["--epochs", "2", "--batch-size", "40", "--limit-train", "160", "--precision", "fp64", "--sync-bn", "--quiet"]
TEACHER = ["--teacher", "cifar_resnet8_w8", "--teacher-checkpoint", "TEACHER"]
EQUAL = {
    "baseline": ["--method", "baseline", "--model", "NETS:small"],
    "gpd": ["--ema", "0.9", "--model", "NETS:small"],
    "gpd, orepa": ["--branches", "orepa", "--model", "NETS:small"],
    "gpd, adamw, lr_scale": ["--optimizer", "adamw", "--lr-scale", "student", "--model", "NETS:small"],
    "gpd+dkd": ["--method", "gpd+dkd", "--model", "NETS:small", *TEACHER],
    "gpd+dkd, accumulate": ["--method", "gpd+dkd", "--accumulate", "2", "--model", "NETS:small", *TEACHER],
    "no norms, accumulate": ["--model", "NETS:normless", "--accumulate", "2", "--branches", "orepa"],
    "reviewkd": ["--method", "gpd+reviewkd", *TEACHER],
}
ALIKE = ("gpd, orepa", "gpd+dkd")
"""Cases of which others have all and more; they run when asked for."""
SMALL = '''

def small(num_classes=10, in_chans=1):
    """Convolutions with norms."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes),
    )
'''


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with networks and a run that is a static teacher."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "nets.py").write_text(NETS + SMALL)
    line = ["--method", "baseline", "--epochs", "1", "--limit-train", "100", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "_draw", lambda folder: None)
        assert main(["train", *line, "--output", str(folder / "teacher")]) == 0
    return folder


def arguments(place, words, output):
    filled = [w.replace("NETS", str(place / "nets.py")).replace("TEACHER", str(place / "teacher")) for w in words]
    return [*BASE, *filled, "--output", str(place / output)]


def slug(name):
    return re.sub(r"\W+", "-", name)


@pytest.fixture(scope="module")
def pairs(request, place):
    """Runs in two processes, all cases that are wanted after another."""
    jobs = []
    selected = {item.callspec.params["name"] for item in request.session.items if _compares(item)}
    for name, words in EQUAL.items():
        if name not in selected:
            continue
        output = f"{slug(name)}-two"
        jobs.append({"name": name, "arguments": arguments(place, words, output), "dump": str(place / output)})
    plain = [
        word
        for word in arguments(place, ["--precision", "fp32", "--model", "NETS:small"], "unsynchronised")
        if word != "--sync-bn"
    ]
    jobs.append({"name": "unsynchronised", "arguments": plain, "dump": str(place / "unsynchronised")})
    said = two_processes(place, jobs)
    assert [codes(text) for text in said] == [[0] * len(jobs)] * 2, said
    return place


def _compares(item):
    return getattr(item, "originalname", None) == "test_two_processes_equal_one"


def interleaved(batch, count):
    """The pieces that two processes work on at the same time."""
    if count == 1:
        return [batch]
    halves = [value.view(2, count, -1, *value.shape[1:]) for value in (batch.images, batch.labels, batch.indices)]
    columns = [[value[:, piece].flatten(0, 1) for piece in range(count)] for value in halves]
    return [Batch(images, labels, None, indices) for images, labels, indices in zip(*columns, strict=True)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough) if n in ALIKE else n for n in EQUAL])
def test_two_processes_equal_one(pairs, monkeypatch, name):
    monkeypatch.setattr(engine, "_split", interleaved)
    monkeypatch.setattr(finish, "_draw", lambda folder: None)
    one, two = pairs / f"{slug(name)}-one", pairs / f"{slug(name)}-two"
    assert main(["train", *arguments(pairs, EQUAL[name], one.name)]) == 0
    expected = last_state(one)
    for rank in range(2):
        found = torch.load(f"{two}-{rank}.pt", weights_only=True)
        for part in ("owner", "losses", "ema"):
            for key, value in (expected[part] or {}).items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-9, atol=1e-11, msg=f"{part} {key}")
    pairs_of_rows = zip(metrics(one), metrics(two), strict=True)
    for single, double in pairs_of_rows:
        assert set(single) == set(double)
        assert {key: float(value) for key, value in single.items()} == pytest.approx(
            {key: float(value) for key, value in double.items()}, rel=1e-9
        )
    told = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert (told[0]["processes"], told[1]["processes"]) == (1, 2)
    for row, other in zip(told[0]["table"], told[1]["table"], strict=True):
        assert (row["name"], row["top1"], row["top5"]) == (other["name"], other["top1"], other["top5"])
    # The state moved, so that equal means something.
    start = expected["optimizer"]["state"]
    assert start and all(torch.is_tensor(entry) or entry for entry in start[0].values())


def test_without_synchronisation_processes_still_agree(pairs):
    """Weights by the mean of the gradients, statistics by the mean at the end of each epoch."""
    states = [torch.load(pairs / f"unsynchronised-{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in states[0]["owner"].items():
        assert torch.equal(value, states[1]["owner"][key]), key
    assert any(key.endswith("running_mean") for key in states[0]["owner"])


# Accidents -----------------------------------------------------------------------------------------------------------

ACCIDENT = ["--epochs", "3", "--batch-size", "40", "--limit-train", "200", "--save-steps", "2"]


@pytest.fixture(scope="module")
def accidents(place):
    """Two processes; one of them meets NaN, or is asked to stop."""
    kinds = {
        "stop": ({"what": "nan", "rank": 1, "step": 7}, ["--on-nan", "stop"], 1),
        "rollback": ({"what": "nan", "rank": 1, "step": 7}, ["--on-nan", "rollback"], 1),
        "give-up": ({"what": "nan", "rank": 1, "step": 7}, ["--on-nan", "rollback"], 100),
        "term": ({"what": "term", "rank": 1, "step": 7}, ["--ema", "0.9"], 1),
        "term, go on": (None, ["--ema", "0.9", "--resume", "auto"], 1),
        "whole": (None, ["--ema", "0.9"], 1),
    }
    jobs = []
    for name, (accident, words, times) in kinds.items():
        output = str(place / name.partition(",")[0])
        line = [*ACCIDENT, "--model", f"{place / 'nets.py'}:small", *words, "--output", output]
        jobs.append({"name": name, "arguments": line, "dump": output, "accident": accident, "times": times})
    said = two_processes(place, jobs)
    return dict(zip(kinds, zip(*map(codes, said), strict=True), strict=True)), said


def test_nan_in_one_process_stops_both(accidents):
    found, said = accidents
    assert found["stop"] == (2, 2)
    assert not any("Warning" in text for text in said), said
    assert all(re.search(r"error: (the .* loss is nan|another process met NaN)", text) for text in said), said


def test_nan_in_one_process_rolls_both_back(accidents, place):
    found, said = accidents
    assert found["rollback"] == (0, 0), said
    states = [torch.load(place / f"rollback-{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in states[0]["owner"].items():
        if "running" not in key:
            assert torch.equal(value, states[1]["owner"][key]), key
    summary = json.loads((place / "rollback" / "summary.json").read_text())
    assert summary["rollbacks"] == 1 and summary["epochs"] == 3


def test_rollbacks_end_together(accidents):
    found, said = accidents
    assert found["give-up"] == (2, 2)
    assert said[0].count("rollbacks)") == 6, said[0]  # one of the run before


def test_one_process_that_is_asked_to_stop_stops_both(accidents, place):
    """Also where an epoch has fewer steps than lie between two looks."""
    found, said = accidents
    assert found["term"] == (143, 143), said
    assert found["term, go on"] == (0, 0), said
    assert json.loads((place / "term" / "summary.json").read_text())["steps"] == 15


def test_going_on_within_an_epoch_is_the_same_run(accidents, place):
    """Each process has norm statistics of its own until the epoch ends."""
    assert_same_run(place / "whole", place / "term")
    saved = torch.load(place / "term-1.pt", weights_only=True)
    assert any("running" in key for key in saved["owner"]) and saved["ema"]


@pytest.mark.parametrize("again", ["forked", pytest.param("torchrun", marks=pytest.mark.thorough)])
def test_death_of_a_process_ends_the_run_and_it_can_go_on(place, again):
    """The whole way, with torchrun: SIGKILL in one process, then the same arguments again."""
    output, mark = place / f"death-{again}", place / f"died-{again}"
    line = [*ACCIDENT, "--model", f"{place / 'nets.py'}:small", "--resume", "auto", "--output", str(output)]
    job = {"arguments": line, "accident": {"what": "die", "rank": 1, "step": 8}, "mark": str(mark)}
    (place / "death.json").write_text(json.dumps([job]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = time.monotonic()
    done = subprocess.run(
        [*torchrun, WORKER, str(place / "death.json")], env=environment(), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert mark.exists() and time.monotonic() - started < 90
    assert done.returncode not in (0, -signal.SIGKILL) and "Signal 9 (SIGKILL) received" in done.stderr
    assert re.search(r"error: process 0 of 2 lost the others.*go on with --resume auto", done.stderr), done.stderr
    assert "Warning" not in done.stderr
    assert last_state(output)["steps"] >= 6
    if again == "forked":
        said = two_processes(place, [{"name": "again", "arguments": line}])
        assert [codes(text) for text in said] == [[0], [0]], said
        told = "".join(said)
    else:
        rest = subprocess.run(
            [*torchrun, "-m", "reparam", "train", *line], env=environment(), capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip
        assert rest.returncode == 0, rest.stderr
        told = rest.stdout
    assert "resume" in told and told.count("Result on") == 1
    assert json.loads((output / "summary.json").read_text())["steps"] == 15


# Statistics of the whole batch, in threads instead of processes ------------------------------------------------------


class Pair:
    """Stands for the collectives of two processes that are two threads."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=20)
        self.values = {}

    def all_reduce(self, value):
        self.values[threading.get_ident()] = value.detach().clone()
        self.barrier.wait()
        total = sum(self.values.values())
        self.barrier.wait()
        with torch.no_grad():
            value.copy_(total)


NORMS = {
    "1d": (nn.BatchNorm1d, (12, 5), {}),
    "1d, length": (nn.BatchNorm1d, (12, 5, 4), {}),
    "2d": (nn.BatchNorm2d, (12, 5, 4, 3), {}),
    "3d": (nn.BatchNorm3d, (8, 5, 2, 3, 2), {}),
    "momentum": (nn.BatchNorm2d, (12, 5, 4, 3), {"momentum": 0.37}),
    "cumulative": (nn.BatchNorm2d, (12, 5, 4, 3), {"momentum": None}),
    "eps": (nn.BatchNorm2d, (12, 5, 4, 3), {"eps": 0.1}),
    "no affine": (nn.BatchNorm2d, (12, 5, 4, 3), {"affine": False}),
    "no statistics": (nn.BatchNorm2d, (12, 5, 4, 3), {"track_running_stats": False}),
}


@pytest.mark.parametrize("case", NORMS)
def test_statistics_of_the_whole_batch(monkeypatch, case):
    kind, shape, options = NORMS[case]
    torch.manual_seed(0)
    whole = kind(5, **options).double()
    if whole.affine:
        nn.init.normal_(whole.weight)
        nn.init.normal_(whole.bias)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    x, weights = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    x = x * torch.linspace(0.5, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1)) + 1
    x.requires_grad_()
    expected = [whole(x), whole(x * 2)][0]
    (expected * weights).sum().backward()
    pair = Pair()
    monkeypatch.setattr(dist, "all_reduce", pair.all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found, size = [None, None], shape[0] // 2

    def process(rank):
        norm = kind(5, **options).double()
        norm.load_state_dict(state)
        part = slice(rank * size, (rank + 1) * size)
        own = x.detach()[part].clone().requires_grad_()
        with SyncStatistics():
            result = norm(own)
            norm(own * 2)
            (result * weights[part]).sum().backward()
        found[rank] = (result.detach(), own.grad, norm)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([entry[0] for entry in found]), expected.detach(), **close)
    torch.testing.assert_close(torch.cat([entry[1] for entry in found]), x.grad, **close)
    for name, value in whole.named_parameters():
        total = sum(entry[2].get_parameter(name).grad for entry in found)
        torch.testing.assert_close(total, value.grad, **close)
    for name, value in whole.named_buffers():
        for entry in found:
            torch.testing.assert_close(entry[2].get_buffer(name), value, msg=name, **close)
    if whole.track_running_stats:
        with SyncStatistics():  # in evaluation mode everything is as ever
            torch.testing.assert_close(found[0][2].eval()(x), whole.eval()(x), **close)


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_a_norm_with_one_of_weight_and_bias(monkeypatch, given):
    """Weight standardisation has a gain and no shift."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))  # the other process has the same
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    x = torch.randn(1, 5, 18, dtype=torch.float64)
    named = {given: torch.randn(5, dtype=torch.float64)}
    with SyncStatistics():
        found = F.batch_norm(x, None, None, **named, training=True)
    torch.testing.assert_close(found, F.batch_norm(x, None, None, **named, training=True), rtol=1e-12, atol=1e-12)


def test_statistics_need_the_other_process(monkeypatch):
    """Each half alone gives other results: the test above compares something."""
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) * torch.linspace(0.5, 3, 8, dtype=torch.float64).view(-1, 1, 1, 1)
    halves = torch.cat([F.batch_norm(half, None, None, training=True) for half in x.split(4)])
    assert not torch.allclose(halves, F.batch_norm(x, None, None, training=True), rtol=1e-2)

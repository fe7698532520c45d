"""The methods that compare features: student, view and dynamic teacher against static teachers of other families."""

import copy
import functools
import math
import socket

import pytest
import timm
import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F

import reparam
import reparam.distill.models
from reparam.distill.features import Observed, needs
from reparam.distill.losses import CRD, attention_transfer, hint, rkd
from reparam.distill.methods.base import Batch, Outputs, Weights, get_distiller
from reparam.errors import InputError

METHODS = ["fitnet", "at", "rkd", "crd", "reviewkd"]
LABELS = torch.arange(40) % 5
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
PAIRS = {
    "cnn-cnn": (("cifar_resnet8_w8", {}), ("cifar_vgg8", {})),
    "cnn-vit": (("cifar_resnet8_w8", {}), ("vit_tiny_patch16_224", VIT)),
    "vit-cnn": (("vit_tiny_patch16_224", VIT), ("cifar_resnet8", {})),
}


def network(name, options):
    torch.manual_seed(len(name))
    return timm.create_model(name, num_classes=5, **options)


def batch_of(count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    indices = torch.randperm(40, generator=generator)[:count]
    return Batch(images, LABELS[indices], None, indices)


def outputs(count, widths=(4, 6), sides=(8, 4), embedding=5, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(count, w, s, s, generator=generator) for w, s in zip(widths, sides, strict=True)]
    vectors = [torch.randn(count, 3, generator=generator), torch.randn(count, embedding, generator=generator)]
    logits, vector, *maps = (value.requires_grad_(grad) for value in (*vectors, *maps))
    return Outputs(logits, tuple(maps), vector)


@functools.cache
def expanded(pair):
    """The dynamic teacher of the student of a pair, to be copied."""
    return reparam.expand(network(*PAIRS[pair][0]), 2, example_input=batch_of().images, verify=False)


FIRST = {("view", "cnn-vit"), ("teacher", "vit-cnn")}
"""Of view and teacher; every student takes its step in every run, the others when asked for."""
STEPS = [
    pytest.param(pair, learner, marks=() if learner == "student" or (learner, pair) in FIRST else pytest.mark.thorough)
    for pair in PAIRS
    for learner in ("student", "view", "teacher")
]


@pytest.mark.parametrize(("pair", "learner"), STEPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step(name, pair, learner):
    kind, batch = get_distiller(name), batch_of()
    student, static = (network(*spec) for spec in PAIRS[pair])
    static.eval()
    own = needs(kind).stages(student, batch.images)
    fixed = Observed(static, needs(kind).stages(static, batch.images))
    if learner == "student":
        trained = student
    else:
        teacher = copy.deepcopy(expanded(pair))
        trained = teacher if learner == "teacher" else reparam.student_view(teacher)
    trained.train()
    observed = Observed(trained, own)
    with torch.no_grad():
        loss_of = kind(observed(batch.images), fixed(batch.images), kind.defaults, LABELS)
    loss_of.train()
    loss = loss_of(observed(batch.images), fixed(batch.images), batch)
    assert loss.ndim == 0 and loss.isfinite() and loss > 0
    loss.backward()
    assert sum(p.grad.abs().sum() for p in trained.parameters() if p.grad is not None) > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss_of.parameters() if p.dim() > 1)
    assert all(p.grad is None for p in static.parameters())
    assert bool(list(loss_of.parameters())) == (name in ("fitnet", "crd", "reviewkd"))


def test_the_numbers_of_the_papers():
    expected = {
        "fitnet": Weights(1.0, 100.0),
        "at": Weights(1.0, 1000.0),
        "rkd": Weights(1.0, 1.0),
        "crd": Weights(1.0, 0.8, temperature=0.07),
        "reviewkd": Weights(1.0, 1.0, warmup=20),
    }
    assert {name: get_distiller(name).defaults for name in METHODS} == expected
    assert [name for name in METHODS if not get_distiller(name).allows_mixing] == ["crd"]
    asked = {name: (get_distiller(name).wants_features, get_distiller(name).wants_embedding) for name in METHODS}
    assert asked == {"fitnet": (True, False), "at": (True, False), "rkd": (False, True), "crd": (False, True),
                     "reviewkd": (True, True)}  # fmt: skip


def made(name, own, other, weights=None):
    kind = get_distiller(name)
    torch.manual_seed(0)
    return kind(own, other, weights or kind.defaults, LABELS)


def test_fitnet_is_the_hint_of_the_middle_level():
    own, other = outputs(6, (4, 5, 6), (16, 8, 4)), outputs(6, (3, 4, 5, 6), (32, 16, 8, 4), seed=1)
    method = made("fitnet", own, other)
    assert method.pair == (1, 2)
    expected = hint(method.loss.connector(own.features[1], (8, 8)), other.features[2])
    torch.testing.assert_close(method(own, other, batch_of()), expected)
    four = outputs(6, (4, 5, 6, 7), (16, 8, 4, 2))
    assert made("fitnet", four, four).pair == (1, 1)


def test_at_is_the_sum_over_all_levels():
    own, other = outputs(6), outputs(6, (3, 4, 5), (16, 8, 4), seed=1)
    expected = attention_transfer(own.features, other.features[1:])
    torch.testing.assert_close(made("at", own, other)(own, other, batch_of()), expected)


def test_rkd_compares_embeddings():
    own, other = outputs(6), outputs(6, embedding=7, seed=1)
    expected = rkd(own.embedding, other.embedding, 25.0, 50.0)
    torch.testing.assert_close(made("rkd", own, other)(own, other, batch_of()), expected)


def test_crd_draws_its_temperature_and_number_from_the_settings():
    own, other, batch = outputs(6), outputs(6, embedding=7, seed=1), batch_of()
    method = made("crd", own, other, Weights(temperature=0.3))
    assert method.loss.temperature == 0.3 and method.loss.negatives == len(LABELS) and method.loss.images == len(LABELS)
    by_hand = copy.deepcopy(method.loss)
    torch.manual_seed(3)
    found = method(own, other, batch)
    torch.manual_seed(3)
    torch.testing.assert_close(found, by_hand(own.embedding, other.embedding, batch.indices))
    drawn = method.loss.draw(batch.indices)
    assert (LABELS[drawn] != batch.labels[:, None]).all()
    before = copy.deepcopy(method.state_dict())
    assert not torch.equal(made("crd", own, other).state_dict()["loss.student_memory"], before["loss.student_memory"])


def test_reviewkd_has_the_embedding_as_its_deepest_level():
    own, other = outputs(6, grad=True), outputs(6, (3, 4, 5), (16, 8, 4), embedding=7, seed=1)
    method = made("reviewkd", own, other)
    assert method.loss.student_channels == [4, 6, 5] and method.loss.teacher_channels == [4, 5, 7]
    expected = method.loss([*own.features, own.embedding], [*other.features[1:], other.embedding])
    found = method(own, other, batch_of())
    torch.testing.assert_close(found, expected)
    found.backward()
    assert own.embedding.grad.abs().sum() > 0 and all(value.grad.abs().sum() > 0 for value in own.features)


def test_rkd_names_the_options_that_make_a_part_of_a_step_too_small():
    with pytest.raises(InputError, match=r"has 2: give a larger --batch-size .* or a smaller --accumulate"):
        made("rkd", outputs(2), outputs(2))(outputs(2), outputs(2), batch_of(2))


@pytest.mark.parametrize("name", METHODS)
def test_outputs_without_what_is_needed(name):
    bare = Outputs(torch.zeros(4, 3))
    with pytest.raises(InputError, match="compares"):
        made(name, bare, outputs(4))
    with pytest.raises(InputError, match="compares"):
        made(name, outputs(4), bare)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_under_autocast(name):
    own, other = outputs(6, grad=True), outputs(6, seed=1)
    method = made(name, own, other)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(own, other, batch_of())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


# The memory of several processes -------------------------------------------------------------------------------------


def test_of_an_image_that_is_there_twice_the_last_counts():
    own, other = torch.randn(3, 4), torch.randn(3, 4)
    memory = CRD(own, other, 10, negatives=3, momentum=0.0)
    memory(own, other, torch.tensor([7, 2, 7]))
    expected = F.normalize(memory.student_embedding(own), dim=1)
    torch.testing.assert_close(memory.student_memory[[7, 2]], expected[[2, 1]])


def remember(rank, port, results):
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)  # the memories differ at first, and so do the negatives
        first, second = torch.randn(7, 4), torch.randn(7, 4)
        memory = CRD(first, second, 10, negatives=3, momentum=0.5)
        torch.manual_seed(5)
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter)
        data = [(torch.randn(7, 4), torch.randn(7, 4), torch.randperm(10)[:7]) for _ in range(3)]
        start = memory.student_memory.clone()
        losses = []
        for own, other, indices in data:
            mine = slice(0, 4) if rank == 0 else slice(4, 7)  # batches of 4 and 3
            losses.append(float(memory(own[mine], other[mine], indices[mine])))
        state = {name: value.numpy() for name, value in memory.state_dict().items()}
        results.put((rank, start.numpy(), state, losses, [tuple(v.numpy() for v in step) for step in data]))
    finally:
        distributed.destroy_process_group()


def test_two_processes_hold_the_same_memory():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "reparam.cli", "reparam.distill.trainer"])  # as other tests that fork do
    results = context.SimpleQueue()
    workers = [context.Process(target=remember, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = sorted([results.get(), results.get()], key=lambda item: item[0])
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    (_, start, first, losses, data), (_, other_start, second, other_losses, _) = found
    assert abs(start - other_start).max() > 0.1
    for name in first:
        assert (first[name] == second[name]).all(), name
    assert all(map(math.isfinite, losses + other_losses)) and losses != other_losses
    # One process with the whole batches and the first one's memory ends with the same vectors.
    alone = CRD(torch.zeros(7, 4), torch.zeros(7, 4), 10, negatives=3, momentum=0.5)
    weights = {name: torch.from_numpy(value) for name, value in first.items() if "embedding" in name}
    alone.load_state_dict({**alone.state_dict(), **weights, "student_memory": torch.from_numpy(start)})
    for own, other, indices in data:
        alone(*map(torch.from_numpy, (own, other, indices)))
    torch.testing.assert_close(alone.student_memory, torch.from_numpy(first["student_memory"]))

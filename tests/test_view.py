"""The student's view: gradients, modes, copies, moves, averages, compilation, taps."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import BY_NAME, built, error, randomise, sample

import reparam
from reparam.errors import InputError
from reparam.ops.params import repeat
from reparam.passes.teacher import Teacher


class Net(nn.Module):
    """Convolutions, norms, dropout and a drop path."""

    def __init__(self, dropout: float = 0.0, drop_path: float = 0.0, width: int = 4) -> None:
        super().__init__()
        from timm.layers import DropPath

        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.drop_path = DropPath(drop_path)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = x + self.drop_path(torch.tanh(self.body(x)))
        return self.head(self.dropout(x.mean((2, 3))))


def net(**options: float) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(**options).double()).eval()


def teacher_of(model: nn.Module, ratio: int = 2, shape: tuple[int, ...] = (2, 2, 6, 6)) -> Teacher:
    return reparam.expand(model, ratio, example_input=sample(shape))


X = sample((3, 2, 5, 6))


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradcheck(training: bool, ratio: int) -> None:
    teacher = teacher_of(net(width=2), ratio)
    view = reparam.student_view(teacher).train(training)
    parameters = tuple(teacher.parameters())
    x = sample((2, 2, 3, 3))

    def run(*_parameters: Tensor) -> Tensor:
        return view(x)

    assert torch.autograd.gradcheck(run, parameters)


@pytest.mark.parametrize("name", ["unet", "net1d", "mlp", "weight_norm", "tied", "nfnet"])
def test_directional_derivatives(name: str) -> None:
    """Along random directions through all parameters at once, against central differences."""
    entry = BY_NAME[name]
    teacher = teacher_of(built(entry), 2, entry.shape)
    view, x = reparam.student_view(teacher), sample(entry.shape, 3)
    parameters = list(teacher.parameters())
    # tanh: smooth, and of order one for every network
    weights = sample(tuple(view(x).shape), 4)
    loss = (torch.tanh(view(x)) * weights).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    start = [p.detach().clone() for p in parameters]
    sizes = [p.detach().std().nan_to_num(1.0) for p in parameters]
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * s for p, s in zip(start, sizes, strict=True)
    ]
    values = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            for p, s, d in zip(parameters, start, direction, strict=True):
                p.copy_(s + step * d)
            values.append(float((torch.tanh(view(x)) * weights).sum()))
    numeric = (values[0] - values[1]) / 2e-6
    exact = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    assert abs(exact) > 1e-6
    assert numeric == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_only_the_students_block_gets_a_gradient_from_the_view() -> None:
    teacher = teacher_of(net())
    reparam.student_view(teacher)(X).sum().backward()
    gradient = teacher.stem.weight.grad
    assert gradient is not None
    assert bool((gradient[::2] != 0).any())
    assert not bool(gradient[1::2].any())


GATHERED = [("Conv", {}), ("Conv", {"branches": "orepa", "init": "scratch"}), ("Conv", {"ratio": 3}),
            ("Conv", {"branches": "dbb", "init": "scratch"}), ("Lstm", {}), ("Normed", {}), ("Tied", {})]  # fmt: skip


def network_to_gather(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "Conv":
        return net(), X
    if name == "Lstm":  # its weights must not be views
        return FromLast(nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)).double(), sample((3, 5, 4))
    if name == "Normed":
        weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), weight_norm, nn.Tanh(), nn.Linear(6, 3)).double(), sample(
            (3, 4)
        )
    middle = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), middle, nn.Linear(6, 3)).double(), sample((3, 4))


class FromLast(nn.Module):
    """A recurrent network and a classifier of its last output."""

    def __init__(self, recurrent: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize(("name", "options"), GATHERED, ids=str)
def test_gathered_gradients_are_those_of_autograd(name: str, options: dict[str, object]) -> None:
    model, x = network_to_gather(name)
    found = []
    for gather in (False, True):
        torch.manual_seed(0)
        teacher = reparam.expand(model, **{"ratio": 2, **options}, example_input=x).train()
        first = next(p for _, p in teacher.named_parameters())
        first.requires_grad_(False)
        view = reparam.student_view(teacher).train()
        teacher(x).square().mean().backward()
        alone = {n: p.grad.clone() for n, p in teacher.named_parameters() if p.grad is not None}
        with view.gathered() if gather else nullcontext():
            for k in (1, 2):  # pieces of a step
                (k * view(x)).cos().mean().backward()
        found.append({n: p.grad for n, p in teacher.named_parameters()})
        assert first.grad is None
    for key, value in found[0].items():
        assert (value is None) == (found[1][key] is None)
        assert value is None or error(found[1][key], value) <= 1e-12, key
    assert any(error(found[1][key], value) > 1e-3 for key, value in alone.items())  # the student did add something


class _FromTheHost(TorchDispatchMode):
    """Counts tensors that are made of Python numbers: a GPU waits for them, and no CUDA graph holds them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["orepa", "orepa_small", "acb", "expandnet", "mobileone"])
def test_a_step_makes_no_tensors_of_numbers(recipe: str) -> None:
    teacher = reparam.expand(net(), 2, branches=recipe, init="scratch", example_input=X).train()
    view = reparam.student_view(teacher).train()
    with _FromTheHost() as mode, view.gathered():
        teacher(X).square().mean().backward()
        view(X).cos().mean().backward()
    with _FromTheHost() as known:
        torch.tensor([1, 2])
    assert (mode.count, known.count) == (0, 1)


class Words(nn.Module):
    """An embedding and its bag, whose gradients may be sparse."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(9, 4, sparse=sparse), nn.EmbeddingBag(9, 4, sparse=sparse)
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(torch.tanh(self.words(x)).mean(1) + self.bags(x))))


@pytest.mark.parametrize("order", ["teacher view", "view teacher", "view", "view view"])
@pytest.mark.parametrize("gather", [False, True], ids=["plain", "gathered"])
def test_sparse_gradients_of_embeddings(gather: bool, order: str) -> None:
    """No map brings a sparse gradient back: those of the view become dense, and add to the teacher's own."""
    x, found = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(0)), []
    for sparse in (False, True):
        torch.manual_seed(0)
        teacher = reparam.expand(Words(sparse).double(), 2, example_input=x)
        networks = {"teacher": teacher, "view": reparam.student_view(teacher)}
        with networks["view"].gathered() if gather else nullcontext():
            for name in order.split():
                networks[name](x).square().sum().backward()
        assert all(not p.grad.is_sparse for p in teacher.parameters())
        found.append([p.grad for p in teacher.parameters()])
        assert reparam.extract(teacher).words.sparse is sparse
    for dense, other in zip(*found, strict=True):
        torch.testing.assert_close(other, dense, rtol=1e-12, atol=1e-12)
        assert dense.abs().max() > 1e-3


class Masked(nn.Module):
    """A layer with a mask of its own, which it calls sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("sparse", (torch.rand(6, 4) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.sparse)


def test_sparse_may_be_anything_in_another_module() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), Masked(), nn.Linear(6, 2)).double(), sample((5, 3))
    teacher = reparam.expand(model, 2, example_input=x)
    with torch.no_grad():
        assert error(model(x), reparam.student_view(teacher)(x)) < 1e-12


def test_gathered_gradients_without_those_of_a_teacher() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    view(X).square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in teacher.named_parameters()}
    teacher.zero_grad()
    with view.gathered():
        view(X).square().mean().backward()
        assert all(p.grad is None for p in (teacher.stem.weight, teacher.body.weight))
    assert all(error(p.grad, wanted[n]) <= 1e-12 for n, p in teacher.named_parameters())


def test_a_pass_without_gradients_inside_costs_the_next_none() -> None:
    teacher = reparam.expand(net(), 2, example_input=X, branches="orepa", init="scratch")
    view = reparam.student_view(teacher)
    with view.gathered():
        with torch.no_grad():
            view(X)
        view(X).square().mean().backward()
    assert all(p.grad is not None for name, p in teacher.named_parameters() if "stem" in name)


def test_an_error_inside_leaves_the_gradients_alone() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    with pytest.raises(RuntimeError, match="stop"), view.gathered():
        view(X).sum().backward()
        raise RuntimeError("stop")
    assert teacher.stem.weight.grad is None
    view(X).sum().backward()  # and the view is as before
    assert teacher.stem.weight.grad is not None


def test_gradients_of_both_add_up_in_the_same_tensors() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    parts = []
    for module in (teacher, view):
        teacher.zero_grad()
        module(X).square().sum().backward()
        parts.append({name: p.grad.clone() for name, p in teacher.named_parameters()})
    view.zero_grad()
    assert all(p.grad is None for p in teacher.parameters())
    (teacher(X).square().sum() + view(X).square().sum()).backward()
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.grad, parts[0][name] + parts[1][name], rtol=1e-12, atol=1e-14)
    assert error(parts[0]["body.weight"], parts[1]["body.weight"]) > 1e-3


def test_the_gradient_is_the_students_own() -> None:
    """Gradient of the view is the gradient of the plain student, times the divisor, at the first replicas."""
    model = net()
    teacher = teacher_of(model)
    reparam.student_view(teacher)(X).square().sum().backward()
    model(X).square().sum().backward()
    torch.testing.assert_close(teacher.head.weight.grad[:, ::2], 2 * model.head.weight.grad)
    torch.testing.assert_close(teacher.stem.weight.grad[::2], model.stem.weight.grad)


def test_frozen_parameters_stay_frozen() -> None:
    model = net()
    model.stem.weight.requires_grad_(False)
    teacher = teacher_of(model)
    (reparam.student_view(teacher)(X).sum() + teacher(X).sum()).backward()
    assert teacher.stem.weight.grad is None
    assert teacher.head.weight.grad is not None


# One object ----------------------------------------------------------------------------------------------------------


def test_one_view_per_teacher() -> None:
    one, two = teacher_of(net()), teacher_of(net())
    view = reparam.student_view(one)
    assert reparam.student_view(one) is view
    assert reparam.student_view(two) is not view
    assert view.teacher is one
    with torch.no_grad():
        assert error(one(X), view(X)) <= 1e-12


def test_the_view_is_no_part_of_the_teacher() -> None:
    teacher = teacher_of(net())
    keys, modules = list(teacher.state_dict()), list(dict(teacher.named_modules()))
    view = reparam.student_view(teacher)
    assert list(teacher.state_dict()) == keys
    assert list(dict(teacher.named_modules())) == modules
    teacher.double()  # no recursion from one into the other and back
    assert "student=Net" in repr(view)


def test_parameters_are_the_teachers_each_once() -> None:
    teacher = teacher_of(built(BY_NAME["tied"]), 2, BY_NAME["tied"].shape)
    view = reparam.student_view(teacher)
    mine, wide = list(view.parameters()), list(teacher.parameters())
    assert len(mine) == len({id(p) for p in mine}) == len(wide)
    assert all(a is b for a, b in zip(mine, wide, strict=True))
    assert dict(view.named_buffers()).keys() == dict(teacher.named_buffers()).keys()


def test_one_optimizer_over_both_counts_each_tensor_once() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    both = nn.ModuleList([teacher, view])
    assert len(list(both.parameters())) == len(list(teacher.parameters()))


def test_train_and_eval_switch_the_view_alone() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    assert not view.training and not teacher.training
    assert view.train() is view
    assert view.training and not teacher.training
    assert all(m.training for m in view.network.modules())
    teacher.train()
    assert view.eval() is view
    assert teacher.training and not view.training


def test_to_moves_the_teacher() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    assert view.to(torch.float32) is view
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert view(X.float()).dtype == torch.float32
    teacher.double()
    with torch.no_grad():
        assert error(teacher(X), view(X)) < 1e-5


def test_a_teacher_refuses_the_students_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    teacher = reparam.expand(model, 2, example_input=torch.randn(2, 3))
    with pytest.raises(InputError, match=r"0\.weight has the student's shape \[5, 3\], the teacher's is \[10, 3\]"):
        teacher.load_state_dict(model.state_dict())
    other = reparam.expand(model, 2, example_input=torch.randn(2, 3))  # other noise
    teacher.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in teacher.state_dict().items())


def test_the_view_has_the_students_state_dict() -> None:
    model = net()
    view = reparam.student_view(teacher_of(model))
    state = view.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    with pytest.raises(InputError, match="owns no weights; load them into the teacher"):
        view.load_state_dict(state)


def test_pickling_is_refused_with_the_way_out() -> None:
    import pickle

    teacher = teacher_of(net())
    with pytest.raises(InputError, match=r"reparam\.save"):
        pickle.dumps(teacher)
    with pytest.raises(InputError, match=r"reparam\.save"):
        pickle.dumps(reparam.student_view(teacher))


def test_a_view_of_something_else() -> None:
    model = net()
    with pytest.raises(InputError, match=r"teacher made by reparam.expand or reparam.load is needed, not Net"):
        reparam.student_view(model)
    with pytest.raises(InputError, match="not Net"):
        reparam.extract(model)


# Copies --------------------------------------------------------------------------------------------------------------


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(t, second[key]) for key, t in first.items())


def test_deepcopy_of_the_teacher() -> None:
    teacher = teacher_of(net(dropout=0.5, drop_path=0.5))
    clone = copy.deepcopy(teacher)
    assert same(teacher, clone)
    assert clone.plan is teacher.plan
    assert not {t.data_ptr() for t in teacher.state_dict().values()} & {
        t.data_ptr() for t in clone.state_dict().values()
    }
    with torch.no_grad():
        assert torch.equal(teacher(X), clone(X))
        before = teacher(X)
        for p in clone.parameters():
            p.add_(0.1)
        assert torch.equal(teacher(X), before)
        assert not torch.equal(clone(X), before)
    view = reparam.student_view(clone)
    assert view.teacher is clone
    assert type(reparam.extract(clone)) is Net
    # A copy of a copy, and the attributes that training code asks for.
    again = copy.deepcopy(clone)
    with torch.no_grad():
        assert torch.equal(clone(X), again(X))


def test_a_view_has_the_teachers_tensors_as_its_own() -> None:
    """DistributedDataParallel collects what each module has itself."""
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    assert [n for n, _ in view.named_modules()] == [""]
    for kind in ("named_parameters", "named_buffers"):
        own = dict(getattr(view, kind)(recurse=False))
        assert own and own.keys() == dict(getattr(teacher, kind)()).keys()


class Twice(nn.Module):
    """A module under two names, tied weights, and a weight that a hook computes: what a view puts into the network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.again, self.head = self.b, nn.Linear(8, 2)
        self.c.weight = self.b.weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on its way out
            nn.utils.weight_norm(self.d)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.again, self.c, self.d):
            x = torch.tanh(layer(x))
        return self.head(x)


def test_copies_after_the_view_ran() -> None:
    model, x = randomise(Twice().double()), sample((3, 4), 1)
    teacher = reparam.expand(model, 2, example_input=x)
    view = reparam.student_view(teacher)
    for train in (False, True):
        teacher.train(train), view.train(train)
        (teacher(x).sum() + view(x).sum()).backward()
        clone = copy.deepcopy(teacher)
        copies = clone, reparam.student_view(clone), copy.deepcopy(view), reparam.extract(teacher)
        assert all(error(model(x).detach(), other(x).detach()) < 1e-12 for other in copies)


@pytest.mark.parametrize("order", ["teacher first", "view first"])
def test_deepcopy_of_teacher_and_view_together(order: str) -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher).train()
    pair = (teacher, view) if order == "teacher first" else (view, teacher)
    clones = copy.deepcopy(pair)
    wide, compact = clones if order == "teacher first" else reversed(clones)
    assert compact.teacher is wide
    assert reparam.student_view(wide) is compact
    assert compact.training and not wide.training
    compact.eval()
    view.eval()
    with torch.no_grad():
        next(wide.parameters()).add_(0.1)
        assert error(view(X), compact(X)) > 1e-6
        assert error(teacher(X), view(X)) <= 1e-12


def test_deepcopy_of_the_view_brings_its_teacher() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    clone = copy.deepcopy(view)
    assert clone is not view and clone.teacher is not teacher
    with torch.no_grad():
        assert torch.equal(view(X), clone(X))
        assert torch.equal(teacher(X), clone.teacher(X))


def test_copied_modes_are_kept() -> None:
    teacher = teacher_of(net(dropout=0.5))
    teacher.train()
    teacher.norm.eval()
    clone = copy.deepcopy(teacher)
    assert {n: m.training for n, m in teacher.named_modules()} == {n: m.training for n, m in clone.named_modules()}


def test_moving_average_of_a_teacher() -> None:
    from timm.utils import ModelEmaV3

    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    average = ModelEmaV3(teacher, decay=0.5)
    start = {key: t.clone() for key, t in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(view.parameters(), 0.1)
    teacher.train()
    view.train()
    (teacher(X).square().sum() + view(X).square().sum()).backward()
    optimizer.step()
    average.update(teacher)
    for key, t in average.module.state_dict().items():
        if t.is_floating_point():
            torch.testing.assert_close(t, 0.5 * (start[key] + teacher.state_dict()[key]))
    averaged = average.module.eval()
    student = reparam.extract(averaged).eval()
    with torch.no_grad():
        assert error(student(X), reparam.student_view(averaged).eval()(X)) <= 1e-12
        assert error(student(X), view.eval()(X)) > 1e-6


# Modes of the teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True], ids=["made", "copied"])
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"drop_path": 0.5}], ids=["dropout", "drop path"])
@pytest.mark.parametrize("start", [False, True], ids=["expanded in eval", "expanded in train"])
def test_the_teacher_obeys_train_and_eval(options: dict[str, float], copied: bool, start: bool) -> None:
    model = net(**options).train(start)
    teacher = teacher_of(model)
    assert teacher.training == start
    teacher = copy.deepcopy(teacher) if copied else teacher
    statistics = {key: t.clone() for key, t in teacher.state_dict().items() if "running" in key}
    x = sample((16, 2, 6, 6), 5)
    with torch.no_grad():
        teacher.eval()
        quiet = teacher(x)
        assert error(quiet, model.eval()(x)) <= 1e-12
        assert torch.equal(quiet, teacher(x))
        assert all(torch.equal(teacher.state_dict()[key], t) for key, t in statistics.items())
        teacher.train()
        assert not torch.equal(teacher(x), teacher(x))
        moved = {key for key, t in statistics.items() if not torch.equal(teacher.state_dict()[key], t)}
        assert moved == {"norm.running_mean", "norm.running_var"}
        assert int(teacher.norm.num_batches_tracked) == 2
        teacher.eval()
        assert torch.equal(teacher(x), teacher(x))
        assert not torch.equal(teacher(x), quiet)


def test_one_module_can_be_switched_alone() -> None:
    teacher = teacher_of(net(dropout=0.5))
    teacher.dropout.train()
    with torch.no_grad():
        assert not torch.equal(teacher(X), teacher(X))
        teacher.train()
        teacher.dropout.eval()
        teacher.drop_path.eval()
        before = teacher.norm.running_mean.clone()
        teacher(X)
        assert not torch.equal(teacher.norm.running_mean, before)
        teacher.norm.eval()
        assert torch.equal(teacher(X), teacher(X))


def test_the_view_obeys_train_and_eval() -> None:
    teacher = teacher_of(net(dropout=0.5))
    view = reparam.student_view(teacher)
    with torch.no_grad():
        assert torch.equal(view(X), view(X))
        view.train()
        assert not torch.equal(view(X), view(X))
        own = teacher.get_buffer("student_statistics.norm.num_batches_tracked")
        assert (int(own), int(teacher.norm.num_batches_tracked)) == (2, 0)
        view.eval()
        assert torch.equal(view(X), view(X))


# Other wrappers ------------------------------------------------------------------------------------------------------


def test_compile() -> None:
    teacher = teacher_of(net())
    view = reparam.student_view(teacher)
    with torch.no_grad():
        assert error(teacher(X), torch.compile(teacher, backend="eager")(X)) <= 1e-12
        assert error(view(X), torch.compile(view, backend="eager")(X)) <= 1e-12
    teacher.train()
    torch.compile(teacher, backend="eager")(X).sum().backward()
    assert teacher.stem.weight.grad is not None


@pytest.fixture
def process_group(tmp_path: Path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    teacher = teacher_of(net()).train()
    alone = copy.deepcopy(teacher)
    wrapped = nn.parallel.DistributedDataParallel(teacher)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (wrapped, alone)]
    for module, optimizer in zip((wrapped, alone), optimizers, strict=True):
        module(X).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), alone.parameters(), strict=True))
    with pytest.raises(InputError, match=r"wrapped .*pass the teacher itself, usually wrapper\.module"):
        reparam.extract(wrapped)
    with torch.no_grad():
        assert reparam.student_view(wrapped.module)(X).shape == (3, 3)


def test_a_compiled_teacher_is_named() -> None:
    with pytest.raises(InputError, match=r"compiled; pass the teacher itself \(compiled\._orig_mod\)"):
        reparam.extract(torch.compile(teacher_of(net()), backend="eager"))


def test_half_precision_autocast() -> None:
    teacher = teacher_of(net()).float()
    view = reparam.student_view(teacher)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert error(view(X.float()).float(), teacher(X.float()).float()) < 0.1


# Taps ----------------------------------------------------------------------------------------------------------------


def test_taps_of_student_view_and_teacher() -> None:
    model = net()
    teacher = teacher_of(model)
    view = reparam.student_view(teacher)
    names = ["stem", "norm", "body", "head"]
    with torch.no_grad():
        plain, mine = reparam.tap(model, names)(X)
        _out, compact = reparam.tap(view, names)(X)
        output, wide = reparam.tap(teacher, names)(X)
    assert list(mine) == list(compact) == list(wide) == names
    assert torch.equal(plain, model(X))
    with torch.no_grad():
        assert torch.equal(output, teacher(X))
    for name in names:
        assert error(mine[name], compact[name]) <= 1e-12
        node = teacher._programs[0].outputs[name][-1]
        expected = mine[name]
        for dim, replica_map in teacher.plan.value_maps.get(node, ((),))[0]:
            expected = repeat(expected, dim, replica_map)
        assert error(expected, wide[name]) <= 1e-12, name
    assert [wide[name].shape[1] for name in names] == [8, 8, 8, 3]


def test_taps_follow_the_weights_and_the_mode() -> None:
    teacher = teacher_of(net(dropout=0.5))
    tapped = reparam.tap(teacher, "stem")
    assert len(list(tapped.parameters())) == len(list(teacher.parameters()))
    with torch.no_grad():
        before = tapped(X)[1]["stem"]
        teacher.stem.weight.add_(1.0)
        assert not torch.equal(tapped(X)[1]["stem"], before)
        teacher.train()
        assert not torch.equal(tapped(X)[0], tapped(X)[0])
        tapped.eval()
        assert not teacher.training
    out, values = tapped(X)
    (out.sum() + values["stem"].square().sum()).backward()
    assert teacher.stem.weight.grad is not None


def test_a_tap_of_a_copied_teacher() -> None:
    teacher = copy.deepcopy(teacher_of(built(BY_NAME["unet"]), 2, BY_NAME["unet"].shape))
    x = sample(BY_NAME["unet"].shape)
    with torch.no_grad():
        out, values = reparam.tap(teacher, ["middle", "down.1"])(x)
        assert torch.equal(out, teacher(x))
    assert values["middle"].shape[:2] == (2, 64)
    assert values["down.1"].shape[:2] == (2, 32)


def test_a_tap_of_an_unknown_module() -> None:
    model = net()
    teacher = teacher_of(model)
    for module in (model, teacher, reparam.student_view(teacher)):
        with pytest.raises(InputError, match=r"tap: no module 'boddy'; did you mean 'body'"):
            reparam.tap(module, ["boddy"])


def test_a_tap_of_a_module_that_is_not_called() -> None:
    model = net()
    model.spare = nn.Linear(2, 2).double()
    teacher = teacher_of(model)
    with pytest.raises(InputError, match="'spare' is not called"):
        reparam.tap(model, ["spare"])(X)
    with pytest.raises(InputError, match="'spare' is not called"):
        reparam.tap(teacher, ["spare"])


def test_hooks_are_gone_after_the_tap() -> None:
    model = net()
    reparam.tap(model, ["stem"])(X)
    assert not model.stem._forward_hooks


def test_tap_follows_the_mode_of_a_network_with_two_forward_passes():
    student = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=4).eval()
    teacher = reparam.expand(student, 2, example_input=torch.randn(2, 3, 64, 64), verify=False)
    tapped = reparam.tap(teacher, ["aux1"])
    with pytest.raises(InputError, match="'aux1' is not called"):
        tapped(torch.randn(2, 3, 64, 64))
    teacher.train()
    _output, values = tapped(torch.randn(2, 3, 64, 64))
    assert values["aux1"].shape == (2, 4)

"""Teachers with branches in use: which layers get them, files, copies, dtypes, modes, taps, autocast, bad input."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_networks import Cnn, batch, branched, made, waken
from torch import Tensor, nn
from zoo import error, randomise, sample

import reparam
from reparam.errors import FormatError, InputError
from reparam.ops.expressions import Expression
from reparam.ops.recipes import Recipe, Site, recipe, registry
from reparam.passes.plan import Plan
from reparam.passes.teacher import Teacher

EXACT = 1e-12
KINDS = ("orepa", "dbb")
"""One recipe without norms, one with."""


def chosen(made_: Plan) -> dict[str, str]:
    return {b.site.name.removesuffix(".weight"): str(b.recipe) for b in made_.branches}


def plan_of(branches: Any, name: str = "cnn", **more: Any) -> Plan:
    return reparam.plan(made(name), 2, branches=branches, example_input=batch(name), **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(
        torch.equal(t, second[n]) and t.dtype == second[n].dtype for n, t in first.items()
    )


def train(teacher: Teacher, name: str, steps: int = 2) -> None:
    view = reparam.student_view(teacher.train()).train()
    optimizer = torch.optim.SGD(teacher.parameters(), 0.02, momentum=0.9)
    for seed in range(steps):
        optimizer.zero_grad()
        x = batch(name, seed)
        (teacher(x).square().mean() + view(x).square().mean()).backward()
        optimizer.step()


# Which layers --------------------------------------------------------------------------------------------------------

SELECTIONS: list[tuple[Any, dict[str, str]]] = [
    ("orepa", {"stem": "orepa", "body": "orepa"}),
    (Recipe("orepa", {"branches": 2}), {"stem": "orepa:branches=2", "body": "orepa:branches=2"}),
    ({"body": "acb"}, {"body": "acb"}),
    ({"body.weight": "acb"}, {"body": "acb"}),
    ({"b*": "acb", "*": "orepa"}, {"body": "acb", "stem": "orepa"}),
    ({"re:(body|down)": "repvgg"}, {"body": "repvgg", "down": "repvgg"}),
    ({nn.Conv2d: "mobileone"}, dict.fromkeys(("stem", "body", "down", "large"), "mobileone")),
    ({"stem": None, "*": "orepa"}, {"body": "orepa"}),
    ({"down": "expandnet", "*": "orepa"}, {"stem": "orepa", "body": "orepa", "down": "expandnet"}),
    ({nn.Linear: "expandnet", nn.Conv2d: "acb"}, {**dict.fromkeys(("stem", "body", "down", "large"), "acb"),
                                                  "head": "expandnet"}),
    ({"*": None, "body": "orepa"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("branches", "expected"), SELECTIONS, ids=[str(s[0]) for s in SELECTIONS])
def test_which_layers_have_branches(branches: Any, expected: dict[str, str]) -> None:
    """The first entry that matches counts and overrides the recipe's condition, but for "*"."""
    if not expected:
        assert chosen(plan_of({"*": None})) == {}
        return
    assert chosen(plan_of(branches)) == expected
    teacher = branched("cnn", branches, 2)
    found = {n.split(".")[1] for n in teacher.state_dict() if n.startswith("reparam_branches.")}
    assert found == set(expected)


def test_layers_without_branches_have_a_reason() -> None:
    made_ = plan_of("orepa")
    assert {n: r.split(";")[0] for n, r in made_.unbranched.items()} == {
        "down.weight": "a stride",
        "large.weight": "a kernel that is not 3 wide in each dimension",
        "head.weight": "a linear",
    }
    text = str(made_)
    assert "branches orepa, init student: 2 layers: stem.weight, body.weight" in text
    assert "no branches for down.weight: a stride" in text
    assert "branch parameters" in text and "multiply-adds to merge" in text
    # An entry None is no reason.
    assert "stem.weight" not in plan_of({"stem": None, "*": "orepa"}).unbranched


@pytest.mark.parametrize("recipe_name", ["orepa:branches=", "mobileone:branches="])
def test_the_number_of_branches_counts(recipe_name: str) -> None:
    """More branches, more tensors and parameters; the plan's numbers are the teacher's."""
    sizes = []
    for count in range(1, 5):
        teacher = branched("cnn", f"{recipe_name}{count}", 2)
        own = [p for n, p in teacher.named_parameters() if n.startswith("reparam_branches.")]
        assert sum(p.numel() for p in own) == sum(b.wide_parameters for b in teacher.plan.branches)
        assert sum(p.numel() for p in teacher.parameters()) == teacher.plan.wide_parameters
        sizes.append(len(own))
    assert sizes == sorted(set(sizes))
    student = plan_of("orepa").branches[1]
    assert student.parameters == 8 * 8 * (1 + 1 + 1 + 9 + 1 + 8) + 6 * 8 + 8 * 8 * 9
    assert student.merge_multiply_adds < student.wide_merge_multiply_adds


def test_a_model_that_is_one_layer() -> None:
    model, x = nn.Conv2d(3, 4, 3, padding=1).double().eval(), sample((2, 3, 6, 6))
    for branches in ("dbb", {nn.Conv2d: "dbb"}, {"weight": "dbb"}):
        teacher = reparam.expand(model, 2, branches=branches, example_input=x)
        waken(teacher)
        with torch.no_grad():
            student = reparam.extract(teacher)
            assert error(teacher(x), reparam.student_view(teacher)(x)) <= EXACT
            assert error(teacher(x), student(x)) <= EXACT and error(model(x), student(x)) > 1e-3
            statistics = teacher.get_buffer("reparam_branches.weight.point.norm.running_mean").clone()
            teacher.train()(x)
            assert not torch.equal(statistics, teacher.get_buffer("reparam_branches.weight.point.norm.running_mean"))


def test_linear_layers_with_norms_inside() -> None:
    """Where an entry asks for them: vectors and tokens."""
    for name, recipe_name in (("mlp", "repvgg"), ("rvt", "dbb"), ("rvt", "mobileone")):
        teacher = branched(name, {nn.Linear: recipe_name}, 2)
        waken(teacher)
        view, x = reparam.student_view(teacher), batch(name, 3)
        with torch.no_grad():
            assert error(teacher(x), reparam.extract(teacher)(x)) <= EXACT
            assert error(teacher.train()(x), view.train()(x)) <= 1e-10
            assert error(teacher.eval()(x), view.eval()(x)) <= 1e-10


def test_one_convolution_called_twice() -> None:
    """One set of branches, merged once for both calls."""
    teacher = branched("tied", "orepa", 2)
    calls = [n for n in teacher.graph.nodes if n.op == "call_module" and str(n.target).endswith("again.weight")]
    assert len(calls) == 1 and len(calls[0].users) == 2
    teacher = branched("tied", "dbb", 2)
    calls = [n for n in teacher.graph.nodes if n.op == "call_module" and str(n.target).endswith("again.weight")]
    assert len(calls) == 2
    assert {b.site.name: b.bias for b in teacher.plan.branches}["again.weight"] == "again.bias"


class Odd(nn.Module):
    """Weights that are used in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both, self.read = (nn.Conv2d(n, 6, 3, padding=1) for n in (3, 6, 6))
        self.up = nn.ConvTranspose2d(6, 6, 3, padding=1)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
        self.unused = nn.Conv2d(6, 6, 3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.both(x) + nn.functional.conv2d(x, self.both.weight, None, dilation=2, padding=2)
        x = self.read(x) * self.read.weight.mean()
        return self.head(torch.relu(self.norm(self.up(x))))


def test_layers_that_no_recipe_can_have() -> None:
    model, x = randomise(Odd().double()).eval(), sample((2, 3, 8, 8))
    made_ = reparam.plan(model, 2, branches={nn.Module: "orepa"}, example_input=x)
    assert set(chosen(made_)) == {"stem", "head"}
    reasons = {n.removesuffix(".weight"): r for n, r in made_.unbranched.items()}
    assert reasons["both"] == "it is called in several ways"
    assert reasons["read"] == "its weight is read in another way too"
    assert "transposed" in reasons["up"]
    assert reasons["unused"] == "not used by this forward pass"
    teacher = reparam.expand(model, 2, branches="orepa", example_input=x)
    with torch.no_grad():
        assert error(model(x), teacher(x)) <= EXACT


# Bad input -----------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"branches": "orpea"}, r"unknown branch recipe 'orpea'.*orepa"),
    ({"branches": {"body": "ddb"}}, r"unknown branch recipe 'ddb'.*dbb"),
    ({"branches": "orepa:count=3"}, r"no option 'count=3'"),
    ({"branches": "orepa:branches=many"}, r"branches is of type int, not 'many'"),
    ({"branches": 6}, r"a name or a Recipe, not int"),
    ({"branches": {3: "orepa"}}, r"a branches entry is a name"),
    ({"branches": "orepa:branches=9"}, r"orepa has 1 to 6 branches, not 9"),
    ({"branches": {"nothing": "orepa"}}, r"entry 'nothing' matches no convolution or linear layer"),
    ({"branches": {"boddy": "orepa"}}, r"matches no convolution or linear layer; did you mean 'body'"),
    ({"branches": {"re:(": "orepa"}}, r"entry 're:\(' is no regular expression"),
    ({"branches": {}, "init": "scratch"}, r"there are none; pass branches"),
    ({"branches": {nn.Conv3d: "orepa"}}, r"matches no convolution or linear layer"),
    ({"branches": {"norm": "orepa"}}, r"entry 'norm' matches no convolution or linear layer"),
    ({"branches": {"he*": "dbb"}, "init": "both"}, r"init must be one of 'student', 'scratch', not 'both'"),
    ({"init": "scratch"}, r"there are none; pass branches"),
    ({"branches": {"large": "orepa:branches=7"}}, r"orepa has 1 to 6 branches, not 7"),
    ({"branches": {nn.Conv2d: "acb", "body": "orepa"}}, r"entry 'body' decides no layer: .*Conv2d.* stands before it"),
    ({"branches": {"*": "dbb", "large": "acb"}}, r"entry 'large' decides no layer: .*'\*' stands before it"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD, ids=[str(b[0]) for b in BAD])
@pytest.mark.parametrize("call", [reparam.plan, reparam.expand])
def test_bad_input(call: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(made("cnn"), 2, example_input=batch("cnn"), **given)


def test_a_recipe_that_fits_no_layer() -> None:
    with pytest.raises(InputError, match=r"recipe 'expandnet' fits no layer of this network: .*a linear"):
        plan_of("expandnet", "mlp")


def test_an_entry_behind_another_that_takes_everything() -> None:
    """Only ``"*"`` may: a default that nothing is left for."""
    assert set(chosen(plan_of({nn.Conv2d: "acb", nn.Linear: None, "*": "orepa"})).values()) == {"acb"}


NO_START: dict[str, Any] = {
    "scaled": lambda site: site.origin() + site.full("a").scaled("b", 1.0),
    "plain": lambda site: site.origin() + site.full("a"),
    "normed": lambda site: site.origin() + site.full("a").normed("n"),
    "in a row": lambda site: site.point("a") >> site.origin(),
    "nan": lambda site: site.origin() + site.full("a", start=lambda w: w.fill_(float("nan"))).scaled("b", 0.0),
}


@pytest.mark.parametrize("case", NO_START)
def test_recipes_that_do_not_start_as_the_layer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    reparam.recipe("wrong", fits=lambda site: "" if site.size == (3, 3) else "other sizes")(NO_START[case])
    message = "start with NaN or Inf" if case == "nan" else r"do not start as the layer itself \(weights differ by"
    with pytest.raises(InputError, match=message):
        reparam.expand(made("cnn"), 2, branches={"body": "wrong"}, example_input=batch("cnn"))
    if case != "nan":
        teacher = reparam.expand(made("cnn"), 2, branches={"body": "wrong"}, init="scratch", example_input=batch("cnn"))
        assert len(teacher.plan.branches) == 1


def test_without_branches_nothing_changes() -> None:
    torch.manual_seed(0)
    one = reparam.expand(made("cnn"), 2, example_input=batch("cnn"))
    torch.manual_seed(0)
    two = branched("cnn", None, 2)
    assert same(one, two) and not any("reparam_branches" in n for n in one.state_dict())
    assert "branch" not in str(one.plan)
    narrow = branched("cnn", None, 1)
    assert set(narrow.state_dict()) == set(made("cnn").state_dict())


# A recipe of one's own -----------------------------------------------------------------------------------------------


def test_a_recipe_of_your_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = dict(registry._RECIPES)
    monkeypatch.setattr(registry, "_RECIPES", dict(known))

    @recipe("twin", fits=lambda site: "" if site.size == (3, 3) else "another size")
    def twin(site: Site, *, more: int = 1) -> Expression:
        expression = site.origin()
        for k in range(more):
            row = site.point(f"in{k}", outputs=2 * site.inputs) >> site.full(f"out{k}", inputs=2 * site.inputs)
            expression = expression + row.scaled(f"scale{k}", site.start(1.0))
        return expression

    teacher = branched("cnn", "twin:more=2", 2)
    assert set(chosen(teacher.plan)) == {"stem", "body", "down"}
    waken(teacher)
    x = batch("cnn", 3)
    with torch.no_grad():
        assert error(teacher(x), reparam.extract(teacher)(x)) <= EXACT
        assert error(teacher(x), made("cnn")(x)) > 1e-3
    reparam.save(teacher, tmp_path / "t.safetensors")
    assert same(teacher, reparam.load(tmp_path / "t.safetensors", made("cnn")))
    monkeypatch.setattr(registry, "_RECIPES", known)
    with pytest.raises((InputError, FormatError), match=r"unknown branch recipe 'twin'.*registered"):
        reparam.load(tmp_path / "t.safetensors", made("cnn"))


# Plans and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [*KINDS, {"body": "orepa:branches=3,pointwise=released", "*": "acb"}], ids=str)
@pytest.mark.parametrize("init", ["student", "scratch"])
def test_plans_in_files(branches: Any, init: str) -> None:
    first = plan_of(branches, init=init)
    again = Plan.from_json(first.to_json())
    assert again.to_json() == first.to_json() and str(again) == str(first)
    assert again.branches == first.branches and dict(again.unbranched) == dict(first.unbranched)


@pytest.mark.parametrize("init", ["student", "scratch"])
@pytest.mark.parametrize(
    ("name", "recipe_name"), [("cnn", "orepa"), ("cnn", "dbb"), ("tied", "repvgg"), ("grouped", "dbb")]
)
def test_save_and_load(name: str, recipe_name: str, init: str, tmp_path: Path) -> None:
    teacher = branched(name, recipe_name, 2, init=init)
    train(teacher, name)
    path = tmp_path / "teacher.safetensors"
    reparam.save(teacher, path)
    loaded = reparam.load(path, made(name, seed=5).train())
    assert same(teacher, loaded) and loaded.training
    x = batch(name, 7)
    for mode in (True, False):
        pairs = [(teacher.train(mode), loaded.train(mode))]
        pairs += [(reparam.student_view(teacher).train(mode), reparam.student_view(loaded).train(mode))]
        for one, two in pairs:
            with torch.no_grad():
                assert torch.equal(one(x), two(x))
    assert same(teacher, loaded) and same(reparam.extract(teacher), reparam.extract(loaded))
    again = tmp_path / "again.safetensors"
    reparam.save(teacher, path)
    reparam.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    teacher = branched("cnn", "orepa", 2)
    reparam.save(teacher, tmp_path / "t.safetensors")
    model, before = made("cnn"), torch.get_rng_state()
    reparam.load(tmp_path / "t.safetensors", model)
    assert torch.equal(before, torch.get_rng_state())


DAMAGE: list[tuple[str, Any]] = [
    ("name", "nothing.weight"), ("outputs", 16), ("inputs", 4), ("size", [5, 5]), ("size", "x"), ("groups", 0),
    ("groups", 2), ("dilation", [1]), ("padding", None), ("init", "x"), ("operator", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def normed() -> Teacher:
    """A teacher that is not changed."""
    return branched("cnn", "dbb", 2)


@pytest.mark.parametrize(("field", "value"), DAMAGE, ids=str)
def test_a_damaged_plan(field: str, value: Any, normed: Teacher, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "t.safetensors"
    reparam.save(normed, path)
    data = json.loads(normed.plan.to_json())
    data["branches"][1]["site"][field] = value
    save_file(load_file(path), path, metadata={"reparam_plan": json.dumps(data)})
    with pytest.raises(FormatError):
        reparam.load(path, made("cnn"))


@pytest.mark.parametrize(("field", "value"), [("norms", ["nothing"]), ("bias", "nothing"), ("recipe", "orepa:x=1"),
                                              ("norms", 3), ("recipe", 3), ("parameters", "x")], ids=str)  # fmt: skip
def test_a_damaged_row(field: str, value: Any, normed: Teacher, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "t.safetensors"
    reparam.save(normed, path)
    data = json.loads(normed.plan.to_json())
    data["branches"][0][field] = value
    save_file(load_file(path), path, metadata={"reparam_plan": json.dumps(data)})
    with pytest.raises((FormatError, InputError)):
        reparam.extract(reparam.load(path, made("cnn")))


# Copies, dtypes, modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe_name", KINDS)
def test_a_copy_is_independent(recipe_name: str) -> None:
    teacher = branched("cnn", recipe_name, 2)
    waken(teacher)
    view, x = reparam.student_view(teacher), batch("cnn", 3)
    clone = copy.deepcopy(teacher)
    second = reparam.student_view(clone)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    assert same(teacher, clone)
    with torch.no_grad():
        expected = teacher(x), view(x)
        assert torch.equal(clone(x), expected[0]) and torch.equal(second(x), expected[1])
    train(clone, "cnn")
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    with torch.no_grad():
        assert torch.equal(teacher(x), expected[0]) and torch.equal(view(x), expected[1])
        clone.eval()
        second.eval()
        assert error(second(x), expected[1]) > 1e-6 and error(clone(x), expected[0]) > 1e-6
        assert error(reparam.extract(clone)(x), second(x)) <= EXACT
    twin = copy.deepcopy(view)
    assert twin.teacher is not teacher
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(view(x), expected[1]) and not torch.equal(twin(x), expected[1])


@pytest.mark.parametrize("recipe_name", KINDS)
def test_to_another_dtype(recipe_name: str) -> None:
    teacher = branched("cnn", recipe_name, 2)
    waken(teacher)
    view, x = reparam.student_view(teacher), batch("cnn", 3)
    with torch.no_grad():
        expected = view(x)
        for network in (teacher.float(), view):
            found = network(x.float())
            assert found.dtype == torch.float32 and 1e-12 < error(expected, found) < 1e-4
    tensors = [t for t in [*teacher.parameters(), *teacher.buffers()] if t.is_floating_point()]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert {t.dtype for n, t in teacher.named_buffers() if n.endswith("tracked")} == {torch.int64}
    view.to(torch.float64)
    with torch.no_grad():
        assert error(teacher(x), view(x)) < 1e-4
        assert teacher(x).dtype == torch.float64


def test_keys_and_parameters() -> None:
    model = made("cnn")
    for recipe_name in KINDS:
        teacher = branched("cnn", recipe_name, 2)
        view = reparam.student_view(teacher)
        rest = {n for n in teacher.state_dict() if n not in model.state_dict()}
        assert all(n.startswith(("reparam_branches.", "student_statistics.")) for n in rest)
        inside = {n for n in rest if n.startswith("student_statistics.reparam_branches.")}
        mine = {n.removeprefix("student_statistics.") for n in inside}
        assert mine == {n for n in rest if n.startswith("reparam_branches") and ("running" in n or "tracked" in n)}
        assert bool(inside) == (recipe_name == "dbb")
        # Fixed kernels are not stored.
        assert not [n for n in rest if re.search(r"window|prior|identity", n)]
        assert [n for n, _p in view.named_parameters()] == [n for n, _p in teacher.named_parameters()]
        ids = [id(p) for p in view.parameters()]
        assert ids == [id(p) for p in teacher.parameters()] and len(set(ids)) == len(ids)
        assert set(view.state_dict()) == set(model.state_dict())
        assert any(n.startswith("reparam_branches.body.weight.serial") for n, _p in view.named_parameters())


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_layers_inside_branches_have_noise(noise: float) -> None:
    """So that replicas part inside a branch too."""
    for recipe_name, layers in (("orepa", ("serial.weight", "average.point")), ("dbb", ("serial.weight",))):
        teacher = branched("cnn", recipe_name, 2, noise=noise)
        for layer in layers:
            weight = teacher.get_parameter(f"reparam_branches.body.weight.{layer}")
            assert torch.equal(weight[::2], weight[1::2]) == (noise == 0)
            assert error(weight[::2, ::2].detach(), weight[::2, 1::2].detach()) == 0


def test_frozen_layers_have_frozen_branches() -> None:
    model = made("cnn")
    model.stem.weight.requires_grad_(False)
    teacher = reparam.expand(model, 2, branches="orepa", example_input=batch("cnn"))
    flags = {n: p.requires_grad for n, p in teacher.named_parameters() if n.startswith("reparam_branches.")}
    assert {n.split(".")[1]: f for n, f in flags.items()} == {"stem": False, "body": True}
    assert all(f == (".body." in n) for n, f in flags.items())
    student = reparam.extract(teacher)
    assert not student.stem.weight.requires_grad and student.body.weight.requires_grad


def test_modes_switch_what_runs() -> None:
    """Train mode runs the branches; a layer whose module stays in eval mode is merged."""
    teacher = branched("cnn", "dbb", 2)
    waken(teacher)
    view, x = reparam.student_view(teacher), batch("cnn", 3)
    statistics = "reparam_branches.body.weight.serial.inner.running_mean"
    for network, prefix in ((teacher, ""), (view, "student_statistics.")):
        modules = network if network is teacher else network.network
        buffer = teacher.get_buffer(prefix + statistics)
        network.eval()
        with torch.no_grad():
            merged = network(x)
            before = buffer.clone()
            network.train()
            assert error(merged, network(x)) > 1e-3 and not torch.equal(before, buffer)
            before = buffer.clone()
            modules.get_submodule("body").eval()
            network(x)
            assert torch.equal(before, buffer)
            network.eval()
            assert error(network(x), merged) > 1e-6  # the statistics have moved
    assert view.training is False and teacher.training is False


@pytest.mark.parametrize("recipe_name", KINDS)
def test_taps(recipe_name: str) -> None:
    teacher = branched("cnn", recipe_name, 2)
    waken(teacher)
    view, x = reparam.student_view(teacher), batch("cnn", 3)
    names = ["stem", "body", "down_norm", "head"]
    for training in (True, False):
        with torch.no_grad():
            student = reparam.extract(teacher).eval()
            wide, mine = reparam.tap(teacher.train(training), names), reparam.tap(view.train(training), names)
            (out, values), (own, narrow) = wide(x), mine(x)
        assert error(out, own) <= 1e-10
        for name in names:
            expected = narrow[name] if name == "head" else narrow[name].repeat_interleave(2, 1)
            assert error(expected, values[name]) <= 1e-10, name
    with torch.no_grad():
        _out, plain = reparam.tap(reparam.extract(teacher).eval(), names)(x)
        # Behind a norm that took up its bias a layer's values are the view's again.
        assert error(plain["down_norm"], narrow["down_norm"]) <= 1e-10 and error(plain["body"], narrow["body"]) <= 1e-10
    assert student.training is False


@pytest.mark.parametrize("recipe_name", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_merges_in_full_precision(recipe_name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam.ops import block

    kernels: list[Tensor] = []
    merge = block.merge

    def seen(*args: Any) -> Any:
        kernel = merge(*args)
        kernels.append(kernel.weight)
        return kernel

    teacher = branched("cnn", recipe_name, 2, torch.float32)
    waken(teacher)
    monkeypatch.setattr(block, "merge", seen)
    monkeypatch.setattr("reparam.passes.blocks.merge", seen)
    x = batch("cnn", 3, torch.float32)
    for network in (teacher.train(training), reparam.student_view(teacher).train(training)):
        state = {n: t.clone() for n, t in teacher.state_dict().items()}
        with torch.no_grad():
            kernels.clear()
            reference = network(x)
            teacher.load_state_dict(state)
            count = len(kernels)
            with torch.autocast("cpu", torch.bfloat16):
                found = network(x)
                assert torch.mm(x[0, 0], x[0, 0]).dtype == torch.bfloat16  # it is on again
        assert found.dtype == torch.bfloat16
        assert 1e-5 < error(reference, found.float()) < 0.1
        assert len(kernels) == 2 * count and bool(count) == (recipe_name == "orepa" or not training)
        assert all(torch.equal(a, b) for a, b in zip(kernels[:count], kernels[count:], strict=True))
        assert {kernel.dtype for kernel in kernels} <= {torch.float32}
    network(x).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in teacher.parameters())


def test_other_batch_sizes_and_resolutions() -> None:
    for recipe_name in KINDS:
        teacher, model = branched("cnn", recipe_name, 3), made("cnn")
        for shape in ((1, 3, 8, 8), (3, 3, 12, 9)):
            x = sample(shape)
            with torch.no_grad():
                assert error(model(x), teacher(x)) <= EXACT
                assert error(model(x), reparam.student_view(teacher)(x)) <= EXACT


def test_check_sees_branches() -> None:
    """reparam.check on a student and what extract gives back."""
    model = made("cnn")
    teacher, x = branched("cnn", "dbb", 2), batch("cnn")
    assert reparam.check(model, teacher, example_input=x).max_rel <= EXACT
    waken(teacher)
    assert reparam.check(model, teacher, example_input=x).max_rel > 1e-3
    assert reparam.check(reparam.extract(teacher), teacher, example_input=x).max_rel <= EXACT


def test_a_meta_model_has_branches() -> None:
    with torch.device("meta"):
        model = Cnn()
    teacher = reparam.expand(model, 2, branches="dbb", example_input=torch.randn(2, 3, 8, 8, device="meta"))
    assert {t.device.type for t in teacher.state_dict().values()} == {"meta"}
    assert len(teacher.plan.branches) == 4


def test_verification_sees_a_wrong_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches are verified with random scales: a map that is wrong inside a branch is noticed though it adds 0."""
    from reparam.errors import VerificationError
    from reparam.ops.expressions import Weight
    from reparam.ops.params import ParamMap

    right = Weight.maps

    def wrong(self: Weight, widening: Any) -> Any:
        for name, found in right(self, widening):
            yield name, ParamMap(found.shape, found.maps, (), None) if "serial" in name else found

    monkeypatch.setattr(Weight, "maps", wrong)
    with pytest.raises(VerificationError):
        branched("cnn", "orepa", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe_name", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS[1:])]
)
def test_compiled(recipe_name: str) -> None:
    teacher = branched("cnn", recipe_name, 2)
    waken(teacher)
    compiled = torch.compile(teacher, backend="aot_eager", fullgraph=True)
    x = batch("cnn", 3)
    for training in (False, True):
        teacher.train(training)
        state = {n: t.clone() for n, t in teacher.state_dict().items()}
        found = []
        for network in (teacher, compiled):
            teacher.load_state_dict(state)
            teacher.zero_grad()
            out = network(x)
            out.square().mean().backward()
            gradient = teacher.get_parameter("reparam_branches.body.weight.serial.weight").grad
            found.append((out.detach(), gradient.clone()))
        assert error(*(out for out, _g in found)) <= 1e-10
        assert error(*(gradient for _out, gradient in found)) <= 1e-9

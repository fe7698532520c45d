"""The losses of Kdiffusion on features that have the teacher's size already; pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from reparam.distill.kdiffusion.options import Options
from reparam.distill.kdiffusion.posterior import Diffusion
from reparam.distill.losses.shared import as_map, check_floating, constant, promote
from reparam.distill.transfer import on_device
from reparam.errors import InputError


def permutation(
    options: Options,
    batch: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the order in which the features enter the chain.

    Args:
        options: how many there are, and what is shuffled.
        batch: ``N``.
        generator: of the random numbers; torch's own without it. It decides on which device they are drawn.
        device: of the result.

    Returns:
        ``[m]``, or ``[N, m]`` for a shuffle per sample: the number of the feature at each step, int64.
    """
    count = options.features
    if options.shuffle == "none":
        return torch.arange(count, device=device)
    home = generator.device if generator is not None else torch.device("cpu")
    if options.shuffle == "iteration":
        order = torch.randperm(count, generator=generator, device=home)
    else:
        order = torch.rand(batch, count, generator=generator, device=home).argsort(dim=1)
    return order if device is None else on_device(order, torch.device(device))


@dataclass(frozen=True)
class Scaled:
    """A teacher's feature as the chain sees it.

    Attributes:
        values: ``[N, C, H, W]``, without history, every channel with mean 0 and variance 1 if standardised.
        mean: what was subtracted, ``[1, C, 1, 1]``.
        scale: what was divided by.
    """

    values: Tensor
    mean: Tensor
    scale: Tensor

    def restore(self, values: Tensor) -> Tensor:
        """Bring values of the chain to the scale of the teacher's feature."""
        return values * self.scale + self.mean


def scaled(teacher: Tensor, standardise: bool = True) -> Scaled:
    """Standardise every channel of a teacher's feature over batch and places, or leave it as it is.

    Channels that are constant in the batch become 0. In a run with several processes each one has its own statistics.

    Args:
        teacher: ``[N, C, H, W]`` or ``[N, C]``.
        standardise: False for mean 0 and scale 1.

    Raises:
        InputError: no map or vector, not floating point, or a single value per channel.
    """
    check_floating(teacher)
    values = as_map(constant(teacher))
    if not standardise:
        return Scaled(values, values.new_zeros(1, values.shape[1], 1, 1), values.new_ones(1, values.shape[1], 1, 1))
    if values.numel() <= values.shape[1]:
        raise InputError(
            f"a feature {list(teacher.shape)} has fewer than two values per channel, which have no variance; use a "
            "larger batch, or standardise=False"
        )
    variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0, keepdim=True)
    size = values.abs().amax(dim=(0, 2, 3), keepdim=True)
    varied = variance > (4 * torch.finfo(values.dtype).eps * size) ** 2
    scale = torch.where(varied, variance, 1).sqrt()
    return Scaled(torch.where(varied, (values - mean) / scale, 0), mean, scale)


@dataclass(frozen=True)
class Trace:
    """The steps of a chain, ``m`` maps ``[N, C, H, W]`` each.

    Attributes:
        targets: where the teacher's chain goes in each step; no gradient but with ``noise="chain"``.
        predictions: where the student's goes; the last one is its estimate of the teacher's feature.
    """

    targets: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]


def trace(
    features: Sequence[Tensor] | Tensor,
    teacher: Tensor,
    numbers: Diffusion,
    order: Tensor,
    options: Options | None = None,
    generator: torch.Generator | None = None,
) -> Trace:
    """Run the chains of student and teacher.

    With ``y_k`` the feature at step ``k = 1..m``, ``X_k`` the teacher's value behind it and ``f_k`` the student's,

    ``target_k = u_k X_{k-1} + v_k x_0`` where ``X_{k-1} = A_{k-1} x_0 + B_{k-1} stopgrad(y_k)``, and
    ``f_k = u_k f_{k-1} + v_k y_k`` from ``f_0 = y_1``.

    Args and errors: see `chain`.
    """
    options = options or _usual(numbers)
    x = scaled(teacher, options.standardise).values
    ordered = _ordered(_stacked(features, x), x, numbers, order)
    noises = [y.detach() for y in ordered] if options.noise == "student" else _noises(x, options, generator)
    return Trace(*_walk(ordered, x, noises, numbers, options, Tensor.detach))


def _walk(
    ordered: Sequence[Tensor],
    x: Tensor,
    noises: Sequence[Tensor],
    numbers: Diffusion,
    options: Options,
    hold: Callable[[Tensor], Tensor],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Targets and predictions, see `trace`; ``hold`` makes a value a constant of later steps."""
    value = ordered[0] if options.start == "first" else torch.zeros_like(x)
    targets, predictions = [], []
    for k, y in enumerate(ordered):
        past = hold(value) if options.detach else value
        begin = past if options.noise == "chain" else numbers.signal[k] * x + numbers.noise[k] * noises[k]
        targets.append(numbers.u[k] * begin + numbers.v[k] * x)
        value = numbers.u[k] * past + numbers.v[k] * y
        predictions.append(value)
    return tuple(targets), tuple(predictions)


def chain(
    features: Sequence[Tensor] | Tensor,
    teacher: Tensor,
    numbers: Diffusion,
    order: Tensor,
    options: Options | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss of one layer in one iteration: squared differences of both chains (see `trace`), summed over the steps.

    Of each step the mean over all elements. The student's features are those behind the connector, in the scale of the
    standardised teacher. Both chains are linear in the features: all steps at once are two products of an ``m x m``
    matrix with the features, one of them with gradient.

    Args:
        features: the ``m`` features of the student, each ``[N, C, H, W]`` (or ``[N, C]``) of the teacher's size: a
            list, or one tensor ``[m, N, C, H, W]``.
        teacher: the teacher's feature as it is; detached.
        numbers: of the schedule, `Options.diffusion`.
        order: see `permutation`.
        options: what the paper leaves open; only ``start``, ``noise``, ``detach`` and ``standardise`` matter here.
        generator: of Gaussian noise, on the device of the features.

    Raises:
        InputError: another number of features than steps, features of another size than the teacher's, or an order that
            is no permutation of them.

    Source: Kdiffusion, equations 8 to 13, with the corrected coefficients of `diffusion`.
    """
    options = options or _usual(numbers)
    x = scaled(teacher, options.standardise).values
    stacked = _stacked(features, x)
    _check_order(stacked, x, numbers, order)
    count, dtype = len(numbers), torch.promote_types(stacked.dtype, x.dtype)
    whole, learned = (on_device(matrix.to(dtype), x.device) for matrix in _differences(numbers, options))
    rank = order.reshape(-1, count).argsort(dim=1)  # the step of each feature: for all images, or for each
    y, constants = _rows(stacked.to(dtype), torch.stack([x, *_noises(x, options, generator)]).to(dtype), len(rank))
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            target = _by_feature(learned[:, :count] - whole[:, :count], rank) @ y
            mixed = whole[:, count : count + constants.shape[1]].expand(len(rank), -1, -1)
            target.baddbmm_(mixed, constants, alpha=-1)
        return count * F.mse_loss(_by_feature(learned[:, :count], rank) @ y, target)


def _by_feature(matrix: Tensor, rank: Tensor) -> Tensor:
    """Columns for the steps as columns for the features, ``[groups, steps, features]``."""
    return matrix[:, rank].transpose(0, 1)


def _rows(features: Tensor, constants: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Maps ``[m, N, C, H, W]`` as ``[groups, m, rest]``: a view of the features if they are dense in either format."""
    last = _channels_last(features)
    flat = [values.movedim(2, -1) if last else values for values in (features, constants)]
    first, second = (values.reshape(len(values), groups, -1).transpose(0, 1) for values in flat)
    return first, second


def _channels_last(maps: Tensor) -> bool:
    """Whether each of the maps ``[m, N, C, H, W]`` has its channels last in memory."""
    return maps[0].is_contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=64)
def _differences(numbers: Diffusion, options: Options) -> tuple[Tensor, Tensor]:
    """Predictions minus targets as matrices in float64: what they are, and what of it is learned from.

    Rows are steps. Columns are the ``m`` features in the order of the chain, the data, and the ``m`` noises. The second
    matrix is the derivative: the walk is linear, so it is the walk of what has a gradient, with 0 for constants.
    """
    count = len(numbers)
    basis = torch.eye(2 * count + 1, dtype=torch.float64)
    ordered, x, noises = list(basis[:count]), basis[count], list(basis[count + 1 :])
    if options.noise == "student":
        noises = ordered
    nothing = torch.zeros_like(x)
    whole = _walk(ordered, x, noises, numbers, options, lambda value: value)
    learned = _walk(ordered, nothing, [nothing] * count, numbers, options, torch.zeros_like)
    first, second = (torch.stack(theirs).neg() + torch.stack(ours) for theirs, ours in (whole, learned))
    return first, second


def last_prediction(features: Tensor, order: Tensor) -> Tensor:
    """Where the student's chain ends: the feature that came last, since the last step keeps nothing before it.

    Args:
        features: ``[m, N, C, H, W]``.
        order: see `permutation`.
    """
    last = order[..., -1]
    return features[last] if last.dim() == 0 else features[last, torch.arange(len(last), device=last.device)]


def mean_of(features: Tensor) -> Tensor:
    """The mean of all heads, ``[m, N, C, H, W] -> [N, C, H, W]``.

    A product, so that the gradient comes in the memory format of the features: the backward pass of torch's batch norm
    takes several times as long if the two differ.
    """
    last = _channels_last(features)
    flat = features.movedim(2, -1) if last else features
    rows = flat.reshape(len(flat), -1)
    with torch.autocast(rows.device.type, enabled=False):
        mean = (rows.new_full((1, len(rows)), 1 / len(rows)) @ rows).reshape(flat.shape[1:])
    return mean.movedim(-1, 1) if last else mean


def average(features: Sequence[Tensor] | Tensor, teacher: Tensor, options: Options | None = None) -> Tensor:
    """The paper's control: the mean squared difference between the mean of all heads and the teacher; no diffusion.

    Args:
        features: of the student, each of the teacher's size, see `chain`.
        teacher: the teacher's feature; detached.
        options: ``standardise`` matters.

    Raises:
        InputError: sizes do not fit.

    Source: Kdiffusion, table 2, row "average".
    """
    target = scaled(teacher, options is None or options.standardise).values
    return F.mse_loss(mean_of(_stacked(features, target)), target)


def guided(
    estimate: Tensor, teacher: Tensor, head: Callable[[Tensor], Tensor], options: Options | None = None
) -> Tensor:
    """The target-guided loss: both features through the teacher's next layer, mean squared difference of the results.

    The estimate is brought back to the scale of the teacher's feature first: the next layer has never seen a
    standardised one. A module is run with its parameters as constants, so it learns nothing here, whatever their
    ``requires_grad``.

    Args:
        estimate: the student's estimate of the teacher's feature, in the chain's scale, of its size.
        teacher: the teacher's feature; detached.
        head: the next layer, frozen and in eval mode: the classifier for the penultimate feature, else the next stage.
        options: ``standardise`` matters.

    Raises:
        InputError: sizes do not fit, or ``head`` is in train mode, where it would compute something else.

    Source: Kdiffusion, equation 14.
    """
    if isinstance(head, nn.Module):
        if any(part.training for part in head.modules()):
            raise InputError("the teacher's next layer is in train mode; call .eval() on the teacher first")
        module, state = head, {name: value.detach() for name, value in _state(head)}
        head = lambda x: functional_call(module, state, (x,))  # noqa: E731
    with torch.no_grad():
        wanted = promote(head(teacher))
    target = scaled(teacher, options is None or options.standardise)
    value = _stacked(estimate[None], target.values)[0]
    restored = target.restore(value).reshape(teacher.shape).to(teacher.dtype)
    return F.mse_loss(promote(head(restored)), wanted)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _noises(x: Tensor, options: Options, generator: torch.Generator | None) -> list[Tensor]:
    """Gaussian noise of every step, if there is some."""
    if options.noise != "gaussian":
        return []
    count = options.features
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) for _ in range(count)]


def _usual(numbers: Diffusion) -> Options:
    return Options(features=len(numbers), steps=max(len(numbers), 1000))


def _stacked(features: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
    """Features as maps ``[m, N, C, H, W]`` in full precision, each of the target's size."""
    if not isinstance(features, Tensor) and not all(isinstance(feature, Tensor) for feature in features):
        raise InputError("the features of the student must be tensors, one per head")
    if not len(features):
        raise InputError("there are no features of the student; a chain needs one per head")
    check_floating(*features)
    for number, value in enumerate(features):
        if as_map(value).shape != target.shape:
            raise InputError(
                f"feature {number} of the student is {list(value.shape)}, the teacher's {list(target.shape)}; a "
                "connector (reparam.distill.kdiffusion.LayerLoss has one) brings it to that size"
            )
    whole = features if isinstance(features, Tensor) else torch.stack([promote(feature) for feature in features])
    return promote(whole).reshape(len(features), *target.shape)


def _check_order(stacked: Tensor, target: Tensor, numbers: Diffusion, order: Tensor) -> None:
    count = len(numbers)
    if len(stacked) != count:
        raise InputError(f"a chain of {count} steps needs as many features, got {len(stacked)}")
    shapes = [(count,), (len(target), count)]
    if order.dtype != torch.int64 or tuple(order.shape) not in shapes:
        raise InputError(
            f"order must be int64 numbers {list(shapes[0])} or {list(shapes[1])}, got {order.dtype} {list(order.shape)}"
        )
    # Looked at on the CPU only, where nothing has to wait.
    expected = torch.arange(count).expand_as(order) if order.device.type == "cpu" else None
    if expected is not None and not torch.equal(order.sort(dim=-1).values, expected):
        raise InputError(f"order must hold each of the numbers 0 to {count - 1} once, got {order.tolist()}")


def _ordered(stacked: Tensor, target: Tensor, numbers: Diffusion, order: Tensor) -> list[Tensor]:
    _check_order(stacked, target, numbers, order)
    if order.dim() == 1:
        return list(stacked[order])
    return list(stacked[order.T, torch.arange(len(target), device=order.device)])


__all__ = ["Scaled", "Trace", "average", "chain", "guided", "permutation", "scaled", "trace"]

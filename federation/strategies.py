"""What the hub makes of a round's mean update, and what a local step counts: the strategies.

    strategy = of(training)                            the plan's; one of:

    chain(momentum(β1), scaled(η))                     FedAvg, with server momentum FedAvgM
    chain(adaptive(β1, τ, adam(β2)), scaled(η))        FedAdam
    chain(adaptive(β1, τ, yogi(β2)), scaled(η))        FedYogi
    chain(adaptive(β1, τ, adagrad), scaled(η))         FedAdagrad

    state = strategy.init(n);   state, update = strategy.step(state, mean)

A strategy sees the mean alone. So it works over any private sum, in every mode, and it costs no
privacy: what is made of a release is no further release.

FedAvgM is Hsu, Qi and Brown, arXiv 1909.06335. The adaptive three are algorithm 2 of Reddi et
al., "Adaptive Federated Optimization" (ICLR 2021), with v₋₁ = τ² and without a correction of
the first rounds' bias, as there. They take a step of about η for each weight, whatever the
length of the update; a weight of which a sum holds only noise walks as far as the others. The
running statistics of a batch-norm layer are no weights to any of them
(:mod:`atoll.federation.running_statistics`).

FedProx and FedNova are the device's part. The proximal term is in
:class:`atoll.federation.training.Sgd`; :func:`effective_steps` is FedNova's count of local
steps, by which a device divides its update, and :mod:`atoll.federation.riders` multiplies back.
So is SCAFFOLD, whose control variates are a second vector in the sum and a state that devices keep
(:mod:`atoll.federation.control`).
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan, Training

Floats = npt.NDArray[np.float64]
State = tuple[Vector, ...]
"""What a strategy remembers from round to round: float32 ``(n,)`` each, as checkpoints keep it."""
SecondMoment = Callable[[Floats, Floats], Floats]
"""From the last second moment and the squared mean, each ``(n,)``, to the next one."""

SERVER_RATE: Final = 0.1
"""η of the adaptive strategies. The paper has no default: it tunes η for each task."""
MOMENTUM: Final = 0.9
"""β1 of FedAdam and FedYogi; FedAdagrad's is 0 (ibid.)."""
BETA2: Final = 0.99
TAU: Final = 1e-3


class Strategy(NamedTuple):
    """``init`` takes the number of weights; ``step`` a state and the mean, float64 ``(n,)``.

    ``step`` returns the next state and the update, float64 ``(n,)``: of a whole chain, what is
    added to the weights.
    """

    init: Callable[[int], State]
    step: Callable[[State, Floats], tuple[State, Floats]]


def of(training: Training) -> Strategy:
    """Return the strategy of a plan; what the plan leaves out is as the papers have it."""
    name, rate = training.strategy, training.server_learning_rate
    beta1, beta2 = training.server_momentum, training.server_beta2
    if name == "fedavg":
        return chain(momentum(_or(beta1, 0.0)), scaled(_or(rate, 1.0)))
    second = {
        "fedadam": adam(_or(beta2, BETA2)),
        "fedyogi": yogi(_or(beta2, BETA2)),
        "fedadagrad": adagrad,
    }[name]
    beta1 = _or(beta1, 0.0 if name == "fedadagrad" else MOMENTUM)
    return chain(
        adaptive(beta1, _or(training.server_tau, TAU), second), scaled(_or(rate, SERVER_RATE))
    )


def title(plan: Plan) -> str:
    """Return what a plan's strategy is called, for a person: "FedAdam with SCAFFOLD"."""
    training = plan.training
    name = {"fedadam": "FedAdam", "fedyogi": "FedYogi", "fedadagrad": "FedAdagrad"}.get(
        training.strategy, "FedAvg with momentum" if training.server_momentum else "FedAvg"
    )
    if plan.asynchrony is not None:
        name = "FedBuff" if name == "FedAvg" else f"FedBuff, {name}"
    used = {
        "FedProx": bool(training.proximal),
        "FedNova": training.step_cap is not None,
        "SCAFFOLD": training.control_steps is not None,
    }
    more = [other for other, asked in used.items() if asked]
    return f"{name} with {' and '.join(more)}" if more else name


def chain(*parts: Strategy) -> Strategy:
    """Return the strategy in which each part steps on what the one before it made."""
    sizes = [len(part.init(0)) for part in parts]

    def init(length: int) -> State:
        return tuple(kept for part in parts for kept in part.init(length))

    def step(state: State, mean: Floats) -> tuple[State, Floats]:
        following: State = ()
        for part, size in zip(parts, sizes, strict=True):
            mine, state = state[:size], state[size:]
            mine, mean = part.step(mine, mean)
            following += mine
        return following, mean

    return Strategy(init, step)


def scaled(rate: float) -> Strategy:
    """Return the strategy whose update is ``rate`` times the mean; it remembers nothing."""
    if rate == 1:
        return Strategy(lambda _: (), lambda state, mean: (state, mean))
    return Strategy(lambda _: (), lambda state, mean: (state, rate * mean))


def momentum(decay: float) -> Strategy:
    """Return heavy-ball momentum: the update is u = ``decay``·u + mean, and is remembered."""

    def step(state: State, mean: Floats) -> tuple[State, Floats]:
        (last,) = state
        update = decay * last + mean if decay else mean
        return (update.astype(np.float32),), update

    return Strategy(lambda length: (np.zeros(length, np.float32),), step)


def adaptive(beta1: float, tau: float, second: SecondMoment) -> Strategy:
    """Return algorithm 2's direction, m/(√v + τ), before η.

    m = β1·m + (1 - β1)·mean, from 0; v is what ``second`` makes of v and mean², from τ².
    """

    def init(length: int) -> State:
        return np.zeros(length, np.float32), np.full(length, tau**2, np.float32)

    def step(state: State, mean: Floats) -> tuple[State, Floats]:
        first, spread = (kept.astype(np.float64) for kept in state)
        first = beta1 * first + (1 - beta1) * mean
        spread = second(spread, mean**2)
        update = first / (np.sqrt(spread) + tau)
        return (first.astype(np.float32), spread.astype(np.float32)), update

    return Strategy(init, step)


def adagrad(spread: Floats, square: Floats) -> Floats:
    """Return v + Δ²."""
    return spread + square


def adam(beta2: float) -> SecondMoment:
    """Return v ↦ β2·v + (1 - β2)·Δ²."""
    return lambda spread, square: beta2 * spread + (1 - beta2) * square


def yogi(beta2: float) -> SecondMoment:
    """Return v ↦ v - (1 - β2)·Δ²·sign(v - Δ²)."""
    return lambda spread, square: spread - (1 - beta2) * square * np.sign(spread - square)


def effective_steps(steps: int, training: Training) -> float:
    """Return what ``steps`` local steps count: ‖a‖₁ of Wang et al., "FedNova" (NeurIPS 2020).

    An update is -η·Σ aₖ·gₖ over the local gradients gₖ. How far one gradient carries is the same
    at every step but for how many come after it: at once by 1, and further by momentum,
    less by what the proximal term pulls back. So ‖a‖₁ is the sum of one impulse's reach
    after 1, 2, … ``steps`` steps. Without momentum and proximal term it is ``steps``; with either
    one it is the paper's closed form.
    """
    pull = training.learning_rate * training.proximal
    velocity = reach = 1.0
    total = 0.0
    for _ in range(steps):
        total += abs(reach)
        velocity = training.momentum * velocity - pull * reach
        reach += velocity
    return total


def _or(given: float | None, default: float) -> float:
    return default if given is None else given

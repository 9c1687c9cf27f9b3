"""How well weights do that a simulation came to."""

from typing import Final

from torch import nn

from atoll.federation import training
from atoll.federation.parameters import Vector
from atoll.simulations.populations import Population, evaluated_on

EVALUATORS: Final = 50
"""Devices on whose held-back examples weights are evaluated."""


def accuracy(model: nn.Module, weights: Vector, population: Population) -> float:
    """Return the share that is right of what :data:`EVALUATORS` devices held back.

    Where a population comes with a test set, of that.
    """
    rows = correct = 0
    for held_back in evaluated_on(population, EVALUATORS):
        done = training.evaluate(model, weights, held_back)
        rows, correct = rows + done.rows, correct + done.correct
    return correct / rows

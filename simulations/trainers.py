"""How simulated devices train: many in one computation, or one after the other."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from atoll.federation import batched, layout, training
from atoll.federation.batched import Client
from atoll.federation.errors import Unbatchable
from atoll.federation.layout import Layout
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.task import Task
from atoll.federation.training import Trained

Engine = Literal["batched", "one by one"]
Train = Callable[[Vector, Iterable[Client]], Iterator[Trained]]


class Trainer(NamedTuple):
    """How devices train: weights and clients to what they come to, in order."""

    train: Train
    engine: Engine
    reason: str = ""


def trainer_of(task: Task, plan: Plan) -> Trainer:
    """Return the batched trainer, or the device's own where that is faster or the only one."""
    shape, settings = layout.of(task, plan.seed, plan.layers), plan.training
    model = shape.model

    def alone(weights: Vector, clients: Iterable[Client]) -> Iterator[Trained]:
        for client in clients:
            yield training.train(
                model,
                weights,
                client.examples,
                settings,
                client.seed,
                correction=client.correction,
            )

    if not batched.worthwhile(model, task.input_shape, settings, batched.default_device()):
        return Trainer(
            _of_part(shape, alone),
            "one by one",
            "on a CPU that is faster for a network of this size",
        )
    try:
        batched.check(model, task.input_shape, len(task.classes), settings)
    except Unbatchable as error:
        return Trainer(_of_part(shape, alone), "one by one", str(error))
    return Trainer(
        _of_part(shape, lambda weights, clients: batched.train(model, weights, clients, settings)),
        "batched",
    )


def _of_part(shape: Layout, train: Train) -> Train:
    """Return what trains on all weights as what is told, and tells, of those that travel."""

    def all_of(client: Client) -> Client:
        given = client.correction
        return client if given is None else client._replace(correction=shape.alone(given))

    def on_part(weights: Vector, clients: Iterable[Client]) -> Iterator[Trained]:
        for done in train(shape.whole(weights), map(all_of, clients)):
            yield done._replace(weights=shape.travelling(done.weights))

    return on_part

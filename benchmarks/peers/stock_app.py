"""A Flower app as its documentation has them: FedAvg, and a client that sends back what it got.

:mod:`benchmarks.fleet_round` packs this file into an app bundle, and stock SuperNodes run it in a
process for each message. It imports nothing but Flower and numpy.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, _: Context) -> Message:
    """Send the arrays back."""
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write what each took."""
    config, ends = context.run_config, []
    devices = int(config["devices"])
    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=devices,
        min_available_nodes=devices,
    )
    strategy.start(
        grid,
        ArrayRecord([np.zeros(int(config["parameters"]), np.float32)]),
        num_rounds=int(config["rounds"]),
        evaluate_fn=lambda *_: ends.append(time.monotonic()),
    )
    Path(str(config["result"])).write_text(json.dumps(np.diff(ends).tolist()))

"""The encryption that NVIDIA FLARE ships for sums, done with TenSEAL itself.

``nvflare.app_opt.he``: CKKS with ``poly_modulus_degree`` 8192, ``coeff_mod_bit_sizes``
[60, 40, 40] and a scale of 2**40; clients encrypt with the public key, one vector per tensor
of the model; the server adds serialised vectors; clients decrypt the sum.

Times are CPU time of one thread.
"""

import math
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
import tenseal as ts

from benchmarks.process import least_cpu_time

MEASURED: Final = 1_000_000
"""Parameters past which costs are scaled up: every ciphertext holds 4096 of them and costs the
same, and ten million would take a minute and a gigabyte for what is known already."""

_WEIGHTS: Final = (0.1, 0.3, 0.6)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one update: bytes, and seconds to encrypt it, to add it and to decrypt the sum."""

    name: str
    size: float
    encrypt: float
    add: float
    decrypt: float


def tensors(parameters: int) -> list[int]:
    """Return the sizes of a plausible model's tensors.

    Three layers, with 10, 30 and 60 % of the parameters; each a weight and a bias, of as many
    values as the square root of the weight's.
    """
    sizes = []
    for share in _WEIGHTS:
        layer = round(parameters * share)
        bias = math.isqrt(layer)
        sizes += [layer - bias, bias]
    sizes[-2] += parameters - sum(sizes)
    return sizes


def measure(parameters: int, repeats: int) -> Costs:
    """Return what one update of so many ``parameters`` costs."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    measured = min(parameters, MEASURED)
    process = context.Process(target=_measure, args=(sender, measured, repeats))
    process.start()
    sender.close()
    try:
        size, encrypt, add, decrypt = receiver.recv()
    finally:
        process.join()
    scale = parameters / measured
    name = "TenSEAL CKKS" + (f", scaled from {measured:,}" if scale > 1 else "")
    return Costs(name, size * scale, encrypt * scale, add * scale, decrypt * scale)


def _measure(sender: "Connection[Any, Any]", parameters: int, repeats: int) -> None:
    # A process of its own: TenSEAL writes a warning to standard output for every vector of
    # more than one ciphertext.
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    secret = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], n_threads=1)
    secret.global_scale = 2**40
    public = ts.context_from(secret.serialize(save_secret_key=False), n_threads=1)
    rng = np.random.default_rng(0)
    update = [rng.normal(0, 0.01, size) for size in tensors(parameters)]

    def encrypt() -> list[bytes]:
        return [ts.ckks_vector(public, tensor).serialize() for tensor in update]

    sent, encrypting = least_cpu_time(encrypt, repeats)
    total = [ts.ckks_vector_from(public, data) for data in sent]

    def add() -> None:
        for vector, data in zip(total, sent, strict=True):
            vector.add_(ts.ckks_vector_from(public, data))

    _, adding = least_cpu_time(add, repeats)
    summed = [vector.serialize() for vector in total]

    def decrypt() -> list[list[float]]:
        return [ts.ckks_vector_from(secret, data).decrypt() for data in summed]

    opened, decrypting = least_cpu_time(decrypt, repeats)
    for got, tensor in zip(opened, update, strict=True):
        assert np.allclose(got, tensor * (repeats + 1), atol=1e-5)
    sender.send((sum(map(len, sent)), encrypting, adding, decrypting))
    sender.close()

"""Peers that cannot live beside Atoll: each has an environment of its own, made once.

    run("flower-ray", FOLDER / "flower_ray.py", {"work": "echo", …}) -> what it printed, a dict

A peer pins what Atoll pins otherwise (pfl-research an older dp-accounting), or brings what Atoll
has no use for (Ray). Its program is a script that imports the peer alone, takes its setting as
JSON in its one argument and prints JSON on its last line. :func:`run` adds ``peak_bytes``, the
most memory that the program and all it started held at a time; :func:`measured` does so for any
command, so that Atoll's own side can be measured alike.

Environments lie in ``$ATOLL_BENCH_ENVS``, or ``~/.cache/atoll/benchmarks``. The name of one
holds a digest of what is in it, so that another pin makes another environment.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

FOLDER: Final = Path(__file__).resolve().parent
"""Where the peers' programs are."""
TORCH: Final = "torch==2.13.0"
PINNED: Final[Mapping[str, tuple[str, ...]]] = {
    "pfl": ("pfl==0.6.0", "numpy==2.4.6", TORCH),
    "flower-ray": ("flwr[simulation]==1.41.0", "ray==2.55.1", "numpy==2.4.6", TORCH),
}
"""What each peer's environment holds."""
CPU_TORCH: Final = "https://download.pytorch.org/whl/cpu"
LIMIT: Final = 1800.0
"""Seconds after which a program is given up."""

_EVERY: Final = 0.5
_TOLD: Final = 2000


class PeerMissing(Exception):
    """A peer cannot be installed or does not run; report that it was not measured."""


def home() -> Path:
    """Return the directory of the environments."""
    named = os.environ.get("ATOLL_BENCH_ENVS")
    return Path(named) if named else Path.home() / ".cache" / "atoll" / "benchmarks"


def python(peer: str) -> Path:
    """Return the Python of a peer's environment, which is made if it is not there.

    Raises :class:`PeerMissing` when it cannot be.
    """
    wanted = PINNED[peer]
    digest = hashlib.sha256("\n".join((sys.version, *wanted)).encode()).hexdigest()[:12]
    place = home() / f"{peer}-{digest}"
    made, program = place / "made", place / "bin" / "python"
    if made.exists():
        return program
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benchmarks may want the same peer
        if not made.exists():
            _make(peer, place, program)
            made.write_text("\n".join(wanted))
    return program


def _make(peer: str, place: Path, program: Path) -> None:
    print(f"making the environment of {peer} in {place}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    pip = [str(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        venv.create(place, with_pip=True)
        if TORCH in PINNED[peer] and not shutil.which("nvidia-smi"):
            # The plain requirement would bring gigabytes of CUDA; without the index, so be it.
            torch = [*pip, "--no-deps", TORCH, "--index-url", CPU_TORCH, "--retries", "1"]
            subprocess.run(torch, check=False, capture_output=True)
        done = subprocess.run([*pip, *PINNED[peer]], check=False, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerMissing(f"no environment for {peer}: {error}") from error
    if done.returncode:
        raise PeerMissing(f"{peer} cannot be installed: {_end(done.stderr)}")


def run(
    peer: str,
    script: Path,
    arguments: Mapping[str, object],
    *,
    launcher: Sequence[str] = (),
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Run a peer's ``script`` with ``arguments`` and return what it printed.

    ``launcher`` stands between Python and the script, such as ``-m torch.distributed.run``.
    Raises :class:`PeerMissing` when there is no such peer here, or it fails.
    """
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    try:
        return measured([str(python(peer)), *launcher, str(script)], arguments, environment, limit)
    except ProgramFailed as error:
        raise PeerMissing(f"{peer} does not run: {error}") from error


class ProgramFailed(Exception):
    """A measured program failed; the message has the end of what it said."""


def measured(
    command: Sequence[str],
    arguments: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Run ``command`` with ``arguments`` as JSON behind it; return the JSON of its last line.

    ``peak_bytes`` is added: the most that it and its descendants held, looked at twice a second.
    Memory that they share is counted once (Linux's proportional set size). Raises
    :class:`ProgramFailed` for a status other than 0, or after ``limit`` seconds.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        program = subprocess.Popen(
            [*command, json.dumps(arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            start_new_session=True,
        )
        peak, began = 0, time.monotonic()
        try:
            while program.poll() is None:
                peak = max(peak, _held(program.pid))
                if time.monotonic() - began > limit:
                    raise ProgramFailed(f"no result after {limit:g} s")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(_EVERY)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        out.seek(0)
        said.seek(0)
        if program.returncode:
            raise ProgramFailed(_end(said.read()) or f"status {program.returncode}")
        lines = out.read().strip().splitlines()
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise ProgramFailed("its last line is no JSON") from error
    return result | {"peak_bytes": peak}


def _held(pid: int) -> int:
    """Return how many bytes a process and its descendants hold, shared ones once."""
    held = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it may end while it is looked at
                held += process.memory_full_info().pss
    return held


def _end(text: str) -> str:
    return text.strip()[-_TOLD:]

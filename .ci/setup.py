"""Make ``.venv`` hold Atoll with the given extras; do nothing when it already does.

    python3 .ci/setup.py sim          # what `make demo` needs
    python3 .ci/setup.py all test     # what `make test` needs

Uses the standard library alone. Works without the ``python3-venv`` package: pip is then taken
from PyPI and checked against the digest that PyPI names.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"


def fail(message: str) -> None:
    sys.exit(f"setup: {message}")


def say(step: int, message: str) -> None:
    print(f"[setup {step}/3] {message}", flush=True)


def run(*command: str, check: bool = True) -> bool:
    done = subprocess.run(command, cwd=ROOT, check=False)
    if check and done.returncode:
        fail(f"{' '.join(command[:6])} … failed with exit status {done.returncode}; see above")
    return done.returncode == 0


def pip(*arguments: str, check: bool = True) -> bool:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    environment = ["--disable-pip-version-check", *quiet]
    return run(str(PYTHON), "-m", "pip", "install", *environment, *arguments, check=check)


def make_venv() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False
    )
    if made.returncode == 0:
        return
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV))
    with urllib.request.urlopen("https://pypi.org/pypi/pip/json", timeout=60) as reply:
        files = json.load(reply)["urls"]
    wheel = next(file for file in files if file["packagetype"] == "bdist_wheel")
    with urllib.request.urlopen(wheel["url"], timeout=60) as reply:
        data = reply.read()
    if hashlib.sha256(data).hexdigest() != wheel["digests"]["sha256"]:
        fail("the pip wheel from PyPI does not match its digest; try again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / wheel["filename"]
        path.write_bytes(data)
        run(str(PYTHON), f"{path}/pip", "install", "--quiet", str(path))


def wanted(extras: list[str]) -> str:
    """Return a digest of everything that decides what is installed."""
    facts = [sys.version, *sorted(extras)]
    facts += [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def main(extras: list[str]) -> None:
    if sys.version_info < (3, 11):
        fail(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
    os.environ.pop("PIP_REQUIRE_VIRTUALENV", None)
    stamp = VENV / f".atoll-{'-'.join(sorted(extras))}"
    digest = wanted(extras)
    if stamp.exists() and stamp.read_text() == digest:
        return
    started = time.monotonic()
    if not PYTHON.exists():
        say(1, f"making {VENV.name} with {sys.executable}")
        make_venv()
    torch = next(
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    say(2, f"{torch}, the CPU build (about 200 MB)")
    options = ["--no-deps", torch]
    if not pip(*options, "--index-url", CPU_TORCH, "--retries", "1", check=False):
        print("the CPU index is out of reach; taking the default index's build", flush=True)
        pip(*options)
    say(3, f"Atoll with {', '.join(extras)} and the pinned packages (a minute or two)")
    pip("-c", "constraints.txt", "-e", f".[{','.join(extras)}]")
    stamp.write_text(digest)
    print(f"[setup] done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["all"])

"""What always runs on a device stays small: by what it imports and what it weighs."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "flwr",
    "fastapi",
    "scipy",
    "onnxruntime",
    "numpy",
    "pandas",
    "typer",
    "click",
    "rich",
    "starlette",
    "uvicorn",
    "urllib3",
    "cryptography",
    "tuf",
}


def imported(module: str) -> tuple[set[str], int]:
    code = (
        f"import json, sys, psutil, {module}\n"
        "tops = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([tops, psutil.Process().memory_info().rss]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    tops, resident = json.loads(done.stdout)
    return set(tops), resident


def test_the_control_process_imports_nothing_heavy():
    tops, resident = imported("atoll.edge_agent.control")
    assert not tops & HEAVY
    assert resident < 40 * 2**20


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "atoll.edge_agent.serving",
            {"torch", "flwr", "fastapi", "scipy", "tuf", "paho", "cryptography"},
        ),
        ("atoll.edge_agent.updates", {"torch", "flwr", "fastapi", "scipy", "onnxruntime"}),
        ("atoll.edge_agent.renew", {"torch", "flwr", "fastapi", "scipy", "onnxruntime", "tuf"}),
        ("atoll.edge_agent.cli", {"torch", "flwr", "fastapi", "scipy", "onnxruntime"}),
    ],
)
def test_only_the_trainer_needs_torch_and_flwr(module, absent):
    tops, _ = imported(module)
    assert not tops & absent


def test_noise_on_counts_needs_numpy_and_cryptography_alone():
    before, _ = imported("atoll.edge_agent.serving")
    after, _ = imported("atoll.edge_agent.serving, atoll.privacy.noise")
    assert "cryptography" in after
    assert not after & {"torch", "flwr", "scipy", "dp_accounting", "tenseal", "opacus", "msgpack"}
    named = {name for name in after - before if not name.startswith("_")}
    assert named <= {"cryptography"} | set(sys.stdlib_module_names)


def test_the_training_process_is_without_torch_until_it_trains():
    tops, resident = imported("atoll.edge_agent.trainer")
    assert "torch" not in tops
    assert resident < 160 * 10**6

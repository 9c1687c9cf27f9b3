"""The wheel and what it brings along."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist and wheel from a clean copy of what git tracks."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    source.mkdir()
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out = work / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    return out


def test_wheel_holds_every_module_and_resource_of_the_six_folders(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ("edge_agent", "federation", "fleet", "privacy", "server", "simulations")
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            wanted = path.is_file() and "__pycache__" not in path.parts
            if wanted and path.suffix in {".py", ".html", ".css", ".js", ".svg", ".toml", ".typed"}:
                assert f"atoll/{path.relative_to(ROOT)}" in names
    assert not {name.split("/")[0] for name in names} - {"atoll", "atoll-0.1.0.dist-info"}


def test_sdist_holds_what_a_rebuild_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "fleet/wire.py"} <= names


def test_agent_wheel_runs_in_a_clean_environment_without_the_heavy_packages(
    built: Path, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    run(*pip, f"atoll[agent] @ {wheel.as_uri()}", cwd=tmp_path)
    assert "enrol" in run(python.parent / "atoll-agent", "--help", cwd=tmp_path)
    assert "hub" in run(python.parent / "atoll", "--help", cwd=tmp_path)
    installed = {
        line.partition("==")[0].lower()
        for line in run(python, "-m", "pip", "list", "--format", "freeze", cwd=tmp_path).split()
    }
    assert {"onnxruntime", "paho-mqtt"} <= installed
    assert not installed & {"torch", "flwr", "fastapi", "scipy", "tenseal", "sqlalchemy"}

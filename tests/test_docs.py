"""What the README tells people to type and to write works as it stands there."""

import re
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import typer.main

from atoll.edge_agent.cli import app as agent
from atoll.federation.errors import DataMissing
from atoll.federation.task import Task
from atoll.server.cli import app as hub

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {"atoll": typer.main.get_command(hub), "atoll-agent": typer.main.get_command(agent)}


def commands() -> list[str]:
    """Every command line of the README, in code blocks, tables and running text."""
    leads = r"(?:`|^ {4}|sudo -u atoll-agent |ExecStart=\S*/)"
    found = re.findall(leads + r"(atoll(?:-agent)? [^`\n#]+)", README, re.MULTILINE)
    return sorted({line.strip() for line in found})


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line: str) -> None:
    program, *words = line.split()
    command = COMMANDS[program]
    options = [word for word in words if word.startswith("--")]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"{program} has no {name!r}: {line}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {"--help", "--install-completion"}
    assert set(options) <= known, line


def test_the_readme_names_commands() -> None:
    assert len(commands()) > 12


def test_the_example_task_is_a_task(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, type] = {}
    exec(code, names)
    task = names["Gestures"]()
    assert isinstance(task, Task)
    logits = task.model(0)(torch.zeros(2, *task.input_shape))
    assert logits.shape == (2, len(task.classes))
    with pytest.raises(DataMissing):
        task.load(tmp_path, "train")
    np.savez(tmp_path / "train.npz", x=np.zeros((4, *task.input_shape)), y=np.zeros(4))
    assert task.load(tmp_path, "train").x.dtype == np.float32


def test_files_and_links_that_the_documents_name_exist() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert target.startswith("http") or (document.parent / target).exists(), target


def test_every_folder_is_packaged() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {f"atoll.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    assert set(packages) == folders - {"atoll.benchmarks"}  # run from a checkout alone

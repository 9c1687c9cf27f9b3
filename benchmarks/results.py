"""Writes docs/results.md from what the benchmarks printed with ``--json``.

python -m benchmarks.secure_sum --json > secure_sum.json
python -m benchmarks.results secure_sum.json … > docs/results.md
"""

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def document(tables: Sequence[tuple[str, Sequence[dict[str, Any]]]], machine: str) -> str:
    """Return the Markdown of tables, each a benchmark's name and its rows."""
    lines = [
        "# What was measured",
        "",
        f"By the programs in `benchmarks/`, each beside its peers in the same run, on {machine}.",
        "`make bench` measures again; with `--json` each tells more than stands here.",
        "A ratio says how many times better ours is.",
    ]
    for name, rows in tables:
        lines += ["", f"## {name}", "", "| case | metric | ours | goal | peer | ratio |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_line(row) for row in rows if _told(row)]
    return "\n".join(lines) + "\n"


def _told(row: dict[str, Any]) -> bool:
    """Tell whether a row has something to be held against, or is about memory."""
    return row["goal"] is not None or row["peer"] is not None or "memory" in row["metric"]


def _line(row: dict[str, Any]) -> str:
    unit = row["unit"]
    goal = "" if row["goal"] is None else _number(row["goal"], unit)
    missed = " **missed**" if row["met"] is False else ""
    peer = "" if row["peer"] is None else f"{_number(row['peer'], unit)}, {row['peer_name']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}×"
    ours = _number(row["ours"], unit)
    return f"| {row['case']} | {row['metric']} | {ours} | {goal}{missed} | {peer} | {ratio} |"


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.2f} %"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def _machine() -> str:
    cores = len(Path("/proc/cpuinfo").read_text().split("\nprocessor")) or 1
    return f"{cores} cores, Python {platform.python_version()}, {platform.machine()}"


def main(files: Sequence[str]) -> None:
    """Print the document for JSON files of rows, named by their benchmarks."""
    tables = [(Path(name).stem, json.loads(Path(name).read_text())) for name in files]
    print(document(tables, _machine()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The hub's Flower parts, running, for tests that need them."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for what tests and their processes share

from links import Hub, made  # after the path

from atoll.federation.flower import Program  # after the path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with made(tmp_path_factory.mktemp("hub"), lambda link: link) as hub:
        yield hub


@pytest.fixture(scope="module")
def stock_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The same with flwr's own SuperLink, as somebody may have it elsewhere."""

    def stock(link: Program) -> Program:
        script = Path(sysconfig.get_path("scripts")) / "flower-superlink"
        options = link.argv[link.argv.index("--host") :]
        return Program([str(script), *options], link.env)

    with made(tmp_path_factory.mktemp("stock"), stock) as hub:
        yield hub

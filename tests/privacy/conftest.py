"""Makes the contract suites and this folder's oracles importable."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "contracts"), str(HERE)]

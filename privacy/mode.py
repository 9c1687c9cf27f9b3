"""The names of the sum protocols, apart from them: whoever reads a plan need not load them."""

from typing import Final, Literal, get_args

Mode = Literal["plain", "he", "secagg"]

MODES: Final[tuple[Mode, ...]] = get_args(Mode)

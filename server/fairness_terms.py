"""The measures of fairness in words: for the model card, a run's page and the terminal.

Apart from :mod:`atoll.server.fairness`, so that the command line starts without numpy.
"""

from typing import Final

MEASURES: Final = {
    "equalised_odds": "equalised odds, difference",
    "equal_opportunity": "equal opportunity, difference",
    "demographic_parity": "demographic parity, difference",
    "demographic_parity_ratio": "demographic parity, ratio",
}
"""In the order in which they are shown."""

"""What can go wrong in a private sum or its accounting.

PrivacyError
├── BadUpdate            the update holds NaN or Inf, or has the wrong shape; skip the device
├── Refused              one message must not be used; go on without it
├── SumFailed            this round cannot be decoded; throw it away
│   └── TooFewSurvivors
├── BadParameters        a combination that cannot be private or cannot be decoded; fix the plan
└── BudgetExceeded       the ledger refuses; lower the noise's cost or stop
"""


class PrivacyError(Exception):
    """Base of all errors raised by :mod:`atoll.privacy`."""


class BadUpdate(PrivacyError, ValueError):
    """An update with NaN or Inf, or of the wrong shape."""


class Refused(PrivacyError):
    """A message that must not be used."""


class SumFailed(PrivacyError):
    """A round that cannot be decoded."""


class TooFewSurvivors(SumFailed):
    """Fewer terms than the noise was calibrated for."""

    def __init__(self, survivors: int, needed: int) -> None:
        super().__init__(f"{survivors} of the devices answered; the noise needs {needed}")


class BadParameters(PrivacyError, ValueError):
    """Parameters that cannot be private or cannot be decoded."""


class BudgetExceeded(PrivacyError):
    """The ledger refuses to spend."""

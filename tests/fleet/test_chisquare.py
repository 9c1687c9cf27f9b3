from math import exp, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.fleet.chisquare import critical, survival

stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")


@given(st.floats(1e-6, 3000), st.integers(1, 1000))
def test_survival_agrees_with_scipy(x, degrees) -> None:
    ours, theirs = survival(x, degrees), stats.chi2.sf(x, degrees)
    assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-280)


@given(st.floats(1e-12, 0.999), st.integers(1, 200))
def test_critical_is_where_survival_is_alpha(alpha, degrees) -> None:
    assert critical(alpha, degrees) == pytest.approx(stats.chi2.isf(alpha, degrees), rel=1e-9)


@given(st.floats(0, 500))
def test_two_degrees_have_a_closed_form(x) -> None:
    assert survival(x, 2) == pytest.approx(exp(-x / 2), rel=1e-12)


def test_the_ends() -> None:
    assert survival(0, 5) == survival(-1, 5) == survival(3, 0) == 1
    assert survival(inf, 5) == 0
    assert critical(0.5, 0) == 0


@pytest.mark.parametrize("alpha", [0, 1, -1, 2, float("nan")])
def test_a_rate_outside_its_range_is_refused(alpha) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        critical(alpha, 3)

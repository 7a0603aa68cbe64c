"""Means, deviations and the paired test, against published values."""

import math

import pytest

from palimpsest.eval.statistics import mean_sd, paired, student_tail


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.571, 5, 0.05), (2.228, 10, 0.05),
     (9.925, 2, 0.01), (2.756, 29, 0.01), (2.660, 60, 0.01)],
)  # fmt: skip
def test_tables_of_the_distribution(t: float, freedom: int, p: float) -> None:
    assert student_tail(t, freedom) == pytest.approx(p, rel=2e-3)  # tables give four digits of t
    assert student_tail(-t, freedom) == student_tail(t, freedom) and student_tail(0.0, freedom) == 1.0


def test_mean_and_deviation() -> None:
    assert mean_sd([2.0, 4.0, 9.0]) == (5.0, pytest.approx(math.sqrt(13)))
    assert mean_sd([3.0]) == (3.0, None)


def test_paired() -> None:
    # Gosset's sleep data: ten patients, two drugs; t = 4.0621, p = 0.00283.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert paired(first, second) == pytest.approx(0.002833, abs=1e-6)
    assert paired([1.0], [2.0]) is None and paired([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert paired([1.0, 2.0], [0.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match="samples were of 2 and 1 values"):
        paired([1.0, 2.0], [1.0])

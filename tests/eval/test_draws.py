"""The draws are fixed numbers, for ever and everywhere."""

import numpy as np
import pytest

from palimpsest.eval import draws


def test_the_numbers_are_these_on_every_machine():
    assert draws.words(0, "a", 3).tolist() == [6457259683090931087, 10761372941700573803, 17873759689748477978]
    assert draws.integers(7, "passkey value", 4, 10**6, 10**7).tolist() == [8287512, 9771729, 4019621, 5496275]


def test_the_numbers_are_those_of_splitmix64_in_python_integers():
    def mix(word):
        word = (word + 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    key = 0
    for part in (12, *b"stream"):
        key = mix(key ^ mix(part))
    assert draws.words(12, "stream", 20, start=5).tolist() == [mix(mix(i) ^ key) for i in range(5, 25)]


def test_a_draw_depends_on_its_place_alone():
    whole = draws.words(5, "x", 100)
    assert np.array_equal(whole[40:], draws.words(5, "x", 60, start=40))


def test_streams_and_seeds_differ():
    rows = [draws.words(seed, stream, 64) for seed in (0, 1) for stream in ("a", "b", "ab", "ba")]
    assert len(np.unique(np.concatenate(rows))) == 8 * 64


def test_uniform_is_uniform():
    u = draws.uniform(3, "u", 100_000)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    # 20 cells of 5000: the standard deviation of a cell is 69, so that 350 is five of them.
    assert np.abs(counts - 5000).max() < 350


@pytest.mark.parametrize(("rows", "count", "high"), [(50, 8, 8), (50, 511, 2048), (50, 1, 9), (50, 127, 128)])
def test_distinct_draws(rows, count, high):
    found = draws.distinct(3, "d", rows, count, 2, 2 + high)
    assert found.shape == (rows, count) and found.min() >= 2 and found.max() < 2 + high
    assert all(len(set(row)) == count for row in found.tolist())
    assert np.array_equal(found[20:], draws.distinct(3, "d", rows - 20, count, 2, 2 + high, start=20))
    with pytest.raises(ValueError, match="count was 9; it must be at most 8, the integers of"):
        draws.distinct(0, "d", 1, 9, 0, 8)


def test_every_arrangement_is_as_likely():
    found = draws.arrange(1, "a", 12_000, 3, np.where(np.arange(12_000) < 6000, 4, 3))
    for part, kinds, cells in ((found[:6000], 4, 24), (found[6000:], 3, 6)):
        assert part.max() == kinds - 1 and part.min() == 0
        seen, counts = np.unique(part @ [16, 4, 1], return_counts=True)
        assert len(seen) == cells and all(len(set(row)) == 3 for row in part.tolist())
        wanted = 6000 / cells
        assert np.abs(counts - wanted).max() < 5 * wanted**0.5, "five standard deviations"
    assert np.array_equal(found[30:50], draws.arrange(1, "a", 20, 3, 4, start=30))


def test_first_places():
    values = draws.integers(2, "f", 60, 0, 5).reshape(4, 15)
    assert draws.first_of(values).tolist() == [[row.index(x) for x in row] for row in values.tolist()]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=f"seed was {seed}"):
        draws.words(seed, "a", 1)


def test_an_empty_range_is_named():
    with pytest.raises(ValueError, match="high was 3"):
        draws.integers(0, "a", 1, 3, 3)

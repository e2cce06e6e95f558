import math

import numpy as np
import pytest

from es_trainer.metrics import Moments


VALUES = np.array([1.0, 2.0, np.nan, 4.0, 1e6, 1e6 + 1, np.nan])


@pytest.mark.parametrize("cut", range(len(VALUES) + 1))
def test_moments_of_parts_are_those_of_the_whole(cut):
    moments = Moments.of_all([Moments.of(VALUES[:cut]), Moments.of(VALUES[cut:])])
    assert moments.count == 5
    assert moments.mean == pytest.approx(np.nanmean(VALUES), rel=1e-14)
    assert moments.deviation == pytest.approx(np.nanstd(VALUES), rel=1e-12)


def test_equal_values_do_not_deviate():
    assert Moments.of_all([Moments.of(np.full(3, 0.1)), Moments.of(np.full(4, 0.1))]).deviation < 1e-16


def test_nothing_has_no_mean():
    nothing = Moments.of_all([Moments.of(np.array([np.nan])), Moments.of(np.array([]))])
    assert nothing.count == 0 and math.isnan(nothing.mean) and math.isnan(nothing.deviation)

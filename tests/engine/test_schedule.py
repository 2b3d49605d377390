"""Do the learning rate and the teacher's momentum follow the published curves?"""

import math

import numpy as np
import pytest

from fuseer.engine.schedule import half_cosine, warmup_cosine, warmup_milestones


def test_equals_the_official_arrays():
    """main_swav.py: linspace over the warm-up iterations, then final + (base - final)(1 + cos(pi t / T)) / 2, here in our own words."""
    warmup, total, start, peak, final = 312 * 10, 312 * 100, 0.3, 4.8, 0.0048
    ramp = np.linspace(start, peak, warmup)
    rest = np.arange(total - warmup)
    curve = np.concatenate([ramp, final + 0.5 * (peak - final) * (1 + np.cos(math.pi * rest / (total - warmup)))])
    ours = [warmup_cosine(s, total_steps=total, warmup_steps=warmup, start=start, peak=peak, final=final) for s in range(total)]
    np.testing.assert_allclose(ours, curve, rtol=1e-12)


def test_without_warmup_it_starts_at_the_peak():
    assert warmup_cosine(0, total_steps=10, warmup_steps=0, start=0.0, peak=2.0, final=0.1) == 2.0
    assert warmup_cosine(10, total_steps=10, warmup_steps=0, start=0.0, peak=2.0, final=0.1) == 0.1


def test_steps_down_are_moco_v1s():
    """lr · 0.1 at epochs 120 and 160 of 200, here of 7 steps each."""
    ours = [warmup_milestones(s, warmup_steps=0, start=0.0, peak=0.03, milestones=(840, 1120), factor=0.1) for s in range(1400)]
    np.testing.assert_allclose(ours, np.repeat([0.03, 0.003, 0.0003], [840, 280, 280]), rtol=1e-12)


def test_steps_down_come_after_the_warmup():
    ours = [warmup_milestones(s, warmup_steps=3, start=1.0, peak=2.0, milestones=(2, 5), factor=0.5) for s in range(7)]
    assert ours == [1.0, 1.5, 2.0, 1.0, 1.0, 0.5, 0.5]


def test_without_steps_down_the_peak_stays():
    ours = [warmup_milestones(s, warmup_steps=4, start=0.3, peak=4.8, milestones=(), factor=0.1) for s in range(9)]
    np.testing.assert_allclose(ours, [0.3, 1.8, 3.3, *[4.8] * 6], rtol=1e-12)


def test_the_cosine_per_epoch_is_moco_v2s():
    """lr · (1 + cos(π epoch / 200)) / 2, the same for all steps of an epoch."""
    ours = [warmup_cosine(s, total_steps=1400, warmup_steps=0, start=0, peak=0.03, final=0, hold_steps=7) for s in range(1400)]
    curve = 0.015 * (1 + np.cos(math.pi * np.arange(200) / 200))
    np.testing.assert_allclose(ours, np.repeat(curve, 7), rtol=1e-12)
    assert len(set(ours)) == 200


def test_the_cosine_per_epoch_goes_on_from_a_warmup_inside_an_epoch():
    ours = [warmup_cosine(s, total_steps=40, warmup_steps=15, start=0.0, peak=1.0, final=0, hold_steps=10) for s in range(15, 40)]
    assert ours[:5] == [1.0] * 5 and len(set(ours)) == 3 and sorted(ours, reverse=True) == ours


def test_the_momentum_is_moco_v3s():
    ours = [half_cosine(step, total_steps=1000, start=0.99) for step in range(1001)]
    np.testing.assert_allclose(ours, 1 - 0.5 * (1 + np.cos(math.pi * np.arange(1001) / 1000)) * (1 - 0.99), rtol=1e-12)
    assert ours[0] == pytest.approx(0.99) and ours[500] == pytest.approx(0.995) and ours[-1] == 1.0
    assert half_cosine(2000, total_steps=1000, start=0.99) == 1.0, "it stays there"
    assert [half_cosine(step, total_steps=100, start=0.996) for step in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0]), "BYOL's oracle"

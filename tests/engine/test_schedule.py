"""Does the learning rate follow the published curve?"""

import math

import numpy as np

from fuseer.engine.schedule import warmup_cosine


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

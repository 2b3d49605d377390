"""Does the generator pass its known-answer vectors, and does a row depend on its own key alone?"""

import numpy as np
import pytest

from fuseer.engine.data.philox import philox4x32, uniforms, words

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    assert tuple(philox4x32(counter, key)) == answer


def test_rows_depend_on_their_own_key_alone():
    samples = np.array([0, 5, 2**32 + 5, 999])
    together = words(3, 1, samples, 2, 11)
    for row, sample in zip(together, samples, strict=True):
        assert (words(3, 1, [sample], 2, 11)[0] == row).all()
    everything = [words(*key, 11) for key in ((3, 1, samples, 2), (4, 1, samples, 2), (3, 2, samples, 2), (3, 1, samples, 3))]
    assert len(np.unique(np.concatenate(everything))) == 4 * 4 * 11


def test_uniforms_fill_the_unit_interval():
    u = uniforms(0, 0, np.arange(5000), 0, 8)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 5000)
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 5 / np.sqrt(5000)

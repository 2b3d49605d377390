"""How does a key and a counter become random numbers, without any state?"""

import numpy as np

ORDER_STREAM = 0xFFFFFFFF  # the third counter word: views count up from 0, these six come from the top
REPLACEMENT_STREAM = 0xFFFFFFFE
SHUFFLE_STREAM = 0xFFFFFFFD
MASK_STREAM = 0xFFFFFFFC
FINETUNE_STREAM = 0xFFFFFFFB
MIXING_STREAM = 0xFFFFFFFA

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter, key) -> np.ndarray:
    """Philox4x32-10 of four counter words and two key words, every one below 2**32 -> uint32 [4, ...].

    The words of `counter` are integers or integer arrays that broadcast against each other; `key` is a pair of integers.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(10):
        high, low = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (low >> _SHIFT) ^ c1 ^ np.uint64(k0), low & _LOW, (high >> _SHIFT) ^ c3 ^ np.uint64(k1), high & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def words(seed: int, epoch: int, samples, stream: int, count: int) -> np.ndarray:
    """The first `count` random words of every sample -> uint32 [B, count]; row b depends on (seed, epoch, samples[b], stream) only."""
    samples = np.asarray(samples, dtype=np.uint64).reshape(-1, 1)
    blocks = np.arange(-(-count // 4))
    drawn = philox4x32((samples & _LOW, samples >> _SHIFT, stream, blocks), (seed & 0xFFFFFFFF, epoch & 0xFFFFFFFF))
    return drawn.transpose(1, 2, 0).reshape(len(samples), 4 * len(blocks))[:, :count]


def uniforms(seed: int, epoch: int, samples, stream: int, count: int) -> np.ndarray:
    """`words` as float64 [B, count] in [0, 1), on a grid of 2**-32."""
    return words(seed, epoch, samples, stream, count) * 2.0**-32

"""Which samples make up micro-batch m of rank r?"""

import numpy as np

from fuseer.engine.data.philox import ORDER_STREAM, words

_ROUNDS = 8


class SampleIndex:
    """The one global order of the samples: which of them micro-step m of this rank takes, by arithmetic alone.

    In epoch e the samples 0..count-1 are permuted by (seed, e); optimizer step t of the epoch takes the positions [t G, (t+1) G) of the
    permutation, G = batch_size; each of its accumulation steps takes the next B W of these, and rank r the r-th B of them,
    B = G / (W accumulation_steps). So a step sees the same samples for any W and any accumulation; a sample comes at most once per
    epoch, and exactly once when G divides count. Memory is O(1) in count: a Feistel network, walked until it lands below count
    (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, accumulation_steps: int = 1):
        if batch_size < 1 or count < batch_size:
            raise ValueError(f"batch_size must lie between 1 and the number of images; got batch_size={batch_size} and {count} images")
        if batch_size % (world_size * accumulation_steps):
            raise ValueError(
                f"batch_size must be a multiple of ranks x accumulation_steps; got {batch_size} for {world_size} x {accumulation_steps}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}); got {rank}")
        self.count, self.batch_size, self.seed, self.rank = count, batch_size, seed, rank
        self.world_size, self.accumulation_steps = world_size, accumulation_steps
        self.batch_per_rank = batch_size // (world_size * accumulation_steps)
        self.steps_per_epoch = count // batch_size

    def epoch(self, micro_step: int) -> int:
        return micro_step // self.accumulation_steps // self.steps_per_epoch

    def samples(self, micro_step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, positions within it, samples at these positions), int64 [B] each."""
        step, part = divmod(micro_step, self.accumulation_steps)
        epoch, step = divmod(step, self.steps_per_epoch)
        first = step * self.batch_size + (part * self.world_size + self.rank) * self.batch_per_rank
        positions = np.arange(first, first + self.batch_per_rank)
        return epoch, positions, permuted(positions, self.count, self.seed, epoch)


def permuted(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of [0, count) keyed by (seed, epoch), at `positions` int64 [B] -> int64 [B]."""
    keys = words(seed, epoch, [0], ORDER_STREAM, 2 * _ROUNDS)[0].view(np.uint64)
    bits = max(2, (count - 1).bit_length())
    out = np.asarray(positions).astype(np.uint64)
    walking = np.arange(len(out))
    while walking.size:
        out[walking] = _feistel(out[walking], bits, keys)
        walking = walking[out[walking] >= np.uint64(count)]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2**bits): the halves differ by a bit where `bits` is odd, and an even number of rounds swaps them back."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return left << np.uint64(right_bits) | right


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """MurmurHash3's 64-bit finalizer of x and a round key; its high half."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(32)

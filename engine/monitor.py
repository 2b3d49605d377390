"""Does a run learn at all, and how is it said when it does not?"""

import math
from collections import deque
from statistics import median
from typing import NamedTuple

# A verdict is on a stretch of training that long: the noise of single batches and the passing states of a healthy start (MoCo's loss
# rises to chance while its queue fills, SwAV begins there) are shorter. 2 % of a run is 4 of 200 epochs.
STEPS, SHARE_OF_RUN, RECORDS = 200, 0.02, 4
# A collapsed loss equals chance to 1e-3 and better. A healthy one can stay near it: at temperature 1 (MoCo v3) a perfect one over 4096
# keys is 12 % below, so that a tolerance of some per cent would accuse it for long.
NEAR_CHANCE = 0.005
# Unit rows of spread s have cosines that differ by about s²; at s = 0.05 and temperature 0.1 that is 0.025 nats: the loss sees one point.
COLLAPSED_SPREAD = 0.05
# Balanced codes spread the views over nearly all prototypes; a batch cannot use more of them than it has images.
FEW_PROTOTYPES = 0.1
# Small networks that learn kept an effective rank of 4 to 10 of 16 dimensions, those that had collapsed 1.0.
FEW_DIMENSIONS = 2.0
# A jump is that many median deviations above the median of the stretch, and a tenth of it at least: batches differ by less.
JUMP_DEVIATIONS, JUMP_SHARE = 10, 0.1
SEE = "see docs/symptoms.md"
# Signs that nothing is being learnt, on which `on_collapse` acts.
COLLAPSE = {"chance", "collapse", "rank", "prototypes", "entropy"}


class Sign(NamedTuple):
    """One sign of trouble that has appeared, or (`over`) passed: its name and the sentence for the person at the terminal."""

    sign: str
    over: bool
    text: str


class Monitor:
    """Reads the numbers of the log and says once, in words, that nothing is being learnt; once more where that has passed or come back.

    `chance` is the method's chance_loss() (None: it has none), `batch_size` counts images of a step over all ranks. Warm-up steps never
    count. A sign needs the whole of the last max(200 steps, 2 % of the run), in at least 4 records, or more steps where records are rare;
    a jump of the loss is seen in the record after such a stretch. Records whose loss is not finite are passed over.
    """

    def __init__(self, chance: float | None, batch_size: int, warmup_steps: int, total_steps: int):
        self._chance, self._batch, self._from = chance, batch_size, warmup_steps
        self._span = max(STEPS, math.ceil(SHARE_OF_RUN * total_steps))
        self._records: deque[tuple[int, dict]] = deque()
        self._told: set[str] = set()

    def observe(self, step: int, numbers: dict[str, float]) -> list[Sign]:
        """What is new at a log step whose numbers are "loss" and the method's diagnostics; nothing where `numbers` is empty."""
        if not math.isfinite(numbers.get("loss", math.nan)) or step <= self._from:
            return []
        jump = self._jump(numbers["loss"])
        self._records.append((step, numbers))
        # the oldest record stays as long as those after it do not cover the span by themselves
        while len(self._records) > RECORDS and step - self._records[1][0] >= self._span:
            self._records.popleft()
        found = [jump]
        if self._is_whole():
            found += [self._at_chance(), self._collapse(), self._few_dimensions(), self._few_prototypes(), self._low_entropy()]
        return [sign for sign in found if sign]

    def _is_whole(self) -> bool:
        return len(self._records) >= RECORDS and self._records[-1][0] - self._records[0][0] >= self._span

    def _jump(self, loss: float) -> Sign | None:
        """The newest loss against the stretch before it."""
        if not self._is_whole():
            return None
        before = self._last("loss")
        middle = median(before)
        deviation = max(JUMP_DEVIATIONS * median(abs(value - middle) for value in before), JUMP_SHARE * abs(middle))
        text = f"the loss has jumped to {loss:.4f}, after {middle:.4f} for {self._steps()} steps; {SEE}"
        return self._turn("jump", loss > middle + deviation, loss < middle + deviation / 2, text, f"the loss is down again: {loss:.4f}")

    def _at_chance(self) -> Sign | None:
        """At chance or above through both halves of the stretch, and not falling: a loss that comes down from above is on its way."""
        losses = self._last("loss")
        if self._chance is None or not losses:
            return None
        half, near = len(losses) // 2, NEAR_CHANCE * abs(self._chance)
        middle, early, late = median(losses), median(losses[:half]), median(losses[-half:])
        above = f"above chance ({middle:.4f} over {self._chance:.4f})"
        where = f"at chance ({self._chance:.4f})" if middle <= self._chance + near else above
        text = f"the loss has stayed {where} for {self._steps()} steps: nothing is being learnt; {SEE}"
        stays = min(early, late) >= self._chance - near and early - late < near
        return self._turn("chance", stays, middle < self._chance - 2 * near, text, "the loss has left chance")

    def _collapse(self) -> Sign | None:
        spreads = self._last("embedding_std")
        if not spreads:
            return None
        text = f"embeddings have collapsed: their spread is {spreads[-1]:.2g} of a sphere's, small for {self._steps()} steps; {SEE}"
        over = f"embeddings spread again: {spreads[-1]:.2g} of a sphere's"
        return self._turn("collapse", max(spreads) < COLLAPSED_SPREAD, spreads[-1] > 2 * COLLAPSED_SPREAD, text, over)

    def _few_dimensions(self) -> Sign | None:
        ranks = self._last("embedding_rank")
        if not ranks:
            return None
        text = f"embeddings have collapsed to few dimensions: effective rank {ranks[-1]:.2f}, small for {self._steps()} steps; {SEE}"
        over = f"embeddings fill more dimensions again: effective rank {ranks[-1]:.2f}"
        return self._turn("rank", max(ranks) < FEW_DIMENSIONS, ranks[-1] > 1.5 * FEW_DIMENSIONS, text, over)

    def _low_entropy(self) -> Sign | None:
        entropies = self._last("prototype_entropy")
        if self._chance is None or not entropies:
            return None
        few, now = FEW_PROTOTYPES * min(math.exp(self._chance), self._batch), math.exp(entropies[-1])
        text = f"images share few prototypes: the entropy of their use is that of {now:.1f}, low for {self._steps()} steps; {SEE}"
        over = f"the entropy of prototypes' use is that of {now:.1f} again"
        return self._turn("entropy", math.exp(max(entropies)) < few, now > 2 * few, text, over)

    def _few_prototypes(self) -> Sign | None:
        used = self._last("prototypes_used")
        if self._chance is None or not used:
            return None
        prototypes = round(math.exp(self._chance))
        few = FEW_PROTOTYPES * min(prototypes, self._batch)
        text = f"only {used[-1]:.0f} of {prototypes} prototypes are used, for {self._steps()} steps fewer than {few:.0f}; {SEE}"
        over = f"{used[-1]:.0f} of {prototypes} prototypes are used again"
        return self._turn("prototypes", max(used) < few, used[-1] > 2 * few, text, over)

    def _last(self, key: str) -> list[float]:
        """`key` over the whole stretch; nothing where a record lacks it."""
        values = [numbers.get(key) for _, numbers in self._records]
        return [] if None in values else values

    def _steps(self) -> int:
        return self._records[-1][0] - self._records[0][0]

    def _turn(self, sign: str, present: bool, gone: bool, text: str, over: str) -> Sign | None:
        """The news about one sign; between `present` and `gone` what was said last still holds."""
        if present and sign not in self._told:
            self._told.add(sign)
            return Sign(sign, False, text)
        if gone and sign in self._told:
            self._told.remove(sign)
            return Sign(sign, True, over)
        return None

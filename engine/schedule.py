"""What are the learning rate and the teacher's momentum at a step?"""

import math
from collections.abc import Sequence


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, start: float, peak: float, final: float, hold_steps: int = 0) -> float:
    """Linear start → peak over `warmup_steps`, then final + (peak - final)·(1 + cos(π t))/2 with t from 0 to 1 at the last step.

    With `hold_steps`, an epoch's worth, the cosine is taken at the beginning of each epoch and held until the next.
    Sources: facebookresearch/swav main_swav.py (warm-up by linspace, cosine per iteration); facebookresearch/moco main_moco.py (cosine
    per epoch).
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps, start, peak)
    if hold_steps:
        step = max(warmup_steps, step // hold_steps * hold_steps)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, share)))


def warmup_milestones(step: int, *, warmup_steps: int, start: float, peak: float, milestones: Sequence[int], factor: float) -> float:
    """Linear start → peak over `warmup_steps`, then peak · factor^(milestones passed); at step m the milestone m has been passed.

    Without milestones the peak is kept, as SEER's RegNetY-128GF had it.
    Source: facebookresearch/moco main_moco.py (×0.1 at epochs 120 and 160 of 200).
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps, start, peak)
    return peak * factor ** sum(step >= milestone for milestone in milestones)


def half_cosine(step: int, *, total_steps: int, start: float) -> float:
    """A momentum that grows from start to 1: 1 - (1 - start)·(1 + cos(π · step / total_steps))/2.

    Source: facebookresearch/moco-v3 main_moco.py (adjust_moco_momentum).
    """
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))


def _warmup(step: int, warmup_steps: int, start: float, peak: float) -> float:
    return start + (peak - start) * step / max(1, warmup_steps - 1)

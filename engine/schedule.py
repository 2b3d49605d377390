"""What is the learning rate at a step?"""

import math


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, start: float, peak: float, final: float) -> float:
    """Linear start → peak over `warmup_steps`, then final + (peak - final)·(1 + cos(π t))/2 with t from 0 to 1 at the last step.

    Source: facebookresearch/swav main_swav.py (warm-up by linspace, cosine per iteration).
    """
    if step < warmup_steps:
        return start + (peak - start) * step / max(1, warmup_steps - 1)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, share)))

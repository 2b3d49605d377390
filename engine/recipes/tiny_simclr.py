"""SimCLR, the small RegNetY and the photographs of tiny_swav.

fuseer demo recipe=tiny_simclr

Expected: three to five minutes on two cores; weighted kNN on the 2,000 test images passes the calibrated initialisation, 56.8 %, by far.
Measured results are in README.md.
"""

from fuseer.engine.config import OptimConfig, TrainConfig
from fuseer.engine.methods.simclr import SimCLRConfig
from fuseer.engine.recipes import tiny_swav


def config() -> TrainConfig:
    base = tiny_swav.config()
    view = base.method.views[0].model_copy(update={"scale": (0.25, 1.0)})
    return base.model_copy(
        update={
            "recipe": "tiny_simclr",
            "method": SimCLRConfig(views=(view,), hidden_widths=(512,), temperature=0.2),
            "optim": OptimConfig(name="adamw", lr=2e-3, final_lr=2e-6, warmup_steps=80, weight_decay=0.05),
            "batch_size": 128,
            "steps": 1200,
        }
    )

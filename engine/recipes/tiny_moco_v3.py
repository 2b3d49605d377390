"""MoCo v3, the small RegNetY and the photographs of tiny_swav.

fuseer demo recipe=tiny_moco_v3

Expected: five to seven minutes on two cores; weighted kNN on the 2,000 test images passes the calibrated initialisation, 56.8 %, by far.
Measured results are in README.md.
"""

from fuseer.engine.config import OptimConfig, TrainConfig
from fuseer.engine.methods.moco import MoCoV3Config
from fuseer.engine.recipes import tiny_swav


def config() -> TrainConfig:
    base = tiny_swav.config()
    view = base.method.views[0].model_copy(update={"scale": (0.25, 1.0)})
    method = MoCoV3Config(views=(view,), hidden_widths=(512,), embedding_width=128, predictor_widths=(512,), temperature=0.2)
    return base.model_copy(
        update={
            "recipe": "tiny_moco_v3",
            "method": method,
            "optim": OptimConfig(name="adamw", lr=2e-3, final_lr=2e-6, warmup_steps=80, weight_decay=0.05),
            "batch_size": 128,
            "steps": 1000,
        }
    )

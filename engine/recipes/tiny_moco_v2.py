"""MoCo v2, the small RegNetY and the photographs of tiny_swav; BatchNorm in virtual slices of 32 images, keys shuffled.

fuseer demo recipe=tiny_moco_v2

Expected: four to five minutes on two cores; weighted kNN on the 2,000 test images passes the calibrated initialisation, 56.8 %, by far.
Measured results are in README.md.
"""

from fuseer.engine.config import OptimConfig, TrainConfig
from fuseer.engine.methods.moco import MoCoConfig
from fuseer.engine.recipes import tiny_swav


def config() -> TrainConfig:
    base = tiny_swav.config()
    view = base.method.views[0].model_copy(update={"scale": (0.25, 1.0)})
    method = MoCoConfig(views=(view,), hidden_widths=(512,), queue_length=4096, teacher_momentum=0.99, norm_images=32)
    return base.model_copy(
        update={
            "recipe": "tiny_moco_v2",
            "method": method,
            "optim": OptimConfig(name="adamw", lr=2e-3, final_lr=2e-6, warmup_steps=80, weight_decay=0.05),
            "batch_size": 128,
            "steps": 1500,
        }
    )

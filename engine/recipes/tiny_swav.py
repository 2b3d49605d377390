"""SwAV, a small RegNetY, 10,000 real photographs of 28 px: `make demo`.

fuseer demo

Expected: four to six minutes on two cores; weighted kNN on the 2,000 test images about as good as raw pixels,
which reach 81.1 %, and 14 points above the network's initialisation.
Measured results are in README.md.
"""

from fuseer.engine.config import DataConfig, FinetuneConfig, KnnConfig, LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import View
from fuseer.engine.distributed import fastest_precision
from fuseer.engine.methods.swav import SwAVConfig

STAGES = {"depths": [1, 2, 4], "widths": [48, 96, 192], "group_widths": 16, "se_ratios": 0.25, "stem_width": 32, "stem_stride": 1}


def config() -> TrainConfig:
    # hue and saturation do nothing to grey images and cost most
    grey = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.2, "blur_sigma": (0.1, 1.0)}
    return TrainConfig(
        recipe="tiny_swav",
        method=SwAVConfig(
            views=(View(size=24, count=2, scale=(0.5, 1.0), **grey), View(size=16, count=4, scale=(0.25, 0.6), **grey)),
            hidden_widths=(512,),
            prototypes=100,
            freeze_prototypes_steps=40,
        ),
        model=ModelConfig(name="anynet", options=STAGES, channels_last=True),
        optim=OptimConfig(name="adamw", lr=1.4e-3, final_lr=1.4e-6, warmup_steps=80, weight_decay=0.05),
        data=DataConfig(path="demo", mean=(0.286, 0.286, 0.286), std=(0.353, 0.353, 0.353)),
        knn=KnnConfig(every_steps=500),
        linear=LinearConfig(protocol="tiny"),
        finetune=FinetuneConfig(protocol="tiny"),
        batch_size=64,
        steps=1500,
        precision=fastest_precision(),
        log_every_steps=25,
        checkpoint_every_steps=500,
    )

"""SwAV, a small RegNetY, 10,000 real photographs of 28 px: `make demo`.

fuseer demo

Expected (weighted kNN on 2,000 test images; raw pixels 81.1 %): provisional.
"""

from fuseer.engine.config import DataConfig, KnnConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import View
from fuseer.engine.methods.swav import SwAVConfig

RULE = {"depth": 8, "w0": 24, "wa": 24.0, "wm": 2.2, "group_width": 8}


def config() -> TrainConfig:
    mild = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0}
    return TrainConfig(
        recipe="tiny_swav",
        method=SwAVConfig(
            views=(View(size=28, count=2, scale=(0.5, 1.0), **mild), View(size=18, count=4, scale=(0.3, 0.6), **mild)),
            hidden_widths=(256,),
            embedding_width=64,
            prototypes=100,
            freeze_prototypes_steps=80,
        ),
        model=ModelConfig(name="regnet", options={**RULE, "se_ratio": 0.25, "stem_stride": 1}),
        optim=OptimConfig(name="larc", lr=1.0, start_lr=0.1, final_lr=0.001, warmup_steps=80, weight_decay=1e-6),
        data=DataConfig(path="demo", mean=(0.286, 0.286, 0.286), std=(0.353, 0.353, 0.353)),
        knn=KnnConfig(every_steps=200),
        batch_size=128,
        steps=400,
    )

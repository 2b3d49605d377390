"""SwAV, ResNet-50, ImageNet-1k, 2x224 + 6x96, batch 4096: the published 200-epoch run.

deepspeed --num_accelerators 64 --module fuseer.engine.train recipe=swav_rn50 data=IMAGENET_TRAIN out=runs/swav_rn50

Published result (linear probe): 73.9 % after 200 epochs, 75.3 % after 800. Not run here. facebookresearch/swav README.
"""

from fuseer.engine.config import ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.swav import SwAVConfig


def config() -> TrainConfig:
    return TrainConfig(
        recipe="swav_rn50",
        method=SwAVConfig(),
        model=ModelConfig(name="resnet50", sync_norm_ranks=8),
        optim=OptimConfig(name="lars", variant="larc", lr=4.8, start_lr=0.3, final_lr=0.0048, warmup_epochs=10, weight_decay=1e-6),
        batch_size=4096,
        epochs=200,
        precision="bf16-autocast",
        checkpoint_every_steps=3120,
    )

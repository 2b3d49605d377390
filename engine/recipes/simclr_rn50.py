"""SimCLR v1, ResNet-50, ImageNet-1k, batch 4096: the published 1000-epoch run.

deepspeed --num_accelerators 32 --module fuseer.engine.train recipe=simclr_rn50 data=IMAGENET_TRAIN out=runs/simclr_rn50

Needs 32 GPUs of 16 GB, whose BatchNorm statistics are shared; with another number set model.sync_norm_ranks to it.
Published result (linear probe): 69.3 % after 1000 epochs, about 64.5 % after 100. Not run here. google-research/simclr README.
"""

from fuseer.engine.config import DataConfig, LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.simclr import SimCLRConfig


def config() -> TrainConfig:
    return TrainConfig(
        recipe="simclr_rn50",
        method=SimCLRConfig(),
        model=ModelConfig(name="resnet50", sync_norm_ranks=32),
        optim=OptimConfig(name="lars", variant="simclr", lr=4.8, warmup_epochs=10, weight_decay=1e-6),
        # pixels in [0, 1], as published
        data=DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        linear=LinearConfig(protocol="simclr"),
        batch_size=4096,
        epochs=1000,
        precision="bf16-autocast",
        checkpoint_every_steps=3120,
    )

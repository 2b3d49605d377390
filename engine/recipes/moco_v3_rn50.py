"""MoCo v3, ResNet-50, ImageNet-1k, batch 4096: the published 300-epoch run.

deepspeed --num_accelerators 16 --module fuseer.engine.train recipe=moco_v3_rn50 data=IMAGENET_TRAIN out=runs/moco_v3_rn50

Needs 16 GPUs of 32 GB, whose BatchNorm statistics are shared; with another number set model.sync_norm_ranks to it.
Published result (linear probe): 72.8 % after 300 epochs, 68.9 % after 100 (lr 9.6), 74.6 % after 1000 (weight decay 1.5e-6, momentum from
0.996). Not run here. facebookresearch/moco-v3 README, CONFIG.md.
"""

from fuseer.engine.config import LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.moco import MoCoV3Config


def config() -> TrainConfig:
    return TrainConfig(
        recipe="moco_v3_rn50",
        method=MoCoV3Config(),
        model=ModelConfig(name="resnet50", options={"zero_init_last": False}, sync_norm_ranks=16),
        optim=OptimConfig(name="lars", variant="mocov3", lr=4.8, warmup_epochs=10, weight_decay=1e-6),
        linear=LinearConfig(protocol="moco_v3"),
        batch_size=4096,
        epochs=300,
        precision="bf16-autocast",
        checkpoint_every_steps=3120,
    )

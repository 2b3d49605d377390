"""MoCo v2, ResNet-50, ImageNet-1k, batch 256: the published 200-epoch run.

deepspeed --num_accelerators 8 --module fuseer.engine.train recipe=moco_v2_rn50 data=IMAGENET_TRAIN out=runs/moco_v2_rn50

Needs 8 GPUs of 16 GB; fewer train the same, since statistics of BatchNorm are those of 32 images wherever these are.
Published result (linear probe): 67.5 % after 200 epochs, 71.1 % after 800. Not run here. facebookresearch/moco README.
"""

from fuseer.engine.config import LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.moco import MoCoConfig


def config() -> TrainConfig:
    return TrainConfig(
        recipe="moco_v2_rn50",
        method=MoCoConfig(),
        model=ModelConfig(name="resnet50", options={"zero_init_last": False}),
        optim=OptimConfig(name="sgd", lr=0.03, weight_decay=1e-4, per_epoch=True),
        linear=LinearConfig(protocol="moco"),
        batch_size=256,
        epochs=200,
        checkpoint_every_steps=5004,
    )

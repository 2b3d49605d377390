"""MoCo v1, ResNet-50, ImageNet-1k, batch 256: the published 200-epoch run.

deepspeed --num_accelerators 8 --module fuseer.engine.train recipe=moco_v1_rn50 data=IMAGENET_TRAIN out=runs/moco_v1_rn50

Needs 8 GPUs of 16 GB; fewer train the same, since statistics of BatchNorm are those of 32 images wherever these are.
Published result (linear probe): 60.6 % after 200 epochs. Not run here. facebookresearch/moco README.
"""

from fuseer.engine.config import LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import View
from fuseer.engine.methods.moco import MoCoConfig


def config() -> TrainConfig:
    jitter = {"jitter": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}
    return TrainConfig(
        recipe="moco_v1_rn50",
        method=MoCoConfig(views=(View(size=224, count=2, scale=(0.2, 1.0), blur=0.0, **jitter),), hidden_widths=(), temperature=0.07),
        model=ModelConfig(name="resnet50", options={"zero_init_last": False}),
        optim=OptimConfig(name="sgd", lr=0.03, weight_decay=1e-4, schedule="step", milestones_epochs=(120, 160)),
        linear=LinearConfig(protocol="moco"),
        batch_size=256,
        epochs=200,
        checkpoint_every_steps=5004,
    )

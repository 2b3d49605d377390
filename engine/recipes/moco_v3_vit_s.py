"""MoCo v3, ViT-S/16 of 12 heads, ImageNet-1k, batch 4096: the published 300-epoch run.

deepspeed --num_accelerators 32 --module fuseer.engine.train recipe=moco_v3_vit_s data=IMAGENET_TRAIN out=runs/moco_v3_vit_s

Needs 32 GPUs of 32 GB, whose BatchNorm statistics (in the heads) are shared; with another number set model.sync_norm_ranks to it.
Published result (linear probe): 73.2 % after 300 epochs. Not run here. facebookresearch/moco-v3 README, CONFIG.md.
"""

from fuseer.engine.config import LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.moco import MoCoV3Config, symmetric_views


def config() -> TrainConfig:
    method = MoCoV3Config(
        views=symmetric_views(smallest=0.08), hidden_widths=(4096, 4096), predictor_last_norm=True, temperature=0.2, teacher_momentum=0.99
    )
    return TrainConfig(
        recipe="moco_v3_vit_s",
        method=method,
        model=ModelConfig(name="mocov3_vit_small", options={"frozen_patches": True}, sync_norm_ranks=32),
        optim=OptimConfig(name="adamw", lr=2.4e-3, warmup_epochs=40, weight_decay=0.1, decay_thin=True),
        linear=LinearConfig(protocol="moco_v3_vit"),
        batch_size=4096,
        epochs=300,
        precision="bf16-autocast",
        zero_stage=1,
        checkpoint_every_steps=3120,
    )

"""MoCo v3, ViT-B/16, ImageNet-1k, batch 4096: the published 300-epoch run.

deepspeed --num_accelerators 64 --module fuseer.engine.train recipe=moco_v3_vit_b data=IMAGENET_TRAIN out=runs/moco_v3_vit_b

Needs 64 GPUs of 32 GB, whose BatchNorm statistics (in the heads) are shared; with another number set model.sync_norm_ranks to it.
Published result (linear probe): 76.7 % after 300 epochs. Not run here. facebookresearch/moco-v3 README, CONFIG.md.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import moco_v3_vit_s


def config() -> TrainConfig:
    small = moco_v3_vit_s.config()
    model = small.model.model_copy(update={"name": "mocov3_vit_base", "sync_norm_ranks": 64})
    return small.model_copy(update={"recipe": "moco_v3_vit_b", "model": model})

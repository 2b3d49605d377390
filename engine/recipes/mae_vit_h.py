"""MAE, ViT-H/14, ImageNet-1k, batch 4096, 75 % of the patches hidden: the published pretraining.

deepspeed --num_accelerators 64 --module fuseer.engine.train recipe=mae_vit_h data=IMAGENET_TRAIN out=runs/mae_vit_h

Any number of GPUs that divides 4096 trains the same. The published checkpoint was trained for 1600 epochs: epochs=1600.
Published result (fine-tuned, 1600 epochs): 86.9 %; linear probe 76.6 %. Not run here. facebookresearch/mae PRETRAIN.md, FINETUNE.md.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import mae_vit_b


def config() -> TrainConfig:
    base = mae_vit_b.config()
    return base.model_copy(
        update={
            "recipe": "mae_vit_h",
            "model": base.model.model_copy(update={"name": "vit_huge"}),
            "finetune": base.finetune.model_copy(update={"protocol": "mae_vit_h"}),
        }
    )

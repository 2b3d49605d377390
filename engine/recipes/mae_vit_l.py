"""MAE, ViT-L/16, ImageNet-1k, batch 4096, 75 % of the patches hidden: the published pretraining.

deepspeed --num_accelerators 64 --module fuseer.engine.train recipe=mae_vit_l data=IMAGENET_TRAIN out=runs/mae_vit_l

Any number of GPUs that divides 4096 trains the same. The published checkpoint was trained for 1600 epochs: epochs=1600.
Published result (fine-tuned, 1600 epochs): 85.9 %; linear probe 75.8 %. Not run here. facebookresearch/mae PRETRAIN.md, FINETUNE.md.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import mae_vit_b


def config() -> TrainConfig:
    base = mae_vit_b.config()
    return base.model_copy(
        update={
            "recipe": "mae_vit_l",
            "model": base.model.model_copy(update={"name": "vit_large"}),
            "finetune": base.finetune.model_copy(update={"protocol": "mae_vit_l"}),
        }
    )

"""MAE, ViT-B/16, ImageNet-1k, batch 4096, 75 % of the patches hidden: the published pretraining.

deepspeed --num_accelerators 64 --module fuseer.engine.train recipe=mae_vit_b data=IMAGENET_TRAIN out=runs/mae_vit_b

Any number of GPUs that divides 4096 trains the same. The published checkpoint was trained for 1600 epochs: epochs=1600.
Published result (fine-tuned, 1600 epochs): 83.6 %; linear probe 68.0 %. Not run here. facebookresearch/mae PRETRAIN.md, FINETUNE.md.
"""

from fuseer.engine.config import FinetuneConfig, LinearConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.mae import MAEConfig


def config() -> TrainConfig:
    return TrainConfig(
        recipe="mae_vit_b",
        method=MAEConfig(),
        model=ModelConfig(name="vit_base", options={"start": "mae"}),
        # 1.5e-4 at a batch of 256
        optim=OptimConfig(name="adamw", lr=2.4e-3, warmup_epochs=40, weight_decay=0.05, betas=(0.9, 0.95)),
        linear=LinearConfig(protocol="moco_v3_vit"),
        finetune=FinetuneConfig(protocol="mae_vit_b"),
        batch_size=4096,
        epochs=800,
        precision="bf16-autocast",
        zero_stage=1,
        checkpoint_every_steps=6240,
    )

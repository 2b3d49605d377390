"""SEER, RegNetY-32GF: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x224 + 4x96, batch 4096.

deepspeed --hostfile HOSTS --num_nodes 16 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_32gf data=IMAGES out=runs/seer

128 GPUs, 32 images each; 244,140 steps are 1e9 images. The head has BatchNorm, that of the sizes from 64GF on has none.
Documented: head, prototypes, crops, batch, lr 0.3 per 256 images with LARC, cosine. Taken over, as nothing says otherwise: groups of 32
for BatchNorm (16GF), weight decay 1e-5 (256GF, 10B), warm-up over 1.28 % of the run (VISSL's setting for one pass over these images).
Published result (fine-tuned at 384 px, ImageNet-1k): 83.4 %; linear probe 74.03 %. Not run here. facebookresearch/vissl projects/SEER.
"""

from fuseer.engine.config import ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import View
from fuseer.engine.methods.swav import SwAVConfig


def config() -> TrainConfig:
    return TrainConfig(
        recipe="seer_regnety_32gf",
        method=SwAVConfig(
            views=(View(size=224, count=2, scale=(0.14, 1.0)), View(size=96, count=4, scale=(0.05, 0.14))),
            hidden_widths=(4096, 4096),
            embedding_width=256,
            head_batch_norm=True,
            prototypes=16_000,
            sinkhorn_iterations=10,
        ),
        model=ModelConfig(name="regnety_32gf", sync_norm_ranks=32),
        optim=OptimConfig(name="lars", variant="larc", lr=4.8, start_lr=0.3, final_lr=0.0048, warmup_steps=3125, weight_decay=1e-5),
        batch_size=4096,
        steps=244_140,
        precision="bf16-autocast",
        checkpoint_every_steps=1000,
    )

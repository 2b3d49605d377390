"""SEER, RegNetY-256GF: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x224 + 4x96, batch 8192.

deepspeed --hostfile HOSTS --num_nodes 64 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_256gf data=IMAGES out=runs/seer

512 GPUs of 32 GB or more, 16 images each, BatchNorm shared by groups of 64; 122,070 steps are 1e9 images whatever the folder holds.
Stages 746, 1492, 4103, 10444 wide: the network of the published weights. 528, 1056, 2904, 7392, as the paper prints them, are those of
128GF; ClassyVision's own regnet_y_256gf (640, 1696, 2544, 5088) is a third network. Its groups of 373 channels suit no tensor core:
recipe=seer_regnety_256gf_friendly has 376.

LARC, lr 0.3 per 256 images, 8,000 steps of warm-up from 0.15 (0.3 times the 128 images of a machine over 256: vissl hydra_config.py),
cosine to a thousandth. bf16 autocast stands for apex O1, blocks are recomputed one by one where VISSL did so in two chunks.
Published result (fine-tuned at 384 px, ImageNet-1k): 85.2 %; linear probe 77.51 %. Not run here. facebookresearch/vissl projects/SEER.
"""

from fuseer.engine.config import ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import View
from fuseer.engine.methods.swav import SwAVConfig


def config() -> TrainConfig:
    return TrainConfig(
        recipe="seer_regnety_256gf",
        method=SwAVConfig(
            views=(View(size=224, count=2, scale=(0.14, 1.0)), View(size=96, count=4, scale=(0.05, 0.14))),
            hidden_widths=(8192, 8192),
            embedding_width=256,
            head_batch_norm=False,
            prototypes=16_000,
            sinkhorn_iterations=10,
        ),
        model=ModelConfig(name="regnety_256gf", sync_norm_ranks=64, recompute="all"),
        optim=OptimConfig(name="lars", variant="larc", lr=9.6, start_lr=0.15, final_lr=0.0096, warmup_steps=8000, weight_decay=1e-5),
        batch_size=8192,
        steps=122_070,
        precision="bf16-autocast",
        zero_stage=1,
        checkpoint_every_steps=500,
    )

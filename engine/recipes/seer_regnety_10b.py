"""SEER, RegNetY-10B: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x160 + 4x96, batch 7936.

deepspeed --hostfile HOSTS --num_nodes 62 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_10b data=IMAGES out=runs/seer

496 GPUs of 40 GB or more, 16 images each, BatchNorm over all of them; 126,008 steps are 1e9 images, 4.3648 % of them warm-up.
Sinkhorn's epsilon is 0.03. Recomputed are chunks of 2 | 7 | 9, 8 blocks, the last stage not. 2020, 4040, 11110, 28280 wide, in groups of
1010: recipe=seer_regnety_10b_friendly has 1008. ZeRO 3 stands for FSDP, bf16 weights with fp32 masters for its fp16 ones.
Published result (fine-tuned at 384 px, ImageNet-1k): 85.8 %; linear probe 79.8 %. Not run here. facebookresearch/vissl regnet10B.yaml.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_256gf


def config() -> TrainConfig:
    base = seer_regnety_256gf.config()
    large, small = base.method.views
    return base.model_copy(
        update={
            "recipe": "seer_regnety_10b",
            "method": base.method.model_copy(update={"views": (large.model_copy(update={"size": 160}), small), "epsilon": 0.03}),
            "model": base.model.model_copy(update={"name": "regnety_10b", "sync_norm_ranks": 496, "recompute": ((2,), (7,), (9, 17), ())}),
            "optim": base.optim.model_copy(update={"lr": 9.3, "final_lr": 0.0093, "warmup_steps": 5500}),
            "batch_size": 7936,
            "steps": 126_008,
            "precision": "bf16",
            "zero_stage": 3,
        }
    )

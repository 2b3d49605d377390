"""SEER, RegNetY-64GF: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x224 + 4x96, batch 4096.

deepspeed --hostfile HOSTS --num_nodes 16 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_64gf data=IMAGES out=runs/seer

Documented for this size: trunk (328, 984, 1968, 4920 wide), head without BatchNorm, prototypes, crops. Batch, lr, schedule, weight
decay and the groups of BatchNorm are not: they are those of 32GF, the groups those of 128GF. ClassyVision's regnet_y_64gf was another
network for a time (368, 992, 1488, 2976 wide).
Published result (fine-tuned at 384 px, ImageNet-1k): 84.0 %; linear probe 75.25 %. Not run here. facebookresearch/vissl projects/SEER.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_32gf


def config() -> TrainConfig:
    base = seer_regnety_32gf.config()
    return base.model_copy(
        update={
            "recipe": "seer_regnety_64gf",
            "method": base.method.model_copy(update={"hidden_widths": (8192, 8192), "head_batch_norm": False}),
            "model": base.model.model_copy(update={"name": "regnety_64gf", "sync_norm_ranks": 64}),
            "zero_stage": 1,
        }
    )

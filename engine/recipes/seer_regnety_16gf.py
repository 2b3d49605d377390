"""SEER, RegNetY-16GF: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x224 + 4x96, batch 4096.

deepspeed --hostfile HOSTS --num_nodes 16 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_16gf data=IMAGES out=runs/seer

Batch, cosine, groups of 32 for BatchNorm and 244,000 steps stand in the name of VISSL's checkpoint; its "warmup2x" is taken for twice
the warm-up of 32GF. Weight decay as for 32GF.
Published result: none for this size, nor weights. Not run here. facebookresearch/vissl nearest_neighbor/models/seer/regnet16gf.yaml.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_32gf


def config() -> TrainConfig:
    base = seer_regnety_32gf.config()
    return base.model_copy(
        update={
            "recipe": "seer_regnety_16gf",
            "model": base.model.model_copy(update={"name": "regnety_16gf"}),
            "optim": base.optim.model_copy(update={"warmup_steps": 6250}),
        }
    )

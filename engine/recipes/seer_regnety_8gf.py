"""SEER, RegNetY-8GF: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x224 + 4x96, batch 4096.

deepspeed --hostfile HOSTS --num_nodes 16 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_8gf data=IMAGES out=runs/seer

Only trunk and head (with BatchNorm) are documented for this size; all else is as for 32GF.
Published result: none for this size, nor weights. Not run here. facebookresearch/vissl nearest_neighbor/models/seer/regnet8gf.yaml.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_32gf


def config() -> TrainConfig:
    base = seer_regnety_32gf.config()
    return base.model_copy(update={"recipe": "seer_regnety_8gf", "model": base.model.model_copy(update={"name": "regnety_8gf"})})

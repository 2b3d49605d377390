"""SEER's training on our own sibling of RegNetY-10B: groups of 1008 channels, a multiple of 8, 2x160 + 4x96, batch 7936.

deepspeed --hostfile HOSTS --num_nodes 62 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_10b_friendly data=IMAGES out=runs/seer

Another network than the published one: 2016, 4032, 11088, 28224 wide, 9,286,843,788 parameters in the trunk
(9,323,934,872 there). The weights of neither fit the other, and loading them is refused. All else is that of seer_regnety_10b.
Published result: none, the network is ours. Not run here, and that it is faster has not been measured.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_10b


def config() -> TrainConfig:
    base = seer_regnety_10b.config()
    model = base.model.model_copy(update={"name": "regnety_10b_friendly"})
    return base.model_copy(update={"recipe": "seer_regnety_10b_friendly", "model": model})

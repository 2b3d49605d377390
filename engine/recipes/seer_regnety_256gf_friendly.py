"""SEER's training on our own sibling of RegNetY-256GF: groups of 376 channels, a multiple of 8, 2x224 + 4x96, batch 8192.

deepspeed --hostfile HOSTS --num_nodes 64 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_256gf_friendly data=IMAGES out=runs/seer

Another network than the published one: 752, 1504, 4136, 10528 wide, 1,292,659,514 parameters in the trunk
(1,272,156,138 there). The weights of neither fit the other, and loading them is refused. All else is that of seer_regnety_256gf.
Published result: none, the network is ours. Not run here, and that it is faster has not been measured.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_256gf


def config() -> TrainConfig:
    base = seer_regnety_256gf.config()
    model = base.model.model_copy(update={"name": "regnety_256gf_friendly"})
    return base.model_copy(update={"recipe": "seer_regnety_256gf_friendly", "model": model})

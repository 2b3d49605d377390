"""SEER, RegNetY-128GF: SwAV with 16,000 prototypes on a billion uncurated photographs seen once, 2x224 + 4x96, batch 4096.

deepspeed --hostfile HOSTS --num_nodes 16 --num_accelerators 8
    --module fuseer.engine.train recipe=seer_regnety_128gf data=IMAGES out=runs/seer

128 GPUs, 32 images each, BatchNorm shared by groups of 64. 528, 1056, 2904, 7392 wide: what the paper prints for 256GF are these.
The lr stays at 4.8 after 8,000 steps of warm-up, as the name of the published checkpoint says ("cnstant", "warmup8k"); weight decay 1e-5 is
documented for 256GF and 10B only.
Published result (fine-tuned at 384 px, ImageNet-1k): 84.5 %; linear probe 75.96 %. Not run here. facebookresearch/vissl projects/SEER.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.recipes import seer_regnety_64gf


def config() -> TrainConfig:
    base = seer_regnety_64gf.config()
    return base.model_copy(
        update={
            "recipe": "seer_regnety_128gf",
            "model": base.model.model_copy(update={"name": "regnety_128gf"}),
            "optim": base.optim.model_copy(update={"schedule": "constant", "final_lr": 0.0, "warmup_steps": 8000}),
        }
    )

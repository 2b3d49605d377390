"""SwAV, the small RegNetY of tiny_swav, all 60,000 photographs of Fashion-MNIST where they can be had: `make demo-long`.

fuseer demo recipe=tiny_swav_long

Needs Debian's dataset-fashion-mnist; without it, it trains as long on the bundled 10,000 images.
Expected: under half an hour on two cores; passes raw pixels narrowly. Measured results are in README.md.
"""

from fuseer.engine.config import TrainConfig
from fuseer.engine.data.sources import full_demo_set_is_here
from fuseer.engine.recipes import tiny_swav


def config() -> TrainConfig:
    short = tiny_swav.config()
    return short.model_copy(
        update={
            "recipe": "tiny_swav_long",
            "data": short.data.model_copy(update={"path": "demo-full" if full_demo_set_is_here() else "demo"}),
            "knn": short.knn.model_copy(update={"every_steps": 2000}),
            "steps": 6000,
            "checkpoint_every_steps": 2000,
        }
    )

"""Does the preview show the views that a run is trained on?"""

import pytest
from PIL import Image, ImageChops

from fuseer.engine.cli import main
from fuseer.engine.preview import preview
from fuseer.engine.recipes.recipe import saved_config


def test_the_preview_is_the_runs_own_crop_sheet(small_run, tmp_path):
    config = saved_config(small_run)
    assert preview(config, tmp_path / "views.png") == {"images": 8, "views": 6, "pipeline": config.data.pipeline}
    ours, runs = (Image.open(folder / name).convert("RGB") for folder, name in ((tmp_path, "views.png"), (small_run, "crops.png")))
    assert ours.size == runs.size and ImageChops.difference(ours, runs).getbbox() is None
    assert preview(config.model_copy(update={"batch_size": 32}), tmp_path / "two.png", images=2)["images"] == 2
    with pytest.raises(ValueError, match="images must be at least 1; got 0"):
        preview(config, tmp_path / "none.png", images=0)
    assert {path.name for path in tmp_path.iterdir()} == {"views.png", "two.png"}


def test_the_command_tells_what_it_drew_and_what_is_wrong(small_images, tmp_path, capsys):
    given = ["data", "preview", "recipe=tiny_swav", f"data={small_images}", f"out={tmp_path / 'views.png'}"]
    assert main([*given, "images=3", "batch_size=12", "data.pipeline=torchvision"]) == 0
    assert "views of 3 images, through torchvision" in capsys.readouterr().out and Image.open(tmp_path / "views.png").width > 300
    for wrong, words in (("images=x", "images must be a whole number; got x"), ("data.masks=saliency", ""), ("method.vews=3", "views")):
        status = main([*given, wrong])
        assert status == (2 if words else 0) and words in capsys.readouterr().err
    assert main(["data", "preview"]) == 2 and "recipe=… is missing" in capsys.readouterr().err

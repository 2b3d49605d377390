"""Do official files become runs with the same features, do exported ones load strictly into timm, and is what does not fit refused?"""

import argparse
import json
import pickle

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fuseer.engine import checkpoint, distributed
from fuseer.engine.cli import main
from fuseer.engine.config import apply_overrides
from fuseer.engine.data.sources import open_source
from fuseer.engine.evaluate.finetune import WEIGHTS, Classifier
from fuseer.engine.export import export, timm_form, timm_regnet
from fuseer.engine.imports.mae import config_of, import_mae, shape_of_file
from fuseer.engine.imports.official import read_file, tensors_of
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.regnet import NAMED
from fuseer.engine.recipes.recipe import load_recipe, saved_config
from fuseer.engine.resume import take_back
from tests.engine.published import finetuned_shapes, full_shapes, generated, pretrained_shapes

SMALL = {"D": 32, "depth": 2, "patch": 4, "grid": 3}
TIMM = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 12}
KINDS = {
    "pretrained": lambda: generated(pretrained_shapes(**SMALL)),
    "full": lambda: generated(full_shapes(**SMALL, width=32, layers=2)),
    "fine-tuned": lambda: generated(finetuned_shapes(**SMALL, classes=7), trained_positions=True),
}


def image(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def imported(tmp_path, kind: str, *, suffix: str = ".pth"):
    """(state, run folder) of an official file of `kind`."""
    state, file = KINDS[kind](), tmp_path / f"{kind}{suffix}"
    torch.save({"model": state}, file) if suffix == ".pth" else save_file(state, file)
    import_mae(file, tmp_path / kind, heads=4)
    return state, tmp_path / kind


def loaded(run, config=None) -> torch.nn.Module:
    backbone = initial_backbone(config or saved_config(run))
    checkpoint.load_weights(checkpoint.latest(run / "ckpt"), backbone, prefix="backbone.")
    return backbone.eval()


def of_timm(state, **options) -> torch.nn.Module:
    """timm's model with the encoder of an official file, strictly."""
    model = timm.create_model("vit_base_patch16_224", **{**TIMM, **options}).eval()
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}, strict=True)
    return model


def test_the_official_files_of_vit_b_hold_these_keys():
    encoder = pretrained_shapes()
    assert len(encoder) == 150 and sum(torch.Size(shape).numel() for shape in encoder.values()) == 85_798_656
    assert len(full_shapes()) == 150 + 2 + 2 + 8 * 12 + 4 and len(finetuned_shapes()) == 152
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
        tuned = timm.create_model("vit_base_patch16_224", global_pool="avg").state_dict()
    assert {key: tuple(value.shape) for key, value in theirs.items()} == encoder
    assert {key: tuple(value.shape) for key, value in tuned.items()} == finetuned_shapes()


SIZES = [(768, 12, 16, 14, "b"), (1024, 24, 16, 14, "l"), (1280, 32, 14, 16, "h")]


@pytest.mark.parametrize(("D", "depth", "patch", "grid", "recipe"), SIZES)
def test_published_sizes_find_their_recipe(D, depth, patch, grid, recipe):
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in full_shapes(D, depth, patch, grid).items()}
    state["pos_embed"] = generated({"pos_embed": (1, 1 + grid * grid, D)})["pos_embed"]
    config = config_of(shape_of_file(state), state, None, 0)
    published = load_recipe(f"mae_vit_{recipe}").config()
    assert (config.recipe, config.model.name, config.method) == (f"mae_vit_{recipe}", published.model.name, published.method)
    with torch.device("meta"):
        backbone = initial_backbone(config)
        method = config.method.build(Ground(initial_backbone(published), None, None, 0, 1, 1))
        plain = initial_backbone(published)
    assert [block.attn.num_heads for block in backbone.model.blocks] == [block.attn.num_heads for block in plain.model.blocks]
    ours = {f"backbone.model.{key}" if not key.startswith(("decoder_", "mask_token")) else key for key in state}
    assert ours - {"backbone.model.pos_embed", "decoder_pos_embed"} == method.state_dict().keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_timm_with_the_same_file(tmp_path, kind, suffix):
    state, run = imported(tmp_path, kind, suffix=suffix)
    if kind == "fine-tuned":
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    theirs = of_timm(state, num_classes=0, **({"global_pool": "avg"} if kind == "fine-tuned" else {}))
    with torch.no_grad():
        torch.testing.assert_close(loaded(run)(image(12)), theirs(image(12)), rtol=1e-5, atol=1e-5)
    assert checkpoint.read_meta(checkpoint.latest(run / "ckpt"))["step"] == 0


def test_a_full_file_fills_the_whole_method(tmp_path):
    state, run = imported(tmp_path, "full")
    config = saved_config(run)
    method = config.method.build(Ground(initial_backbone(config), None, None, 0, 1, 1))
    weights = load_file(checkpoint.latest(run / "ckpt") / checkpoint.MODEL)
    assert weights.keys() == method.state_dict().keys()
    for key in ("mask_token", "decoder_embed.weight", "decoder_blocks.1.attn.qkv.weight", "decoder_pred.bias"):
        assert torch.equal(weights[key], state[key])


def test_a_fine_tuned_file_keeps_its_classifier_and_goes_back_out_as_it_came(tmp_path):
    state, run = imported(tmp_path, "fine-tuned")
    found = export(run, tmp_path / "back.safetensors", finetuned=True)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert found["keys"] == len(state) and found["difference"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_backbone_is_the_file_that_was_imported(tmp_path, kind):
    state, run = imported(tmp_path, kind)
    out = tmp_path / "out.safetensors"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    back = load_file(out)
    encoder = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token", "head."))}
    assert back.keys() == encoder.keys()
    for key, value in encoder.items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6 if key == "pos_embed" else 0)
    header = safe_open(out, "pt").metadata()
    model = timm.create_model(header["timm_model"], **json.loads(header["timm_options"])).eval()
    model.load_state_dict(back, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(image(12)), loaded(run)(image(12)), rtol=1e-5, atol=1e-5)


VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
REGNET = {"depth": 6, "w0": 16, "wa": 20.0, "wm": 2.0, "group_width": 8, "stem_width": 16, "se_ratio": 0.25}
BACKBONES = {
    "vit, class token": ("vit_tiny", VIT),
    "vit, mean": ("vit_tiny", {**VIT, "pool": "mean", "start": "mae"}),
    "vit, fc_norm": ("vit_tiny", {**VIT, "pool": "fc_norm"}),
    "vit, learnt positions": ("vit_tiny", {**VIT, "learnt_positions": True, "img_size": 32}),
    "mocov3_vit_small": ("mocov3_vit_small", {"depth": 1, "patch_size": 8, "frozen_patches": True}),
    "regnety_200mf": ("regnety_200mf", {}),
    "regnetx_200mf": ("regnetx_200mf", {}),
    "regnet by its numbers": ("regnet", REGNET),
    "resnet18": ("resnet18", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
}


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_loads_strictly_into_timm_and_computes_the_same(kind, classes):
    name, options = BACKBONES[kind]
    config = load_recipe("tiny_swav").config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": name, "options": options})})
    backbone = initial_backbone(config)
    for module in backbone.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    head = None
    if classes:
        model = Classifier(backbone, classes, 0)
        torch.nn.init.normal_(model.head.weight)
        head, ours = model.head, model.eval()
    else:
        ours = backbone.eval()
    form = timm_form(config, backbone, 32, head)
    theirs = timm.create_model(form.name, **form.options).eval()
    theirs.load_state_dict(form.state, strict=True)
    with torch.no_grad():
        expected = theirs(image(32))
        assert (ours(image(32)) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_every_named_regnet_has_timms_name_and_shapes():
    for name in NAMED:
        theirs = timm_regnet(name)
        assert (theirs is None) == name.startswith("regnety_10b")
        if theirs:
            assert timm.is_model(theirs), theirs
    config = load_recipe("swav_rn50").config()
    for name in ("regnety_3_2gf", "regnety_64gf", "regnety_256gf", "regnety_256gf_friendly", "regnetx_32gf"):
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name, "options": {}})})
        with torch.device("meta"):
            form = timm_form(config, initial_backbone(config), 224)
            theirs = timm.create_model(form.name, **form.options).state_dict()
        assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in form.state.items()}


def test_a_regnet_that_timm_cannot_build_keeps_timms_keys(small_run, tmp_path, capsys):
    assert main(["export", f"run={small_run}", f"out={tmp_path / 'a.safetensors'}"]) == 0
    assert "timm has no model of this shape" in capsys.readouterr().out
    keys = load_file(tmp_path / "a.safetensors").keys()
    assert {"stem.conv.weight", "s1.b1.downsample.conv.weight", "s2.b1.se.fc1.bias"} <= keys


def test_an_imported_run_is_evaluated_but_not_resumed(tmp_path, small_images, capsys):
    file = tmp_path / "file.pth"
    torch.save({"model": generated(pretrained_shapes(D=32, depth=1, patch=7, grid=4))}, file)
    run = tmp_path / "run"
    assert main(["import", "mae", f"file={file}", f"out={run}", f"data={small_images}", "heads=4"]) == 0
    assert "pretrained: vit_base of 28 px" in capsys.readouterr().out
    assert main(["eval", "knn", f"run={run}"]) == 0
    assert "pretrained" in capsys.readouterr().out
    config = saved_config(run)
    assert config.data.path == str(small_images) and open_source(config.data.path, split="test").classes


def changed(kind: str, **tensors):
    """An official state with some tensors replaced, or left out where None."""
    state = {**KINDS[kind](), **{key.replace("__", "."): value for key, value in tensors.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: changed("pretrained", norm__weight=None), r"norm.weight is missing"),
        (lambda: changed("pretrained", extra=torch.zeros(3)), r"extra \[3\] is strange here"),
        (lambda: changed("pretrained", blocks__1__norm1__bias=torch.zeros(9)), r"blocks.1.norm1.bias is \[9\], wanted \[32\]"),
        (lambda: changed("full", decoder_pred__bias=torch.zeros(9)), r"decoder_pred.bias is \[9\], wanted \[48\]"),
        (lambda: changed("full", mask_token=None), r"mask_token is missing"),
        (lambda: changed("fine-tuned", head__bias=None), r"head.weight \[classes, 32\] and head.bias"),
        (lambda: changed("pretrained", pos_embed=torch.zeros(1, 9, 32)), r"pos_embed must be \[1, 1 \+ side², 32\].*got \[1, 9, 32\]"),
        (lambda: {"conv1.weight": torch.zeros(3)}, "cls_token, .* missing, so this is no MAE file; it holds conv1.weight"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_keys_and_shapes(tmp_path, state, words):
    torch.save({"model": state()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=words):
        import_mae(tmp_path / "file.pth", tmp_path / "run", heads=4)
    assert not (tmp_path / "run").exists()


def test_heads_are_asked_for_where_no_tensor_tells(tmp_path):
    torch.save({"model": KINDS["pretrained"]()}, tmp_path / "file.pth")
    for heads in (0, 5):
        with pytest.raises(ValueError, match="heads=N must divide the width 32"):
            import_mae(tmp_path / "file.pth", tmp_path / "run", heads=heads)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").touch()
    with pytest.raises(ValueError, match="already holds something"):
        import_mae(tmp_path / "file.pth", tmp_path / "run", heads=4)


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_are_read_without_executing_them(tmp_path, capsys):
    state = KINDS["pretrained"]()
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "trained.pth")
    assert tensors_of(read_file(tmp_path / "trained.pth"), tmp_path, "model").keys() == state.keys()
    torch.save({"model": state, "more": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "trained.pth").read_bytes()[:5000])
    (tmp_path / "other.pth").write_bytes(pickle.dumps([1, 2]))
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("root:x:0:0:root:/root:/bin/bash\n" * 20)
    for name in ("harmful.pth", "cut.pth", "other.pth", "list.pth", "absent.pth", "text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"import: .*{name}"):
            read_file(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_what_cannot_be_exported_is_refused_in_words(tmp_path, capsys):
    _, run = imported(tmp_path, "pretrained")
    (tmp_path / "there.safetensors").touch()
    for out, words in (("there.safetensors", "exists; name a new file"), ("a.pth", "must end in .safetensors")):
        with pytest.raises(ValueError, match=words):
            export(run, tmp_path / out)
    with pytest.raises(ValueError, match="holds no fine-tuned weights; run fuseer eval finetune"):
        export(run, tmp_path / "b.safetensors", finetuned=True)
    assert not (run / "eval" / WEIGHTS).exists()
    assert main(["import", "mae", "file=x"]) == 2 and "out=… is missing" in capsys.readouterr().err
    assert main(["export", f"run={run}", "out=x", "image_size=-3"]) == 2 and "must be a whole number; got -3" in capsys.readouterr().err


def test_imported_weights_do_not_resume(tmp_path):
    _, folder = imported(tmp_path, "full")
    idle = argparse.Namespace(finish=lambda: None)
    run = argparse.Namespace(reader=argparse.Namespace(source=None), writer=idle, ranks=distributed.start())
    try:
        with pytest.raises(ValueError, match="holds imported weights and no optimizer state; start another run from it, with init="):
            take_back(run, folder)
    finally:
        distributed.stop()
    assert apply_overrides(saved_config(folder), {"steps": "3", "epochs": "0"}).steps == 3

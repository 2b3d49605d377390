"""Do head and prototypes map as the official ones, in fp32, and refuse what they cannot?"""

import pytest
import torch
from torch import nn

from fuseer.engine.models.heads import ProjectionHead, Prototypes


def official(head, x):
    """Linear - BN - ReLU - ... - Linear - norm in plain torch fp64, from the head's own numbers."""
    layers = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    norms = [layer for layer in head.layers if hasattr(layer, "running_mean")]
    x = x.double()
    for index, layer in enumerate(layers):
        x = x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        if index < len(layers) - 1:
            if norms:
                x = (x - x.mean(0)) / (x.var(0, correction=0) + norms[index].eps).sqrt()
            x = x.relu()
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_is_the_official_head(batch_norm):
    torch.manual_seed(0)
    head = ProjectionHead([10, 16, 12, 5], batch_norm=batch_norm)
    x = torch.randn(9, 10)
    torch.testing.assert_close(head(x).double(), official(head, x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head(x).norm(dim=1), torch.ones(9))


def test_published_head_sizes():
    # SEER's heads as counted from their configurations: trunk width, hidden, hidden, embedding; prototypes of 16000 x 256
    sizes = {(2016, 4096, 4096, 256, True): 26_108_160, (10444, 8192, 8192, 256, False): 154_779_904}
    for (*dims, batch_norm), count in sizes.items():
        with torch.device("meta"):
            head = ProjectionHead(dims, batch_norm=batch_norm)
        assert sum(parameter.numel() for parameter in head.parameters()) == count
    with torch.device("meta"):
        assert Prototypes(256, 16000).weight.numel() == 4_096_000


def test_layers_and_bias_option():
    head = ProjectionHead([8, 6, 4], bias=False)
    assert head.layers[0].bias is None and head.layers[-1].bias is not None
    assert ProjectionHead([8, 6, 4]).layers[0].bias is not None
    assert ProjectionHead([8, 6, 4], bias=False, batch_norm=False).layers[0].bias is not None
    assert [type(layer).__name__ for layer in ProjectionHead([8, 6, 4], activation=nn.SiLU).layers] == [
        "FP32Linear",
        "BatchNorm",
        "SiLU",
        "FP32Linear",
    ]
    assert len(ProjectionHead([8, 4]).layers) == 1


@pytest.mark.parametrize("last_norm", ["scale", "plain"])
def test_a_norm_at_the_end(last_norm):
    """SimCLR's head ends in a BatchNorm without bias, MoCo v3's in one without weight and bias."""
    torch.manual_seed(0)
    head = ProjectionHead([8, 6, 4], bias=False, last_bias=False, last_norm=last_norm, normalize=False)
    names = {"layers.0.weight", "layers.1.weight", "layers.1.bias", "layers.3.weight"}
    assert {name for name, _ in head.named_parameters()} == names | ({"layers.4.weight"} if last_norm == "scale" else set())
    x = torch.randn(9, 8)
    if last_norm == "scale":
        head.layers[-1].weight.data.mul_(3)
    before = head.layers[:-1](x)
    expected = (before - before.mean(0)) / (before.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), expected * (3 if last_norm == "scale" else 1), rtol=1e-4, atol=1e-5)
    head(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_normalize_off_gives_the_last_layer():
    torch.manual_seed(0)
    head = ProjectionHead([8, 6, 4], normalize=False)
    x = torch.randn(5, 8)
    raw = head(x)
    assert (raw.norm(dim=1) - 1).abs().max() > 0.1
    head.normalize = True
    torch.testing.assert_close(head(x), raw / raw.norm(dim=1, keepdim=True))


def test_a_zero_row_stays_zero_with_finite_gradient():
    head = ProjectionHead([4, 3], batch_norm=False)
    nn.init.zeros_(head.layers[0].bias)
    x = torch.zeros(2, 4, requires_grad=True)
    z = head(x)
    z.sum().backward()
    assert z.abs().max() == 0 and x.grad.isfinite().all()


def test_fp32_outside_autocast_and_with_bf16_parameters():
    torch.manual_seed(0)
    head, prototypes = ProjectionHead([32, 16, 8]), Prototypes(8, 5)
    x = torch.randn(6, 32).bfloat16()
    truth = head(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        z = head(x)
        scores = prototypes(z)
    assert z.dtype == scores.dtype == torch.float32
    assert torch.equal(z, truth) and torch.equal(scores, prototypes(truth))
    head, prototypes = head.bfloat16(), prototypes.bfloat16()
    z = head(x)
    scores = prototypes(z)
    scores.sum().backward()
    assert z.dtype == scores.dtype == torch.float32
    assert head.layers[0].weight.grad.dtype == prototypes.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(z, truth, rtol=0, atol=0.05)
    assert head.double()(x.double()).dtype == torch.float64


def test_prototypes_are_unit_rows_and_give_cosines():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 9)
    assert prototypes.weight.shape == (9, 6) and prototypes.weight.unit_rows is True
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(9))
    z = nn.functional.normalize(torch.randn(4, 6), dim=1)
    expected = nn.functional.cosine_similarity(z[:, None], prototypes.weight[None], dim=2)
    torch.testing.assert_close(prototypes(z), expected)


def test_frozen_prototypes_get_no_gradient():
    prototypes, z = Prototypes(6, 9), torch.randn(4, 6, requires_grad=True)
    prototypes(z, frozen=True).sum().backward()
    assert prototypes.weight.grad is None
    torch.testing.assert_close(z.grad, prototypes.weight.sum(0).expand(4, 6))
    prototypes(z).sum().backward()
    torch.testing.assert_close(prototypes.weight.grad, z.sum(0).expand(9, 6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ProjectionHead([8]), r"got \[8\]"),
        (lambda: ProjectionHead([8, 0, 4]), r"got \[8, 0, 4\]"),
        (lambda: ProjectionHead([8, 4])(torch.zeros(3, 7)), r"\[N, 8\]; got \[3, 7\]"),
        (lambda: ProjectionHead([8, 4])(torch.zeros(3, 8, 1, 1)), r"got \[3, 8, 1, 1\]"),
        (lambda: ProjectionHead([8, 4], last_norm="layer"), "scale or plain; got 'layer'"),
        (lambda: Prototypes(8, 0), "K=0"),
        (lambda: Prototypes(0, 8), "D=0"),
        (lambda: Prototypes(8, 3)(torch.zeros(3, 7)), r"\[N, 8\]; got \[3, 7\]"),
    ],
)
def test_refuses_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()

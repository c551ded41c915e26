"""Architectures: layer sizes, parameter counts, initialisation, and that every parameter is used."""

import math

import pytest
import torch
from torch import nn

from data.graphs import normalised_adjacency
from models.autoencoder import Autoencoder
from models.convnet import ConvNet
from models.gcn import GCN, SparseDropout
from models.lenet import LeNet
from models.resnet import OptionA, ResNet
from models.vgg import VGG

VGG_WIDTHS = [64, 128, 256, 512, 512]


def build(kind, *args, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args, **kwargs)


def resnet(blocks):
    return build(ResNet, blocks, [16, 32, 64], 10)


def vgg(convolutions, classes=10, batch_norm=False, hidden=(64, 64)):
    return build(VGG, convolutions, VGG_WIDTHS, hidden, classes, batch_norm)


def count(model):
    return sum(p.numel() for p in model.parameters())


def of_kind(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


ADJACENCY = normalised_adjacency(torch.tensor([[0, 1], [1, 0]]), 6)
FEATURES = torch.rand(6, 7).to_sparse_csr()
cases = pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        (build(Autoencoder, [784, 128, 64, 6]), (torch.rand(3, 784),), (3, 784)),
        (resnet(1), (torch.rand(3, 3, 32, 32),), (3, 10)),
        (resnet(5), (torch.rand(3, 3, 32, 32),), (3, 10)),
        (vgg([1, 1, 2, 2, 2]), (torch.rand(3, 3, 32, 32),), (3, 10)),
        (vgg([2, 2, 3, 3, 3], 100, batch_norm=True), (torch.rand(3, 3, 32, 32),), (3, 100)),
        (build(LeNet, 10), (torch.rand(3, 1, 28, 28),), (3, 10)),
        (build(ConvNet, [16, 32], 10, 1, 8), (torch.rand(3, 1, 8, 8),), (3, 10)),
        (build(ConvNet, [4, 8, 8], 10, 1, 7), (torch.rand(3, 1, 7, 7),), (3, 10)),
        (build(Autoencoder, [784, 8, 6], "tanh", "layer"), (torch.rand(3, 784),), (3, 784)),
        (build(ConvNet, [8, 8], 10, 1, 7, "gelu", "group"), (torch.rand(3, 1, 7, 7),), (3, 10)),
        (build(ConvNet, [8, 8], 10, 1, 7, "silu", None), (torch.rand(3, 1, 7, 7),), (3, 10)),
        (build(GCN, 7, 16, 5), (FEATURES, ADJACENCY), (6, 5)),
    ],
    ids=[
        "autoencoder",
        "resnet8",
        "resnet32",
        "vgg11",
        "vgg16bn",
        "lenet",
        "convnet",
        "convnet3",
        "autoencoder_ln",
        "convnet_gn",
        "convnet_plain",
        "gcn",
    ],
)


@cases
def test_outputs_and_every_parameter_used(model, inputs, outputs):
    result = model(*inputs)
    assert result.shape == outputs
    model.zero_grad()
    result.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@cases
def test_activations_are_not_in_place(model, inputs, outputs):
    assert not any(m.inplace for m in of_kind(model, nn.ReLU))


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [([784, 1000, 500, 250, 30], 2_837_314), ([625, 2000, 1000, 500, 30], 7_537_655), ([784, 128, 64, 6], 219_030)],
)
def test_autoencoder_mirrors_its_encoder(sizes, parameters):
    model = build(Autoencoder, sizes)
    linears = of_kind(model, nn.Linear)
    assert [m.in_features for m in linears] == [*sizes, *sizes[-2:0:-1]]
    assert linears[-1].out_features == sizes[0]
    assert count(model) == parameters


def test_autoencoders_code_and_output_are_linear():
    kinds = [type(m).__name__ for m in build(Autoencoder, [8, 4, 2])]
    assert kinds == ["Linear", "ReLU", "Linear", "Linear", "ReLU", "Linear"]


def test_layers_are_normalised_where_that_is_asked_for_and_have_biases_where_not():
    kinds = [type(m).__name__ for m in build(Autoencoder, [8, 4, 2], "gelu", "batch")]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "Linear", "BatchNorm1d", "GELU", "Linear"]
    assert [m.bias is None for m in of_kind(build(ConvNet, [8, 8], 10, 1, 8), nn.Conv2d)] == [True, True]
    assert [m.bias is None for m in of_kind(build(ConvNet, [8, 8], 10, 1, 8, "relu", None), nn.Conv2d)] == [
        False,
        False,
    ]


def test_what_parts_there_are_is_said():
    with pytest.raises(ValueError, match="no activation 'swish'; there are relu, tanh, gelu, silu"):
        Autoencoder([8, 4], "swish")
    with pytest.raises(ValueError, match="no normalisation 'layer'; there are null, batch, group"):
        ConvNet([8], 10, 1, 8, "relu", "layer")


def test_resnet32_is_he_et_als():
    model = resnet(5)
    assert count(model) == 464_154
    assert len(of_kind(model, nn.Conv2d)) == 31
    assert len(of_kind(model, nn.Linear)) == 1
    assert all(m.bias is None for m in of_kind(model, nn.Conv2d))


def test_small_resnet_has_seven_convolutions():
    model = resnet(1)
    assert [m.out_channels for m in of_kind(model, nn.Conv2d)] == [16, 16, 16, 32, 32, 64, 64]
    assert count(model) == 75_290


def test_resnet_starts_kaiming_normal():
    for module in of_kind(resnet(5), nn.Conv2d):
        std = math.sqrt(2 / (9 * module.in_channels))
        assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))


def test_option_a_subsamples_and_pads_with_zeros():
    x = torch.rand(2, 3, 4, 4)
    shortcut = OptionA(extra=2, stride=2)(x)
    assert shortcut.shape == (2, 5, 2, 2)
    assert torch.equal(shortcut[:, 1:4], x[:, :, ::2, ::2])
    assert shortcut[:, [0, 4]].count_nonzero() == 0
    assert OptionA(0, 1)(x) is x


@pytest.mark.parametrize(
    ("convolutions", "batch_norm", "classes", "parameters"),
    [
        ([1, 1, 2, 2, 2], False, 10, 28_144_010),
        ([2, 2, 2, 2, 2], False, 10, 28_328_522),
        ([2, 2, 3, 3, 3], True, 100, 34_015_396),
    ],
    ids=["vgg11", "vgg13", "vgg16bn"],
)
def test_vgg_sizes(convolutions, batch_norm, classes, parameters):
    with torch.device("meta"):
        model = VGG(convolutions, VGG_WIDTHS, [4096, 4096], classes, batch_norm)
    assert len(of_kind(model, nn.Conv2d)) == sum(convolutions)
    assert len(of_kind(model, nn.BatchNorm2d)) == batch_norm * sum(convolutions)
    assert [m.in_features for m in of_kind(model, nn.Linear)] == [512, 4096, 4096]
    assert not of_kind(model, nn.Dropout)
    assert count(model) == parameters


def test_vgg_convolutions_start_normal_by_fan_out():
    for module in of_kind(vgg([1, 1, 2, 2, 2]), nn.Conv2d):
        std = math.sqrt(2 / (9 * module.out_channels))
        assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))
        assert module.bias.count_nonzero() == 0


def test_lenet_sizes():
    assert count(build(LeNet, 10)) == 431_080


def test_gcn_is_two_propagated_products():
    model = build(GCN, 7, 16, 5).eval()
    x, a = FEATURES.to_dense(), ADJACENCY.to_dense()
    w1, w2 = model.conv1.lin.weight.T, model.conv2.lin.weight.T
    expected = a @ torch.relu(a @ x @ w1 + model.conv1.bias) @ w2 + model.conv2.bias
    torch.testing.assert_close(model(FEATURES, ADJACENCY), expected)


def test_sparse_dropout_drops_and_rescales_entries():
    x = torch.ones(100, 100).tril().to_sparse_csr()
    dropped = SparseDropout(0.25)(x).to_dense()
    kept = dropped != 0
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75))
    assert not kept.triu(1).any()
    assert kept.sum().item() / len(x.values()) == pytest.approx(0.75, abs=0.03)  # five standard errors
    assert torch.equal(SparseDropout(0.25).eval()(x).to_dense(), x.to_dense())


def test_sparse_features_give_the_dense_ones_outputs_and_gradients():
    model = build(GCN, 7, 16, 5, dropout=0.0)
    found, expected = (
        (output := model.conv1(x, ADJACENCY), *torch.autograd.grad(output.square().sum(), model.conv1.parameters()))
        for x in (FEATURES, FEATURES.to_dense())
    )
    torch.testing.assert_close(found, expected)


def test_sparse_product_is_differentiable_any_number_of_times():
    from models.graph_convolution import SparseProduct, Transposition

    x, transposed = FEATURES.double(), Transposition()
    w = torch.randn(FEATURES.shape[1], 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w: SparseProduct.apply(x, transposed, w), w, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda w: SparseProduct.apply(x, transposed, w).square(), w)


def test_transposition_knows_a_pattern_again_and_no_other():
    from models.graph_convolution import Transposition

    transposed = Transposition()
    dropped = SparseDropout(0.5)(FEATURES)
    other = FEATURES.to_dense().flip(0).to_sparse_csr()
    assert torch.equal(transposed(FEATURES).to_dense(), FEATURES.to_dense().T)
    order = transposed._order
    assert torch.equal(transposed(dropped).to_dense(), dropped.to_dense().T)
    assert transposed._order is order
    assert torch.equal(transposed(other).to_dense(), other.to_dense().T)


def test_gcn_names_its_first_layer_for_the_penalty():
    model = build(GCN, 7, 16, 5)
    assert set(model.penalised_parameters()) == set(model.conv1.parameters())


def test_gcn_drops_inputs_of_both_layers():
    assert [m.p for m in of_kind(build(GCN, 7, 16, 5, dropout=0.5), nn.Dropout)] == [0.5, 0.5]

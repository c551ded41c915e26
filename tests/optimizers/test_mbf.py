"""MBF against one dense inverse per block."""

import pytest
import torch
from torch import nn

from models.likelihoods import Gaussian
from optimizers import Objective
from optimizers.mbf import MBF, MBFOutgoing
from tests.optimizers import cases
from tests.optimizers.test_layers import Graph, graph

LAMBDA, RATE = 0.01, 0.1


def one_step(model, objective, batch, cls=MBF):
    before = {p: p.detach().clone() for p in model.parameters()}
    cls(model.parameters(), lr=RATE, damping=LAMBDA).step(objective(*batch))
    return {p: (start - p.detach()) / RATE for p, start in before.items()}


def inverse(matrix):
    return torch.linalg.inv(matrix + LAMBDA * torch.eye(len(matrix)))


def test_one_block_per_kernel():
    model = cases.small_network(torch.float64)
    moved = one_step(model, cases.small_objective(model), cases.small_batch(torch.float64))
    conv = model[0].weight
    for o in range(4):
        g = conv.grad[o, 0].flatten()
        torch.testing.assert_close(moved[conv][o, 0].flatten(), inverse(torch.outer(g, g)) @ g)


@pytest.mark.parametrize("cls", [MBF, MBFOutgoing])
def test_one_averaged_block_per_fully_connected_layer(cls):
    model = cases.small_network(torch.float64)
    moved = one_step(model, cases.small_objective(model), cases.small_batch(torch.float64), cls)
    for layer in (model[4], model[6]):
        g = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        got = torch.cat([moved[layer.weight], moved[layer.bias][:, None]], 1)
        if cls is MBF:
            block = inverse(torch.stack([torch.outer(row, row) for row in g]).mean(0))
            wanted = torch.stack([block @ row for row in g])
        else:
            block = inverse(torch.stack([torch.outer(column, column) for column in g.T]).mean(0))
            wanted = torch.stack([block @ column for column in g.T], 1)
        torch.testing.assert_close(got, wanted)


def test_vectors_take_a_damped_square_root():
    model = cases.small_network(torch.float64)
    moved = one_step(model, cases.small_objective(model), cases.small_batch(torch.float64))
    for p in (model[0].bias, model[1].weight, model[1].bias):
        torch.testing.assert_close(moved[p], p.grad / (p.grad.square() + LAMBDA).sqrt())


def test_graph_convolution_is_a_fully_connected_layer():
    torch.manual_seed(0)
    model, inputs = Graph(), graph()
    moved = one_step(model, Objective(model, Gaussian()), (inputs, torch.randn(8, 3), torch.arange(8)))
    weight, bias = model.first.lin.weight, model.first.bias
    g = torch.cat([weight.grad, bias.grad[:, None]], 1)
    got = torch.cat([moved[weight], moved[bias][:, None]], 1)
    torch.testing.assert_close(got, g @ inverse(g.T @ g / len(g)), rtol=1e-3, atol=1e-4)


def test_layer_without_bias():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    batch = torch.randn(9, 5).double(), torch.randn(9, 3).double()
    moved = one_step(model, Objective(model, Gaussian()), batch)[model.weight]
    g = model.weight.grad
    torch.testing.assert_close(moved, g @ inverse(g.T @ g / 3))

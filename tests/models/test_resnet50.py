"""torchvision's ResNet-50 works in place; what curvature methods see of its layers must not notice."""

import torch
from torch import nn

from models.likelihoods import Categorical
from models.resnet import resnet50
from optimizers import Objective
from optimizers.curvature import SampledFisher


def curvature(inplace):
    torch.manual_seed(0)
    model = resnet50(classes=3).double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    minibatch = Objective(model, Categorical(), torch.Generator().manual_seed(1))(x, y)
    trace = minibatch.trace(keep_outputs=False)
    minibatch.fill_gradients(trace, retain_graph=True)
    directions = {layer: [p.grad for p in layer.parameters] for layer in minibatch.objective.layers}
    return SampledFisher()(minibatch, trace, directions)


def test_curvature_is_that_of_the_network_without_operations_in_place():
    q = curvature(inplace=True)
    assert q.shape == (107, 107)  # 53 convolutions, as many BatchNorms, and the linear layer
    assert (q.diagonal() > 0).all()
    torch.testing.assert_close(q, curvature(inplace=False), rtol=1e-9, atol=0)

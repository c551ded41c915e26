"""What is refused before anything is captured; the rest needs a GPU (tests/test_cuda.py)."""

import pytest

from optimizers.cuda_graphs import CapturedSteps
from tests.optimizers import cases


def steps(name):
    model = cases.small_network()
    return CapturedSteps(cases.small_objective(model), cases.build(name, model.parameters()))


def test_an_optimizer_in_whose_steps_the_host_takes_part_is_refused():
    with pytest.raises(TypeError, match=r"KFAC's steps cannot be captured .* LWSGDm, LWAdamW, SGD, Adam"):
        steps("kfac")


def test_parameters_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="the parameters are on cpu"):
        steps("lw_sgdm")

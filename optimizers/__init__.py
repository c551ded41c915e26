"""Optimizers: plain ``torch.optim.Optimizer``s, and the objective and curvature engine that they share."""

from optimizers.lw_adamw import LWAdamW
from optimizers.lw_sgdm import LWSGDm
from optimizers.objective import Objective

__all__ = ["LWAdamW", "LWSGDm", "Objective"]

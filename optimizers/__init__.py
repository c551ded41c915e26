"""Optimizers: plain ``torch.optim.Optimizer``s, and the objective and curvature engine that they share."""

from optimizers.layerwise import LWAdamW, LWSGDm
from optimizers.objective import Objective

__all__ = ["LWAdamW", "LWSGDm", "Objective"]

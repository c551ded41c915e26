"""Muon for any model: matrices by Muon, all other parameters by AdamW; the optimizer is ``pytorch_optimizer``'s.

That package wants its caller to say which parameter groups hold hidden matrices. Here they are divided by shape: what
has two dimensions or more goes to Muon (convolution kernels as ``out × in·k²`` matrices), the output layer included.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def muon(params: Iterable, **settings) -> torch.optim.Optimizer:
    """A ``pytorch_optimizer.Muon`` on any parameters or parameter groups.

    Args:
        params: parameters or parameter groups; a group's settings are kept for both of its parts, but its ``lr``, which
            is Muon's: AdamW's is ``adamw_lr``.
        **settings: as of ``pytorch_optimizer.Muon``: ``lr``, ``momentum``, ``adamw_lr`` …
    """
    from pytorch_optimizer import Muon

    params = list(params)
    groups = []
    for group in params if isinstance(params[0], dict) else [{"params": params}]:
        members = list(group["params"])
        for use_muon in (True, False):
            part = [p for p in members if (p.dim() >= 2) == use_muon]
            kept = {name: value for name, value in group.items() if use_muon or name != "lr"}
            if part:
                groups.append(kept | {"params": part, "use_muon": use_muon})
    return Muon(groups, **settings)

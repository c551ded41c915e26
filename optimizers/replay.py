"""Forward passes made again within a step: with the same random numbers, and leaving nothing behind."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm


class RandomState:
    """The state of torch's global generators, so that a second forward pass draws the first one's dropout masks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    def has_advanced(self) -> bool:
        """Whether random numbers have been drawn since."""
        now = RandomState(self.device)
        return not all(map(torch.equal, [self.cpu, *self.cuda], [now.cpu, *now.cuda]))

    @contextmanager
    def replayed(self):
        """Within: the state as it was. After: as before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def frozen_statistics(module: nn.Module):
    """What training mode keeps track of stands still, the mode does not change: for second forward passes in one step.

    That is BatchNorm's and InstanceNorm's running statistics, spectral normalisation's singular vectors, and whatever
    other modules keep in buffers.
    """
    with ExitStack() as stack:
        for m in module.modules():
            if not m.training:
                continue
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
                stack.enter_context(_set(m, "track_running_stats", False))
            elif isinstance(m, nn.modules.instancenorm._InstanceNorm) and m.track_running_stats:
                stack.enter_context(_set(m, "momentum", 0.0))
            elif isinstance(m, _SpectralNorm):
                stack.enter_context(_set(m, "training", False))
            elif m._buffers:
                stack.enter_context(_restored_buffers(m))
        yield


@contextmanager
def _set(module: nn.Module, name: str, value):
    """Within, an attribute is another."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _restored_buffers(module: nn.Module):
    """After, a module's own buffers are what they were."""
    before = [(name, buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None]
    try:
        yield
    finally:
        for name, buffer, values in before:
            buffer.data.copy_(values)  # past autograd: a graph of the pass may hold one that stood still
            module._buffers[name] = buffer

"""What a CUDA graph is, on a CPU: the operations of a step on the tensors that it had, done again in the same memory.

Numbers of Python are what they were, a tensor that the step has bound anew stays where it was, and reading a number
back is an error. What takes place on the host alone is not repeated, setting a generator's state among it.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ATEN = torch.ops.aten
BY_THE_HOST = (
    ATEN._local_scalar_dense.default,
    ATEN.lift_fresh.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
)


class Tape(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``. The step is taken while it is captured; so the first replay is none.

    Graphs share memory: what one has left there, but for what was there before, is overwritten by another.
    """

    made: list["Tape"] = []  # noqa: RUF012 - emptied by `install`

    def __init__(self):
        super().__init__()
        self.operations, self.taken = [], False
        self.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in BY_THE_HOST:
            raise RuntimeError(f"{function} cannot be captured: the host takes part in it")
        here = tree_map(as_it_is, (args, kwargs))
        outputs = function(*args, **kwargs)
        if not function.is_view and torch.Tag.inplace_view not in function.tags:
            self.operations.append((function, *here, tree_map(as_it_is, outputs)))
        return outputs

    def register_generator_state(self, generator):
        pass

    @torch.no_grad()
    def replay(self):
        if not self.taken:
            self.taken = True
            return
        for other in self.made:
            other.spoil()
        for function, args, kwargs, outputs in self.operations:
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) else old, outputs, again)

    def spoil(self):
        """Leave nothing of what was computed."""
        for function, *_, outputs in self.operations:
            if not function._schema.is_mutable:
                tree_map(lambda x: x.fill_(torch.nan) if is_floating(x) else x, outputs)


def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def as_it_is(x):
    """The same memory in the shape of now, for a later operation may give the tensor another."""
    return x.detach() if isinstance(x, torch.Tensor) else x


@contextmanager
def recorded(graph, pool, stream):
    """Stands in for ``torch.cuda.graph``."""
    with graph:
        yield


def install(monkeypatch, module):
    """Have a module capture on tapes."""
    Tape.made.clear()
    stream = SimpleNamespace(wait_stream=lambda other: None, device=None)
    for name, stand_in in {
        "Stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: stream,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": Tape,
        "graph": recorded,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(module, "check_device", lambda device: None)

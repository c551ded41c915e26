"""Whole training steps as CUDA graphs, for nets so small that launching a step's kernels takes longer than they do.

::

    step = CapturedSteps(objective, optimizer)
    for inputs, targets in loader:
        loss = step(inputs, targets)

trains as ``optimizer.step(objective(inputs, targets))`` does, at the same random numbers. Every kind of step is taken
twice as ever, then captured, and from then on replayed: the host says once what is to be done, not kernel by kernel.

Captured is what is on the device. What the host counts is not: so a layer-wise method *plans* a step on the host
(``optimizers.plan``), which tells its kind (whether noise is measured, say) and the numbers in it that change by
counting alone, such as bias corrections; those are sent along with the batch. So may any optimizer that has ``plan``
and ``carry_out``. Steps of torch's SGD and Adam differ by nothing but the groups' settings; Adam's count is kept on the
device (``capturable``). Settings that change, by a scheduler for instance, have steps captured anew.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Hashable
from contextlib import contextmanager

import torch
from torch import Tensor

from optimizers.layer_specific import LayerSpecificSGD
from optimizers.objective import Minibatch, Objective
from optimizers.plan import Plan

#: Optimizers whose steps can be captured without a plan: nothing of them is decided or counted on the host.
UNCOUNTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, LayerSpecificSGD)

#: Steps of each kind before it is captured: libraries load what they need, and what is kept takes its place in memory.
WARM = 2


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose steps cannot be captured.

    Raises:
        TypeError: naming those that can.
    """
    if not hasattr(optimizer, "plan") and type(optimizer) not in UNCOUNTED:
        names = ", ".join(kind.__name__ for kind in UNCOUNTED)
        raise TypeError(
            f"{type(optimizer).__name__}'s steps cannot be captured in CUDA graphs, for the host takes part in them; "
            f"those of LWSGDm, LWAdamW, {names} can"
        )


def check_device(device: torch.device) -> None:
    """Refuse what is no CUDA device, by a ``ValueError``."""
    if device.type != "cuda":
        raise ValueError(f"steps are captured on a CUDA device, and the parameters are on {device}")


class CapturedSteps:
    """Steps of one optimizer on one objective, replayed once they have been captured.

    What a step does is looked at when it is captured. Other settings of the groups, modules in another mode, frozen
    parameters and batches of another shape are noticed, and captured in turn; whatever else is changed by hand (a
    dropout's rate, ``max_norm``) is not, nor a state that is loaded: make a new one then. Between steps ``.grad`` is
    not to be read.

    Args:
        objective: on a CUDA device.
        optimizer: one that plans its steps, as the layer-wise methods do, or one of ``UNCOUNTED``.

    Raises:
        TypeError: the optimizer's steps cannot be captured.
        ValueError: the parameters are not on a CUDA device.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        check_capturable(optimizer)
        self.objective, self.optimizer = objective, optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device
        check_device(device)
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        for state in (optimizer.state[p] for p in self._parameters if p in optimizer.state):
            state.update({name: x.to(device) for name, x in state.items() if isinstance(x, Tensor)})
        self._stream = torch.cuda.Stream(device)
        self._circumstances = self._account = None
        self._begin()

    def _begin(self) -> None:
        """Forget what was captured."""
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, inputs, targets: Tensor, rows: Tensor | None = None) -> Tensor:
        """One step; arguments as of ``Objective``, the loss as of ``optimizer.step``."""
        minibatch = self.objective(inputs, targets, rows)
        plan = self._plan(minibatch)
        circumstances, account = self._present_circumstances(), self.objective._account
        if circumstances != self._circumstances or account is not self._account:
            self._circumstances, self._account = circumstances, account
            self._begin()
        kind = plan.kind, *map(_form, _tensors(minibatch))
        capture = self._captured.get(kind)
        if capture is None:
            self._seen[kind] += 1
            if self._seen[kind] <= WARM:
                return self._aside(lambda: self._carry_out(plan, minibatch))
            capture = self._captured[kind] = self._aside(lambda: _Capture(self, plan, minibatch))
        else:
            self.objective.gradient_equivalents += capture.work
        return capture.replay(plan, minibatch)

    def _plan(self, minibatch: Minibatch) -> Plan:
        return Plan() if type(self.optimizer) in UNCOUNTED else self.optimizer.plan(minibatch)

    def _carry_out(self, plan: Plan, minibatch: Minibatch) -> Tensor:
        if type(self.optimizer) in UNCOUNTED:
            return self.optimizer.step(minibatch)
        return self.optimizer.carry_out(plan, minibatch)

    def _present_circumstances(self) -> tuple:
        """What a step depends on beside tensors and its plan, as far as it is looked after."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        trained = [p.requires_grad for p in self._parameters]
        modes = [module.training for module in self.objective.model.modules()]
        return repr(groups), trained, modes

    def _aside(self, work):
        """Do it on the stream of all captures, where libraries keep their workspaces."""
        present = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            done = work()
        present.wait_stream(self._stream)
        return done


class _Capture:
    """The graph of one kind of step, with the places where its batch and its numbers are put."""

    def __init__(self, steps: CapturedSteps, plan: Plan, minibatch: Minibatch) -> None:
        objective = steps.objective
        places: dict[int, Tensor] = {}  # an autoencoder's targets are its very inputs

        def place(x: Tensor | None) -> Tensor | None:
            return x if x is None or _stays(x) else places.setdefault(id(x), x.clone())

        self._batch = objective(tuple(map(place, minibatch.inputs)), place(minibatch.targets), place(minibatch.rows))
        self._numbers = steps._parameters[0].new_tensor(list(plan.numbers.values()))
        numbers = dict(zip(plan.numbers, self._numbers.unbind(), strict=True))
        self._graph = torch.cuda.CUDAGraph()
        if objective.generator is not None:
            self._graph.register_generator_state(objective.generator)
        before = objective.gradient_equivalents
        with _no_garbage(), torch.cuda.graph(self._graph, pool=steps._pool, stream=steps._stream):
            self._loss = steps._carry_out(plan._replace(numbers=numbers), self._batch)
        self.work = objective.gradient_equivalents - before
        objective.model.zero_grad()  # theirs is memory that other captures use

    def replay(self, plan: Plan, minibatch: Minibatch) -> Tensor:
        """The step on another batch; its loss."""
        for place, x in zip(_tensors(self._batch), _tensors(minibatch), strict=True):
            if place is not x:
                place.copy_(x)
        if plan.numbers:
            numbers = torch.tensor(list(plan.numbers.values()), dtype=self._numbers.dtype)
            self._numbers.copy_(numbers.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._loss.clone()


@contextmanager
def _no_garbage():
    """Nothing is collected within: a graph that is destroyed while another one is captured ends the capture."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _tensors(minibatch: Minibatch) -> list[Tensor]:
    """What a minibatch is made of, each once."""
    tensors = (*minibatch.inputs, minibatch.targets, minibatch.rows)
    return list({id(x): x for x in tensors if x is not None}.values())


def _stays(x: Tensor) -> bool:
    """Whether a tensor is captured as it is: a graph's sparse matrices, which are the same in every step."""
    return x.layout != torch.strided


def _form(x: Tensor) -> Hashable:
    return id(x) if _stays(x) else (x.shape, x.dtype)

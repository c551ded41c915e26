"""Numbers that are not finite end a run as `diverged`, with the step and, where it can be told, the layer."""

import pytest
import torch

from runners import trainer
from runners.record import read_summary, read_table
from runners.reproduce import _spread

DIGITS = ("task=cnn_digits", "budget.epochs=2")
STEP = 6


def at_step(monkeypatch, act):
    """Call `act(trainer)` before step `STEP`."""
    take = trainer.Trainer._next_batch

    def next_batch(self):
        if self.step == STEP - 1:
            act(self)
        return take(self)

    monkeypatch.setattr(trainer.Trainer, "_next_batch", next_batch)


def poison_gradient(monkeypatch, layer, value):
    """One layer's gradient holds a value that is not finite in step `STEP`, whoever computes it; the loss is fine."""

    def act(self):
        module = self.model.get_submodule(layer)
        handle = module.weight.register_hook(lambda g: handle.remove() or torch.full_like(g, value))

    at_step(monkeypatch, act)


def test_not_finite_weights_name_their_layer(train, monkeypatch):
    @torch.no_grad()
    def act(self):
        self.layer = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)][-1]
        self.model.get_submodule(self.layer).weight[0, 0] = torch.inf
        layers.append(self.layer)

    layers = []
    at_step(monkeypatch, act)
    folder = train(*DIGITS, "optimizer=sgdm")
    summary = read_summary(folder)
    assert (summary["status"], summary["diverged_at"], summary["diverged_in"]) == ("diverged", STEP, layers[0])
    assert [row["step"] for row in read_table(folder / "metrics.csv")] == ["0"]


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [("sgdm", torch.inf), *((name, torch.nan) for name in ("adamw", "lw_sgdm", "lw_adamw", "kfac", "shampoo", "mbf"))],
)
def test_a_gradient_that_is_not_finite(train, monkeypatch, optimizer, value):
    poison_gradient(monkeypatch, "conv2", value)
    summary = read_summary(train(*DIGITS, f"optimizer={optimizer}"))
    seen = STEP if optimizer.startswith("lw_") else STEP + 1  # those evaluate the loss after steps 1, 6, 11, …
    assert (summary["status"], summary["diverged_at"], summary["diverged_in"]) == ("diverged", seen, "conv2")


def test_a_loss_that_overflows_names_the_first_layer_whose_output_does(train, monkeypatch):
    @torch.no_grad()
    def act(self):
        next(self.model.parameters()).fill_(1e38)

    at_step(monkeypatch, act)
    summary = read_summary(train("task=autoencoder_curves_small", "budget.epochs=2", "optimizer=sgdm"))
    assert (summary["status"], summary["diverged_at"]) == ("diverged", STEP)
    assert summary["diverged_in"]


def test_where_a_seed_diverged_the_table_has_no_mean():
    finished, diverged = (
        {"status": status, "final": {"train_loss": loss}} for status, loss in (("finished", 1.5), ("diverged", 7e12))
    )
    assert _spread([finished, finished], "train_loss") == "1.5 ± 0"
    assert _spread([finished, diverged, diverged], "train_loss") == "diverged 2/3"

"""Draw nets at random, as tasks of the profile `drawn`: `python -m runners.draw 12`.

A rule that needs no tuning is to be tried where nobody looked before. Net number `k` has its own seed, so that of a
longer list the first ones are the same: `python -m runners.draw 24` adds twelve. By turns an autoencoder (CURVES, by
the project's generator), a CNN (the embedded digits) and a GCN (a stochastic block model), each with a data set of its
own, and by turns a batch size; depth, width, activation, normalisation, dropout, decay and the number of steps are
drawn.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from runners.config import CONFIGS

#: Steps of a training, drawn evenly on a log scale.
STEPS = 100, 2000
EVALUATIONS = 20
BATCHES = [32, 64, 128, 256, 512, "full"]

TASK = """\
# Profile `drawn`, net {number}: written by `python -m runners.draw`, which drew what is not said to be otherwise.
name: {name}
version: 1
family: {family}
data:
{data}
  seed: {number}  # the net's number
model:
{model}
likelihood:
  _target_: models.likelihoods.{likelihood}
batch_size: {batch_size}  # its turn; graphs: all
drop_last: {drop_last}  # as in the other tasks of the family
weight_decay: {weight_decay}  # drawn; none for autoencoders, as in the others
penalty: {penalty}  # drawn for GCNs
select: {select}  # protocol: tuning selects on the held-out part of the training set
target: null  # protocol: the tuned SGD-m's median final value
evaluate_every: {evaluate_every}  # epochs: about {evaluations} evaluations
dtype: float32
"""

PROFILE = """\
# {count} nets drawn at random, by which no default was or is to be chosen: written by `python -m runners.draw {count}`.
name: drawn
tasks: [{tasks}]
optimizers: [sgdm, lw_sgdm, adamw, lw_adamw]
seeds: 3
trials: 8
budgets:
{budgets}
schedules: {{}}
study: []
threads: 1
# For estimates before there are records: 3 ms a step.
seconds_per_epoch:
{seconds}
"""


def autoencoder(r: random.Random) -> dict:
    """CURVES; one to four hidden layers on either side of the code."""
    halves = [784] + r.randint(1, 4) * [r.choice([32, 64, 128, 256])] + [r.choice([4, 8, 16, 32])]
    data = ["_target_: data.curves.curves", "train: 2000  # as the embedded task's", "test: 1000  # ours"]
    model = ["_target_: models.autoencoder.Autoencoder", f"sizes: {halves}  # drawn"]
    model += _parts(r, [None, None, "batch", "layer"])
    facts = {"likelihood": "Bernoulli", "drop_last": "false", "select": "{metric: val_loss, mode: min}"}
    return {"data": data, "model": model, "weight_decay": 0.0, "penalty": 0.0, "examples": 2000} | facts


def cnn(r: random.Random) -> dict:
    """The digits; one to four convolutions."""
    channels = r.randint(1, 4) * [r.choice([8, 16, 32, 64])]
    data = ["_target_: data.digits.digits", "test: 360  # ours: a fifth of the 1,797 digits"]
    model = ["_target_: models.convnet.ConvNet", f"channels: {channels}  # drawn", "classes: 10  # data"]
    model += ["in_channels: 1  # data", "size: 8  # data", *_parts(r, [None, "batch", "batch", "group"])]
    facts = {"likelihood": "Categorical", "drop_last": "true", "select": "{metric: val_accuracy, mode: max}"}
    decay = r.choice([0.0, 5e-4])
    return {"data": data, "model": model, "weight_decay": decay, "penalty": 0.0, "examples": 1437} | facts


def gcn(r: random.Random) -> dict:
    """Two graph convolutions on a graph of communities."""
    nodes, words, classes = r.choice([1000, 2000]), r.choice([200, 500]), r.randint(3, 7)
    data = [
        "_target_: data.graphs.stochastic_block_model",
        f"nodes: {nodes - nodes % classes}  # drawn; communities are of one size",
        f"communities: {classes}  # drawn",
        f"words: {words}  # drawn",
        f"degree: {r.choice([2.0, 4.0, 8.0])}  # drawn",
        f"homophily: {r.choice([0.6, 0.75, 0.85])}  # drawn",
        "words_per_node: 10  # as the embedded task's",
        "topic_share: 0.3  # as the embedded task's",
        f"train_per_class: {r.choice([10, 20, 40])}  # drawn",
        "validation: 200  # ours",
        "test: 500  # ours",
    ]
    model = ["_target_: models.gcn.GCN", f"features: {words}  # data", f"hidden: {r.choice([8, 16, 64, 256])}  # drawn"]
    model += [f"classes: {classes}  # data", f"dropout: {r.choice([0.0, 0.5, 0.8])}  # drawn"]
    facts = {"likelihood": "Categorical", "drop_last": "false", "select": "{metric: val_accuracy, mode: max}"}
    penalty = r.choice([0.0, 5e-4])
    return {"data": data, "model": model, "weight_decay": 0.0, "penalty": penalty, "examples": None} | facts


def _parts(r: random.Random, normalisations: list[str | None]) -> list[str]:
    activation, normalisation = r.choice(["relu", "tanh", "gelu", "silu"]), r.choice(normalisations)
    return [f"activation: {activation}  # drawn", f"normalisation: {normalisation or 'null'}  # drawn"]


FAMILIES = [autoencoder, cnn, gcn]


def draw(number: int) -> tuple[str, str, int, int]:
    """Net `number`, from 1 on: its task's name, its config file, its epochs, and the steps of an epoch."""
    r = random.Random(number)
    family = FAMILIES[(number - 1) % len(FAMILIES)]
    net = family(r)
    examples = net.pop("examples")
    batch_size = BATCHES[(number - 1) // len(FAMILIES) % len(BATCHES)] if examples else "full"
    steps = round(STEPS[0] * (STEPS[1] / STEPS[0]) ** r.random())
    per_epoch = max(1, examples // batch_size) if batch_size != "full" else 1
    epochs = max(1, round(steps / per_epoch))
    name = f"{family.__name__}_drawn_{number:02d}"
    net |= {key: "\n".join(f"  {line}" for line in net[key]) for key in ("data", "model")}
    evaluations = {"evaluate_every": max(1, epochs // EVALUATIONS), "evaluations": EVALUATIONS}
    task = TASK.format(number=number, name=name, family=family.__name__, batch_size=batch_size, **net, **evaluations)
    return name, task, epochs, per_epoch


def write(count: int, folder: Path = CONFIGS) -> None:
    """The tasks and the profile of the first `count` nets, into a folder of configs."""
    nets = [draw(number) for number in range(1, count + 1)]
    for name, task, _, _ in nets:
        (folder / "task" / f"{name}.yaml").write_text(task)
    profile = PROFILE.format(
        count=count,
        tasks=", ".join(name for name, *_ in nets),
        budgets="\n".join(f"  {name}: {{epochs: {epochs}}}" for name, _, epochs, _ in nets),
        seconds="\n".join(f"  {name}: {0.003 * per_epoch:g}" for name, _, _, per_epoch in nets),
    )
    (folder / "profile" / "drawn.yaml").write_text(profile)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal() or not int(sys.argv[1]):
        sys.exit("error: how many nets? type python -m runners.draw 12")
    write(int(sys.argv[1]))

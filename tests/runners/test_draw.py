"""Nets drawn at random: the committed ones are those that the command writes."""

import pytest
from omegaconf import OmegaConf

from runners import draw
from runners.config import CONFIGS


def folder(tmp_path):
    for group in ("task", "profile"):
        (tmp_path / group).mkdir()
    return tmp_path


def test_the_committed_nets_are_those_that_are_drawn(tmp_path):
    draw.write(12, folder(tmp_path))
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.yaml"))
    assert written == sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*drawn*.yaml"))
    for path in written:
        assert (tmp_path / path).read_text() == (CONFIGS / path).read_text()


def test_each_family_meets_every_batch_size():
    sizes = {}
    for number in range(1, 19):
        task = OmegaConf.create(draw.draw(number)[1])
        sizes.setdefault(task.family, set()).add(task.batch_size)
    assert sizes == {"autoencoder": {*draw.BATCHES}, "cnn": {*draw.BATCHES}, "gcn": {"full"}}


@pytest.mark.parametrize("number", [1, 40, 41, 42])
def test_steps_lie_between_their_bounds(number):
    _, _, epochs, per_epoch = draw.draw(number)
    assert draw.STEPS[0] - per_epoch <= epochs * per_epoch <= draw.STEPS[1] + per_epoch

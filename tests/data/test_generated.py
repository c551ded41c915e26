"""CURVES, FACES and the digits: made here from a seed, or embedded."""

import math

import pytest
import torch
from scipy.io import savemat

from data import faces
from data.checksums import DataError
from data.curves import BOX, HALF_WIDTH, SIZE, curves, draw, random_points
from data.digits import digits


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_curves(cache):
    dataset = curves(cache, cache, train=200, test=100, seed=0)
    assert dataset.train.targets.shape == (200, 784)
    assert dataset.test.targets.shape == (100, 784)
    assert dataset.train.targets is dataset.train.inputs[0]
    assert "CURVES" in dataset.surrogate
    x = dataset.train.targets
    assert x.min() == 0
    assert x.max() == 1
    assert ((x > 0) & (x < 1)).float().mean() > 0.02  # edges are smooth
    assert (x == 0).float().mean() > 0.8  # and most of an image is empty
    assert not torch.equal(x[:100], dataset.test.targets)


def test_curves_are_the_same_every_time_and_differ_by_seed():
    first, again, other = (draw(random_points(20, seeded(s))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:7], draw(random_points(20, seeded(0))[:7], chunk=3))


def test_curves_against_distances_to_all_pixels():
    points = random_points(5, seeded())
    t = torch.linspace(0, 1, 4000)
    path = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], dim=1) @ points
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    distance = torch.cdist(torch.cartesian_prod(axis, axis), path).amin(2)
    expected = (HALF_WIDTH + 0.5 - distance).clamp(0, 1)
    torch.testing.assert_close(draw(points), expected, rtol=0, atol=0.07)  # the curve's samples are up to 0.7 apart


def test_curves_go_through_their_three_points():
    points = torch.tensor([[[-8.0, -8.0], [0.5, 0.5], [9.0, -6.0]]])
    image = draw(points).view(SIZE, SIZE)
    for row, column in (points[0] + (SIZE - 1) / 2).round().long():
        assert image[row, column] > 0.7


def test_curves_stay_inside():
    corner = BOX / 2
    points = torch.tensor([[[-corner, 0.0], [corner, 1.0], [corner, 2.0]]])
    assert draw(points).isfinite().all()
    assert draw(points).view(SIZE, SIZE)[-1].max() > 0  # the parabola overshoots to the last row


def test_digits(cache):
    dataset = digits(cache, cache, test=360, seed=0)
    x = dataset.train.inputs[0]
    assert x.shape == (1437, 1, 8, 8)
    assert dataset.test.inputs[0].shape == (360, 1, 8, 8)
    std, mean = torch.std_mean(x, correction=0)
    torch.testing.assert_close((mean, std), (torch.tensor(0.0), torch.tensor(1.0)), rtol=0, atol=1e-5)
    assert set(dataset.test.targets.tolist()) == set(range(10))
    again = digits(cache, cache, test=360, seed=0)
    assert torch.equal(x, again.train.inputs[0])
    every = torch.cat([x, dataset.test.inputs[0]]).flatten(1)
    assert len(every.unique(dim=0)) == 1797  # the digits are distinct: no one is in both splits


def test_faces_counts_are_martens():
    assert faces.PER_FACE * faces.FACES_PER_PERSON * faces.TRAIN_PERSONS == 103_500
    assert faces.PER_FACE * faces.FACES_PER_PERSON * faces.TEST_PERSONS == 41_400


def test_a_patch_of_a_plane_is_a_plane():
    """Bilinear sampling is exact on `f(row, column) = 2 row − column`."""
    line = torch.arange(64.0) - 31.5
    image = 2 * line[:, None] - line
    angle, scale = 0.3, 1.6
    cell = ((torch.arange(25) + 0.5) / 25 - 0.5) * 64 / scale
    row, column = torch.meshgrid(cell, cell, indexing="ij")
    expected = 2 * (math.sin(angle) * column + math.cos(angle) * row) - (
        math.cos(angle) * column - math.sin(angle) * row
    )
    patch = faces.crop(image, torch.tensor([angle]), torch.tensor([scale]))
    torch.testing.assert_close(patch.view(25, 25), expected, rtol=0, atol=1e-4)


def test_a_right_angle_turns_counter_clockwise():
    image = torch.rand(64, 64, generator=seeded())
    straight, turned = faces.crop(image, torch.tensor([0.0, math.pi / 2]), torch.tensor([1.5, 1.5])).view(2, 25, 25)
    torch.testing.assert_close(turned, torch.rot90(straight), rtol=0, atol=1e-4)


def test_no_rotation_shows_a_border():
    angles = torch.linspace(-math.pi / 2, math.pi / 2, 181)
    patches = faces.crop(torch.ones(64, 64), angles, torch.full_like(angles, 1.4))
    assert patches.min() > 0.999


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(faces, "PER_FACE", 3)


def test_surrogate_faces_keep_persons_apart(few):
    persons = torch.arange(400.0).div(10, rounding_mode="floor").view(400, 1, 1) + torch.rand(400, 64, 64) / 10
    patches = faces.surrogate_patches(persons, seed=0)
    assert patches["train"].shape == (750, 625)
    assert patches["test"].shape == (300, 625)
    assert patches["train"].mean(1).max() < patches["test"].mean(1).min()  # persons 0–24 against 30–39


def test_surrogate_faces_from_olivetti(few, real_root, cache):
    root = real_root("Olivetti faces")
    dataset = faces.faces(root, cache, seed=0)
    x = dataset.train.targets
    torch.testing.assert_close(x.mean(0), torch.zeros(625), rtol=0, atol=1e-4)
    assert x.var(0, correction=0).mean().item() == pytest.approx(1, rel=1e-4)
    assert dataset.train.targets is dataset.train.inputs[0]
    assert "FACES" in dataset.surrogate
    images = faces.olivetti(root, cache)
    assert torch.equal(x, faces.surrogate_patches(images, seed=0)["train"])
    assert not torch.equal(x, faces.surrogate_patches(images, seed=1)["train"])


def test_olivetti_faces_are_upright(real_root, cache):
    """Faces are nearly mirror-symmetric from left to right and not from top to bottom."""
    mean = faces.olivetti(real_root("Olivetti faces"), cache).mean(0)
    assert (mean - mean.flip(1)).abs().mean() < 0.5 * (mean - mean.flip(0)).abs().mean()


def test_the_original_faces_are_used_where_they_are(few, tmp_path):
    columns = torch.rand(625, 1200)
    savemat(tmp_path / faces.ORIGINAL, {"newfaces_single": columns.numpy()})
    dataset = faces.faces(tmp_path, tmp_path, seed=0)
    assert dataset.surrogate is None
    assert torch.equal(dataset.train.targets, columns.T[:750])
    assert torch.equal(dataset.test.targets, columns.T[-300:])


def test_another_array_in_place_of_the_original_is_refused(tmp_path):
    savemat(tmp_path / faces.ORIGINAL, {"newfaces_single": torch.rand(625, 7).numpy()})
    with pytest.raises(DataError, match=r"\(625, 7\), not \(625, 165600\)"):
        faces.faces(tmp_path, tmp_path, seed=0)


def test_missing_faces_name_the_embedded_task(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(DataError, match=r"no network.*task=autoencoder_curves_small"):
        faces.faces(tmp_path, tmp_path, seed=0)

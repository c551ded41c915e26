import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import images
from data.checksums import CHECKSUMS, DataError
from data.images import CropFlip, channel_statistics


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(augment, images, generator):
    return augment(images, augment.draw(len(images), generator))


def test_augmentation_against_a_per_image_reference():
    batch = torch.rand(20, 3, 32, 32, generator=seeded(1))
    augmented = changed(CropFlip(4, [0.1, 0.2, 0.3]), batch, seeded(2))

    generator = seeded(2)
    top, left = torch.randint(9, (2, 20), generator=generator).tolist()
    flip = torch.rand(20, 1, 1, 1, generator=generator).flatten() < 0.5
    for i, image in enumerate(batch):
        padded = torch.cat([F.pad(image[c : c + 1], [4] * 4, value=v) for c, v in enumerate([0.1, 0.2, 0.3])])
        crop = padded[:, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert torch.equal(augmented[i], crop.flip(2) if flip[i] else crop)


def test_augmentation_draws_every_offset_and_both_sides():
    corner = torch.zeros(2000, 1, 5, 5)
    corner[:, :, 2, 2] = 1
    augmented = changed(CropFlip(2, [0.0]), corner, seeded())
    assert (augmented.sum(0).squeeze() > 0).all()  # the middle pixel came everywhere
    marked = torch.arange(3.0).expand(2000, 1, 1, 3)
    flipped = (changed(CropFlip(0, [0.0]), marked, seeded())[:, 0, 0, 0] == 2).float().mean()
    assert 0.45 < flipped < 0.55


def test_without_a_border_and_flip_nothing_changes():
    batch = torch.rand(50, 2, 4, 4)
    augmented = changed(CropFlip(0, [0.0, 0.0]), batch, seeded())
    same = (augmented == batch).flatten(1).all(1)
    mirrored = (augmented == batch.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()


def test_channel_statistics_against_torch():
    x = torch.randint(256, (10, 3, 6, 6), dtype=torch.uint8, generator=seeded())
    mean, std = channel_statistics(x)
    expected = torch.std_mean(x.double(), dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close((std.double(), mean.double()), expected, rtol=1e-6, atol=1e-6)


def test_mnist_pixels(real_root, cache):
    dataset = images.mnist_pixels(real_root("MNIST"), cache)
    for split, n in ((dataset.train, 60_000), (dataset.test, 10_000)):
        assert split.inputs[0].shape == (n, 784)
        assert split.targets is split.inputs[0]
        assert (split.targets.min(), split.targets.max()) == (0, 1)
    mean = dataset.train.targets.mean().item()
    assert mean == pytest.approx(0.1307, abs=5e-5)  # the standard statistic
    assert dataset.validation is dataset.augment is dataset.surrogate is None


def test_mnist_labels(real_root, cache):
    dataset = images.mnist(real_root("MNIST"), cache)
    x = dataset.train.inputs[0]
    assert x.shape == (60_000, 1, 28, 28)
    assert dataset.test.inputs[0].shape == (10_000, 1, 28, 28)
    assert dataset.train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    std, mean = torch.std_mean(x)
    assert abs(mean) < 1e-4
    assert abs(std - 1) < 1e-4


def test_cifar10(real_root, cache):
    dataset = images.cifar10(real_root("CIFAR-10"), cache, padding=4)
    x = dataset.train.inputs[0]
    assert x.shape == (50_000, 3, 32, 32)
    assert dataset.test.inputs[0].shape == (10_000, 3, 32, 32)
    assert dataset.train.targets.bincount().tolist() == [5000] * 10
    assert dataset.test.targets.bincount().tolist() == [1000] * 10
    std, mean = torch.std_mean(x[::10], dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(std, torch.ones(3), rtol=0, atol=0.02)
    # Black lies the standard mean over the standard deviation below zero.
    black = torch.tensor([0.4914 / 0.2470, 0.4822 / 0.2435, 0.4465 / 0.2616])
    torch.testing.assert_close(-torch.tensor(dataset.augment.fill), black, rtol=1e-3, atol=0)


@pytest.fixture
def unchecked(monkeypatch):
    """Lets small stand-ins through, in the files' own formats."""
    monkeypatch.setattr(images, "ensure", lambda *_, **__: None)
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def test_svhn_reads_its_format(unchecked, tmp_path):
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3, 6), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[1], [2], [10], [4], [5], [6]])})
    dataset = images.svhn(tmp_path, tmp_path, padding=4)
    assert dataset.train.inputs[0].shape == (6, 3, 32, 32)
    assert dataset.train.targets.tolist() == [1, 2, 0, 4, 5, 6]
    restored = dataset.train.inputs[0][2, 1] * pixels[:, :, 1].std() + pixels[:, :, 1].mean()
    np.testing.assert_allclose(restored, pixels[:, :, 1, 2], rtol=0, atol=1e-3)
    assert dataset.augment.padding == 4


def test_cifar100_reads_its_format(unchecked, tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(4, 3072), dtype=np.uint8)
    for split in ("train", "test"):
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [3, 99, 0, 7]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    dataset = images.cifar100(tmp_path, tmp_path, padding=4)
    assert dataset.train.targets.tolist() == [3, 99, 0, 7]
    blue = pixels.reshape(4, 3, 32, 32)[:, 2]
    np.testing.assert_allclose(dataset.train.inputs[0][1, 2], (blue[1] - blue.mean()) / blue.std(), rtol=0, atol=1e-5)


def test_a_damaged_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr("torchvision.datasets.MNIST", opened)
    for file in CHECKSUMS["MNIST"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"damaged")
    with pytest.raises(DataError, match="idx3-ubyte is damaged"):
        images.mnist(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("load", "library", "instead"),
    [
        (images.mnist, "MNIST", "cnn_digits"),
        (images.mnist_pixels, "MNIST", "autoencoder_curves_small"),
        (lambda root, cache: images.cifar10(root, cache, 4), "CIFAR10", "cnn_digits"),
        (lambda root, cache: images.cifar100(root, cache, 4), "CIFAR100", "cnn_digits"),
        (lambda root, cache: images.svhn(root, cache, 4), "SVHN", "cnn_digits"),
    ],
)
def test_missing_data_name_the_embedded_task(load, library, instead, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(f"torchvision.datasets.{library}", offline)
    with pytest.raises(DataError, match=f"no network.*task={instead}"):
        load(tmp_path, tmp_path / "cache")

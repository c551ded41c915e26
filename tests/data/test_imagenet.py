"""Streaming from class folders: the files, the errors, and images that do not depend on who decodes them."""

import multiprocessing

import pytest
import torch
from PIL import Image
from torchvision import transforms

from data import imagenet
from data.batches import Batches
from data.checksums import DataError
from tests.data import folders


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    folders.write(root)
    return root


def load(root, classes=3, evaluated=None):
    return imagenet.imagenet(root, root, classes, size=24, resize=28, evaluated=evaluated)


def batches(dataset, seed=0, **settings):
    generators = {name: torch.Generator().manual_seed(seed) for name in ("generator", "augment_generator")}
    return Batches(dataset.train, 8, shuffle=True, drop_last=True, augment=dataset.augment, **generators, **settings)


def test_the_splits_are_the_folders(small):
    dataset = load(small)
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (36, 12, None)
    assert dataset.train.targets.bincount().tolist() == [12, 12, 12]
    assert (dataset.train.files[0], dataset.train.files[-1]) == ("cat/cat_00.JPEG", "eel/eel_11.JPEG")


def test_evaluation_sees_the_middle_as_torchvision_does(small):
    dataset = load(small)
    steps = [transforms.Resize(28), transforms.CenterCrop(24), transforms.ToTensor()]
    view = transforms.Compose([*steps, transforms.Normalize(imagenet.MEAN, imagenet.STD)])
    files = [small / "imagenet/val/cat/cat_01.JPEG", small / "imagenet/val/dog/dog_00.JPEG"]
    batch = list(Batches(dataset.test, 4, shuffle=False, drop_last=False))
    torch.testing.assert_close(batch[0].inputs[0][1], view(Image.open(files[0])))
    torch.testing.assert_close(batch[1].inputs[0][0], view(Image.open(files[1])))
    assert [part.targets.tolist() for part in batch] == [[0] * 4, [1] * 4, [2] * 4]


def test_every_epoch_has_other_views_and_the_same_seed_the_same(small):
    dataset = load(small)
    first, second = (list(batches(dataset)) for _ in range(2))
    stream = batches(dataset)
    epochs = [list(stream), list(stream)]
    for a, b, c in zip(first, second, epochs[0], strict=True):
        assert torch.equal(a.inputs[0], b.inputs[0])
        assert torch.equal(a.inputs[0], c.inputs[0])
    assert not torch.equal(epochs[0][0].inputs[0], epochs[1][0].inputs[0])


def test_the_number_of_workers_changes_no_bit_and_leaves_the_global_generator(small, monkeypatch):
    dataset = load(small)
    state = torch.get_rng_state()
    expected = list(batches(dataset))
    monkeypatch.setattr(imagenet, "_workers", lambda: 2)
    for batch, other in zip(batches(dataset), expected, strict=True):
        assert torch.equal(batch.inputs[0], other.inputs[0])
        assert torch.equal(batch.targets, other.targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


def test_no_image_is_decoded_that_is_behind_or_another_ranks(small, monkeypatch):
    dataset = load(small)
    expected = list(batches(dataset))[2:]
    decoded, decode = [], imagenet._decode
    monkeypatch.setattr(imagenet, "_decode", lambda file: decoded.append(file) or decode(file))
    for batch, whole in zip(batches(dataset, share=(1, 2)).epoch(2), expected, strict=True):
        assert torch.equal(batch.inputs[0], whole.inputs[0][4:])
        assert torch.equal(batch.targets, whole.targets[4:])
    assert len(decoded) == 2 * 4


def test_holdout_and_precision(small):
    held = load(small, evaluated=9).holdout(0.25, torch.Generator().manual_seed(0)).to("cpu", torch.float64)
    assert (len(held.train), len(held.validation)) == (27, 9)
    assert not set(held.train.files) & set(held.validation.files)
    assert len(held.measured) == 9
    assert set(held.measured.files) < set(held.train.files)
    batch = next(iter(Batches(held.validation, 4, shuffle=False, drop_last=False)))
    assert batch.inputs[0].dtype == torch.float64


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, monkeypatch, workers):
    folders.write(tmp_path, train=3, val=1)
    bad = tmp_path / "imagenet/train/dog/dog_01.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    monkeypatch.setattr(imagenet, "_workers", lambda: workers)
    with pytest.raises(DataError, match=f"^{bad} cannot be decoded .*; replace or remove it$"):
        list(batches(load(tmp_path)))


def test_missing_folders_are_told_with_what_to_do(tmp_path):
    advice = "no images in .*train .*imagenet/train/CLASS/.*data.root=FOLDER or DATA_ROOT.*task=cnn_digits$"
    with pytest.raises(DataError, match=advice):
        load(tmp_path)
    (tmp_path / "imagenet/train").mkdir(parents=True)
    with pytest.raises(DataError, match=advice):
        load(tmp_path)


def test_classes_that_differ_are_refused(tmp_path):
    folders.write(tmp_path, train=1, val=1)
    with pytest.raises(DataError, match=r"has 3 classes, not 1000; .*task.data.classes=3 task.model.classes=3"):
        load(tmp_path, classes=1000)
    (tmp_path / "imagenet/val/eel").rename(tmp_path / "imagenet/val/fox")
    with pytest.raises(DataError, match="have 3 and 3 classes; in one alone: eel, fox; give both the same folders"):
        load(tmp_path)

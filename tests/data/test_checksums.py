import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data import checksums
from data.checksums import CHECKSUMS, DataError, cached, digest, ensure


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A data set of two files, one checked by md5 and one by either of two sha256."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"first")
    (root / "b").write_bytes(b"second")
    files = {"a": digest(root / "a", "md5"), "b": ("0" * 64, digest(root / "b"))}
    monkeypatch.setitem(CHECKSUMS, "toy", files)
    return root, tmp_path / "cache"


def unexpected():
    raise AssertionError("nothing is to be downloaded")


def check(root, cache, download=unexpected):
    ensure("toy", root, cache, download=download, instead="cnn_digits")


def test_right_files_pass(known):
    check(*known)


def test_a_damaged_file_is_named(known):
    root, cache = known
    (root / "b").write_bytes(b"secund")
    with pytest.raises(DataError, match=r"b is damaged.*delete it.*task=cnn_digits"):
        check(root, cache)


def test_a_digest_is_paid_once_and_again_after_a_change(known, monkeypatch):
    root, cache = known
    check(root, cache)
    monkeypatch.setattr(checksums, "digest", lambda *_: "not the digest")
    check(root, cache)
    stat = (root / "a").stat()
    os.utime(root / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DataError, match="a is damaged"):
        check(root, cache)


@pytest.mark.parametrize("text", ['{"a": ', "[]"])
def test_lost_notes_of_earlier_checks_cost_a_check(known, text):
    root, cache = known
    check(root, cache)
    (cache / "checksums.json").write_text(text)
    check(root, cache)
    assert str(root / "a") in (cache / "checksums.json").read_text()


def test_what_another_process_is_still_downloading_is_waited_for(known):
    root, cache = known
    (root / "b").unlink()
    begun = threading.Event()

    def download():
        (root / "b").write_bytes(b"sec")
        begun.set()
        time.sleep(0.3)
        (root / "b").write_bytes(b"second")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(check, root, cache, download)
        begun.wait()
        check(root, cache)
        other.result()


def test_missing_files_are_downloaded_and_checked(known):
    root, cache = known
    (root / "a").unlink()
    check(root, cache, download=lambda: (root / "a").write_bytes(b"first"))
    (root / "a").unlink()
    with pytest.raises(DataError, match="a is damaged"):
        check(root, cache, download=lambda: (root / "a").write_bytes(b"an error page"))


def test_a_failed_download_says_what_to_do_in_one_line(known):
    root, cache = known
    (root / "a").unlink()

    def download():
        raise OSError("no route\nto host")

    with pytest.raises(DataError) as error:
        check(root, cache, download)
    message = str(error.value)
    for part in (
        "toy",
        "no file a",
        str(root),
        "OSError: no route to host",
        "data.root=",
        "DATA_ROOT",
        "task=cnn_digits",
    ):
        assert part in message
    assert "\n" not in message


def test_a_download_that_brings_nothing_is_an_error(known):
    root, cache = known
    (root / "a").unlink()
    with pytest.raises(DataError, match="incomplete"):
        check(root, cache, download=lambda: None)


def test_generated_tensors_are_kept(tmp_path):
    path = tmp_path / "folder" / "tensors.pt"
    made = cached(path, lambda: {"x": torch.arange(3)})
    kept = cached(path, unexpected)
    assert torch.equal(made["x"], kept["x"])
    assert {p.name for p in path.parent.iterdir()} == {"tensors.pt", "tensors.sha256", ".lock"}


def test_one_process_builds_and_the_others_wait(tmp_path):
    built = []

    def build():
        built.append(1)
        time.sleep(0.2)
        return {"x": torch.arange(3)}

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: cached(tmp_path / "new" / "x.pt", build), range(4)))
    assert len(built) == 1 and all(torch.equal(tensors["x"], torch.arange(3)) for tensors in made)
    assert (tmp_path / "new" / "x.pt").stat().st_mode == (
        tmp_path / "new" / ".lock"
    ).stat().st_mode  # any user reads it


def test_a_damaged_cache_is_built_anew(tmp_path):
    path = tmp_path / "tensors.pt"
    cached(path, lambda: {"x": torch.arange(3)})
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(cached(path, lambda: {"x": torch.ones(2)})["x"], torch.ones(2))


@pytest.mark.parametrize("name", ["MNIST", "CIFAR-10", "Cora", "CiteSeer", "PubMed", "Olivetti faces"])
def test_the_tables_digests_are_those_of_the_real_files(name, real_root, cache):
    ensure(name, real_root(name), cache, download=unexpected, instead="")


def test_torchvisions_digests():
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN

    def md5(kind):
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return {f"{kind.base_folder}/{name}": value for name, value in files}

    assert CHECKSUMS["CIFAR-100"] == md5(CIFAR100)
    assert CHECKSUMS["CIFAR-10"].keys() == md5(CIFAR10).keys()
    assert CHECKSUMS["SVHN"] == {SVHN.split_list[s][1]: SVHN.split_list[s][2] for s in ("train", "test")}

"""Files are checked before they are opened: several of these formats are pickles, and a damaged file trains quietly.

`ensure` is the one way to a data set's files: it checks what is there, has what is missing downloaded, and checks
that too. A digest is paid once per file: its result is remembered with the file's size and time stamp.
`cached` keeps what a generator made in a file under its own digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.files import replace_file

# Files of each data set relative to `data.root`, with their md5 (32 hex digits) or sha256 (64) digests;
# a tuple where more than one copy is known.
CHECKSUMS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "MNIST": {
        "MNIST/raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "MNIST/raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "MNIST/raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "MNIST/raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    },
    "CIFAR-10": {
        "cifar-10-batches-py/batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
        "cifar-10-batches-py/data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "cifar-10-batches-py/data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "cifar-10-batches-py/data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "cifar-10-batches-py/data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "cifar-10-batches-py/data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "cifar-10-batches-py/test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    },
    # The digests that torchvision carries for these two.
    "CIFAR-100": {
        "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
        "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
        "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    "SVHN": {
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    },
    "Cora": {
        "Planetoid/Cora/raw/ind.cora.allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "Planetoid/Cora/raw/ind.cora.ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "Planetoid/Cora/raw/ind.cora.graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "Planetoid/Cora/raw/ind.cora.test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
        "Planetoid/Cora/raw/ind.cora.tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "Planetoid/Cora/raw/ind.cora.ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "Planetoid/Cora/raw/ind.cora.x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
        "Planetoid/Cora/raw/ind.cora.y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
    },
    "CiteSeer": {
        "Planetoid/CiteSeer/raw/ind.citeseer.allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "Planetoid/CiteSeer/raw/ind.citeseer.ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "Planetoid/CiteSeer/raw/ind.citeseer.graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "Planetoid/CiteSeer/raw/ind.citeseer.test.index": "70af39d4dff8aaa5c63f8dc526b16534",
        "Planetoid/CiteSeer/raw/ind.citeseer.tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "Planetoid/CiteSeer/raw/ind.citeseer.ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "Planetoid/CiteSeer/raw/ind.citeseer.x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
        "Planetoid/CiteSeer/raw/ind.citeseer.y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
    },
    "PubMed": {
        "Planetoid/PubMed/raw/ind.pubmed.allx": "508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e",
        "Planetoid/PubMed/raw/ind.pubmed.ally": "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
        "Planetoid/PubMed/raw/ind.pubmed.graph": "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
        "Planetoid/PubMed/raw/ind.pubmed.test.index": "57cdfacfa20179b9b92e077fba394d1c",
        "Planetoid/PubMed/raw/ind.pubmed.tx": "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
        "Planetoid/PubMed/raw/ind.pubmed.ty": "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
        "Planetoid/PubMed/raw/ind.pubmed.x": "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
        "Planetoid/PubMed/raw/ind.pubmed.y": "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
    },
    "Olivetti faces": {
        "olivetti/olivettifaces.mat": (
            "b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d",
            "b612fb967f2dc77c9c62d3e1266e0c73d5fca46a4b8906c18e454d41af987794",  # scikit-learn's copy
        ),
    },
}


class DataError(ValueError):
    """Data that are missing or damaged; the message is one line that says what to do."""


def ensure(dataset: str, root: Path, cache: Path, *, download: Callable[[], object], instead: str) -> None:
    """Make sure that all files of `dataset` are under `root` and are the right ones.

    Args:
        dataset: key of `CHECKSUMS`.
        root: folder of the data sets.
        cache: folder where results of earlier checks are kept.
        download: called to fetch missing files into `root`.
        instead: task with embedded data that an error message offers.

    Raises:
        DataError: if a file is damaged, or missing and not to be had.
    """
    files, reason = CHECKSUMS[dataset], "downloads are incomplete"
    with _alone(cache):  # what another process is still downloading is not damaged
        missing = _check(files, root, cache, instead)
        if not missing:
            return
        try:
            download()
            missing = _check(files, root, cache, instead)
        except DataError:
            raise
        except Exception as error:  # whatever the library and the network answer: the user needs the same advice
            reason = f"the download failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if missing:
        raise DataError(
            f"{dataset}: no file {missing[0]} in {root} ({reason}); put it there, name a folder that has it with "
            f"data.root=FOLDER or DATA_ROOT, or use embedded data with task={instead}"
        )


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def cached(path: Path, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `build` returns, kept in `path`; a file that is not what was written is built anew.

    Args:
        path: file in the cache whose name tells all that the tensors depend on.
        build: makes the tensors.
    """
    seal = path.with_suffix(".sha256")

    def is_whole() -> bool:
        return path.exists() and seal.exists() and seal.read_text() == digest(path)

    if not is_whole():
        with _alone(path.parent):
            if not is_whole():  # built by another process, meanwhile
                tensors, content = build(), io.BytesIO()
                torch.save(tensors, content)  # in memory: on a full disk torch does not say what is wrong
                replace_file(path, lambda file: file.write_bytes(content.getbuffer()))
                replace_file(seal, lambda file: file.write_text(digest(path)))
                return tensors
    return torch.load(path, weights_only=True)


def _check(files: dict[str, str | tuple[str, ...]], root: Path, cache: Path, instead: str) -> list[str]:
    """Compare the files that exist with their digests; return those that do not exist."""
    stamps_path = cache / "checksums.json"
    stamps = _stamps(stamps_path)
    fresh, missing = {}, []
    for name, expected in files.items():
        path = (root / name).resolve()
        if not path.is_file():
            missing.append(name)
            continue
        known = [expected] if isinstance(expected, str) else list(expected)
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, known]
        if stamps.get(str(path)) == stamp:
            continue
        found = digest(path, "md5" if len(known[0]) == 32 else "sha256")
        if found not in known:
            raise DataError(
                f"{path} is damaged: its checksum is {found[:12]}…, not {known[0][:12]}…; delete it to have it "
                f"downloaded again, or use embedded data with task={instead}"
            )
        fresh[str(path)] = stamp
    if fresh:
        replace_file(stamps_path, lambda file: file.write_text(json.dumps(stamps | fresh)))
    return missing


def _stamps(path: Path) -> dict[str, list]:
    """What earlier checks found; nothing where that is lost, for it costs a checksum and no data."""
    try:
        stamps = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time checks, downloads or builds; the others wait, and find it done."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(PermissionError):  # a cache that is only read has nothing to be guarded
            cache.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((cache / ".lock").open("w")), fcntl.LOCK_EX)
        yield

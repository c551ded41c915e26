"""ImageNet in the folders that torchvision reads, decoded as the batches ask for it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.batches import Augmentation, Batch, Dataset, Part
from data.checksums import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels: torchvision's references


def imagenet(root: Path, cache: Path, classes: int, size: int, resize: int, evaluated: int | None) -> Dataset:
    """ImageNet (ILSVRC 2012) `(n, 3, size, size)`, or any images in `imagenet/{train,val}/CLASS/` under `root`.

    Training images are cropped at random and flipped (`RandomView`); for evaluation the shorter side is scaled to
    `resize` and the middle taken. `val`, the only other labelled part, is the test set. There are no checksums: a JPEG
    is no program, and one that cannot be decoded is named.

    Args:
        root: folder of the data sets.
        cache: unused: nothing is derived.
        classes: how many there must be.
        size: of the images' sides, in pixels.
        resize: of the shorter side before the middle is taken, in pixels.
        evaluated: training images that `train_loss` is measured on, evenly spaced over the classes; None: all.

    Raises:
        DataError: no such folders, or other classes than there must be.
    """
    from torchvision import transforms

    middle = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size), transforms.PILToTensor()])
    (train, names), (test, others) = (_scan(root / "imagenet" / part, middle) for part in ("train", "val"))
    if names != others:
        differing = sorted(set(names) ^ set(others))
        raise DataError(
            f"ImageNet: imagenet/train and imagenet/val in {root} have {len(names)} and {len(others)} classes; in one "
            f"alone: {', '.join(differing[:5])}{', …' if len(differing) > 5 else ''}; give both the same folders"
        )
    if len(names) != classes:
        raise DataError(
            f"ImageNet: {root / 'imagenet'} has {len(names)} classes, not {classes}; complete it, or type "
            f"task.data.classes={len(names)} task.model.classes={len(names)}"
        )
    return Dataset(train, test, None, RandomView(size), None, "ImageNet", evaluated)


class RandomView:
    """A random part of an image (8 to 100 % of its area, sides 3:4 to 4:3), scaled to a square of `size` pixels, and
    flipped every second time on average: GoogLeNet's, as in torchvision's references.
    """

    def __init__(self, size: int) -> None:
        from torchvision import transforms

        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        self.view = transforms.Compose(steps)

    def draw(self, m: int, generator: torch.Generator | None) -> Tensor:
        """A seed for each image, `(m,)`: whoever decodes it, and when, its view is the same."""
        return torch.randint(2**62, (m,), generator=generator)

    def __call__(self, image, draws: Tensor) -> Tensor:
        """A view of one PIL image, uint8 `(3, size, size)`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(draws))
            return self.view(image)


@dataclass(frozen=True)
class Stream:
    """Images in files: a `data.batches.Split` whose batches are decoded on the CPU, in as many processes as torch has
    threads (with one thread, in this process).

    Attributes:
        folder: that the files are in.
        files: their paths in it, `(n,)`.
        targets: their classes `(n,)`.
        view: makes a uint8 tensor `(3, height, width)` of a PIL image where no augmentation does.
        mean: of each channel, in [0, 1], `(3, 1, 1)`; images come on its device and in its precision, normalised.
        std: of each channel.
    """

    folder: Path
    files: np.ndarray
    targets: Tensor
    view: Callable
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.files)

    @property
    def device(self) -> torch.device:
        """Where images are decoded."""
        return torch.device("cpu")

    def take(self, index: Tensor | slice) -> Stream:
        """The images at `index`."""
        return replace(self, files=_at(self.files, index), targets=self.targets[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Stream:
        """With `function` applied to each tensor: the images follow `mean`."""
        return replace(self, targets=function(self.targets), mean=function(self.mean), std=function(self.std))

    def load(self, plan: Iterable[Part], augment: Augmentation | None) -> Iterator[Batch]:
        """The planned batches.

        Raises:
            DataError: an image cannot be decoded.
        """
        device = self.mean.device
        loader = DataLoader(
            _Decoder(self.folder, self.files, self.view, augment),
            batch_size=None,  # the plan has whole batches
            sampler=plan,
            collate_fn=_as_it_is,
            num_workers=_workers(),
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # torch's global one is dropout's
        )
        for index, images in loader:
            if isinstance(images, DataError):
                raise images
            images = images.to(device, non_blocking=True).to(self.mean.dtype).div_(255)
            yield Batch((images.sub_(self.mean).div_(self.std),), self.targets[index], None)


class _Decoder:
    """Whole batches by their plan: the index, and uint8 images `(m, 3, height, width)` or what is wrong with one."""

    def __init__(self, folder: Path, files: np.ndarray, view: Callable, augment: Augmentation | None) -> None:
        self.folder, self.files, self.view, self.augment = folder, files, view, augment

    def __getitem__(self, part: Part) -> tuple[Tensor | slice, Tensor | DataError]:
        index = slice(None) if part.index is None else part.index
        files = [self.folder / name for name in _at(self.files, index)]
        try:
            if self.augment is None:
                images = [self.view(_decode(file)) for file in files]
            else:
                images = [self.augment(_decode(file), seed) for file, seed in zip(files, part.draws, strict=True)]
            return index, torch.stack(images)
        except DataError as error:  # raised there, a worker's traceback would be wrapped around it
            return index, error


def _decode(file: Path):
    from torchvision.datasets.folder import pil_loader

    try:
        return pil_loader(str(file))
    except Exception as error:  # whatever the decoder makes of a damaged file
        reason = " ".join(str(error).replace(str(file), "it").split())
        raise DataError(f"{file} cannot be decoded ({type(error).__name__}: {reason}); replace or remove it") from error


def _scan(folder: Path, view: Callable) -> tuple[Stream, list[str]]:
    """The images in a folder's class folders, in the order of their names, and the classes."""
    from torchvision.datasets import ImageFolder

    try:
        source = ImageFolder(str(folder))
    except OSError as error:
        reason = "there is no such folder" if not folder.is_dir() else error
        raise DataError(
            f"ImageNet: no images in {folder} ({reason}); put torchvision's layout there (imagenet/train/CLASS/*.JPEG "
            "and imagenet/val/CLASS/*.JPEG), name the folder that imagenet/ is in with data.root=FOLDER or DATA_ROOT, "
            "or use embedded data with task=cnn_digits"
        ) from error
    files = np.array([str(Path(path).relative_to(folder)) for path, _ in source.samples])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return Stream(folder, files, torch.tensor(source.targets), view, mean, std), source.classes


def _at(files: np.ndarray, index: Tensor | slice) -> np.ndarray:
    return files[index if isinstance(index, slice) else index.cpu().numpy()]


def _workers() -> int:
    """How many processes decode, beside this one."""
    threads = torch.get_num_threads()
    return threads if threads > 1 else 0


def _as_it_is(item):
    return item


def _leave_signals(worker: int) -> None:
    """Signals to all of a run's processes are for the one that trains; it ends its workers."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)

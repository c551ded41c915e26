"""A small ImageNet: generated images in torchvision's folders."""

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel")

# The task at their size, with a ResNet of 7 convolutions.
TASK = (
    "task=cnn_imagenet_resnet50", "task.batch_size=8", "task.data.classes=3", "task.data.size=24",
    "task.data.resize=28", "task.data.evaluated=24",
    "task.model._target_=models.resnet.ResNet", "task.model.classes=3", "+task.model.blocks=1",
    "+task.model.widths=[4,8,8]",
)  # fmt: skip


def write(root, train=12, val=4):
    """Classes differ by colour; sizes and noise by image."""
    dice = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = dice.integers(0, 120, (*dice.integers(36, 60, 2), 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{name}_{i:02}.JPEG")

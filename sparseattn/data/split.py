"""What a training reads: two data sets, and the facts about them that a model needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.data import Dataset

from sparseattn.data.problems import Problems

Example = dict[str, Tensor]  # by the names of the model's arguments


@dataclass(frozen=True, eq=False)
class Split:
    """Examples to train on and examples to measure on.

    train, test  each item is a dict of tensors by the names of the model's arguments
    about        one sentence: what it is and where it comes from
    classes      what the labels stand for, in order; empty without labels
    channels     of an image
    problems     files and rows that were left out
    """

    train: Dataset[Example]
    test: Dataset[Example]
    about: str
    classes: tuple[str, ...] = ()
    channels: int = 1
    problems: Problems = field(default_factory=Problems)


class Examples(Dataset[Example]):
    """Examples in memory: one tensor a name, all of the same length."""

    def __init__(self, **columns: Tensor) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Examples: columns have lengths {lengths}; expected equal ones")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self.columns.items()}

    def take(self, indices: Sequence[int]) -> "Examples":
        """Return the examples at `indices`."""
        return Examples(**{name: column[list(indices)] for name, column in self.columns.items()})


def count(data: Dataset[Example]) -> int:
    """Return how many examples a data set has."""
    return len(data)  # type: ignore[arg-type]

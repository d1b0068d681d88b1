"""Pictures with texts: a table of your own, or numbers written in real handwritten digits."""

import re
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparseattn.data.images import load_image, resize
from sparseattn.data.problems import DataError, OnError, Problems, read_table
from sparseattn.data.samples import digits
from sparseattn.data.sources import split_by_group
from sparseattn.data.split import Example, Examples, Split

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST = 4  # digits of a number
_WORD = re.compile(r"[a-z0-9]+")


def image_texts(
    source: str,
    *,
    seed: int = 0,
    table: str | None = None,
    size: int = 64,
    length: int = 112,
    words: int = 4096,
    on_error: OnError = "raise",
    check: bool = True,
) -> Split:
    """Return pictures and the words of their texts: `images`, `words` and `word_mask`.

    Args:
        source: "numbers", or a folder of pictures.
        seed: of the numbers, or of the split of a folder, of which a fifth is for testing.
        table: CSV file with the columns path and text; a column group keeps patients together.
        size: pictures are cut to a square and resized to [size, size].
        length: words of a text that are kept.
        words: size of the vocabulary; a word's number is a hash, so there is nothing to fit.
        on_error: "raise" or "skip" what cannot be used.
        check: read every file once, before training.

    Raises:
        DataError: a file or row cannot be used, and on_error is "raise"; or nothing is left.
        ValueError: there is no such folder, or no table is given for one.
    """
    if source == "numbers":
        return numbers(seed, words)
    folder, problems = Path(source), Problems(on_error)
    if not folder.is_dir() or table is None:
        raise ValueError(
            f"data: source is {source!r} with table {table!r}; expected numbers, or a folder with "
            "a CSV table of path and text"
        )
    found: list[tuple[Path, str, str]] = []
    for place, row in read_table(Path(table), ("path", "text"), problems):
        path = folder / row["path"]
        if not _WORD.search(row["text"].lower()):
            problems.add(place, "missing text", f"{row['path']} has none")
            continue
        try:
            if not path.is_file() or check:
                load_image(path)
        except DataError as error:
            problems.add(path, "unreadable file", str(error))
            continue
        found.append((path, row["text"], row.get("group") or str(path)))
    if len(found) < 2:
        raise DataError(f"{folder}: nothing is left to train or to test on: {problems.counts()}")
    held = split_by_group([group for *_, group in found], seed)
    parts = [[x for x, away in zip(found, held, strict=True) if away == side] for side in (0, 1)]
    train, test = (Texts(part, size, length, words) for part in parts)
    about = f"pictures of {folder.name} with the texts of {Path(table).name}"
    return Split(train, test, about, problems=problems)


class Texts(Dataset[Example]):
    """Grey pictures and texts, read when they are asked for."""

    def __init__(
        self, pairs: list[tuple[Path, str, str]], size: int, length: int, words: int
    ) -> None:
        self.pairs, self.size, self.length, self.words = pairs, size, length, words

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        path, text, _ = self.pairs[index]
        words, mask = word_numbers(text, self.length, self.words)
        image = resize(load_image(path), self.size).mean(0, keepdim=True)
        return {"images": image, "words": words, "word_mask": mask}


def numbers(seed: int = 0, words: int = 4096) -> Split:
    """Numbers of one to four handwritten digits of scikit-learn, with their digits as words.

    Pictures [1, 8, 32], 4000 to train and 512 to test; each side has digits of its own. Numbers are
    drawn with `seed`; the digits are real, their rows are put together here.
    """
    source, generator = digits(), torch.Generator().manual_seed(seed)
    parts = []
    for data, count in ((source.train, 4000), (source.test, 512)):
        if not isinstance(data, Examples):
            raise TypeError("numbers: digits are not in memory")
        images, labels = data.columns["images"], data.columns["labels"]
        chosen = torch.randint(len(labels), (count, LONGEST), generator=generator)
        lengths = torch.randint(1, LONGEST + 1, (count, 1), generator=generator)
        shown = torch.arange(LONGEST) < lengths  # [count, LONGEST]
        rows = images[chosen] * shown[..., None, None, None]  # [count, LONGEST, 1, 8, 8]
        table = torch.tensor([_hash(name, words) for name in NAMES])
        parts.append(
            Examples(
                images=rows.permute(0, 2, 3, 1, 4).flatten(3),
                words=table[labels[chosen]] * shown,
                word_mask=shown,
            )
        )
    about = "numbers made of handwritten digits of scikit-learn, and their digits in words"
    return Split(parts[0], parts[1], about)


def word_numbers(text: str, length: int, words: int) -> tuple[Tensor, Tensor]:
    """Return the numbers int [length] of the words of a text, and which of them are words."""
    found = [_hash(word, words) for word in _WORD.findall(text.lower())][:length]
    numbered = torch.zeros(length, dtype=torch.long)
    numbered[: len(found)] = torch.tensor(found, dtype=torch.long)
    return numbered, torch.arange(length) < len(found)


def _hash(word: str, words: int) -> int:
    return zlib.crc32(word.encode()) % (words - 1) + 1

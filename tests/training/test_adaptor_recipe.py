"""Pictures with texts, and a short training of Adaptor."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason='needs pip install "sparseattn[train]"')
pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')

from sparseattn.data.pairs import NAMES, image_texts, numbers, word_numbers
from sparseattn.data.problems import DataError
from sparseattn.testing.files import cut, picture, table
from sparseattn.training.metrics import retrieval_metrics
from sparseattn.training.recipes.adaptor import AdaptorRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_words_are_hashed_and_padded() -> None:
    numbered, mask = word_numbers("Heart: normal, heart!", 5, 100)
    assert mask.tolist() == [True] * 3 + [False] * 2 and numbered[3:].tolist() == [0, 0]
    assert numbered[0] == numbered[2] != numbered[1] and int(numbered[:3].min()) > 0
    assert word_numbers("a b c", 2, 100)[1].tolist() == [True, True]


def test_numbers_are_pictures_of_their_words() -> None:
    split = numbers(seed=1)
    example = split.train[0]
    assert example["images"].shape == (1, 8, 32)
    words = {int(word_numbers(name, 1, 4096)[0]) for name in NAMES}
    shown = example["word_mask"]
    assert set(example["words"][shown].tolist()) <= words and len(words) == 10
    for place in range(4):
        digit = example["images"][:, :, 8 * place : 8 * place + 8]
        assert bool(digit.any()) == bool(shown[place])


def test_a_table_of_texts(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png")
    cut(picture(tmp_path / "cut.png", side=64))
    rows = [f'{i}.png,"a heart, of size {i}",p{i // 2}' for i in range(10)]
    path = table(
        tmp_path / "t.csv", "path,text,group", *rows, "cut.png,a,x", "no.png,a,y", "1.png,.,z"
    )
    split = image_texts(str(tmp_path), table=str(path), size=8, length=6, on_error="skip")
    assert (len(split.train), len(split.test)) == (8, 2)
    assert split.problems.counts() == {"unreadable file": 2, "missing text": 1}
    example = split.test[0]
    assert example["images"].shape == (1, 8, 8) and int(example["word_mask"].sum()) == 5
    groups = [{group for *_, group in part.pairs} for part in (split.train, split.test)]
    assert not groups[0] & groups[1]
    with pytest.raises(DataError, match=r"cut\.png: .*truncated"):
        image_texts(str(tmp_path), table=str(path))
    with pytest.raises(ValueError, match="expected numbers, or a folder"):
        image_texts(str(tmp_path))


def test_retrieval() -> None:
    similarity = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    found = retrieval_metrics(similarity, torch.eye(3).bool())
    assert found["recall_at_1"] == pytest.approx(1 / 3) and found["recall_at_5"] == 1
    assert found["recall_at_1_by_chance"] == pytest.approx(1 / 3)
    found = retrieval_metrics(similarity, torch.ones(3, 3).bool())
    assert found["recall_at_1"] == 1


def test_a_text_encoder_with_a_tokenizer_is_refused() -> None:
    """Words that are numbered by a hash would mean nothing to it."""
    with pytest.raises(ValueError, match="text_name is 'hf:bert'; expected words"):
        AdaptorRecipe.configure(numbers(), {"text_name": "hf:bert"})

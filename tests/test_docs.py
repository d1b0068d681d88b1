"""What the documents point to exists: links, paths in backticks, `make` words, decision notes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "kernels" / "README.md"]
)

FOLDERS = {"kernels", "sparseattn", "benchmarks", "tests", "docs", ".ci"}
ROOT_FILE = re.compile(r"\.?[\w-]+\.(md|toml|txt|ya?ml)")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)+/?|[\w.-]+/")  # no <op>, no *, no blanks
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"\bmake ([a-z-]+)\b")


def quoted(text: str) -> list[str]:
    """The words in single backticks; fenced blocks are programs, not prose."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def paths_in(text: str) -> list[str]:
    """Backticked words that look like paths of this repository."""
    words = [word.split("::")[0] for word in quoted(text)]
    below = [w for w in words if PATH.fullmatch(w) and w.split("/")[0] in FOLDERS]
    return below + [w for w in words if ROOT_FILE.fullmatch(w)]


def links_in(text: str) -> list[str]:
    """Link targets inside this repository, without their anchors."""
    targets = [target.split("#")[0] for target in LINK.findall(FENCE.sub("", text))]
    return [target for target in targets if target and ":" not in target]


def make_words(text: str) -> list[str]:
    """The targets of `make`, in backticks or in fenced blocks."""
    programs = "\n".join(FENCE.findall(text) + quoted(text))
    return MAKE.findall(programs)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_path_checks_find_what_they_should():
    text = "`docs/a.md` `kernels/` `setup.cfg` `fwd/bwd` `sparseattn/<op>.py` `log.md` `x.py`"
    assert paths_in(text) == ["docs/a.md", "kernels/", "log.md"]
    assert paths_in("`tests/test_a.py::test_b`\n```\n`docs/b.md`\n```\n") == ["tests/test_a.py"]
    assert links_in("[a](docs/a.md#b) [c](#d) [e](https://f.g) ![h](i.png)") == [
        "docs/a.md",
        "i.png",
    ]
    assert make_words("make up: `make test`\n```sh\nmake demo\n```\n") == ["demo", "test"]


@pytest.mark.parametrize("name", GUIDES)
def test_paths_exist(name):
    missing = [path for path in paths_in(read(name)) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_exist(name):
    folder = (ROOT / name).parent
    missing = [target for target in links_in(read(name)) if not (folder / target).exists()]
    assert not missing


@pytest.mark.parametrize("name", GUIDES)
def test_make_words_exist(name):
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
    assert set(make_words(read(name))) <= set(targets)


NOTES = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))


def test_decision_notes_are_numbered_consecutively():
    numbers = [name.split("-")[0] for name in NOTES]
    assert numbers == [f"{number:04}" for number in range(1, len(NOTES) + 1)]


@pytest.mark.parametrize("name", NOTES)
def test_decision_note_has_its_parts(name):
    text = read(f"docs/decisions/{name}")
    assert text.startswith(f"# {name.split('-')[0]} ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[:3] == ["Context", "Choice", "Price"]

"""From the word after --data to examples: a sample of an installed package, or a folder."""

from sparseattn.data.samples import SAMPLES
from sparseattn.data.split import Split


def image_classes(source: str, seed: int = 0) -> Split:
    """Return images with class labels.

    Raises:
        ValueError: there is no such sample.
    """
    if source in SAMPLES:
        return SAMPLES[source](seed)
    raise ValueError(f"data: source is {source!r}; expected one of {', '.join(SAMPLES)}")

"""Frozen encoders for Adaptor: any module, timm's, Hugging Face's, or two tiny random ones."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 4096  # rows of the table of the tiny text encoder; 0 is padding
_WIDTH = 64


def image_encoder(name: str) -> nn.Module:
    """Return an image encoder by name.

    "pixels" is a tiny convolutional net with random weights, the same each time; "timm:NAME" and
    "hf:NAME" have trained weights, which are downloaded; "timm-random:NAME" has random ones.
    """
    kind, _, rest = name.partition(":")
    if name == "pixels":
        return _fixed(RandomPixels)
    if kind in ("timm", "timm-random"):
        made: nn.Module = import_timm().create_model(rest, pretrained=kind == "timm", num_classes=0)
        return made
    if kind == "hf":
        return _from_hugging_face(rest)
    raise ValueError(
        f"Adaptor: image_name is {name!r}; expected pixels, timm:NAME, timm-random:NAME or hf:NAME"
    )


def text_encoder(name: str) -> nn.Module:
    """Return a text encoder by name: "words", tiny and random, or "hf:NAME", downloaded."""
    kind, _, rest = name.partition(":")
    if name == "words":
        return _fixed(RandomWords)
    if kind == "hf":
        return _from_hugging_face(rest)
    raise ValueError(f"Adaptor: text_name is {name!r}; expected words or hf:NAME")


class RandomPixels(nn.Module):
    """Patches of 4 x 4 grey pixels, two apart, through two random layers: [B, 64, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, _WIDTH, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W], whose channels are averaged."""
        out: Tensor = self.layers(images.mean(1, keepdim=True))
        return out


class RandomWords(nn.Module):
    """A random vector a word and one a place, 64 wide; up to 256 words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, _WIDTH)
        self.places = nn.Embedding(256, _WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode words int [B, N]; the mask is not used."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        out: Tensor = self.words(input_ids) + self.places(places)
        return out


def image_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return an encoder's features of images as tokens [B, N, C].

    timm's `forward_features` is used where there is one; maps [B, C, h, w] become tokens, and
    [B, h, w, C] too, where the encoder says that it is C wide (`num_features`).
    """
    run: Any = getattr(encoder, "forward_features", encoder)
    found = _tensor_of(run(images))
    if found.dim() == 4:
        width = getattr(encoder, "num_features", None)
        last = width == found.shape[3] != found.shape[1]
        found = found.flatten(1, 2) if last else found.flatten(2).mT
    return found


def text_features(encoder: nn.Module, words: Tensor, word_mask: Tensor) -> Tensor:
    """Return an encoder's features of words int [B, N] as tokens [B, N, C]."""
    return _tensor_of(encoder(input_ids=words, attention_mask=word_mask.long()))


def _tensor_of(output: Any) -> Tensor:
    found = getattr(output, "last_hidden_state", output)
    if not isinstance(found, Tensor) or found.dim() not in (3, 4):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"Adaptor: an encoder returns {what}; expected tokens [B, N, C] or a map, "
            "as a tensor or as last_hidden_state"
        )
    return found


def import_timm() -> Any:
    """Return the package timm, also beside a torchvision that is of another build than torch.

    That one fails at import, since its C library does not load and so its operators have no names.
    timm's models need the names only: they are declared, and nothing can call them.

    Raises:
        ImportError: it is not installed, or cannot be imported for another reason.
    """
    try:
        return _timm()
    except ImportError as error:
        raise ImportError(f"this model needs timm: {error}; pip install timm") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(f"timm cannot be imported: {error}") from error
    _declare_operators_of_torchvision()
    return _timm()


def _timm() -> Any:
    import timm.models.vision_transformer  # timm alone does not import its models

    return timm


@cache
def _declare_operators_of_torchvision() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # they live as long as it is kept
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _fixed(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def _from_hugging_face(name: str) -> nn.Module:
    from transformers import AutoModel

    made: nn.Module = AutoModel.from_pretrained(name)
    return made

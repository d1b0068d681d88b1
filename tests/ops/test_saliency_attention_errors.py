"""What saliency_attention says to wrong arguments."""

import pytest
import torch

from sparseattn import saliency_attention

Q, K = torch.zeros(2, 4, 9, 16), torch.zeros(2, 2, 9, 16)
S = torch.ones(2, 9)

WRONG = [
    (ValueError, {"saliency": torch.ones(2, 8)}, r"\[2, 8\]; expected \[B, Nk\], B=2"),
    (ValueError, {"saliency": torch.ones(2, 4, 9)}, r"expected \[B, G, Nk\], B=2 \(from k\), G=2"),
    (ValueError, {"saliency": torch.ones(9)}, r"saliency has shape \[9\]; expected"),
    (TypeError, {"saliency": torch.ones(2, 9).long()}, "saliency has dtype torch.int64"),
    (TypeError, {"saliency": 0.5}, r"saliency is 0.5 \(float\); expected a torch.Tensor"),
    (ValueError, {"saliency": S.to("meta")}, "saliency is on meta; expected the device of q"),
    (ValueError, {"keep": 0.0}, r"keep is 0.0; expected an int >= 0 or a float in \(0, 1\]"),
    (ValueError, {"keep": 1.5}, "keep is 1.5; expected"),
    (ValueError, {"keep": float("nan")}, "keep is nan; expected"),
    (ValueError, {"keep": -1}, "keep is -1; expected"),
    (TypeError, {"keep": True}, "keep is True"),
    (TypeError, {"keep": "all"}, "keep is 'all'"),
    (ValueError, {"key_mask": torch.ones(2, 8).bool()}, r"key_mask has shape \[2, 8\]"),
    (TypeError, {"key_mask": S}, "key_mask has dtype torch.float32; expected torch.bool"),
    (ValueError, {"always": -1}, "always is -1; expected an int >= 0"),
    (ValueError, {"always": 4}, r"always is 4; expected at most .*, K=3 \(from keep\)"),
    (TypeError, {"always": 0.5}, "always is 0.5"),
    (TypeError, {"always": torch.ones(9)}, "always has dtype torch.float32; expected torch.bool"),
    (ValueError, {"always": torch.ones(8).bool()}, r"always has shape \[8\]; expected \[Nk\]"),
    (TypeError, {"threshold": "high"}, "threshold is 'high'"),
    (ValueError, {"threshold": float("nan")}, "threshold is nan; expected a finite float"),
    (TypeError, {"log_bias": 1}, "log_bias is 1"),
    (TypeError, {"prune_queries": None}, "prune_queries is None"),
    (TypeError, {"scale": "large"}, "scale is 'large'"),
    (ValueError, {"scale": float("inf")}, "scale is inf"),
    (ValueError, {"passthrough": Q}, "passthrough is given; expected None without prune_queries"),
    (
        ValueError,
        {"prune_queries": True, "passthrough": K},
        r"passthrough has shape \[2, 2, 9, 16\]; expected \[B, H, Nq, D\]",
    ),
    (
        TypeError,
        {"prune_queries": True, "passthrough": Q.half()},
        "passthrough has dtype torch.float16; expected torch.float32",
    ),
    (ValueError, {"q": Q[:, :, :5], "prune_queries": True}, r"expected Nq = Nk .*, Nk=9"),
    (ValueError, {"k": K[:, :1]}, r"v has shape \[2, 2, 9, 16\]"),
    (TypeError, {"q": Q.half()}, "k has dtype torch.float32; expected the dtype of q"),
    (ValueError, {"impl": "cuda"}, "impl is 'cuda'; expected one of"),
    (
        NotImplementedError,
        {"q": Q.double(), "k": K.double(), "v": K.double(), "impl": "triton"},
        "impl='triton' cannot run this: dtype is float64",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("error", "wrong", "message"), WRONG)
def test_wrong_arguments_are_named(error, wrong, message):
    arguments = {"q": Q, "k": K, "v": K, "saliency": S, "keep": 3, **wrong}
    with pytest.raises(error, match=message) as caught:
        saliency_attention(**arguments)
    assert str(caught.value).startswith("saliency_attention: ")

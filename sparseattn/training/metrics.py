"""Metrics of test examples, from MONAI where it has them."""

import torch.nn.functional as F
from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy and AUROC, one class against the others and averaged over classes.

    logits [B, classes], labels int [B]. AUROC is that of the classes that occur.
    """
    from monai.metrics import compute_roc_auc

    present = labels.unique()
    truth = F.one_hot(labels, logits.shape[1])[:, present]
    found = {"accuracy": float((logits.argmax(1) == labels).float().mean())}
    if len(present) > 1:
        found["auroc"] = float(compute_roc_auc(logits.softmax(1)[:, present], truth))
    return found

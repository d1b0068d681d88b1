"""Metrics of test examples, from MONAI where it has them."""

import math

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


def dice_metrics(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Return the Dice coefficient of each class but 0 over all voxels, and `dice`, their mean.

    predicted, labels: int [B, X, Y, Z]. A class that is in neither is left out.
    """
    from monai.metrics import compute_dice

    found = {}
    for number in range(1, classes):
        pair = [(voxels == number).view(1, 1, -1) for voxels in (predicted, labels)]
        if pair[0].any() or pair[1].any():
            found[f"dice_{number}"] = float(compute_dice(*pair, ignore_empty=False))
    mean = sum(found.values()) / len(found) if found else math.nan
    return {"dice": mean, **found}


def retrieval_metrics(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """Return recall at 1 and 5: the share of rows with a right column among the best ones.

    similarity [B, B], relevant bool [B, B]. `recall_at_1_by_chance` is what guessing gives.
    """
    found = {}
    for depth in (1, 5):
        best = similarity.topk(min(depth, similarity.shape[1]), dim=1).indices
        found[f"recall_at_{depth}"] = float(relevant.gather(1, best).any(1).float().mean())
    found["recall_at_1_by_chance"] = float(relevant.float().mean())
    return found

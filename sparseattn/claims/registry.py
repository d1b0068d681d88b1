"""The checks by name, and what cannot be checked."""

from sparseattn.claims import adaptor, batch_mates, encoder, memory, pixels, saliency, step_time
from sparseattn.claims.finding import Check, Effort, Finding


def on_hospital_data(effort: Effort) -> Finding:
    """Say what is out of reach: nothing is measured."""
    return Finding(
        "All: AUC, Dice and accuracy on hospital data, as the papers report them",
        "MIMIC-CXR, CheXpert, CBIS-DDSM, BTCV and the cytometry sets cannot be shipped",
        "cannot be shown here",
    )


CHECKS: dict[str, Check] = {
    "V1": adaptor.trainable_share,
    "V2": pixels.digits,
    "V2b": pixels.nuclei,
    "V3": memory.memory_slopes,
    "V4": step_time.step_times,
    "V5": encoder.sparse_encoder,
    "V6": saliency.learned_saliency,
    "V7": batch_mates.batch_mates,
    "V8": adaptor.frozen_bits,
    "V9": adaptor.shuffled_pairs,
    "V10": on_hospital_data,
}

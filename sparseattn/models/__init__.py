"""Reference models: thin, one file each, made of our layers and ops."""

try:
    import huggingface_hub  # noqa: F401  the models save and load through its mixin
except ImportError as error:
    raise ImportError('models need huggingface_hub; pip install "sparseattn[train]"') from error

from sparseattn.models.adaptor import Adaptor, AdaptorConfig, AdaptorOutput
from sparseattn.models.adaptor_classifier import AdaptorClassifier, AdaptorClassifierOutput
from sparseattn.models.hyspark import (
    HySparK,
    HySparKConfig,
    HySparKOutput,
    HySparKReconstruction,
)
from sparseattn.models.hyspark_segmenter import HySparKSegmenter, HySparKSegmenterOutput
from sparseattn.models.keep_rule import KeepRule
from sparseattn.models.miram import (
    MIRAM,
    MIRAMConfig,
    MIRAMOutput,
    MIRAMReconstruction,
)
from sparseattn.models.miram_classifier import MIRAMClassifier, MIRAMClassifierOutput
from sparseattn.models.sparseattnnet import (
    SparseAttnNet,
    SparseAttnNetConfig,
    SparseAttnNetOutput,
)
from sparseattn.models.sparsecontrast import (
    SparseContrast,
    SparseContrastClassifier,
    SparseContrastClassifierOutput,
    SparseContrastConfig,
    SparseContrastOutput,
    info_nce,
    nt_xent,
)
from sparseattn.models.views import two_views

__all__ = [
    "MIRAM",
    "Adaptor",
    "AdaptorClassifier",
    "AdaptorClassifierOutput",
    "AdaptorConfig",
    "AdaptorOutput",
    "HySparK",
    "HySparKConfig",
    "HySparKOutput",
    "HySparKReconstruction",
    "HySparKSegmenter",
    "HySparKSegmenterOutput",
    "KeepRule",
    "MIRAMClassifier",
    "MIRAMClassifierOutput",
    "MIRAMConfig",
    "MIRAMOutput",
    "MIRAMReconstruction",
    "SparseAttnNet",
    "SparseAttnNetConfig",
    "SparseAttnNetOutput",
    "SparseContrast",
    "SparseContrastClassifier",
    "SparseContrastClassifierOutput",
    "SparseContrastConfig",
    "SparseContrastOutput",
    "info_nce",
    "nt_xent",
    "two_views",
]

"""Small transformers for the tests: generated ones (`build`) and stock ones (`build_stock`)."""

from tests.models.attention import RowWiseCore
from tests.models.network import Dllm, ModelOutput, build, logits_of
from tests.models.spec import (
    ATTENTIONS,
    CAUSALS,
    MIXER_PLACES,
    MIXERS,
    NEAR_MISSES,
    SPELLING_FIELDS,
    UNMATCHED_ATTENTIONS,
    ModelSpec,
)
from tests.models.stock import IMPLEMENTATIONS, STOCK, build_stock

__all__ = [
    "ATTENTIONS",
    "CAUSALS",
    "IMPLEMENTATIONS",
    "MIXERS",
    "MIXER_PLACES",
    "NEAR_MISSES",
    "SPELLING_FIELDS",
    "STOCK",
    "UNMATCHED_ATTENTIONS",
    "Dllm",
    "ModelOutput",
    "ModelSpec",
    "RowWiseCore",
    "build",
    "build_stock",
    "logits_of",
]

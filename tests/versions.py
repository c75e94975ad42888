"""What older versions of torch cannot do."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)

flex_attention = pytest.mark.skipif(
    TORCH < "2.12", reason="torch 2.11 cuts the graph at transformers' flex masks"
)
grouped_experts = pytest.mark.skipif(
    TORCH < "2.12", reason="torch 2.11 cuts the graph at lazy imports in transformers' experts"
)
ignored_logging = pytest.mark.skipif(
    TORCH < "2.12", reason="torch 2.11 fails on functions among what Dynamo is to ignore"
)
recast_weights = pytest.mark.skipif(
    TORCH < "2.12", reason="torch 2.11 runs a model that was cast by the graph of its old dtype"
)

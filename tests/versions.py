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

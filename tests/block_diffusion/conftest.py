"""One capture of each tiny model for the tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.block_diffusion.tiny import share_graphs


@pytest.fixture(autouse=True, scope="package")
def shared_graphs() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(recompile_limit=256), pytest.MonkeyPatch.context() as patch:
        share_graphs(patch)
        yield
    torch.set_num_threads(threads)

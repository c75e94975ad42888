"""A model split over ranks decodes the tokens of one process, by the same decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.cases import BLOCK_CASES, CASES, decode_case, decode_cases
from tests.distributed.ranks import run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="no gloo in this build of torch"
)
REST = sorted({*CASES, *BLOCK_CASES} - {"focus-evict"})


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, ["focus-evict"]),
        (4, ["focus-dllm"]),
        pytest.param(2, REST, marks=pytest.mark.long),
        pytest.param(4, ["dual-cache", "adaptive"], marks=pytest.mark.long),
    ],
)
def test_tokens_and_decisions_are_those_of_one_process(
    ranks: int, cases: list[str], tmp_path: Path
) -> None:
    found = run(ranks, tmp_path, decode_cases, cases)
    for result in found:
        if isinstance(result, Exception):
            raise result
    for case in cases:
        tokens, decisions = decode_case(case, over_ranks=False)
        assert any(call[0] != "refresh" for call in decisions), "nothing but refreshes ran"
        for result in found:
            assert torch.equal(result[case][0], tokens), case
            assert result[case][1] == decisions, case

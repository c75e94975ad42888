"""Sampling loops for masked diffusion language models, alone and in batches, and a live view."""

from focus_compile.block_diffusion.batch_generator import BatchGenerator, BlockStep, Completion
from focus_compile.decode.sampler import DecodeProgress, GenerateResult, generate

__all__ = [
    "BatchGenerator",
    "BlockStep",
    "Completion",
    "DecodeProgress",
    "GenerateResult",
    "generate",
]

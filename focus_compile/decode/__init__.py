"""Sampling loops for masked diffusion language models, and a live view of them."""

from focus_compile.decode.sampler import DecodeProgress, GenerateResult, generate

__all__ = ["DecodeProgress", "GenerateResult", "generate"]

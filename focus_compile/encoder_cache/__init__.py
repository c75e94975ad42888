"""Forwards that attend to a cache which they read and do not write: the decoder of an
encoder-decoder dLLM such as DiffusionGemma, called on a canvas of tokens.

All tokens of the canvas are undecided until the loop leaves it, since any may be drawn anew: all
rows are computed in every call. What can be left out are keys of the cache, in the layers that read
the whole of it.
"""

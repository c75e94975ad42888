"""Block diffusion: blocks of masks decoded one after another, each finished one exact for ever."""

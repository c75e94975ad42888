"""Generated architectures and trajectories, judged against dense attention and the oracle.

`python -m tests.fuzz --minutes 60` searches; `tests/fuzz/corpus` keeps what it found.
"""

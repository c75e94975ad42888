"""Trains the tiny diffusion LMs of the tests and benchmarks: texts, tasks, ladder, evaluation."""

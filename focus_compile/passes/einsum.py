"""Two-operand einsum as a matmul, so that every spelling of attention shows the same ops."""

from __future__ import annotations

import torch

__all__ = ["einsum_as_matmul"]


def einsum_as_matmul(
    equation: str, operands: list[torch.Tensor], *, path: list[int] | None = None
) -> torch.Tensor:
    """`einsum` of two operands with one contracted and one free axis each, as permuted matmul.

    Anything else is left to torch's own decomposition.
    """
    axes = _matmul_axes(equation.replace(" ", ""))
    if len(operands) != 2 or axes is None:
        return torch.ops.aten.einsum.default.decompose(equation, operands, path=path)
    left, right, out = axes
    product = torch.matmul(operands[0].permute(left), operands[1].permute(right))
    return product.permute(out)


def _matmul_axes(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """Permutations of both operands and of the product, or None if this is not a matmul."""
    if "->" not in equation or "." in equation:
        return None
    inputs, out = equation.split("->")
    terms = inputs.split(",")
    if len(terms) != 2 or any(len(set(t)) != len(t) for t in (*terms, out)):
        return None
    a, b = terms
    batch = [x for x in a if x in b and x in out]
    summed = [x for x in a if x in b and x not in out]
    rows = [x for x in a if x not in b]
    columns = [x for x in b if x not in a]
    if not (len(summed) == len(rows) == len(columns) == 1):
        return None
    if sorted(out) != sorted(batch + rows + columns):
        return None
    left = [a.index(x) for x in (*batch, *rows, *summed)]
    right = [b.index(x) for x in (*batch, *summed, *columns)]
    product = [*batch, *rows, *columns]
    return left, right, [product.index(x) for x in out]

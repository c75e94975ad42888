"""matmul, softmax, matmul: attention written out, with scores scaled and masked in any order
that equals softmax(q k^T * scale + mask) v.

Scale: `*` or `/` by a number, on the scores, on q or on k. Mask: added, `masked_fill` or `where`
with a constant. Products: matmul, bmm (heads flattened into the batch) or baddbmm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from focus_compile.passes.graph_tools import arg, op_name, position, shape_of
from focus_compile.patterns.match import (
    CASTS,
    DROPOUT,
    NEGLIGIBLE,
    AttentionMatch,
    MaskTerm,
    Miss,
    look_through,
)

__all__ = ["MatmulSoftmaxMatmul"]

PRODUCTS = {"matmul.default": (0, 1), "bmm.default": (0, 1), "baddbmm.default": (1, 2)}
SCALINGS = {"mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar"}
LONGEST_CHAIN = 16


class MatmulSoftmaxMatmul:
    """softmax over the last axis of a product, consumed by one other product."""

    name = "softmax"

    @staticmethod
    def is_anchor(node: fx.Node) -> bool:
        return op_name(node) in ("softmax.int", "_softmax.default")

    @staticmethod
    def match(node: fx.Node) -> AttentionMatch:
        """Raises Miss: the condition that failed."""
        source = arg(node, 0)
        assert isinstance(source, fx.Node)
        rank = len(shape_of(source))
        if position(int(arg(node, 1)), rank) != rank - 1:
            raise Miss("softmax is not over the last axis")
        scores, scale, mask = _unwrap_scores(source)
        query, key = _operands(scores, "scores")
        if op_name(scores) == "baddbmm.default":
            scale, mask = _absorb_baddbmm(scores, scale, mask)
        output, value = _consumer(node)
        query, by_query = _peel_scale(query)
        key, by_key = _peel_scale(key)
        return AttentionMatch(
            anchor=node,
            output=output,
            query=query,
            key=key,
            value=value,
            scale=scale * by_query * by_key,
            spelling=f"{MatmulSoftmaxMatmul.name} ({op_name(scores).split('.')[0]})",
            mask=mask,
            key_is_transposed=True,
        )

    @staticmethod
    def examples() -> Iterator[tuple[str, Any, bool]]:
        """(what, function of q, k, v [B, H, T, d], whether it is a hit)."""
        hide = torch.rand(6, 6) > 0.7

        def plain(q: Any, k: Any, v: Any) -> Any:
            return (q @ k.mT * 0.25).softmax(-1) @ v

        def filled(q: Any, k: Any, v: Any) -> Any:
            return (q @ k.mT / 4).masked_fill(hide, float("-inf")).softmax(-1) @ v

        def added(q: Any, k: Any, v: Any) -> Any:
            return ((q / 4) @ k.mT + hide * -1e9).softmax(-1, dtype=torch.float32).to(q.dtype) @ v

        def flattened(q: Any, k: Any, v: Any) -> Any:
            b, h, t, d = q.shape
            flat = (x.reshape(b * h, t, d) for x in (q, k, v))
            fq, fk, fv = flat
            return torch.bmm(torch.bmm(fq, fk.mT).softmax(-1), fv).view(b, h, t, d)

        def softcap(q: Any, k: Any, v: Any) -> Any:
            return ((q @ k.mT).tanh() * 5).softmax(-1) @ v

        def over_queries(q: Any, k: Any, v: Any) -> Any:
            return (q @ k.mT).softmax(-2) @ v

        def probabilities_reused(q: Any, k: Any, v: Any) -> Any:
            p = (q @ k.mT).softmax(-1)
            return p @ v + p.sum()

        for name, function in (("plain", plain), ("masked_fill", filled), ("additive", added)):
            yield name, function, True
        yield "flattened heads", flattened, True
        for name, function in (("softcap", softcap), ("over queries", over_queries)):
            yield name, function, False
        yield "probabilities reused", probabilities_reused, False


def _unwrap_scores(node: fx.Node) -> tuple[fx.Node, float, MaskTerm | None]:
    """Walk from the softmax's input to the product, collecting scale and mask."""
    scale, mask = 1.0, None
    for _ in range(LONGEST_CHAIN):
        node = _regrouped(look_through(node))
        name = op_name(node)
        if name in SCALINGS:
            scale *= _number(node)
            node = arg(node, 0)
            continue
        step = _mask_step(node, name)
        if step is None:
            return node, scale, mask
        if mask is not None:
            raise Miss("the scores are masked twice")
        if scale != 1.0:
            raise Miss("the mask is scaled with the scores")
        node, mask = step
    raise Miss(f"more than {LONGEST_CHAIN} ops between product and softmax")


def _regrouped(node: fx.Node) -> fx.Node:
    """The matrices behind a reshape that only merges or splits the axes in front of them."""
    if op_name(node) == "reshape.default":
        source = arg(node, 0)
        if len(shape_of(source)) >= 3 and shape_of(source)[-2:] == shape_of(node)[-2:]:
            return look_through(source)
    return node


def _mask_step(node: fx.Node, name: str) -> tuple[fx.Node, MaskTerm] | None:
    if name == "add.Tensor":
        scores, mask = _split_sum(node)
        return scores, MaskTerm("add", mask)
    if name == "masked_fill.Scalar":
        return arg(node, 0), MaskTerm("not", arg(node, 1), _fill(arg(node, 2)))
    if name == "where.ScalarOther":
        return arg(node, 1), MaskTerm("bool", arg(node, 0), _fill(arg(node, 2)))
    if name in ("where.self", "masked_fill.Tensor"):
        return _tensor_fill(node, name)
    return None


def _tensor_fill(node: fx.Node, name: str) -> tuple[fx.Node, MaskTerm]:
    condition, kept, other = (arg(node, index) for index in range(3))
    kind = "bool"
    if name == "masked_fill.Tensor":
        condition, kept, kind = kept, condition, "not"
    return kept, MaskTerm(kind, condition, _fill(_constant(other)))


def _constant(node: Any) -> float:
    """The number in a 0-d constant tensor (`full`, `scalar_tensor`, or a captured constant)."""
    node = look_through(node)
    if op_name(node) == "full.default":
        return float(arg(node, 1))
    if op_name(node) == "scalar_tensor.default":
        return float(arg(node, 0))
    if node.op == "get_attr":
        tensor = getattr(node.graph.owning_module, str(node.target))
        if tensor.numel() == 1:
            return float(tensor)
    raise Miss("the masked scores are filled with a tensor that is not a constant")


def _fill(value: Any) -> float:
    number = float(value)
    if number > NEGLIGIBLE:
        raise Miss(f"masked scores are filled with {number:g}, which still counts in the softmax")
    return number


def _split_sum(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, mask) of an addition: exactly one side leads to a product of two activations."""
    if node.kwargs.get("alpha", 1) != 1:
        raise Miss("a multiple of the mask is added to the scores")
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        raise Miss("a number is added to the scores")
    leads = [_leads_to_product(a), _leads_to_product(b)]
    if leads[0] == leads[1]:
        raise Miss("cannot tell scores from mask in a sum")
    return (a, b) if leads[0] else (b, a)


def _leads_to_product(node: fx.Node) -> bool:
    for _ in range(LONGEST_CHAIN):
        node = look_through(node, CASTS | SCALINGS | {"reshape.default"})
        if op_name(node) in PRODUCTS:
            return True
        if op_name(node) not in ("masked_fill.Scalar", "add.Tensor"):
            return False
        node = arg(node, 0)
    return False


def _number(node: fx.Node) -> float:
    factor = arg(node, 1)
    if isinstance(factor, fx.Node):
        raise Miss("the scale is a tensor")
    return float(factor) if op_name(node).startswith("mul") else 1 / float(factor)


def _operands(node: fx.Node, what: str) -> tuple[fx.Node, fx.Node]:
    where = PRODUCTS.get(op_name(node))
    if where is None:
        raise Miss(f"the {what} come from {op_name(node)}, expected a matrix product")
    return arg(node, where[0]), arg(node, where[1])


def _absorb_baddbmm(
    node: fx.Node, scale: float, mask: MaskTerm | None
) -> tuple[float, MaskTerm | None]:
    """baddbmm(input, q, k, beta, alpha) = beta * input + alpha * q k."""
    named: dict[str, Any] = dict(node.kwargs)
    beta, alpha = named.get("beta", 1), named.get("alpha", 1)
    if beta == 0:
        return scale * float(alpha), mask
    if mask is not None or scale != 1.0 or beta != 1:
        raise Miss("baddbmm adds a bias that is scaled or masked again")
    return float(alpha), MaskTerm("add", arg(node, 0))


def _peel_scale(node: fx.Node) -> tuple[fx.Node, float]:
    """A number multiplied into q or k."""
    factor, inner = 1.0, look_through(node)
    while op_name(inner) in SCALINGS and not isinstance(arg(inner, 1), fx.Node):
        factor *= _number(inner)
        inner = look_through(arg(inner, 0))
        node = inner
    return node, factor


def _consumer(softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The product that consumes the probabilities, and its value operand."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise Miss(f"the attention probabilities have {len(users)} users, expected one")
        if op_name(users[0]) not in CASTS and _regrouped(users[0]) is users[0]:
            break
        node = users[0]
    output = users[0]
    if op_name(output) == "dropout.default":
        raise Miss(DROPOUT)
    if op_name(output) not in ("matmul.default", "bmm.default") or arg(output, 0) is not node:
        raise Miss(f"the attention probabilities are consumed by {op_name(output)}")
    return output, arg(output, 1)

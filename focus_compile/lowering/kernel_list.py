"""What a compiled program launches, read from the code that Inductor wrote for it.

The wrapper calls one kernel or op a line, C++ and Triton alike. What a fused kernel computes stands
in the comment above it ("Original ATen"), or, in C++, in its name.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering

from focus_compile.kernels.library import ATTENTION

__all__ = ["Launch", "generated_code", "launches_in", "layers_of", "summary"]

VIEWS = frozenset(
    "_unsafe_view alias arange clone detach expand permute reshape select slice split "
    "split_with_sizes squeeze t transpose unsqueeze view".split()
)
"""Left out of a summary: they move nothing by themselves."""
_KERNEL_SOURCE = re.compile(r"r?('{3}|\"{3}).*?\1", re.DOTALL)
_DEFINITION = re.compile(r"^(\w+) = async_compile\.\w+\(")
_COMMENT = re.compile(r"^\s*# .*Original ATen: \[(.*?)\]")
_CALL = re.compile(
    r"^\s+(?:\w+ = )?(?:"
    r"extern_kernels\.(?P<extern>\w+)"
    r"|(?:torch\.ops\.(?P<library>\w+)|aten|inductor_ops)\.(?P<op>\w+)(?:\.\w+)?"
    r"|(?P<kernel>\w+)(?:\.run)?"
    r")\("
)
_LINEAR = re.compile(r"(^|_)(bias_)?(badd|add)?b?mm(_|$)|linear")


@dataclass(frozen=True, slots=True)
class Launch:
    """One line of a compiled program. A hand-written op counts as one, whatever it launches.

    kind: "fused" (a kernel that Inductor wrote), "linear" (a matrix product), "op" (hand-written,
    of this package) or "extern" (any other op). ops: what a fused kernel computes.
    """

    kind: str
    name: str
    ops: tuple[str, ...] = ()


@contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collects the code of everything that Inductor compiles, or takes from its cache, inside.

    As torch._inductor.utils.run_and_get_code, which would reset Dynamo and all backends.
    """
    code: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", code.append):
        yield code


def launches_in(code: str) -> list[Launch]:
    """The launches of one generated module, in order."""
    found: list[Launch] = []
    computed: dict[str, tuple[str, ...]] = {}
    above: tuple[str, ...] = ()
    for line in _KERNEL_SOURCE.sub("", code).splitlines():
        comment = _COMMENT.match(line)
        if comment:
            above = tuple(_plain(name) for name in comment.group(1).split(", ") if name)
            continue
        defined = _DEFINITION.match(line)
        if defined:
            computed[defined.group(1)] = above or _ops_in_name(defined.group(1))
            above = ()
            continue
        launch = _launch(line, above, computed)
        if launch is not None:
            found.append(launch)
            above = ()
    return found


def _launch(
    line: str, above: tuple[str, ...], computed: dict[str, tuple[str, ...]]
) -> Launch | None:
    call = _CALL.match(line)
    if call is None:
        return None
    kernel, op = call["kernel"], call["extern"] or call["op"]
    if kernel is not None:
        if kernel not in computed:
            return None
        template = "_tem_" in kernel or "gemm" in kernel.lower()
        return Launch("linear" if template else "fused", kernel, above or computed[kernel])
    if call["library"] == "focus_compile":
        return Launch("op", op)
    return Launch("linear" if _LINEAR.search(op) else "extern", op)


def _plain(name: str) -> str:
    return name.removeprefix("aten.").removeprefix("prims.")


def _ops_in_name(kernel: str) -> tuple[str, ...]:
    """`cpp_fused_add_index_select_3` computes add and index_select; the longest names win."""
    text = re.sub(r"^.*?fused_|_\d+$", "", kernel)
    words, ops, at = text.split("_"), [], 0
    while at < len(words):
        ends = range(len(words), at, -1)
        end = next((e for e in ends if "_".join(words[at:e]) in _known_ops()), at + 1)
        ops.append("_".join(words[at:end]))
        at = end
    return tuple(op for op in ops if op)


@functools.cache
def _known_ops() -> frozenset[str]:
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.partition("::")[2].partition(".")[0] for name in names)


def layers_of(launches: Sequence[Launch], regions: Sequence[str]) -> dict[str, list[Launch]]:
    """What a typical layer of each region launches: from the attention before it to its own.

    regions: of every layer. Empty where attention is not called once a layer; the first layer,
    which has none before it, stands for no region.
    """
    ends = [at for at, launch in enumerate(launches) if launch.name in ATTENTION]
    if len(ends) != len(regions):
        return {}
    seen: dict[str, list[tuple[Launch, ...]]] = {}
    for layer in range(len(regions) - 1, 0, -1):
        own = tuple(launches[ends[layer - 1] + 1 : ends[layer] + 1])
        seen.setdefault(regions[layer], []).append(own)
    typical: dict[str, list[Launch]] = {}
    for region in dict.fromkeys(regions[1:]):
        alike = Counter(_counts(layer) for layer in seen[region])
        common = alike.most_common(1)[0][0]
        typical[region] = list(next(x for x in seen[region] if _counts(x) == common))
    return typical


def _counts(launches: Sequence[Launch]) -> str:
    return summary(launches, ops=True)


def summary(launches: Sequence[Launch], *, ops: bool = False) -> str:
    """Such as `16 launches: 7 fused (mul+rsqrt, ...), 7 linear, select_blocks`.

    ops: say what the fused kernels compute.
    """
    fused = [launch for launch in launches if launch.kind == "fused"]
    linear = sum(launch.kind == "linear" for launch in launches)
    others = Counter(launch.name for launch in launches if launch.kind in ("op", "extern"))
    parts = []
    if fused:
        what = ", ".join("+".join(_without_views(launch.ops)) for launch in fused)
        parts.append(f"{len(fused)} fused" + (f" ({what})" if ops else ""))
    parts += [f"{linear} linear"] if linear else []
    parts += [name if count == 1 else f"{count} {name}" for name, count in others.items()]
    return f"{len(launches)} launches: {', '.join(parts)}" if parts else "no launches"


def _without_views(ops: Sequence[str]) -> list[str]:
    return [op for op in ops if op not in VIEWS] or ["copy"]

"""What becomes of stock models: `python -m focus_compile.coverage`.

Tiny models of every family are built with random weights, compiled, and called as a decoding loop
calls them, at two lengths: a prompt with masks, then the same with one more of them decided in each
call. "plan" means that the last call computed some rows only, at both lengths, and that the
first-run check of rows against the model passed; the shape of the graph decides that, not the size
of the model.
"""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from focus_compile.plan import FRAGMENT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from focus_compile.runtime.record import StepRecord

__all__ = ["FAMILIES", "IMPLEMENTATIONS", "WAYS", "Coverage", "Family", "Way", "build", "cover"]

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
VOCABULARY = 40
MASK = VOCABULARY - 1
LENGTHS = (24, 32)
BLOCK = 8
CALLS = 3
"""Of each length: some options of transformers change the graph in the first call."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
_DECODER = {"num_key_value_heads": 1, "use_cache": False}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Family:
    """A stock transformers class. options: of its config, beside common sizes; decoder: causal
    unless told otherwise, and able to take a block-causal mask."""

    prefix: str
    model: str
    options: dict[str, Any]
    decoder: bool = False


FAMILIES = {
    "eurobert": Family(
        "EuroBert",
        "EuroBertForMaskedLM",
        {**_SPECIAL, "num_key_value_heads": 1, "mask_token_id": MASK},
    ),
    "bert": Family("Bert", "BertForMaskedLM", {}),
    "roberta": Family("Roberta", "RobertaForMaskedLM", {}),
    "modernbert": Family(
        "ModernBert",
        "ModernBertForMaskedLM",
        {
            **_SPECIAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 16,
            "global_attn_every_n_layers": 3,
        },
    ),
    "llama": Family("Llama", "LlamaForCausalLM", _DECODER, decoder=True),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", _DECODER, decoder=True),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}, decoder=True),
    "qwen3_moe": Family(
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {**_DECODER, **_EXPERTS, "head_dim": 16},
        decoder=True,
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        "Qwen2MoeForCausalLM",
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 24},
        decoder=True,
    ),
}


@dataclass(frozen=True)
class Way:
    """A way to call a model other than with ids alone: what else is passed, and what is done to the
    model and asked of torch.compile before."""

    family: str
    inputs: Callable[[Tensor], dict[str, Any]] = lambda ids: {}
    training: bool = False
    compile: Mapping[str, Any] = field(default_factory=dict)


WAYS = {
    "attention_mask": Way("llama", lambda ids: {"attention_mask": ids.new_ones(ids.shape)}),
    "position_ids": Way("llama", lambda ids: {"position_ids": (ids * 0).cumsum(1) + 3}),
    "output_hidden_states": Way("eurobert", lambda ids: {"output_hidden_states": True}),
    "output_attentions": Way("eurobert", lambda ids: {"output_attentions": True}),
    "labels": Way("eurobert", lambda ids: {"labels": ids}),
    "use_cache": Way("llama", lambda ids: {"use_cache": True}),
    "logits_to_keep": Way("llama", lambda ids: {"logits_to_keep": BLOCK}),
    "train(), dropout 0": Way("llama", training=True),
    "train(), dropout .1": Way("bert", training=True),
    "dynamic=True": Way("llama", compile={"dynamic": True}),
}
"""Tried with SDPA only."""


@dataclass(frozen=True)
class Coverage:
    """What became of one family with one attention implementation.

    attention: "bidirectional", "block-causal", or one of `WAYS`; outcome: "plan", "partial" (at one
    length only, or in some of several graphs) or "refused"; reason: of what is not planned.
    """

    family: str
    implementation: str
    attention: str
    device: str
    outcome: str
    reason: str = ""


def build(name: str, implementation: str = "sdpa", **options: Any) -> nn.Module:
    """A tiny model of a family in eval mode, its weights as transformers draws them.

    options override the config; decoders are bidirectional unless `is_causal=True`.
    """
    import transformers

    family = FAMILIES[name]
    own = {**_COMMON, **({"is_causal": False} if family.decoder else {}), **family.options}
    config = getattr(transformers, f"{family.prefix}Config")(**{**own, **options})
    made: nn.Module = getattr(transformers, family.model)._from_config(
        config, attn_implementation=implementation
    )
    if name.endswith("_moe"):
        made.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    return made.eval()


def cover(
    device: str = "cpu",
    lowering: str = "eager",
    jobs: int = 1,
    families: Sequence[str] = tuple(FAMILIES),
    implementations: Sequence[str] = IMPLEMENTATIONS,
) -> Iterator[Coverage]:
    """Try families in implementations, one result at a time, in `jobs` processes."""
    cells = [
        (name, implementation, attention, device, lowering)
        for name, implementation, attention in _cells()
        if name in families and implementation in implementations
    ]
    if jobs == 1:
        yield from (_tried(cell) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        yield from pool.map(_tried, cells)


def _cells() -> Iterator[tuple[str, str, str]]:
    """(family, implementation, attention) of everything that is tried."""
    for name, family in FAMILIES.items():
        for implementation in IMPLEMENTATIONS:
            yield name, implementation, "bidirectional"
            if family.decoder:
                yield name, implementation, "block-causal"
    for way, how in WAYS.items():
        yield how.family, "sdpa", way


def _tried(cell: tuple[str, str, str, str, str]) -> Coverage:
    name, implementation, attention, device, _ = cell
    return Coverage(name, implementation, attention, device, *_try(*cell))


def _try(
    name: str, implementation: str, attention: str, device: str, lowering: str
) -> tuple[str, str]:
    import torch

    from focus_compile.passes.block_causality import block_causal_mask

    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, implementation).to(device)
    way = WAYS.get(attention, Way(name))
    model.train(way.training)
    options: dict[str, Any] = {"mask_token_id": MASK, "block_length": BLOCK, "lowering": lowering}
    blocks = attention == "block-causal"
    if blocks:
        options |= {"policy": "focus-evict", "evict_layer": 1}
    else:
        options |= {"key_block": 4, "sink_tokens": 4, "dense_layers": 0}
    focus = torch.compile(model, backend="focus", options=options, **way.compile)

    def call(ids: Tensor) -> object:
        if not blocks:
            return focus(ids, **way.inputs(ids))
        length = ids.shape[1]
        mask: Any = block_causal_mask(length, BLOCK, ids.device)
        if implementation == "flex_attention":
            mask = _flex_mask(length, device)
        positions = torch.arange(length, device=ids.device)[None]
        return focus(ids, attention_mask=mask, position_ids=positions, use_cache=False)

    outcomes = [_decode(call, length, device) for length in LENGTHS]
    reasons = [reason for _, reason in outcomes if reason]
    if not reasons:
        return "plan", ""
    some = any(stepped for stepped, _ in outcomes)
    return ("partial" if some else "refused"), reasons[0]


def _sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query // BLOCK >= key // BLOCK


def _flex_mask(length: int, device: str) -> object:
    """The block-causal mask as flex attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_sees, None, None, length, length, device=device)


def _decode(call: Callable[[Tensor], object], length: int, device: str) -> tuple[bool, str]:
    """(whether some graph was stepped, why not all were)."""
    import torch

    import focus_compile

    truth = torch.randint(3, MASK, (1, length), generator=torch.Generator().manual_seed(0))
    ids = truth.to(device)
    ids[:, -BLOCK:] = MASK
    with warnings.catch_warnings(), torch.no_grad(), focus_compile.record() as history:
        warnings.simplefilter("ignore")
        try:
            for decided in range(CALLS):
                before = len(history)
                call(ids.clone())
                ids[:, decided - BLOCK] = truth[:, decided - BLOCK]
        except Exception as error:  # of any kind: a model that does not run is a row of the table
            return False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    last = history[before:]
    return any(entry.program == "step" for entry in last), _why_not_stepped(last)


def _why_not_stepped(records: list[StepRecord]) -> str:
    parts = [entry for entry in records if entry.why != FRAGMENT.reason]
    exact = [entry.why for entry in parts if entry.program != "step"]
    return exact[0] if exact else "" if records else "no graph reached the backend"


def _chosen(text: str, known: Collection[str]) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(known)}")
    return names


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lowering: Annotated[str, typer.Option(help="eager, or inductor as in use.")] = "eager",
    jobs: Annotated[int, typer.Option(min=1, help="Processes to try them in.")] = 1,
    families: Annotated[str, typer.Option(help="Of them only.")] = ",".join(FAMILIES),
    implementations: Annotated[str, typer.Option(help="Likewise.")] = ",".join(IMPLEMENTATIONS),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result here.")
    ] = None,
) -> None:
    """Which stock models are accelerated, and why others are not."""
    from rich.console import Console
    from rich.table import Table

    from focus_compile.demo import environment

    chosen = _chosen(families, FAMILIES), _chosen(implementations, IMPLEMENTATIONS)
    console = Console()
    found: list[Coverage] = []
    with console.status("compiling tiny models") as status:
        for one in cover(device, lowering, jobs, *chosen):
            found.append(one)
            status.update(f"{one.family}, {one.implementation}, {one.attention}: {one.outcome}")
    if markdown:
        print(_markdown(found))
    else:
        table = Table("family", "implementation", "attention", "outcome", "reason")
        for one in found:
            table.add_row(one.family, one.implementation, one.attention, one.outcome, one.reason)
        console.print(table)
    if json_file is not None:
        result = {"environment": environment.describe(), "rows": [asdict(one) for one in found]}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _markdown(found: list[Coverage]) -> str:
    """A row a family and attention or way, a column an implementation, then the reasons."""
    lines = [
        f"| {found[0].device} | | {' | '.join(IMPLEMENTATIONS)} |",
        "|---|---|" + "---|" * len(IMPLEMENTATIONS),
    ]
    reasons: list[str] = []
    by_key = {(one.family, one.attention, one.implementation): one for one in found}
    for family, attention in dict.fromkeys((one.family, one.attention) for one in found):
        cells = []
        for implementation in IMPLEMENTATIONS:
            one = by_key.get((family, attention, implementation))
            if one is None:
                cells.append("–")
                continue
            if one.reason and one.reason not in reasons:
                reasons.append(one.reason)
            note = f" ({reasons.index(one.reason) + 1})" if one.reason else ""
            cells.append(one.outcome + note)
        lines.append(f"| {family} | {attention} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{at}. {why}" for at, why in enumerate(reasons, 1))])


if __name__ == "__main__":
    app()

"""A model of SGLang whose rows can leave within a forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor, nn

from focus_compile.block_diffusion.state import BlockState, Listing
from focus_compile.errors import FocusError, OptionError
from focus_compile.integrations.sglang.rows import BlockBatch
from focus_compile.kernels.importance.op import importance
from focus_compile.policies.focus_evict import keep_rows

__all__ = ["EvictingModel", "Step"]

LAYER = ("positions", "hidden_states", "forward_batch")
"""What a decoder layer of SGLang takes."""


@dataclass
class Step:
    """One forward. kept: the rows that went through all layers, from the cut on."""

    block: BlockBatch
    state: BlockState
    listing: Listing
    kept: Listing
    before: Tensor | None = None
    """Importance of the listed rows in the layer before the cut."""
    chosen: Tensor | None = None
    """The kept rows' places in the list, where some left."""


class EvictingModel:
    """Hooks in the layers of a model, idle outside `step`.

    At the cut all listed rows write their keys and values, then only the kept ones attend; the
    rest of that layer still computes the others, whose result is dropped before the next.
    """

    def __init__(self, model: nn.Module, cut: int, alpha: float) -> None:
        """
        Raises:
            FocusError: layers of another make.
            OptionError: the cut is no layer that another one follows.
        """
        inner: Any = model
        try:
            layers = list(inner.model.layers)
            attention = [layer.self_attn.attn for layer in layers]
        except AttributeError as error:
            raise FocusError(
                f"FocusEvict: {type(model).__name__} has other layers: {error}"
            ) from None
        taken = tuple(inspect.signature(layers[0].forward).parameters)
        if taken != LAYER:
            raise FocusError(
                f"FocusEvict: layers of {type(model).__name__} take {', '.join(taken)}; expected "
                f"{', '.join(LAYER)}, as in the version of SGLang that docs/howto/serving.md names"
            )
        if cut >= len(layers):
            raise OptionError.invalid("cut", cut, f"a layer from 1 to {len(layers) - 1}")
        self.alpha = alpha
        self._step: Step | None = None
        _watch(attention[cut - 1], self._attend_before)
        _watch(attention[cut], self._attend_at_cut)
        for layer in layers[cut + 1 :]:
            layer.register_forward_pre_hook(self._narrow, with_kwargs=False)

    @contextmanager
    def step(self, block: BlockBatch, state: BlockState, listing: Listing) -> Iterator[Step]:
        """What is forwarded in this context is the listing, of which rows leave."""
        self._step = Step(block, state, listing, listing)
        try:
            yield self._step
        finally:
            self._step = None

    def _evicts(self) -> bool:
        step = self._step
        return step is not None and not math.isinf(self.alpha) and bool(step.listing.masked.any())

    def _attend_before(self, attention: Any, original: Any, *values: Any, **named: Any) -> Any:
        if self._evicts():
            assert self._step is not None
            self._step.before = self._importance(attention, values[0], values[1])
        return original(*values, **named)

    def _importance(self, attention: Any, q: Tensor, k: Tensor) -> Tensor:
        assert self._step is not None
        listing = self._step.listing
        heads, kv_heads = attention.tp_q_head_num, attention.tp_k_head_num
        width = attention.qk_head_dim
        return importance(
            q.view(-1, heads, width).transpose(0, 1), k.view(-1, kv_heads, width).transpose(0, 1),
            listing.masked, listing.rows.starts, self._step.state.block_length, attention.scaling,
        )  # fmt: skip

    def _attend_at_cut(
        self,
        attention: Any,
        original: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Any,
        save_kv_cache: bool = True,
        **named: Any,
    ) -> Any:
        """Attention of the rows that stay; zeros for the others."""
        if not self._evicts():
            return original(q, k, v, batch, save_kv_cache=save_kv_cache, **named)
        assert self._step is not None
        chosen = self._leave(self._importance(attention, q, k))
        backend = get_attn_backend()
        if save_kv_cache:
            keys = k.view(-1, attention.tp_k_head_num, attention.qk_head_dim)
            values = v.view(-1, attention.tp_v_head_num, attention.v_head_dim)
            places = KVWriteLoc(batch.out_cache_loc, None)
            backend.token_to_kv_pool.set_kv_buffer(attention, places, keys, values)
        self._step.block.put(batch, self._step.state, self._step.kept)
        backend.init_forward_metadata(batch)
        attended = original(
            q[chosen], k[chosen], v[chosen], batch, save_kv_cache=save_kv_cache, **named
        )
        return attended.new_zeros((q.shape[0], *attended.shape[1:])).index_copy(0, chosen, attended)

    def _leave(self, at_cut: Tensor) -> Tensor:
        """Choose the rows that stay; their places in the list, int64 [kept]."""
        step = self._step
        assert step is not None
        assert step.before is not None
        state, listing = step.state, step.listing
        keep = keep_rows(
            at_cut, step.before, listing.masked, listing.index % state.block_length,
            listing.rows.starts, state.decoded.mean(), state.progress, self.alpha,
            state.block_length,
        )  # fmt: skip
        step.kept, chosen = state.narrowed(listing, keep, int(keep.sum()))
        step.chosen = chosen.flatten()
        return step.chosen

    def _narrow(self, layer: nn.Module, values: Any) -> Any:
        """A layer behind the cut: the model still hands over all positions, and the first such
        layer all rows."""
        step = self._step
        if step is None or step.chosen is None:
            return None
        positions, hidden, batch = values
        if hidden.shape[0] == positions.shape[0]:
            whole = residual_batch.fold(hidden, batch)
            hidden = residual_batch.set_written(whole[step.chosen], batch)
        return positions[step.chosen], hidden, batch


def _watch(attention: Any, instead: Any) -> None:
    original = attention.forward

    def forward(*values: Any, **named: Any) -> Any:
        return instead(attention, original, *values, **named)

    attention.forward = forward

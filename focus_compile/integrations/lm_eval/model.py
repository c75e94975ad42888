"""`focus_dllm`: the lm-eval model for masked and block diffusion language models."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from tqdm import tqdm

import focus_compile
from focus_compile.config import BLOCK_POLICIES, FocusConfig
from focus_compile.errors import OptionError
from focus_compile.frontend import known_mask_token_id
from focus_compile.integrations.lm_eval.decoders import BlockQueue, Decoder, dense_call
from focus_compile.integrations.lm_eval.likelihood import Likelihood
from focus_compile.integrations.lm_eval.settings import Request, split_arguments
from focus_compile.integrations.lm_eval.work import Work
from focus_compile.model_files import BUNDLED, language_model_class, source_of

__all__ = ["FocusLM"]

log = logging.getLogger(__name__)


@register_model("focus_dllm")
class FocusLM(HFLM):
    """Evaluates a diffusion language model, dense or through focus_compile.

    Loading, tokenizers, chat templates and data parallelism are those of lm-eval's `hf` model,
    whose arguments all work. Responses come from `focus_compile.decode.generate`, or with a policy
    for block diffusion from a `BatchGenerator`; likelihoods are Monte Carlo bounds, always of the
    dense model.
    """

    def __init__(self, pretrained: Any, batch_size: int | str | None = 1, **arguments: Any) -> None:
        """
        Args:
            pretrained: "tiny" or "tiny-block" for the bundled models, a folder or hub name, or a
                model with `tokenizer=`.
            batch_size: sequences decoded side by side, and masks scored in one call.
            arguments: fields of `LMSettings` and of `FocusConfig`, and whatever lm-eval's `hf`
                model takes. `mask_token_id` is from the model's config or tokenizer if not given.

        Raises:
            OptionError: an unknown or invalid argument, no mask token id, or a batch size of
                "auto".
        """
        theirs = set(inspect.signature(HFLM.__init__).parameters)
        self.settings, self.options, others = split_arguments(arguments, theirs)
        self.work = Work()
        """What decoding took so far, in this process."""
        others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(pretrained, str) and pretrained in BUNDLED:
            others.setdefault("dtype", "float32")  # the fastest on most CPUs, as demo.load has it
        if isinstance(pretrained, str) and "gguf_file" not in others:
            pretrained = source_of(pretrained)
        if others["device"] == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=True)  # else accelerate takes part in a run on CPUs only under MPI
        super().__init__(
            pretrained=pretrained,
            batch_size=_as_batch_size(batch_size),
            backend="causal",
            **others,
        )
        if getattr(self, "accelerator", None) is not None:
            # HFLM takes part in a distributed run only where there are several GPUs.
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            self._device = self.accelerator.device
            self.model.to(self._device)
        if getattr(self.model.config, "use_cache", False):
            self.model.config.use_cache = False
        self.focus_config = self._config_of_focus()

    def _get_backend(self, config: Any, backend: str = "causal", **others: Any) -> None:
        """The class that loads the model: what its config names, masked before causal."""
        trusted = bool(others.get("trust_remote_code"))
        name = str(getattr(config, "name_or_path", None) or type(config).__name__)
        self.AUTO_MODEL_CLASS = language_model_class(name, config, trusted)
        super()._get_backend(config, backend, **others)

    def _config_of_focus(self) -> FocusConfig:
        """The options, with what the model's config and tokenizer say."""
        options = dict(self.options)
        config = self.model.config
        if FocusConfig.from_options(options).mask_token_id is None:
            known = known_mask_token_id(self.model)
            known = self.tokenizer.mask_token_id if known is None else known
            if known is None:
                raise OptionError(
                    "focus_dllm: neither the model's config nor its tokenizer names a mask token; "
                    "pass mask_token_id=..."
                )
            options["mask_token_id"] = known
        if getattr(config, "block_length", None) is not None:
            options.setdefault("block_length", config.block_length)
        self.is_block = self.settings.is_block_diffusion(config, options.get("policy"))
        if self.is_block:
            options.setdefault("policy", "focus-evict")
            if options["policy"] not in BLOCK_POLICIES:
                raise OptionError.unknown(
                    options["policy"], BLOCK_POLICIES, kind="policy for block diffusion"
                )
        self.options = options
        return FocusConfig.from_options(options)

    # What runs the model

    @cached_property
    def _dense(self) -> Callable[..., Any]:
        """The model as it is, compiled unless the backend or the lowering is "eager"."""
        eager = "eager" in (self.settings.backend, self.focus_config.lowering)
        compiled = self.model if eager else torch.compile(self.model)
        return self._in_place(compiled)

    @cached_property
    def _focused(self) -> Callable[..., Any]:
        return self._in_place(focus_compile.compile(self.model, **self.options))

    def _in_place(self, call: Any) -> Callable[..., Any]:
        return dense_call(
            self.model,
            call,
            block_length=self.focus_config.block_length if self.is_block else None,
            shift=self.settings.is_shifted(self.model.config),
        )

    @cached_property
    def _decoder(self) -> Decoder:
        assert self.focus_config.mask_token_id is not None
        return Decoder(
            call=self._focused if self.settings.backend == "focus" else self._dense,
            mask_token_id=self.focus_config.mask_token_id,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            eos_token_id=self.eot_token_id,
            block_length=self.focus_config.block_length,
            device=self.device,
            align=self.is_block,
            generator=torch.Generator(self.device).manual_seed(self.settings.seed + self.rank),
        )

    @cached_property
    def _queue(self) -> BlockQueue:
        assert self.focus_config.mask_token_id is not None
        return BlockQueue(
            self.model,
            self.focus_config,
            self.options,
            self.focus_config.mask_token_id,
            self.eot_token_id,
            self.batch_size,
        )

    @cached_property
    def _likelihood(self) -> Likelihood:
        assert self.focus_config.mask_token_id is not None
        return Likelihood(
            self._dense,
            self.focus_config.mask_token_id,
            self.device,
            mc_num=self.settings.mc_num,
            batch_size=self.batch_size,
            seed=self.settings.seed,
            block_length=self.focus_config.block_length if self.is_block else None,
        )

    # What lm-eval asks for

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuations of (context, gen_kwargs), up to a stop string or the end token.

        Each is in the response cache (`use_cache`) as soon as its batch is done.
        """
        arguments = [request.args for request in requests]
        prompts, wanted = [], []
        for context, gen_kwargs in arguments:
            request = self._request(gen_kwargs)
            prompts.append(self._prompt(context, request.max_tokens))
            wanted.append(request)
        run = self._in_queue if self._is_queued else self._in_batches
        texts: dict[int, str] = {}
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc=f"Running generate_until requests ({self.settings.backend})",
        )
        with bar:
            for at, tokens in run(prompts, wanted):
                texts[at] = self._text(tokens, wanted[at])
                self.cache_hook.add_partial("generate_until", arguments[at], texts[at])
                bar.update()
        return [texts[at] for at in range(len(requests))]

    @property
    def _is_queued(self) -> bool:
        return self.is_block and self.settings.backend == "focus"

    def _in_queue(
        self, prompts: Sequence[list[int]], wanted: Sequence[Request]
    ) -> Iterator[tuple[int, list[int]]]:
        stops = [self._stop_tokens(request.stop) for request in wanted]
        for found in self._queue.decode(prompts, wanted, stops):
            self.work, self._queue.work = self.work + self._queue.work, Work()
            yield found

    def _in_batches(
        self, prompts: Sequence[list[int]], wanted: Sequence[Request]
    ) -> Iterator[tuple[int, list[int]]]:
        same_length = self.is_block or self.settings.padding == "none"
        batches = Collator(
            list(range(len(prompts))),
            sort_fn=lambda at: (-len(prompts[at]), at),
            group_by="gen_kwargs",
            group_fn=lambda at: {
                "request": wanted[at],
                "length": len(prompts[at]) if same_length else 0,
            },
        )
        for batch in batches.get_batched(n=self.batch_size):
            request = wanted[batch[0]]
            ended = self._ended(request.stop) if request.stop else None
            found = self._decoder.decode([prompts[at] for at in batch], request, ended)
            self.work, self._decoder.work = self.work + self._decoder.work, Work()
            yield from zip(batch, found, strict=True)

    def _request(self, gen_kwargs: dict[str, Any]) -> Request:
        known = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        return Request.of(known, self.settings, self.max_gen_toks)

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """The context's tokens, cut on the left so that the response fits."""
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - max_tokens - self.focus_config.block_length
        if room < 1:
            raise OptionError(
                f"focus_dllm: {max_tokens} tokens of response leave no room for a prompt in "
                f"max_length={self.max_length}; pass a smaller max_gen_toks or gen_length"
            )
        if len(tokens) > room:
            log.warning("a prompt of %d tokens is cut on the left to %d", len(tokens), room)
        return list(tokens[-room:])

    def _text(self, tokens: Sequence[int], request: Request) -> str:
        """The response up to its end token or first stop string."""
        if self.eot_token_id in tokens:
            tokens = tokens[: list(tokens).index(self.eot_token_id)]
        text = self.tok_decode(tokens)
        stop = handle_stop_sequences(list(request.stop), eos=None)
        return postprocess_generated_text(text, stop, self.think_end_token)

    def _ended(self, stop: Sequence[str]) -> Callable[[Tensor], Tensor]:
        def ended(responses: Tensor) -> Tensor:
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            return torch.tensor([any(one in text for one in stop) for text in texts])

        return ended

    def _stop_tokens(self, stop: Sequence[str]) -> list[list[int]]:
        """Stop strings as tokens, where these spell them: what ends a response early. A stop that
        appears in other tokens is cut from the text."""
        found = [self.tok_encode(text, add_special_tokens=False) for text in stop]
        return [
            tokens
            for tokens, text in zip(found, stop, strict=True)
            if tokens and text in self.tok_decode(tokens, skip_special_tokens=False)
        ]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Monte Carlo bounds of log p(continuation | context), and whether it is decoded greedily.

        Windows of `loglikelihood_rolling` come without their text, and only the bound is computed.
        """
        found = []
        for texts, context, target in tqdm(
            requests,
            disable=disable_tqdm or texts_missing(requests) or self.rank != 0,
            desc="Running loglikelihood requests",
        ):
            context = context[max(0, len(context) + len(target) - self.max_length) :]
            greedy = self.settings.check_greedy and texts is not None
            score = self._likelihood.score(context, target)
            answer = (score, greedy and self._likelihood.is_greedy(context, target))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            found.append(answer)
        return found


def texts_missing(requests: Sequence[tuple[Any, list[int], list[int]]]) -> bool:
    """Whether these are windows of one text."""
    return any(texts is None for texts, _, _ in requests)


def _as_batch_size(batch_size: int | str | None) -> int:
    text = str(1 if batch_size is None else batch_size)
    if not text.isdigit() or int(text) < 1:
        raise OptionError.invalid("batch_size", batch_size, "a whole number >= 1")
    return int(text)

"""The ways of running the bundled model that the demo and the fidelity table compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from focus_compile.decode.sampler import DecodeProgress, generate
from focus_compile.demo.retrieval import Example

__all__ = ["Answer", "Arm", "answer", "answer_all"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of running a model."""

    name: str
    options: Mapping[str, Any] | None = None
    """Options of `focus_compile.compile`; None is dense: `torch.compile` with Inductor."""

    def compile(self, model: Any) -> Any:
        """The model as this arm runs it, with nothing left over from another arm."""
        import torch

        torch.compiler.reset()
        if self.options is None:
            return torch.compile(model)
        import focus_compile

        return focus_compile.compile(model, **self.options)


@dataclass(frozen=True, slots=True)
class Answer:
    """The response to one question."""

    text: str
    right: tuple[bool, ...]
    """Whether each of the pairs asked for is stated."""
    model_calls: int
    ids: tuple[int, ...] = ()
    """Prompt and response."""


def answer(
    model: Any,
    tokenizer: Any,
    example: Example,
    *,
    gen_length: int,
    block_length: int,
    progress: Callable[[DecodeProgress], object] | None = None,
) -> Answer:
    """The answer to one question; see `answer_all`."""
    (found,) = answer_all(
        model,
        tokenizer,
        [example],
        gen_length=gen_length,
        block_length=block_length,
        progress=progress,
    )
    return found


def answer_all(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    gen_length: int,
    block_length: int,
    progress: Callable[[DecodeProgress], object] | None = None,
) -> list[Answer]:
    """Decode the responses to questions of equal length side by side, one token a call.

    model: plain or compiled, with a `config` that names its mask token. gen_length and
    block_length are in tokens.
    """
    import torch

    prompts = torch.tensor([example.prompt_ids for example in examples], device=model.device)
    result = generate(
        model,
        prompts,
        gen_length=gen_length,
        block_length=block_length,
        progress=progress,
    )
    responses = result.ids[:, prompts.shape[1] :]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    return [
        Answer(text, example.marks(text), result.model_calls, tuple(ids))
        for text, example, ids in zip(texts, examples, result.ids.tolist(), strict=True)
    ]

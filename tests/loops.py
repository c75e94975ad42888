"""The decoding loops that people run, reduced to what they do to the ids.

Each takes `forward`, ids [B, T] to logits [B, T, V], and the prompts [B, P]; it returns all ids.
What is random comes from torch's default generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LOOPS", "dream", "fast_dllm", "llada", "remasking", "score"]

Forward = Callable[[Tensor], Tensor]


def canvas(prompt: Tensor, response: int, mask: int) -> Tensor:
    """The prompts with `response` masks after them."""
    return torch.nn.functional.pad(prompt, (0, response), value=mask)


def evenly(total: int, steps: int) -> list[int]:
    """`total` in `steps` parts, larger ones first."""
    least, rest = divmod(total, steps)
    return [least + (step < rest) for step in range(steps)]


def gumbel_argmax(logits: Tensor, temperature: float) -> Tensor:
    """Samples of softmax(logits / temperature), by LLaDA's form of the Gumbel trick."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.rand_like(logits, dtype=torch.float64)
    return (logits.double().exp() / (-noise.log()) ** temperature).argmax(-1)


def llada(
    forward: Forward,
    prompt: Tensor,
    mask: int,
    *,
    response: int = 8,
    block: int = 4,
    steps: int = 8,
    temperature: float = 0.0,
    guidance: float = 0.0,
    remask: str = "low_confidence",
    apart: bool = False,
) -> Tensor:
    """LLaDA (arXiv 2502.09992): blocks from left to right, a fixed number of tokens a step.

    guidance: strength of classifier-free guidance, whose unconditional sequences have the prompt
    masked and are a second half of the batch, or, `apart`, a call of their own.
    """
    x = canvas(prompt, response, mask)
    begin = prompt.shape[1]
    given = (x != mask).clone()
    for start in range(begin, x.shape[1], block):
        for count in evenly(block, steps * block // response):
            undecided = x == mask
            logits = _guided(forward, x, x.masked_fill(given, mask), guidance, apart)
            token = gumbel_argmax(logits, temperature)
            if remask == "random":
                confidence = torch.rand(x.shape)
            else:
                confidence = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            confidence[:, start + block :] = -math.inf
            confidence.masked_fill_(~undecided, -math.inf)
            for row, best in zip(range(len(x)), confidence.topk(count).indices, strict=True):
                x[row, best] = token[row, best]
    return x


def _guided(forward: Forward, x: Tensor, without: Tensor, scale: float, apart: bool) -> Tensor:
    if not scale:
        return forward(x)
    if apart:
        some, none = forward(x), forward(without)
    else:
        some, none = forward(torch.cat([x, without])).chunk(2)
    return none + (scale + 1) * (some - none)


def fast_dllm(
    forward: Forward,
    prompt: Tensor,
    mask: int,
    *,
    response: int = 8,
    block: int = 4,
    threshold: float = 0.5,
) -> Tensor:
    """Fast-dLLM (arXiv 2505.22618): all positions of the block above a threshold, or the best."""
    x = canvas(prompt, response, mask)
    for start in range(prompt.shape[1], x.shape[1], block):
        inside = torch.zeros_like(x, dtype=torch.bool)
        inside[:, start : start + block] = True
        while (open_positions := (x == mask) & inside).any():
            probability, token = forward(x).double().softmax(-1).max(-1)
            probability.masked_fill_(~open_positions, -math.inf)
            best = torch.zeros_like(inside).scatter(1, probability.argmax(1, keepdim=True), True)
            x = torch.where((best | (probability >= threshold)) & open_positions, token, x)
    return x


def dream(
    forward: Forward,
    prompt: Tensor,
    mask: int,
    *,
    response: int = 8,
    steps: int = 8,
    algorithm: str = "entropy",
    temperature: float = 0.0,
    algorithm_temperature: float = 0.0,
    eps: float = 1e-3,
) -> Tensor:
    """Dream's diffusion_generate: no blocks, logits of the row before, times from 1 to eps."""
    x = canvas(prompt, response, mask)
    times = torch.linspace(1, eps, steps + 1).tolist()
    for step in range(steps):
        logits = forward(x)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        undecided, last = x == mask, step == steps - 1
        share = 1.0 if last else 1 - times[step + 1] / times[step]
        if temperature:
            logits = logits / temperature
        probabilities = logits.softmax(-1)
        token = _drawn(probabilities) if temperature else probabilities.argmax(-1)
        if algorithm == "origin":
            x = torch.where(undecided & (torch.rand(x.shape) < share), token, x)
            continue
        score = _score(algorithm, probabilities, token).masked_fill(~undecided, -math.inf)
        for row in range(len(x)):
            left = int(undecided.sum() / len(x)) if not last else int(undecided[row].sum())
            count = min(int(left * share), int(undecided[row].sum()))
            if not count:
                continue
            if algorithm_temperature:
                weights = (score[row] / algorithm_temperature).softmax(-1)
                chosen = torch.multinomial(weights, count)
            else:
                chosen = score[row].topk(count).indices
            x[row, chosen] = token[row, chosen]
    return x


def _score(algorithm: str, probabilities: Tensor, token: Tensor) -> Tensor:
    if algorithm == "maskgit_plus":
        return probabilities.gather(-1, token[..., None])[..., 0]
    if algorithm == "topk_margin":
        first, second = probabilities.topk(2).values.unbind(-1)
        return first - second
    assert algorithm == "entropy"
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)


def _drawn(probabilities: Tensor) -> Tensor:
    return torch.multinomial(probabilities.flatten(0, -2), 1).view(probabilities.shape[:-1])


def remasking(
    forward: Forward,
    prompt: Tensor,
    mask: int,
    *,
    response: int = 8,
    block: int = 4,
    every: int = 3,
    edit: bool = False,
) -> Tensor:
    """Low-confidence decoding that every so many calls takes back the decided token of the response
    that the model is least sure of, or, `edit`, puts the model's present choice in its place."""
    x = canvas(prompt, response, mask)
    begin, budget = prompt.shape[1], 2 * response
    for call in range(budget):
        if not (x == mask).any():
            break
        probability, token = forward(x).double().softmax(-1).max(-1)
        token = token.where(token != mask, 1)
        for row in range(len(x)):
            open_positions = (x[row] == mask).nonzero()[:, 0]
            if not len(open_positions):
                continue
            first = int(open_positions[0])
            end = begin + ((first - begin) // block + 1) * block
            inside = open_positions[open_positions < end]
            decided = torch.arange(begin, x.shape[1])[x[row, begin:] != mask]
            best = inside[probability[row, inside].argmax()]
            x[row, best] = token[row, best]
            if call % every == every - 1 and len(decided) >= 2:
                worst = decided[probability[row, decided].argmin()]
                other = token[row, worst]
                x[row, worst] = other if edit else mask
    return x


def score(
    forward: Forward, prompt: Tensor, answer: Tensor, mask: int, *, batch: int = 2, draws: int = 8
) -> float:
    """LLaDA's estimate of the log-likelihood of `answer` [A] after `prompt` [P]: random masks in
    every call, a random number of them in every sequence of the batch."""
    whole = torch.cat([prompt, answer]).repeat(batch, 1)
    begin, losses = len(prompt), []
    for _ in range(draws // batch):
        first = int(torch.randint(1, len(answer) + 1, ()))
        counts = torch.linspace(first, first + (batch - 1) * len(answer) / batch, batch).long()
        counts = (counts - 1) % len(answer) + 1
        order = torch.rand(batch, len(answer)).argsort(1)
        hidden = torch.zeros_like(whole, dtype=torch.bool)
        hidden[:, begin:] = order < counts[:, None]
        logits = forward(whole.masked_fill(hidden, mask))
        loss = torch.nn.functional.cross_entropy(logits[hidden], whole[hidden], reduction="none")
        share = (counts / len(answer))[:, None].expand_as(whole)[hidden]
        losses.append(float((loss / share).sum() / batch))
    return -sum(losses) / len(losses)


LOOPS: dict[str, Callable[[Forward, Tensor, int], Tensor]] = {
    "llada": llada,
    "llada two a step": lambda *given: llada(*given, steps=4),
    "llada sampled": lambda *given: llada(*given, temperature=0.7),
    "llada random": lambda *given: llada(*given, remask="random"),
    "llada guided": lambda *given: llada(*given, guidance=1.5),
    "fast-dllm": fast_dllm,
    "dream origin": lambda *given: dream(*given, algorithm="origin", temperature=0.4),
    "dream maskgit_plus": lambda *given: dream(*given, algorithm="maskgit_plus", temperature=0.2),
    "dream topk_margin": lambda *given: dream(
        *given, algorithm="topk_margin", algorithm_temperature=0.5
    ),
    "dream entropy": dream,
    "remasking": remasking,
    "editing": lambda *given: remasking(*given, edit=True),
}
"""Every published algorithm once, and two loops that take decided tokens back."""

"""The bundled model decodes one question, dense and with focus, and the tokens are compared."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from focus_compile.doctor.check import NOTE, OK, PROBLEM, Check
from focus_compile.errors import FocusError

__all__ = ["SelfTest", "check_inductor", "self_test"]

LENGTH, GEN_LENGTH, BLOCK_LENGTH, QUESTIONS = 192, 32, 16, 2


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What both ways of decoding gave."""

    lowering: str
    device: str
    tokens: int
    same_tokens: int
    dense_right: int
    focus_right: int
    asked: int
    programs: dict[str, int]
    """Calls of the focus run by program."""
    seconds: float
    """All of it, compilation included."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def check(self) -> Check:
        """Passed where both answers are right and most calls were steps."""
        found = (
            f"{self.same_tokens} of {self.tokens} tokens as dense, {self.focus_right} of "
            f"{self.asked} values right, "
            + ", ".join(f"{count} {name}" for name, count in self.programs.items())
            + f"; {self.lowering}, {self.device}, {self.seconds:.1f} s"
        )
        if self.dense_right < self.asked:
            return Check(
                "self-test", PROBLEM, f"the plain model answers wrongly; {found}",
                "torch or transformers is broken here: run another version of them",
            )  # fmt: skip
        if self.focus_right < self.asked:
            return Check(
                "self-test", PROBLEM, f"focus answers wrongly; {found}",
                "please report it with the output of `doctor --json -`",
            )  # fmt: skip
        if not self.programs.get("step"):
            return Check(
                "self-test", PROBLEM, f"no call was incremental; {found}",
                "TORCH_LOGS=+focus_compile says why",
            )  # fmt: skip
        status = OK if self.same_tokens == self.tokens else NOTE
        return Check("self-test", status, found)


def self_test(
    lowering: str = "eager", device: str | None = None, *, debug: bool = False
) -> tuple[Check, SelfTest | None]:
    """Run it; the outcome, and the figures where it came to an end.

    lowering: "eager" takes seconds; "inductor" compiles first, as ordinary runs do.
    debug: let errors that nobody foresaw pass.
    """
    try:
        result = _run(lowering, device)
    except FocusError as error:
        return Check("self-test", PROBLEM, str(error), "correct what it names"), None
    except Exception as error:
        if debug:
            raise
        first = (str(error).splitlines() or [""])[0]
        return Check(
            "self-test", PROBLEM, f"{type(error).__name__}: {first}",
            "focus-compile --debug doctor shows where",
        ), None  # fmt: skip
    return result.check(), result


def _run(lowering: str, device_name: str | None) -> SelfTest:
    import torch

    import focus_compile
    from focus_compile import demo
    from focus_compile.decode.sampler import generate
    from focus_compile.demo import retrieval
    from focus_compile.model_files import as_device

    begun = time.perf_counter()
    device = as_device(device_name)
    model, tokenizer = demo.load()
    model.to(device)
    example = retrieval.make(tokenizer, LENGTH, questions=QUESTIONS, response=GEN_LENGTH)
    prompt = torch.tensor([example.prompt_ids], device=device)
    lengths: dict[str, Any] = {"gen_length": GEN_LENGTH, "block_length": BLOCK_LENGTH}
    torch.compiler.reset()
    compiled = focus_compile.compile(model, lowering=lowering, block_length=BLOCK_LENGTH)
    dense = generate(model, prompt, **lengths).ids[0, prompt.shape[1] :]
    with warnings.catch_warnings(), focus_compile.record() as history:
        warnings.simplefilter("ignore", focus_compile.FocusWarning)
        focus = generate(compiled, prompt, **lengths).ids[0, prompt.shape[1] :]
    answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (dense, focus)]
    return SelfTest(
        lowering=lowering,
        device=str(device),
        tokens=GEN_LENGTH,
        same_tokens=int((dense == focus).sum()),
        dense_right=example.score(answers[0]),
        focus_right=example.score(answers[1]),
        asked=len(example.pairs),
        programs=dict(Counter(call.program for call in history)),
        seconds=time.perf_counter() - begun,
    )


def check_inductor(device_name: str | None = None) -> Check:
    """Whether Inductor compiles a small function to one that computes the same."""
    import torch

    from focus_compile.model_files import as_device

    def small(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x * 2).sum(-1)

    begun = time.perf_counter()
    try:
        x = torch.linspace(-1, 1, 96, device=as_device(device_name)).view(4, 24)
        same = torch.allclose(torch.compile(small)(x), small(x), atol=1e-5)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Check(
            "Inductor", PROBLEM, f"{type(error).__name__}: {first}",
            'TORCH_LOGS=inductor says more; lowering="eager" runs without it, slowly',
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    if not same:
        return Check("Inductor", PROBLEM, "computes other values than eager torch", "update torch")
    return Check("Inductor", OK, f"compiles and agrees with eager torch, {seconds:.1f} s")

"""Environment variables that change what runs."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping

from focus_compile.config import ENVIRONMENT_PREFIX, VERIFY, FocusConfig
from focus_compile.doctor.check import NOTE, OK, PROBLEM, Check
from focus_compile.errors import OptionError
from focus_compile.fallback import FocusWarning, forget

__all__ = ["checks"]

_SLOW = {
    ENVIRONMENT_PREFIX + "REFERENCE": (
        ("", "0"),
        "slow references run instead of kernels: unset it",
    ),
    VERIFY: (("0", "1"), "every stage is executed before and after: unset it"),
    ENVIRONMENT_PREFIX + "DUMP": (("",), "graphs are written after every stage: unset it"),
    ENVIRONMENT_PREFIX + "LOWERING": (("inductor",), "programs run op by op: unset it"),
    ENVIRONMENT_PREFIX + "DRYRUN": (("0", "false"), "every call runs exactly: unset it"),
}
"""Variables that make programs slow: the values that do not, and what to do."""
_STOPS = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


def checks(environment: Mapping[str, str] | None = None) -> Iterator[Check]:
    """One check for each variable that matters, and one where none is set."""
    environment = os.environ if environment is None else environment
    found = [*_stopped(environment), *_ours(environment)]
    if not found:
        found = [Check("environment", OK, f"no variable {ENVIRONMENT_PREFIX}… is set")]
    yield from found


def _stopped(environment: Mapping[str, str]) -> Iterator[Check]:
    for name in _STOPS:
        if environment.get(name, "0") not in ("", "0"):
            yield Check(name, PROBLEM, environment[name], "torch.compile does nothing: unset it")


def _ours(environment: Mapping[str, str]) -> Iterator[Check]:
    """A bad value, unknown names, and what each other variable does."""
    wrong: list[tuple[str, str, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FocusWarning)
        forget()
        try:
            FocusConfig.from_options(environment=environment)
        except OptionError as error:
            wrong.append((PROBLEM, str(error), "correct or unset it"))
    unknown = [str(each.message) for each in caught if each.category is FocusWarning]
    wrong += [(NOTE, message, "nothing reads it") for message in unknown]
    for status, message, advice in wrong:
        yield Check("environment", status, message.removeprefix("focus_compile: "), advice)
    for name in sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX)):
        if any(name in _words(message) for _, message, _ in wrong):
            continue
        harmless, advice = _SLOW.get(name, (None, ""))
        slow = harmless is not None and environment[name] not in harmless
        yield Check(name, NOTE if slow else OK, environment[name], advice if slow else "")


def _words(message: str) -> list[str]:
    """The names in a message."""
    return re.findall(r"\w+", message)

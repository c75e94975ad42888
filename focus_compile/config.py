"""Options: one frozen dataclass, validated, with presets and environment mirrors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from focus_compile.errors import OptionError
from focus_compile.fallback import warn_once
from focus_compile.settings_file import SETTINGS, Settings, settings_in

__all__ = [
    "BLOCK_POLICIES",
    "COMBINED",
    "EVICTING_POLICIES",
    "POLICIES",
    "TORCH_MODES",
    "VERIFY",
    "FocusConfig",
    "options_from_text",
    "verify_level",
]

COMBINED = "focus-dllm+evict"
"""Sparse keys over finished blocks and eviction inside the current one, in one plan."""
EVICTING_POLICIES = ("focus-evict", COMBINED)
BLOCK_POLICIES = (*EVICTING_POLICIES, "delayed-cache", "block-diffusion")
"""Policies for block-causal models, whose ids grow by a block."""
LOSSLESS = "lossless"
"""Steps answer only where they are sure; all other calls are dense."""
POLICIES = ("focus-dllm", "dual-cache", "prefix-cache", LOSSLESS, *BLOCK_POLICIES, "exact")
TORCH_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What Inductor knows by `mode=`: graphs that always run exactly are compiled so."""
REFRESH_WORDS = ("block", "adaptive", "every-step")
BLOCK_SUMMARIES = ("bound", "mean")
LOGITS_ROWS = ("all", "response")
LOWERINGS = ("inductor", "eager")
ENVIRONMENT_PREFIX = "FOCUS_COMPILE_"
DEBUG_VARIABLES = ("DUMP", "REFERENCE", "VERIFY")
"""Names after the prefix that are no options."""
VERIFY = "FOCUS_COMPILE_VERIFY"
"""0: nothing, 1: check every stage (default), 2: also execute before and after."""


@dataclass(frozen=True, kw_only=True)
class FocusConfig:
    """The options of `torch.compile(model, backend="focus", options={...})`.

    Values larger than the sequence mean "everything". Sources: Focus-dLLM (arXiv 2602.02159) for
    expansion, window, keep_ratio and dense_layers; docs/selection-study.md for sink_tokens,
    key_block and block_summary, which the paper does not publish. With "focus-dllm+evict" the
    prompt of these options is all finished blocks, and the sinks are its first positions.
    """

    policy: str = "focus-dllm"
    """Which rows, keys and depth each step computes: one of `POLICIES`. Also a `mode=`."""
    mask_token_id: int | None = None
    """Id of the token that marks an undecided position. Without it every call is exact."""
    block_length: int = 32
    """Tokens per decode block of the user's semi-autoregressive loop."""
    dense_layers: int | None = None
    """l_dense: layers before the sink capture that read all keys. None: 6, or a third of the
    layers in a model of fewer than 18."""
    dense_tail_layers: int = 0
    """Last layers that read all keys (the paper uses 4 for Dream-7B)."""
    expansion: int = 4
    """rho: focus rows per token decoded in the previous call."""
    window: int = 8
    """w: total width, in tokens, of the window of active rows around each focus row."""
    keep_ratio: float = 0.5
    """alpha: share of the prompt's key blocks that a sparse layer reads."""
    dense_if_faster: bool | None = None
    """Read all keys in every layer where choosing some takes longer: both are timed on the device
    when the model is compiled, and `explain` gives the figures. None: on a GPU."""
    list_reuse: int = 1
    """Steps that read the key blocks and sinks which the first of them chose; a refresh chooses
    anew."""
    sink_tokens: int = 16
    """Prompt positions kept in every sparse layer because they attract attention."""
    key_block: int = 32
    """Tokens per prompt block of the key selection."""
    block_summary: str = "bound"
    """What a key block is judged by: "bound" (its keys' bounding box) or "mean" (their mean)."""
    refresh: str | int = "block"
    """When all rows are recomputed: at decode "block" entry, at "every-step", or every n calls.
    "adaptive": at block entry, where recomputing some of the prompt leaves too large an error."""
    tolerance: float = 0.2
    """Relative error of attention outputs that prompt rows left as they are may cause at a block
    entry, as estimated, in the layer where it is largest. For `refresh="adaptive"`."""
    refresh_rows: float = 0.05
    """Share of the prompt that is recomputed at a block entry with `refresh="adaptive"`."""
    max_age: int = 64
    """Block entries after which every row of the prompt was recomputed, with
    `refresh="adaptive"`."""
    guard: float = 0.0
    """Share of the steps that are also answered densely. Such a call returns the dense logits;
    where the two part too often, the runtime reads all keys, then refreshes more often, then in
    every call."""
    guard_agreement: float = 0.98
    """Share of the positions that guarded steps would have had decided, over the latest 32 checks,
    at which dense logits have the same token: below it the guard backs off."""
    logits: str = "all"
    """Which rows a refresh computes outputs for: "all", or "response": from a window before the
    first mask on. Other rows are then zero; a sampler that reads masked positions (or the one
    before them) sees no difference, and the head and the last layer cost a fraction."""
    evict_alpha: float = 1.5
    """FOCUS's alpha: masked rows that stay past the cut, per token decoded per step so far."""
    evict_layer: int = 1
    """The cut: rows are evicted after this layer's keys and values, from 1 on."""
    buckets: tuple[int, ...] | None = None
    """Row counts, ascending, that a step is padded to. None: multiples of 8 to 64, of 32 to 256,
    powers of two beyond; on a GPU 32, 64, 96, 128, 192, 256, and powers of two beyond."""
    merge_projections: bool | None = None
    """Run a step's linear layers of one input as one, over a copy of their weights: faster for few
    rows. None: on a GPU."""
    cuda_graphs: bool = True
    """Replay a step as one CUDA graph per bucket. No effect on the CPU."""
    context_parallel: str | None = None
    """Ranks that each hold the keys and values of a part of every sequence: "world", or the name of
    a torch.distributed group. A ProcessGroup or a DeviceMesh of one dimension is taken for its
    name. docs/distributed.md."""
    strict: bool = False
    """Raise instead of running the exact program when a model or a call is refused."""
    dryrun: bool = False
    """Print the plan and run every call exactly."""
    lowering: str = "inductor"
    """What runs the programs: "inductor", or "eager" (op by op, for debugging)."""

    def __post_init__(self) -> None:
        buckets: object = self.buckets
        if isinstance(buckets, list):
            object.__setattr__(self, "buckets", tuple(buckets))
        object.__setattr__(self, "context_parallel", _name_of_group(self.context_parallel))
        for field in dataclasses.fields(self):
            _CHECKS[field.name](field.name, getattr(self, field.name))
        if self.policy == COMBINED:
            _check_unread(self)
        if self.context_parallel is not None:
            _check_shared(self)

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any] | None = None,
        *,
        mode: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> FocusConfig:
        """Options win over the file that their `settings` names, which wins over the environment;
        that wins over the file of FOCUS_COMPILE_SETTINGS, which is read where the options name
        none, and this over the defaults.

        Args:
            options: field names to values, as given to `torch.compile(options=...)`; and
                `settings`, a file that `focus-compile tune` wrote, or None for no such file.
            mode: a policy name, as given to `torch.compile(mode=...)`; torch's own modes say
                nothing of a policy.
            environment: mirrors `FOCUS_COMPILE_<FIELD>`; `os.environ` if None.

        Raises:
            OptionError: an unknown name (with the closest known one) or a bad value, in a settings
                file too. An unknown name in the environment is only reported, once.
        """
        environment = os.environ if environment is None else environment
        verify_level(environment)
        _report_unknown(environment)
        options = options or {}
        values = _from_environment(environment)
        settings = settings_in(options, environment)
        if settings is not None:
            held = _checked(settings)
            values = values | held if SETTINGS in options else held | values
        if mode is not None and mode not in TORCH_MODES:
            if mode not in POLICIES:
                raise OptionError.unknown(mode, POLICIES, kind="mode")
            values["policy"] = mode
        return cls(**values | _known(options, also=(SETTINGS,)))

    @property
    def focus_rows(self) -> int:
        """Rows of a step that follows one decoded token, at most."""
        return self.expansion * max(self.window, 1)

    def dense_layers_for(self, layers: int) -> int:
        """l_dense in a model of `layers` attention sites."""
        if self.dense_layers is not None:
            return min(self.dense_layers, layers)
        return 6 if layers >= 18 else layers // 3

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON types."""
        values = dataclasses.asdict(self)
        values["buckets"] = None if self.buckets is None else list(self.buckets)
        return values


def _checked(settings: Settings) -> dict[str, Any]:
    """The options of a settings file; OptionError, which names it, where one is bad."""
    try:
        values = _known(settings.options)
        FocusConfig(**values)
    except OptionError as error:
        message = str(error).removeprefix("focus_compile: ")
        raise OptionError(f"focus_compile: settings {settings.path}: {message}") from None
    return values


def _known(options: Mapping[str, Any], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options that are fields; OptionError where one is neither that nor one of `also`."""
    fields = {field.name for field in dataclasses.fields(FocusConfig)}
    for name in options:
        if name not in fields and name not in also:
            raise OptionError.unknown(str(name), fields.union(also))
    return {name: value for name, value in options.items() if name in fields}


def _check_unread(config: FocusConfig) -> None:
    """Raise OptionError where an option is set that the combined policy does not read."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, instead in _UNREAD.items():
        value = getattr(config, name)
        if value != defaults[name]:
            expected = f"{defaults[name]!r}, the default, with policy={COMBINED!r}: {instead}"
            raise OptionError.invalid(name, value, expected)


_UNREAD = {
    "expansion": "evict_alpha says how many rows stay",
    "window": "evict_alpha says how many rows stay",
    "refresh": "keys and values of finished blocks are final",
}


def _name_of_group(group: Any) -> Any:
    """The name of a process group, or of that of a device mesh; anything else as it is."""
    if callable(getattr(group, "get_group", None)) and group.ndim == 1:
        group = group.get_group()
    return getattr(group, "group_name", group)


def _check_shared(config: FocusConfig) -> None:
    """Raise OptionError where keys that are spread over ranks have no form."""
    without = None
    if config.policy in BLOCK_POLICIES:
        without = f"policy={config.policy!r}"
    elif config.refresh == "adaptive":
        without = 'refresh="adaptive"'
    if without is not None:
        expected = f"None with {without}, which has no form for keys spread over ranks"
        raise OptionError.invalid("context_parallel", config.context_parallel, expected)


def _group(name: str, value: object) -> None:
    expected = '"world", the name of a process group, the group or a device mesh of one dimension'
    _expect(value is None or (isinstance(value, str) and value != ""), name, value, expected)


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise OptionError.invalid(name, value, expected)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _whole(least: int, *, optional: bool = False) -> Any:
    def check(name: str, value: object) -> None:
        if optional and value is None:
            return
        _expect(_is_int(value, least), name, value, f"a whole number >= {least}")

    return check


def _flag(name: str, value: object) -> None:
    _expect(isinstance(value, bool), name, value, "True or False")


def _optional_flag(name: str, value: object) -> None:
    _expect(value is None or isinstance(value, bool), name, value, "True, False or None")


def _one_of(known: tuple[str, ...]) -> Any:
    def check(name: str, value: object) -> None:
        if isinstance(value, str) and value not in known:
            raise OptionError.unknown(value, known, kind=name)
        _expect(isinstance(value, str), name, value, f"one of {', '.join(known)}")

    return check


def _ratio(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and 0 <= value <= 1  # type: ignore[operator, arg-type]
    _expect(inside, name, value, "a share between 0 and 1")


def _at_least_one(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _expect(number and value >= 1, name, value, "a number >= 1")  # type: ignore[operator]


def _not_negative(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _expect(number and value >= 0, name, value, "a number >= 0")  # type: ignore[operator]


def _refresh(name: str, value: object) -> None:
    if isinstance(value, str) and value not in REFRESH_WORDS:
        raise OptionError.unknown(value, REFRESH_WORDS, kind=name)
    expected = '"block", "adaptive", "every-step" or a number of calls >= 1'
    _expect(isinstance(value, str) or _is_int(value, 1), name, value, expected)


def _buckets(name: str, value: object) -> None:
    if value is None:
        return
    ascending = (
        isinstance(value, tuple)
        and len(value) > 0
        and all(_is_int(count, 2) for count in value)
        and all(a < b for a, b in itertools.pairwise(value))
    )
    _expect(ascending, name, value, "ascending row counts >= 2, such as [32, 64, 128]")


_CHECKS: dict[str, Any] = {
    "policy": _one_of(POLICIES),
    "mask_token_id": _whole(0, optional=True),
    "block_length": _whole(1),
    "dense_layers": _whole(0, optional=True),
    "dense_tail_layers": _whole(0),
    "expansion": _whole(1),
    "window": _whole(1),
    "keep_ratio": _ratio,
    "sink_tokens": _whole(0),
    "key_block": _whole(1),
    "list_reuse": _whole(1),
    "block_summary": _one_of(BLOCK_SUMMARIES),
    "refresh": _refresh,
    "tolerance": _not_negative,
    "refresh_rows": _ratio,
    "max_age": _whole(1),
    "guard": _ratio,
    "guard_agreement": _ratio,
    "logits": _one_of(LOGITS_ROWS),
    "evict_alpha": _at_least_one,
    "evict_layer": _whole(1),
    "buckets": _buckets,
    "merge_projections": _optional_flag,
    "dense_if_faster": _optional_flag,
    "cuda_graphs": _flag,
    "context_parallel": _group,
    "strict": _flag,
    "dryrun": _flag,
    "lowering": _one_of(LOWERINGS),
}


def verify_level(environment: Mapping[str, str]) -> int:
    """What the environment says of checking the stages.

    Raises:
        OptionError: no such level.
    """
    text = environment.get(VERIFY, "1")
    if text not in ("0", "1", "2"):
        raise OptionError.invalid(VERIFY, text, "0, 1 or 2")
    return int(text)


def _report_unknown(environment: Mapping[str, str]) -> None:
    """Warn of variables with our prefix that nothing reads."""
    known = {field.name.upper() for field in dataclasses.fields(FocusConfig)}
    known |= {*DEBUG_VARIABLES, SETTINGS.upper()}
    ours = (name for name in environment if name.startswith(ENVIRONMENT_PREFIX))
    for name in sorted(name.removeprefix(ENVIRONMENT_PREFIX) for name in ours):
        if name not in known:
            prefix, kind = ENVIRONMENT_PREFIX, "environment variable"
            warn_once(str(OptionError.unknown(name, known, kind=kind, prefix=prefix)))


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Fields set by `FOCUS_COMPILE_<FIELD>`, parsed by the field's type."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(FocusConfig):
        name = ENVIRONMENT_PREFIX + field.name.upper()
        if name in environment:
            values[field.name] = _parse(name, str(field.type), environment[name])
    return values


def options_from_text(texts: Iterable[str]) -> dict[str, Any]:
    """Options written `name=value`, parsed as their mirrors in the environment are.

    Raises:
        OptionError: no such form, an unknown or repeated name, or a value of another type.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(FocusConfig)}
    kinds[SETTINGS] = "str"
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise OptionError(f"focus_compile: {text!r} is no option; write name=value")
        if name not in kinds:
            raise OptionError.unknown(name, kinds)
        if name in values:
            raise OptionError(f"focus_compile: option {name} is given more than once")
        values[name] = _parse(name, kinds[name], value.strip())
    return values


def _parse(name: str, kind: str, text: str) -> Any:
    if "None" in kind and text.lower() in ("", "none"):
        return None
    parse, expected = _PARSERS[kind.removesuffix(" | None")]
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise OptionError.invalid(name, text, expected) from None


_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (lambda text: _BOOLEANS[text.lower()], "1 or 0"),
    "float": (float, "a number"),
    "int": (int, "a whole number"),
    "str": (str, "a name"),
    "str | int": (
        lambda text: int(text) if text.lstrip("-").isdigit() else text,
        "a name or number",
    ),
    "tuple[int, ...]": (
        lambda text: tuple(int(part) for part in text.split(",")),
        "whole numbers with commas between them",
    ),
}

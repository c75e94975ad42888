"""The options of commands that take a MODEL: what to load, and how focus_compile is to run it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer

from focus_compile.cli.common import quiet_transformers
from focus_compile.config import BLOCK_POLICIES, POLICIES, FocusConfig, options_from_text
from focus_compile.errors import OptionError
from focus_compile.model_files import LoadedModel, as_device, as_dtype, load_model, load_tokenizer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder or hub name that transformers loads, or tiny or tiny-block.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(POLICIES)}. Default: focus-dllm, or focus-evict where the model's config "
        "names a block_length."
    ),
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any option of focus_compile; may be repeated, such as -o keep_ratio=0.25.",
    ),
]
ModelBlockOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens per decode block; the model's, or 32.")
]
MaskOption = Annotated[
    int | None,
    typer.Option(help="Id of the mask token; from the model's config or tokenizer if not given."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; the first GPU, or the CPU without one.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; float32 on the CPU, else bfloat16."),
]
RandomOption = Annotated[
    bool,
    typer.Option("--random-weights", help="Build the model from its config alone."),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first."),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """What was asked for; `check` before the model is loaded, which may take minutes."""

    name: str
    policy: str | None = None
    block_length: int | None = None
    mask_token_id: int | None = None
    options: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    random_weights: bool = False
    trust_remote_code: bool = False

    def check(self) -> dict[str, Any]:
        """The options of FocusConfig that were given.

        Raises:
            OptionError: one of them is unknown, given twice, or out of range.
        """
        named = {
            "policy": self.policy,
            "block_length": self.block_length,
            "mask_token_id": self.mask_token_id,
        }
        given = {name: value for name, value in named.items() if value is not None}
        more = options_from_text(self.options)
        for name in given.keys() & more.keys():
            raise OptionError(f"focus_compile: option {name} is given more than once")
        FocusConfig.from_options(given | more)
        as_dtype(self.dtype, as_device(self.device))
        return given | more

    def load(self) -> LoadedModel:
        """The model on its device.

        Raises:
            OptionError: see `load_model`.
        """
        quiet_transformers()
        device = as_device(self.device)
        return load_model(
            self.name,
            device=device,
            dtype=as_dtype(self.dtype, device),
            random_weights=self.random_weights,
            trust_remote_code=self.trust_remote_code,
        )

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            OptionError: it has none that transformers can load.
        """
        return load_tokenizer(self.name, trust_remote_code=self.trust_remote_code)

    def tokenizer_or_none(self) -> Any:
        """The tokenizer, or None."""
        try:
            return self.tokenizer()
        except OptionError:
            return None

    def focus_options(
        self, loaded: LoadedModel, *, needs_mask: bool, tokenizer: Any
    ) -> dict[str, Any]:
        """What was given, and what the model says of its blocks and its mask.

        Raises:
            OptionError: the mask token is needed and not known, or no token of the model.
        """
        options = self.check()
        config = FocusConfig.from_options(options)
        blocks = loaded.block_length
        if blocks is not None:
            options.setdefault("block_length", blocks)
            if "policy" not in options and config.policy == FocusConfig().policy:
                options["policy"] = BLOCK_POLICIES[0]
        try:
            options["mask_token_id"] = loaded.mask_token_id(config.mask_token_id, tokenizer)
        except OptionError:
            if needs_mask or config.mask_token_id is not None:
                raise
        return options


_FIELDS: dict[str, tuple[Any, Any]] = {
    "policy": (PolicyOption, None),
    "option": (OptionsOption, None),
    "block_length": (ModelBlockOption, None),
    "mask_token_id": (MaskOption, None),
    "device": (DeviceOption, None),
    "dtype": (DtypeOption, None),
    "random_weights": (RandomOption, False),
    "trust_remote_code": (TrustOption, False),
}
"""The options of a command that takes a MODEL, and their defaults."""


def with_model(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the argument MODEL and the options that go with it, but those named.

    The command's first parameter is the `ModelRequest` made of them.
    """
    fields = {name: field for name, field in _FIELDS.items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(model: str, **given: Any) -> None:
            asked = {name: given.pop(name) for name in fields}
            options = asked.pop("option", None) or ()
            command(ModelRequest(name=model, options=options, **asked), **given)

        signature = inspect.signature(command, eval_str=True)
        _, *own = signature.parameters.values()
        kind = Parameter.POSITIONAL_OR_KEYWORD
        named = [
            Parameter(name, kind, default=default, annotation=annotation)
            for name, (annotation, default) in fields.items()
        ]
        parameters = [Parameter("model", kind, annotation=ModelArgument), *own, *named]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate

"""Settings files: options that `focus-compile tune` found for one model, and what they are for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from focus_compile.errors import OptionError
from focus_compile.fallback import warn_once

__all__ = [
    "SETTINGS",
    "Settings",
    "config_hash",
    "describe_model",
    "package_version",
    "settings_in",
]

SETTINGS = "settings"
"""The name of the option that holds a file's path; no field of FocusConfig."""
VARIABLE = "FOCUS_COMPILE_SETTINGS"
"""Its mirror in the environment."""
_EXPECTED = "a file that focus-compile tune wrote"
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""What a model's config says beside the model."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A settings file.

    options: names to values, not checked yet. model: see `describe_model`; made_by: the version of
    focus_compile that measured them.
    """

    path: str
    options: Mapping[str, Any]
    model: Mapping[str, Any]
    made_by: str | None

    @classmethod
    def read(cls, path: object) -> Settings:
        """The settings in a file.

        Raises:
            OptionError: no path, no such file, or one of another content.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise OptionError.invalid(SETTINGS, path, f"the path of {_EXPECTED}")
        try:
            found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise OptionError(
                f"focus_compile: settings {path}: {why}; expected {_EXPECTED}"
            ) from None
        except ValueError as error:
            raise OptionError(
                f"focus_compile: settings {path}: no JSON ({error}); expected {_EXPECTED}"
            ) from None
        found = found if isinstance(found, dict) else {}
        options, model = found.get("options"), found.get("model")
        if not isinstance(options, dict) or not isinstance(model, dict):
            raise OptionError(
                f'focus_compile: settings {path}: no objects "options" and "model"; '
                f"expected {_EXPECTED}"
            )
        return cls(str(path), options, model, found.get("focus_compile"))

    def check_model(self, model: Any) -> None:
        """Warn once where they were measured on a model of another config."""
        config = getattr(model, "config", None)
        if config is None:
            return
        if config_hash(config) != self.model.get("config_sha256"):
            self._of_another(type(model).__name__)
        else:
            self._check_version()

    def check_weights(self, shapes: Iterable[tuple[int, ...]], name: str) -> None:
        """Warn once where a graph reads weights of shapes that their model has not.

        shapes: of its parameters; those of fewer than two axes tell nothing. name: the graph's
        class of model.
        """
        known = {tuple(shape) for shape in self.model.get("weight_shapes", ())}
        if any(len(shape) > 1 and tuple(shape) not in known for shape in shapes):
            self._of_another(name)

    def _of_another(self, name: str) -> None:
        warn_once(
            f"focus_compile: settings {self.path} were measured on {self.model.get('name')} "
            f"({self.model.get('class')}), and this {name} is another model; tune it by itself: "
            "python -m focus_compile tune",
            about=f"the model of {self.path}",
        )

    def _check_version(self) -> None:
        running = package_version("focus-compile")
        if running is not None and self.made_by not in (None, running):
            warn_once(
                f"focus_compile: settings {self.path} were measured with focus_compile "
                f"{self.made_by}, and this is {running}; tune again where answers matter"
            )


def settings_in(
    options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Settings | None:
    """The settings file that options, or else the environment (`os.environ` if None), name.

    Raises:
        OptionError: it cannot be read.
    """
    environment = os.environ if environment is None else environment
    path = options[SETTINGS] if SETTINGS in options else environment.get(VARIABLE) or None
    return None if path is None else Settings.read(path)


def config_hash(config: Any) -> str:
    """SHA-256 of a transformers config, without what changes from copy to copy of a model."""
    known = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def describe_model(model: Any) -> dict[str, Any]:
    """What a model is known by later, as JSON types: `config_sha256`, and the distinct shapes of
    its weights of two axes or more, `weight_shapes`."""
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1}
    return {
        "config_sha256": config_hash(model.config),
        "weight_shapes": [list(shape) for shape in sorted(shapes)],
    }


def package_version(name: str) -> str | None:
    """A distribution's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""Models by name through transformers: bundled ones, local folders, and the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_compile import demo
from focus_compile.errors import OptionError
from focus_compile.frontend import MASK_NAMES, known_mask_token_id

if TYPE_CHECKING:
    import torch

__all__ = [
    "BUNDLED",
    "DTYPES",
    "LoadedModel",
    "as_device",
    "as_dtype",
    "language_model_class",
    "load_model",
    "load_tokenizer",
    "source_of",
]

BUNDLED = {"tiny": "masked", "tiny-block": "block"}
"""Names of the bundled models on the command line, and those of `focus_compile.demo.load`."""
DTYPES = ("float32", "bfloat16", "float16")
HUB_SECONDS = 10
"""How long the hub may take to answer."""
_WEIGHTS_MISSING = ("no file named", "does not appear to have a file named")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, as it was named."""

    name: str
    model: Any
    trust_remote_code: bool = False

    @property
    def block_length(self) -> int | None:
        """Tokens of the blocks that the model was trained to decode, where its config says so."""
        for name in ("block_length", "block_size"):
            value = getattr(self.model.config, name, None)
            if isinstance(value, int) and value > 1:
                return value
        return None

    @property
    def shifts_logits(self) -> bool:
        """Whether row i scores position i + 1, as in Dream."""
        return str(getattr(self.model.config, "model_type", "")).lower() == "dream"

    def mask_token_id(self, given: int | None = None, tokenizer: Any = None) -> int:
        """The id that marks undecided positions: as given, from the config, or the tokenizer's.

        Raises:
            OptionError: not known, or not in the vocabulary; with candidates of the vocabulary.
        """
        found = given if given is not None else known_mask_token_id(self.model)
        if found is None:
            found = getattr(tokenizer, "mask_token_id", None)
        if found is None:
            raise OptionError(
                f"{self.name}: no mask token id is known; its config has none of "
                f"{', '.join(MASK_NAMES)}.{_candidates(tokenizer)} Pass --mask-token-id."
            )
        vocabulary = self.vocabulary
        if not 0 <= found < vocabulary:
            raise OptionError.invalid("mask_token_id", found, f"an id from 0 to {vocabulary - 1}")
        return int(found)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def random_ids(
        self, length: int, masked: int, mask_token_id: int | None, seed: int = 0
    ) -> torch.Tensor:
        """Ids int64 [1, length], none of them the mask but the last `masked`."""
        import torch

        mask = self.vocabulary - 1 if mask_token_id is None else mask_token_id
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocabulary - 1, (1, length), generator=random)
        ids += ids >= mask
        ids[:, length - masked :] = mask
        return ids.to(self.model.device)

    def check_length(self, length: int) -> None:
        """Raises OptionError where `length` tokens exceed the model's position table."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(most, int) and length > most:
            raise OptionError.invalid(
                "length", length, f"at most {most} tokens, the positions of {self.name}"
            )

    @property
    def description(self) -> dict[str, Any]:
        """For a results file: class, parameters, dtype and device as JSON types."""
        parameters = sum(weight.numel() for weight in self.model.parameters())
        return {
            "model": self.name,
            "class": type(self.model).__name__,
            "parameters": parameters,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }


def _candidates(tokenizer: Any) -> str:
    """Tokens whose name says that they may be the mask."""
    if tokenizer is None:
        return " Its model card names the mask token, and the tokenizer its id."
    found = {
        text: number
        for text, number in tokenizer.get_vocab().items()
        if "mask" in text.lower() and not text.isalpha() and text[0] in "<[|"
    }
    if not found:
        return " No token of the tokenizer is named after a mask: see the model card."
    return " Tokens named so: " + ", ".join(f"{text} = {n}" for text, n in found.items()) + "."


def as_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None is float32 on the CPU and bfloat16 elsewhere."""
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise OptionError.unknown(name, DTYPES, kind="dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def as_device(name: str | None) -> torch.device:
    """The device of that name; None is the first GPU, or the CPU where there is none.

    Raises:
        OptionError: no device of that name is there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError.invalid("device", name, "cpu, cuda, or cuda:0") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= count
    ):
        raise OptionError.invalid(
            "device", name, f"cpu or one of {count} CUDA devices; `doctor` says what torch sees"
        )
    return device


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    random_weights: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The masked language model of that name, else the causal one, in eval mode.

    name: one of `BUNDLED`, a folder, or a hub name. random_weights: build it from its config alone.
    Its config asks for no cache: a decoding loop of a dLLM passes none, and LLaDA's own code reads
    the setting though its config lacks it.

    Raises:
        OptionError: no such model, one without a language model head, or one whose own code was
            not allowed to run.
    """
    path = source_of(name)
    with _explained(name):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        make = language_model_class(name, config, trust_remote_code)
        if random_weights:
            model = _from_config(make, config, dtype, trust_remote_code)
        else:
            model = make.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    return LoadedModel(name, model.eval().to(device), trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model of that name; see `load_model`."""
    path = source_of(name)
    with _explained(name):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _from_config(make: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def language_model_class(name: str, config: Any, trust_remote_code: bool) -> Any:
    """The class of transformers that loads a language model of this config: what its own code
    (`auto_map`) says, where that may run; else its architecture's name; masked before causal.

    Raises:
        OptionError: there is none. name: what the model is called there.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    kinds = (AutoModelForMaskedLM, AutoModelForCausalLM)
    remote = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for make in (*kinds, AutoModel):
        if make.__name__ in remote:
            return make
    known = [make for make in kinds if type(config) in make._model_mapping]
    named = getattr(config, "architectures", None) or ()
    for make in known:
        if any(each.endswith(make.__name__.removeprefix("AutoModel")) for each in named):
            return make
    if known:
        return known[0]
    raise OptionError(
        f"{name}: no language model of transformers has a {type(config).__name__}; expected one "
        "that AutoModelForMaskedLM or AutoModelForCausalLM loads"
    )


def source_of(name: str) -> str:
    """What transformers is to load: a folder, or a name that the hub has.

    Raises:
        OptionError: neither, or a folder without a config.
    """
    if name in BUNDLED:
        return str(demo.model_path(BUNDLED[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OptionError(
                f"{name}: the folder holds no config.json; expected one that save_pretrained wrote"
            )
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if looks_local or not name:
        raise OptionError(f"{name}: no such folder; expected a model that save_pretrained wrote")
    _ask_hub(name)
    return name


def _ask_hub(name: str) -> None:
    """Raises OptionError unless the hub, or its cache, has such a model.

    Asked once: transformers' own look-up goes on for a minute where there is no network.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError

    try:
        cached = hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str) or hub.constants.HF_HUB_OFFLINE:
            return
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except HFValidationError as error:
        raise OptionError(_missing(name, f"not a name of the hub: {_line(error)}")) from error
    except GatedRepoError as error:
        raise OptionError(
            f"{name}: its authors give access on request; ask on its page at the hub, then log in "
            "with `hf auth login`"
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        hidden = "it has none that may be read here; `hf auth login` shows private ones"
        raise OptionError(_missing(name, hidden)) from error
    except EntryNotFoundError as error:
        raise OptionError(f"{name}: no model of transformers: it has no config.json") from error
    except Exception as error:  # the hub's HTTP library differs between its versions
        reached = f"{hub.constants.ENDPOINT} is not reached: {_line(error)}"
        raise OptionError(_missing(name, reached)) from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What transformers raises about files and foreign code, in one line."""
    try:
        yield
    except OptionError:
        raise
    except OSError as error:
        raise OptionError(_missing(name, str(error))) from error
    except (ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise OptionError(
                f"{name}: the model comes with code of its own; read it, and allow it to run "
                "with --trust-remote-code"
            ) from error
        raise OptionError(f"{name}: transformers cannot load it: {_line(error)}") from error


def _missing(name: str, message: str) -> str:
    if any(words in message for words in _WEIGHTS_MISSING):
        return (
            f"{name}: {_line(message)} Where only the shapes matter, --random-weights builds the "
            "model from its config."
        )
    if Path(name).expanduser().is_dir():
        return f"{name}: {_line(message)}"
    close = str(OptionError.unknown(name, BUNDLED, kind="model"))
    hint = f" {close.rpartition('; ')[2]}" if "did you mean" in close else ""
    return (
        f"{name}: no folder of that name, and nothing of the hub ({_line(message)}).{hint} "
        f"Bundled: {', '.join(BUNDLED)}."
    )


def _line(error: object) -> str:
    """The first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

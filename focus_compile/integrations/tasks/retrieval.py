"""Documents and scores of `focus_needle` and `focus_table`, in the wording of the bundled models.

As in RULER (arXiv 2404.06654), documents are made for given lengths in tokens, and every length is
a metric of its own. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from focus_compile import demo
from focus_compile.demo import retrieval
from focus_compile.errors import OptionError

LENGTHS = (512, 1024, 2048, 4096)
DEFAULT_LENGTHS = (512, 1024)
DEFAULT_SAMPLES = 16
RESPONSE = 64
BLOCK_LENGTH = 32
ABSENT = -1.0
"""The score of a document of another length, as RULER's tasks have it."""
_SEEDS = 1000


def needle(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Facts scattered through the text."""
    return _dataset("needle", **metadata)


def table(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Facts in one place."""
    return _dataset("table", **metadata)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of values that the response states, by the document's length and overall."""
    right = sum(statement in results[0] for statement in doc["outputs"]) / len(doc["outputs"])
    lengths = {str(length): ABSENT for length in doc["lengths"]}
    return {"right": right} | lengths | {str(doc["max_length"]): right}


def mean_of_length(scores: Sequence[float]) -> float:
    """The mean over documents of one length."""
    present = [score for score in scores if score != ABSENT]
    return sum(present) / len(present) if present else ABSENT


def _dataset(
    kind: retrieval.Kind,
    max_seq_lengths: Sequence[int] = DEFAULT_LENGTHS,
    num_samples: int = DEFAULT_SAMPLES,
    data_seed: int = 0,
    pretrained: Any = "tiny",
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """`num_samples` documents of each length, in turn, for the bundled model that is evaluated.

    max_seq_lengths: tokens of prompt and response. pretrained: the model argument of that name.

    Raises:
        OptionError: a length that the task has no metric for.
    """
    lengths = [max_seq_lengths] if isinstance(max_seq_lengths, int) else list(max_seq_lengths)
    for length in lengths:
        if length not in LENGTHS:
            expected = f"some of {', '.join(map(str, LENGTHS))}"
            raise OptionError.invalid("max_seq_lengths", max_seq_lengths, expected)
    model = _bundled_model(pretrained)
    tokenizer = demo.load_tokenizer(model)
    documents = [
        _document(tokenizer, kind, length, data_seed * _SEEDS + number, model)
        | {"max_length": length, "lengths": lengths}
        for number in range(num_samples)
        for length in lengths
    ]
    return {"test": datasets.Dataset.from_list(documents, split=datasets.Split.TEST)}


def _document(
    tokenizer: Any, kind: retrieval.Kind, length: int, seed: int, model: str
) -> dict[str, Any]:
    """A question as text. Text may come out some tokens shorter than the ids it was made of; the
    block model needs prompts of whole blocks, so it gets the first question that has them."""
    for attempt in range(_SEEDS):
        example = retrieval.make(
            tokenizer,
            length,
            kind=kind,
            response=RESPONSE,
            seed=seed + attempt * _SEEDS * _SEEDS,
            model=model,
        )
        text = tokenizer.decode(example.prompt_ids)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if model != "block" or len(tokens) == len(example.prompt_ids):
            outputs = [f"{key} is {value};" for key, value in example.pairs]
            return {"input": text, "outputs": outputs}
    raise OptionError(f"no question of {length} tokens survives its way through text")


def _bundled_model(pretrained: Any) -> str:
    """The bundled model whose wording is asked for: by name or folder, else the masked one."""
    folder = Path(str(pretrained))
    for name, path in demo.MODELS.items():
        if str(pretrained) == f"tiny-{name}" or folder.resolve() == path.resolve():
            return name
    return "masked"

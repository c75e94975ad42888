"""One evaluation with several backends, side by side: what `focus-compile eval` runs."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from rich.table import Table

from focus_compile.demo import environment
from focus_compile.errors import FocusError, OptionError
from focus_compile.integrations.lm_eval import TASKS
from focus_compile.integrations.lm_eval.model import FocusLM
from focus_compile.integrations.lm_eval.settings import BACKENDS
from focus_compile.integrations.lm_eval.work import Work

__all__ = ["Comparison", "EvalSettings", "Score", "run", "table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """What to evaluate, and how."""

    model: str = "tiny"
    """`pretrained` of `focus_dllm`."""
    tasks: tuple[str, ...] = ("focus_retrieval",)
    backends: tuple[str, ...] = ("inductor", "focus")
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For tasks that make their documents, such as `max_seq_lengths`."""
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    limit: int | None = None
    """Documents of each task."""
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    use_cache: str | None = None
    """Path of the response cache, one a backend: a run that was stopped goes on from there."""
    include_path: str | None = None
    """A folder with more tasks."""

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in BACKENDS:
                raise OptionError.unknown(backend, BACKENDS, kind="backend")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise OptionError(f"include_path {self.include_path}: no such folder")


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of each backend that ran so far."""

    scores: Mapping[str, Mapping[tuple[str, str], Score]]
    """By backend, then by task and metric."""
    work: Mapping[str, Work]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        backends = {
            backend: {
                "scores": [
                    {"task": task, "metric": metric} | asdict(score)
                    for (task, metric), score in scores.items()
                ],
                "work": asdict(self.work[backend]),
            }
            for backend, scores in self.scores.items()
        }
        return {"backends": backends, "settings": dict(self.settings)}


def run(
    settings: EvalSettings, finished: Callable[[Comparison], object] = lambda _: None
) -> Comparison | None:
    """Evaluate with one backend after another; None but in the first process of a distributed run.

    finished: called after each backend with what there is so far.

    Raises:
        FocusError: settings out of range, unknown tasks, or a model that cannot be loaded.
    """
    arguments = {"pretrained": settings.model} | dict(settings.model_arguments)
    manager = _task_manager(settings, arguments)
    scores: dict[str, Mapping[tuple[str, str], Score]] = {}
    work: dict[str, Work] = {}
    described = asdict(settings) | environment.describe()
    comparison = None
    for backend in settings.backends:
        torch.compiler.reset()
        lm = _model(arguments | {"backend": backend}, settings.batch_size)
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(settings.tasks),
            task_manager=manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            gen_kwargs=dict(settings.gen_kwargs) or None,
            apply_chat_template=settings.apply_chat_template,
            system_instruction=settings.system_instruction,
            use_cache=None if settings.use_cache is None else f"{settings.use_cache}_{backend}",
        )
        works = lm.gather_object(lm.work)
        if found is None or works is None:
            continue
        scores[backend] = _scores(found["results"])
        work[backend] = Work.side_by_side(works)
        comparison = Comparison(dict(scores), dict(work), described | {"processes": len(works)})
        finished(comparison)
    return comparison


def table(comparison: Comparison) -> Table:
    """The comparison for people."""
    first, *_ = comparison.scores
    rows = Table(title="the same task by backend")
    for column in ("task", "metric", *comparison.scores):
        rows.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for key in comparison.scores[first]:
        shown = [_shown(scores.get(key)) for scores in comparison.scores.values()]
        rows.add_row(*key, *shown)
    rows.add_section()
    for name, show in _WORK.items():
        rows.add_row("", name, *(show(work) for work in comparison.work.values()))
    return rows


_WORK: dict[str, Callable[[Work], str]] = {
    "model calls": lambda work: f"{work.model_calls:,}",
    "rows computed": lambda work: f"{work.rows:,}",
    "decoding, seconds": lambda work: f"{work.seconds - work.compile_seconds:.1f}",
    "compilation, seconds": lambda work: f"{work.compile_seconds:.1f}",
}


def _shown(score: Score | None) -> str:
    if score is None:
        return "–"
    spread = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{score.value:.3f}{spread}"


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Score]:
    """lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    scores = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            spread = float(stderr) if isinstance(stderr, (int, float)) else None
            scores[task, label] = Score(float(value), spread)
    return scores


def _task_manager(settings: EvalSettings, arguments: Mapping[str, Any]) -> TaskManager:
    """Knows this package's tasks, and lm-eval's own where others are asked for."""
    logging.getLogger("lm_eval.api.task").addFilter(_is_news)
    folders: Sequence[str] = [str(TASKS), *filter(None, [settings.include_path])]
    metadata = dict(arguments) | dict(settings.metadata)
    for defaults in (False, True):
        manager = TaskManager(
            include_path=list(folders), include_defaults=defaults, metadata=metadata
        )
        missing = [task for task in settings.tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    close = difflib.get_close_matches(missing[0], manager.all_tasks, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "lm-eval ls tasks lists what there is."
    raise OptionError(f"focus_compile: unknown task {missing[0]!r}; {hint}")


def _is_news(record: logging.LogRecord) -> bool:
    """Not what lm-eval says of every task that makes its documents."""
    return "Custom kwargs can be passed" not in record.getMessage()


def _model(arguments: Mapping[str, Any], batch_size: int) -> FocusLM:
    try:
        return FocusLM(batch_size=batch_size, **arguments)
    except FocusError:
        raise
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(f"{arguments['pretrained']}: cannot be loaded: {reason}") from error

"""The Pareto plot of a search."""

from __future__ import annotations

from pathlib import Path

from focus_compile.errors import OptionError
from focus_compile.tuning.result import Trial, TuneResult, pareto_front

__all__ = ["check_plot", "draw"]

FORMATS = (".svg", ".png", ".pdf")


def check_plot(file: Path | None) -> None:
    """Raises OptionError where a plot cannot be drawn into the file."""
    if file is None:
        return
    if file.suffix not in FORMATS or not file.absolute().parent.is_dir():
        raise OptionError(
            f"--plot {file}: not a file in an existing folder with a name in {', '.join(FORMATS)}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError('--plot needs matplotlib: pip install "focus-compile[tune]"') from None


def draw(result: TuneResult, file: Path) -> None:
    """Speed-up against agreement: all trials, the Pareto front, the target, and the chosen one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "focus_compile"}):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        cut = [trial for trial in result.trials if not trial.complete]
        done = [trial for trial in result.trials if trial.complete]
        front = pareto_front(result.trials)
        axes.scatter(*_points(cut), marker="x", color="0.6", label="cut short")
        axes.scatter(*_points(done), color="C0", label="all prompts")
        axes.plot(*_points(front), color="C0", linewidth=1, label="Pareto front")
        axes.scatter(*_points(result.trials[:1]), marker="D", color="C1", label="defaults")
        axes.scatter(
            *_points([result.chosen]), marker="*", s=220, color="C3", zorder=3,
            label="chosen" if result.reached else "best; the target was not reached",
        )  # fmt: skip
        axes.axhline(result.target, color="black", linestyle=":", linewidth=1, label="target")
        axes.set_xlabel(
            "dense / focus, " + ("seconds" if result.measure == "time" else "multiply-adds")
        )
        axes.set_ylabel("tokens equal to the dense loop's")
        axes.set_title(f"{result.model['model']}, {len(result.trials)} settings")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _points(trials: list[Trial] | tuple[Trial, ...]) -> tuple[list[float], list[float]]:
    return [1 / trial.score.cost for trial in trials], [t.score.agreement for t in trials]

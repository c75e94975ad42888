"""One self-contained HTML file about a run: `html(record)`, `write(record, path)`."""

from focus_compile.report.page import html, write

__all__ = ["html", "write"]

"""lm-eval's own command line, with `focus_dllm` and the tasks of this package known to it."""

from __future__ import annotations

import sys

from focus_compile.integrations.lm_eval import TASKS

COMMANDS_WITHOUT_TASKS = ("-h", "--help")


def with_tasks(arguments: list[str]) -> list[str]:
    """The arguments, with this package's tasks included unless another folder is."""
    given = any(argument.split("=")[0] == "--include_path" for argument in arguments)
    if given or not arguments or arguments[-1] in COMMANDS_WITHOUT_TASKS:
        return arguments
    return [*arguments, "--include_path", str(TASKS)]


def main() -> None:
    """Run lm-eval on this process's arguments."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = with_tasks(sys.argv[1:])
    cli_evaluate()


if __name__ == "__main__":
    main()

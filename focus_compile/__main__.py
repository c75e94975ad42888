"""`python -m focus_compile`: the command line."""

from focus_compile.cli import app

if __name__ == "__main__":
    app(prog_name="python -m focus_compile")

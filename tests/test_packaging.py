"""What is installed: a wheel built from the source archive works without the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = ("py.typed", "demo/tiny_dllm/model.safetensors", "demo/tiny_block/README.md")
LICENCES = ("LICENSE", "NOTICE")
OUTSIDE = """
import importlib.metadata, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import focus_compile
from focus_compile import demo

assert Path(focus_compile.__file__).is_relative_to(sys.argv[1]), focus_compile.__file__
(entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="focus")
entry.load()
(script,) = importlib.metadata.entry_points(group="console_scripts", name="focus-compile")
script.load()
model, tokenizer = demo.load()
print(focus_compile.__version__, tokenizer.mask_token_id)
"""


@pytest.mark.release
def test_the_wheel_of_the_source_archive_works_alone(tmp_path: Path) -> None:
    pytest.importorskip("build")
    build = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (archive,) = tmp_path.glob("*.tar.gz")
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        packed.extractall(target)
    assert {f"focus_compile/{member}" for member in MEMBERS} <= names
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    assert licences == set(LICENCES)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"focus_compile"}
    version = wheel.name.split("-")[1]
    assert archive.name == f"focus_compile-{version}.tar.gz"
    command = [sys.executable, "-P", "-c", OUTSIDE, str(target)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.stdout.split() == [version, "3"], ran.stderr


def test_the_import_costs_less_than_a_third_of_a_second_beyond_torch() -> None:
    program = "import time, torch; t = time.process_time(); import focus_compile"
    command = [sys.executable, "-c", f"{program}; print(time.process_time() - t)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 0.3


def test_no_file_is_unpickled_or_evaluated() -> None:
    forbidden = re.compile(
        r"\bimport pickle\b|\btorch\.load\(|(?<![\w.])(eval|exec)\(|yaml\.load\("
    )
    for file in (ROOT / "focus_compile").rglob("*.py"):
        assert not forbidden.search(file.read_text()), file

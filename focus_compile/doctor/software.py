"""Versions, the backend's registration, and the compilers that programs need."""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

from focus_compile.doctor.check import NOTE, OK, PROBLEM, Check

__all__ = ["checks"]

PACKAGE = "focus-compile"
NEWEST_TORCH = "2.13"
"""The newest release that the tests run with."""


def checks() -> Iterator[Check]:
    """Versions and compilers."""
    yield Check("python", OK, f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield _own_version()
    yield from _required()
    yield _torch_release()
    yield _compiler()
    yield triton()


def _own_version() -> Check:
    name, folder = PACKAGE, Path(__file__).resolve().parents[1]
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        return Check(
            name, NOTE, f"not installed; imported from {folder}",
            'torch.compile(backend="focus") finds it only once installed: pip install -e .',
        )  # fmt: skip
    if not entry_points(group="torch_dynamo_backends", name="focus"):
        return Check(
            name, PROBLEM, f"{found}, but torch knows no backend focus", "install it again"
        )
    return Check(name, OK, f"{found}, backend focus is registered")


def _required() -> Iterator[Check]:
    """The packages that ours asks for, beside torch, against the versions that it asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        return
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(each.name)
        except PackageNotFoundError:
            yield Check(
                each.name, PROBLEM, f"not installed; {each} is needed", f'pip install "{each}"'
            )
            continue
        if each.specifier.contains(found, prereleases=True):
            yield Check(each.name, OK, found)
        else:
            yield Check(
                each.name, PROBLEM, f"{found}; {each.specifier} is needed", f'pip install "{each}"'
            )


def _torch_release() -> Check:
    import torch
    from packaging.version import Version

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if torch.version.hip:
        return Check(
            "torch build", NOTE, f"ROCm {torch.version.hip}",
            "programs were never run on ROCm: compare with policy=exact",
        )  # fmt: skip
    release = Version(torch.__version__).release[:2]
    if release > Version(NEWEST_TORCH).release:
        return Check(
            "torch build", NOTE, f"{built}; newer than {NEWEST_TORCH}, the newest tested",
            "the self-test says whether it works",
        )  # fmt: skip
    if not torch.version.cuda and shutil.which("nvidia-smi"):
        return Check(
            "torch build", NOTE, f"{built}, beside an NVIDIA driver",
            "for the GPU, install a torch built for CUDA: https://pytorch.org/get-started",
        )  # fmt: skip
    return Check("torch build", OK, built)


def _compiler() -> Check:
    """Inductor compiles C++ for the CPU, and a launcher for Triton."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    name = "C++ compiler"
    try:
        found = get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        return Check(
            name, PROBLEM, f"none that works ({str(error).splitlines()[0]})",
            "install g++ or clang (apt install g++), or name one in CXX; until then only "
            'lowering="eager" runs on the CPU',
        )  # fmt: skip
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return Check(
            name, PROBLEM, f"{found}, but {header} is missing",
            f"install the headers of Python {sys.version_info.major}.{sys.version_info.minor} "
            "(apt install python3-dev)",
        )  # fmt: skip
    return Check(name, OK, str(found))


def triton() -> Check:
    """Triton: what runs our kernels, and Inductor's, on a GPU."""
    import os

    import torch

    gpu = torch.cuda.is_available()
    try:
        found = version("triton")
    except PackageNotFoundError:
        if not gpu:
            return Check("triton", OK, "not installed; the CPU needs none")
        return Check(
            "triton", PROBLEM, "not installed: kernels on the GPU run as plain torch operations",
            "pip install focus-compile[cuda]",
        )  # fmt: skip
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return Check(
            "triton", PROBLEM if gpu else NOTE, f"{found}, interpreted (TRITON_INTERPRET is set)",
            "kernels are thousands of times slower: unset TRITON_INTERPRET",
        )  # fmt: skip
    return Check("triton", OK, found if gpu else f"{found}, not used on the CPU")

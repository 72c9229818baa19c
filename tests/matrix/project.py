"""The project as the cells test it: a copy of the checkout, and wheels made of it."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

from matrix import debian
from matrix.base import Failure, Job, output

BUILD = ["gcc", "libc6-dev"]
# Python 3.11's suite: the wheel for every Python with a GIL is made there.
OLDEST = "bookworm"
OLDEST_PYTHON = ["python3", "python3-dev", "python3-venv", *BUILD]


def copy(job: Job) -> Path:
    """The checkout's files, uncommitted changes and new files included."""
    names = output(
        *("git", "-C", job.source, "ls-files", "-z", "-co", "--exclude-standard")
    )
    to = job.work / "checkout"
    for name in filter(None, names.split("\0")):
        if (job.source / name).is_file():  # neither deleted nor a submodule
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(job.source / name, to / name)
    return to


def commit(source: Path) -> str:
    """The commit, with a plus sign if the checkout has changes besides."""
    changes = output("git", "-C", source, "status", "--porcelain")
    return output("git", "-C", source, "rev-parse", "--short=12", "HEAD") + (
        "+" if changes else ""
    )


def test_extra(source: Path) -> list[str]:
    """What the tests need from PyPI."""
    data = tomllib.loads((source / "pyproject.toml").read_text())
    extra: list[str] = data["project"]["optional-dependencies"]["test"]
    return extra


def only_wheel(folder: Path) -> Path:
    found = list(folder.glob("mrelease-*.whl"))
    if len(found) != 1:
        raise Failure(f"{len(found)} wheels built, not one")
    return found[0]


def oldest_root(job: Job) -> Path:
    return debian.root(job, OLDEST, OLDEST_PYTHON)


def site(job: Job) -> Path:
    """What the tests need, for the oldest Python, and the wheel: as site-packages."""
    root = oldest_root(job)
    venv = job.work / "oldest"
    wheels = job.work / "wheels"
    pip = [venv / "bin/python", "-m", "pip", "-q"]
    for command in (
        ["python3.11", "-m", "venv", venv],
        [*pip, "wheel", "--no-deps", "-w", wheels, "."],
        [*pip, "install", *test_extra(job.source)],
    ):
        if debian.chroot(job, root, *command, cwd=job.work / "checkout"):
            raise Failure("the wheel cannot be built")
    packages = venv / "lib/python3.11/site-packages"
    install(only_wheel(wheels), packages)
    # In the copy, what the build has left would be taken for the project's own.
    subprocess.run(["rm", "-rf", job.work / "checkout/build"], check=True)
    return packages


def install(wheel: Path, to: Path) -> None:
    """Unpack a wheel: ours has nothing but files for site-packages."""
    shutil.unpack_archive(wheel, to, "zip")

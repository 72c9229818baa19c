"""The project as the cells test it: a copy of the checkout, and wheels made of it."""

from __future__ import annotations

import shutil
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


def build_requirements(source: Path) -> list[str]:
    data = tomllib.loads((source / "pyproject.toml").read_text())
    requires: list[str] = data["build-system"]["requires"]
    return requires


def _oldest(job: Job, *words: object) -> None:
    """Run the oldest Python, in an environment of its own."""
    root = debian.root(job, OLDEST, OLDEST_PYTHON)
    venv = job.work / "oldest"
    if not venv.exists() and debian.chroot(job, root, "python3", "-m", "venv", venv):
        raise Failure("no environment can be made")
    python = venv / "bin/python"
    if debian.chroot(job, root, python, *words, cwd=job.work / "checkout"):
        raise Failure("the wheel cannot be built, or its tests have not what they need")


def wheel(job: Job) -> Path:
    """The wheel for every Python with a GIL, built from the copy."""
    wheels = job.work / "wheels"
    _oldest(job, "-m", "pip", "-q", "wheel", "--no-deps", "-w", wheels, ".")
    # In the copy, what the build has left would be taken for the project's own.
    shutil.rmtree(job.work / "checkout/build")
    found = list(wheels.glob("mrelease-*-cp311-abi3-*.whl"))
    if len(found) != 1:
        raise Failure(f"{len(found)} wheels built, not one")
    return found[0]


def given(job: Job, libc: str, machine: str) -> Path | None:
    """The wheel for a machine among those that are to be tested; None: build one."""
    if not job.wheels:
        return None
    found = list(job.wheels.glob(f"mrelease-*-cp311-abi3-{libc}*_{machine}.whl"))
    if len(found) != 1:
        raise Failure(f"{len(found)} wheels of {libc} for {machine} in {job.wheels}")
    job.on["wheel"] = found[0].name
    return found[0]


def site(job: Job) -> Path:
    """What the tests need, for the oldest Python: its site-packages."""
    _oldest(job, "-m", "pip", "-q", "install", *test_extra(job.source))
    return job.work / "oldest/lib/python3.11/site-packages"


def pure_site(job: Job, to: Path) -> None:
    """The same without what is compiled: for another Python or architecture."""
    packages = site(job)
    compiled = {path.relative_to(packages).parts[0] for path in packages.rglob("*.so")}
    # Of what is left out, no trace may be left: pip's record would tell of it.
    shutil.copytree(packages, to, ignore=shutil.ignore_patterns(*compiled))


def foreign_site(job: Job, to: Path, platform: str, version: str) -> None:
    """The same for another Python, of which there are wheels, but that has no pip."""
    wanted = "--only-binary=:all:", "--platform", platform, "--python-version", version
    install = "-m", "pip", "-q", "install", "--target", to, *wanted
    _oldest(job, *install, *test_extra(job.source))


def install(wheel: Path, to: Path) -> None:
    """Unpack a wheel: ours has nothing but files for site-packages."""
    shutil.unpack_archive(wheel, to, "zip")

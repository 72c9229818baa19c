"""The whole suite in a guest, as root and as nobody, on the kernels Debian has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from matrix import debian, guest, project
from matrix.base import CACHE, Failure, Job, Skip

# What tests may be skipped for lacking (conftest.py), and no guest lacks.
USER = "cpus,seccomp,strace"
ROOT = f"{USER},freezer,fuse,mount,root,unshare"

PYTHON = ["python3"]

# Modules that the tests can make use of, where they are no part of the kernel itself,
# and where those are that they depend on.
MODULES = ("fs/fuse", "drivers/block/zram", "mm", "crypto", "lib", "arch/x86/crypto")


def version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def fetch(job: Job, suite: str, release: str) -> Path:
    """Unpack the newest cloud kernel of this release, the newest of all if empty."""
    apt = debian.Suite(job, suite)
    # The package linux-binary has the image since 6.19, linux-image had it before.
    pattern = re.compile(
        rf"linux-image-({re.escape(release)}(\b[^a-z]*)(\+[a-z0-9]+|-\d+)?-cloud-amd64)"
    )
    names = apt.names("linux-image-")
    found = [match for name in names if (match := pattern.fullmatch(name))]
    if not found:
        raise Skip(f"Debian {suite} has no cloud kernel {release}")
    name = max(found, key=lambda match: version(match[1]))[1]
    folder = CACHE / "kernels" / name
    with debian.locked(folder.name):
        if not folder.exists():
            kinds = [f"linux-{kind}-{name}" for kind in ("image", "binary", "modules")]
            there = [kind for kind in kinds if apt.has([kind])]
            new = folder.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            for deb in apt.download(there, job.work / "kernel"):
                debian.unpack(deb, new)
            new.rename(folder)
    return folder


def image(folder: Path) -> Path:
    for found in (*folder.glob("boot/vmlinu*"), *folder.glob("usr/lib/modules/*/vmlinu*")):
        return found
    raise Failure(f"no kernel image in {folder}")


def modules(job: Job, kernel: Path, to: Path) -> None:
    """Copy what the tests can use of a kernel's modules, for modprobe."""
    for tree in (*kernel.glob("lib/modules/*"), *kernel.glob("usr/lib/modules/*")):
        there = to / "usr/lib/modules" / tree.name
        there.mkdir(parents=True, exist_ok=True)
        for file in tree.glob("modules.*"):
            shutil.copy(file, there)
        for name in MODULES:
            if (tree / "kernel" / name).is_dir():
                shutil.copytree(tree / "kernel" / name, there / "kernel" / name)
        depmod = ["depmod", "-b", to / "usr", tree.name]
        if debian.chroot(job, debian.root(job, project.OLDEST, PYTHON), *depmod):
            raise Failure("depmod failed")


def run(job: Job, suite: str, release: str, *, releases: bool = True) -> None:
    """A kernel cell. `releases`: whether the kernel has process_mrelease()."""
    kernel = fetch(job, suite, release)
    overlay = job.work / "overlay"
    shutil.copytree(project.copy(job), overlay / "checkout")
    packages = project.site(job)
    shutil.copytree(packages, overlay / "usr/local/lib/python3.11/dist-packages")
    modules(job, kernel, overlay)
    more = ",release" if releases else ""
    guest.boot(
        job,
        guest.X86,
        kernel=image(kernel),
        root=debian.root(job, project.OLDEST, PYTHON),
        overlay=overlay,
        script=guest.tests_as("root", ROOT + more, job.args)
        + guest.tests_as("nobody", USER + more, job.args),
        timeout=2400,
    )

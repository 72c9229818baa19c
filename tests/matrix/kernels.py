"""The whole suite in a guest, as root and as nobody, on the kernels Debian has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from matrix import debian, guest, project
from matrix.base import CACHE, Failure, Job, Skip

# What tests may be skipped for lacking (conftest.py), and no guest lacks.
USER = "cpus,seccomp,strace"
ROOT = f"{USER},cgroup1,cgroup2,freezer,fuse,memcg,mount,pids,root,unshare"

PYTHON = ["python3"]

# Modules that the tests can make use of, where they are no part of the kernel itself,
# and where those are that they depend on.
MODULES = ("fs/fuse", "drivers/block/zram", "mm", "crypto", "lib", "arch/x86/crypto")


def version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def fetch(
    job: Job,
    suite: str,
    release: str = "",
    *,
    flavour: str = "cloud-amd64",
    arch: str = "amd64",
) -> Path:
    """Unpack the newest kernel of this release, or of all."""
    apt = debian.Suite(job, suite, arch)
    exact = rf"{re.escape(release)}(?!\d)" if release else ""
    wanted = rf"linux-image-({exact}[\d.]*(-\d+|\+\w+)?-{flavour})"
    names = [re.fullmatch(wanted, name) for name in apt.names("linux-image-")]
    found = [match[1] for match in names if match]
    if not found:
        raise Skip(f"Debian {suite} has no kernel {release} {flavour}")
    name = max(found, key=version)
    folder = CACHE / "kernels" / name
    with debian.locked(folder.name):
        if not folder.exists():
            # From 6.19 on the image is in linux-binary, before that in linux-image.
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
    for found in (
        *folder.glob("boot/vmlinu*"),
        *folder.glob("usr/lib/modules/*/vmlinu*"),
    ):
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
    site = overlay / "usr/local/lib/python3.11/dist-packages"
    shutil.copytree(project.site(job), site)
    project.install(project.wheel(job), site)
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
        timeout=6000,
    )

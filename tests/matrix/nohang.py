"""Debian's nohang in a guest short of memory, as it is and with mrelease's kill."""

from __future__ import annotations

import shutil

from matrix import debian, guard, project
from matrix.base import Job


def run(job: Job) -> None:
    overlay = guard.small(job)
    package = job.work / "package"
    package.mkdir()
    suite = debian.Suite(job, project.OLDEST)
    for deb in suite.download(["nohang"], job.work / "nohang"):
        debian.unpack(deb, package)
    # Not its lib/, which would take the place of the guest's link of that name.
    for name in ("etc", "usr"):
        shutil.copytree(package / name, overlay / name, dirs_exist_ok=True)
    guard.boot(job, overlay, "nohang", ["tests/exhaust_nohang.py"], swap=False)

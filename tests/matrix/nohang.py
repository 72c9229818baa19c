"""Debian's nohang in a guest short of memory, as it is and with mrelease's kill."""

from __future__ import annotations

from matrix import debian, guard, project
from matrix.base import Job


def run(job: Job) -> None:
    overlay = guard.small(job)
    suite = debian.Suite(job, project.OLDEST)
    for deb in suite.download(["nohang"], job.work / "nohang"):
        debian.unpack(deb, overlay)
    guard.boot(job, overlay, "nohang", "tests/exhaust_nohang.py", swap=False)

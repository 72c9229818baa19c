"""A machine of qemu's: its memory holds a Debian, its first process runs the tests."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from matrix import debian
from matrix.base import CACHE, NOBODY, PYTEST, Failure, Job

# Suite with a qemu that runs recent kernels: 7.2 of Debian 12 lets guests panic.
QEMU_SUITE = "trixie"


@dataclass(frozen=True)
class Machine:
    """How qemu is told to be one."""

    arch: str  # Debian's name
    packages: tuple[str, ...]
    command: tuple[str, ...]
    console: str
    mib: int = 3072


X86 = Machine(
    "amd64",
    ("qemu-system-x86",),
    # Where /dev/kvm works, MRELEASE_ACCEL=kvm makes it quicker.
    (
        "qemu-system-x86_64",
        *("-accel", os.environ.get("MRELEASE_ACCEL", "tcg"), "-cpu", "max"),
    ),
    "ttyS0",
)

# A guest's first process. What it prints, the log has; the lines with @@ are for us.
INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2> /dev/null
dmesg -n 1  # the console is the tests'
exec < /dev/null > /dev/console 2>&1
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp
ln -sfn /proc/self/fd /dev/fd
mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo +memory > /sys/fs/cgroup/cgroup.subtree_control
mkdir -p /run/freezer
mount -t cgroup -o freezer freezer /run/freezer
modprobe -q fuse
modprobe -q zram
[ ! -e /dev/fuse ] || chmod 666 /dev/fuse
ldconfig
echo "@@ kernel $(uname -r)"
ls -d /dev/fuse /dev/zram0
echo "@@ machine $(uname -m)"
echo "@@ python $(python3 -c 'import platform; print(platform.python_version())')"
cd /checkout
sh /job 2>&1 | cat  # to no terminal
dmesg | grep -i -e 'killed process' -e panic -e 'BUG:'  # whatever else has killed
echo "@@ done"
python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'  # power off
"""


def tests_as(label: str, required: str, args: list[str]) -> str:
    """The lines of a guest's job that run pytest; as root, unless it is for nobody."""
    pytest = ["python3", "-P", "-m", "pytest", "-q", "--durations=60", *PYTEST, *args]
    if label == "nobody":
        user = f"--reuid={NOBODY} --regid={NOBODY} --clear-groups env HOME=/tmp"
        prefix = f"setpriv {user}"
    else:
        prefix = "env"
    return (
        f"echo '@@ begin {label}'\n"
        f"{prefix} MRELEASE_REQUIRE={required} {shlex.join(pytest)}\n"
        f'echo "@@ end {label} $?"\n'
    )


def archive(job: Job, tools: Path, folder: Path, to: Path) -> None:
    """Pack a folder as the kernel unpacks it."""
    script = f'cd "$1" && find . {PRUNE} | cpio --quiet -o -H newc > "$2"'
    if debian.chroot(job, tools, "sh", "-c", script, "sh", folder, to):
        raise Failure("cpio failed")


# Neither run nor read in a guest; nor is what chroot() has made in a root.
PRUNE = (
    " ".join(
        f"-path '{path}' -prune -o"
        for path in (
            "./usr/share/doc",
            "./usr/share/locale",
            "./usr/share/man",
            "./usr/include",
            f".{CACHE}",
        )
    )
    + " -print"
)


def boot(
    job: Job,
    machine: Machine,
    *,
    kernel: Path,
    root: Path,
    overlay: Path,
    script: str,
    timeout: float,
    append: str = "",
) -> None:
    """Boot, run the job's script, take its counts.

    The guest has the files of root and those of overlay. `append`: for the kernel.
    """
    tools = debian.root(job, QEMU_SUITE, ["cpio", *machine.packages])
    base = CACHE / "cpio" / f"{root.name}.cpio"
    with debian.locked(base.name):
        if not base.exists():
            base.parent.mkdir(exist_ok=True)
            archive(job, tools, root, base.with_suffix(".new"))
            base.with_suffix(".new").rename(base)
    (overlay / "init").write_text(INIT)
    (overlay / "init").chmod(0o755)
    (overlay / "job").write_text(script)
    archive(job, tools, overlay, job.work / "overlay.cpio")
    initrd = job.work / "initrd"
    with open(initrd, "wb") as whole:
        for part in (base, job.work / "overlay.cpio"):
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
    before = job.log.tell()
    status = debian.chroot(
        job,
        tools,
        *machine.command,
        *("-m", str(machine.mib), "-smp", "2", "-nographic", "-nic", "none"),
        *("-no-reboot", "-kernel", kernel, "-initrd", initrd, "-append"),
        f"console={machine.console} quiet panic=-1 rdinit=/init {append}".rstrip(),
        timeout=timeout,
    )
    take(job, job.logged(before).replace("\r", ""), status)


def take(job: Job, console: str, status: int) -> None:
    for word in ("kernel", "machine", "python"):
        # Not at a line's beginning: firmware has written there.
        if found := re.search(rf"@@ {word} (.+)$", console, re.M):
            job.on[word] = found[1]
    failures = []
    whole = re.compile(r"^@@ begin (\w+)$(.*?)^@@ end \1 (\d+)$", re.M | re.S)
    for label, text, code in whole.findall(console):
        try:
            job.counted(label, text, int(code))
        except Failure as failure:
            failures.append(str(failure))
    if not re.search(r"^@@ done$", console, re.M):
        failures.append(f"the guest did not finish (qemu's exit status {status})")
    elif not job.runs:
        failures.append("the guest ran no tests")
    if failures:
        raise Failure("; ".join(failures))

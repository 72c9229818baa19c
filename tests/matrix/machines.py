"""Other architectures: 32-bit x86 run by this CPU, the others by emulated machines.

Emulated whole, since an emulator of processes alone knows no process_mrelease(2).
"""

from __future__ import annotations

import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from matrix import debian, guest, kernels, project, pythons
from matrix.base import Failure, Job

# What depends on the CPU, and a kill from end to end. The rest would take an hour.
TESTS = ["tests/test_syscalls.py", "tests/test_arguments.py", "tests/test_kill.py"]
REQUIRED = "release,root,seccomp,strace"


@dataclass(frozen=True)
class Architecture:
    triplet: str
    wheel: str  # what wheels call it
    elf: tuple[int, str]  # e_machine, and struct's letter for the byte order
    flavour: str  # of Debian's kernel
    machine: guest.Machine
    suite: str = "bookworm"


ARCHITECTURES = {
    "arm64": Architecture(
        "aarch64-linux-gnu",
        "aarch64",
        (183, "<"),
        "cloud-arm64",
        guest.Machine(
            "arm64",
            ("qemu-system-arm",),
            ("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57"),
            "ttyAMA0",
            2048,
        ),
    ),
    "armhf": Architecture(
        "arm-linux-gnueabihf",
        "armv7l",
        (40, "<"),
        "armmp",
        guest.Machine(
            "armhf",
            ("qemu-system-arm",),
            ("qemu-system-arm", "-M", "virt,highmem=off", "-cpu", "cortex-a15"),
            "ttyAMA0",
            2048,
        ),
    ),
    "ppc64le": Architecture(
        "powerpc64le-linux-gnu",
        "ppc64le",
        (21, "<"),
        "powerpc64le",
        guest.Machine(
            "ppc64el",
            ("qemu-system-ppc",),
            ("qemu-system-ppc64", "-M", "pseries", "-cpu", "power9", "-vga", "none"),
            "hvc0",
            2048,
        ),
    ),
    "riscv64": Architecture(
        "riscv64-linux-gnu",
        "riscv64",
        (243, "<"),
        "riscv64",
        guest.Machine(
            "riscv64",
            ("qemu-system-misc", "qemu-system-riscv", "opensbi"),
            ("qemu-system-riscv64", "-M", "virt"),
            "ttyS0",
            2048,
        ),
        "sid",  # Debian 12 has none
    ),
    "s390x": Architecture(
        "s390x-linux-gnu",
        "s390x",
        (22, ">"),
        "s390x",
        guest.Machine(
            "s390x",
            ("qemu-system-misc", "qemu-system-s390x"),
            ("qemu-system-s390x", "-M", "s390-ccw-virtio", "-cpu", "max"),
            "ttysclp0",
            2048,
        ),
    ),
}


def i686(job: Job) -> None:
    """The whole suite, compiled and run by a 32-bit Debian on this kernel."""
    root = debian.root(job, project.OLDEST, project.OLDEST_PYTHON, arch="i386")
    python = pythons.Python("python3", root, under=("linux32",))
    pythons.suite(job, python, "abi3 and sys.maxsize < 2**32", own=True)


def cross(job: Job, arch: Architecture, target: Path) -> Path:
    """Build the wheel for another architecture, with Debian's compiler for it."""
    machine = arch.machine.arch
    compiler = f"gcc-{arch.triplet}"
    libc = f"libc6-dev-{machine}-cross"
    root = debian.root(job, arch.suite, [*project.OLDEST_PYTHON, compiler, libc])
    # How the target's Python was configured decides how its extensions are compiled.
    (config,) = target.glob(f"usr/lib/python3.*/_sysconfigdata__{arch.triplet}.py")
    settings = job.work / "settings"
    settings.mkdir()
    shutil.copy(config, settings)
    venv = job.work / "cross"
    wheels = job.work / "wheels"
    env = {
        "CFLAGS": f"-idirafter {target}/usr/include",
        "PYTHONPATH": str(settings),
        "_PYTHON_HOST_PLATFORM": f"linux-{arch.wheel}",
        "_PYTHON_SYSCONFIGDATA_NAME": config.stem,
    }
    pip = [venv / "bin/python", "-m", "pip", "-q"]
    checkout = job.work / "checkout"
    needed = project.build_requirements(job.source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", wheels, "."]
    if (
        debian.chroot(job, root, "python3", "-m", "venv", venv)
        or debian.chroot(job, root, *pip, "install", *needed)
        or debian.chroot(job, root, *pip, *build, cwd=checkout, env=env)
    ):
        raise Failure("the wheel cannot be built")
    shutil.rmtree(checkout / "build")
    (wheel,) = wheels.glob("mrelease-*-cp311-abi3-*.whl")
    return wheel


def check_elf(extension: Path, arch: Architecture) -> None:
    number, order = arch.elf
    header = extension.read_bytes()[:20]
    if struct.unpack_from(f"{order}H", header, 18) != (number,):
        raise Failure(f"{extension.name} is for another machine")


def emulated(job: Job, name: str) -> None:
    """The tests of the system calls and of the kill in an emulated machine."""
    arch = ARCHITECTURES[name]
    kernel = kernels.fetch(
        job, arch.suite, flavour=arch.flavour, arch=arch.machine.arch
    )
    packages = ["python3", "python3-psutil", "libpython3-dev"]
    target = debian.root(job, arch.suite, packages, arch=arch.machine.arch)
    overlay = job.work / "overlay"
    checkout = project.copy(job)
    wheel = project.given(job, "manylinux", arch.wheel) or cross(job, arch, target)
    shutil.copytree(checkout, overlay / "checkout")
    version = Path((target / "usr/bin/python3").readlink()).name
    site = overlay / f"usr/local/lib/{version}/dist-packages"
    project.pure_site(job, site)
    project.install(wheel, site)
    for extension in site.glob("mrelease/*.so"):
        check_elf(extension, arch)
    kernels.modules(job, kernel, overlay)
    guest.boot(
        job,
        arch.machine,
        kernel=kernels.image(kernel),
        root=target,
        overlay=overlay,
        script=guest.tests_as("root", REQUIRED, job.args or TESTS),
        timeout=2400,
    )

"""Debian of any suite and architecture: its packages, unpacked, and run by chroot.

Nothing of the machine's own packages or sources is changed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from matrix.base import CACHE, Failure, Job, Skip, output

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# Unpacked without a maintainer script, so what those would pull in is named here.
SYSTEM = [
    *("base-files", "bash", "coreutils", "dash", "diffutils", "findutils", "grep"),
    *("gzip", "kmod", "libc-bin", "libseccomp2", "mawk", "mount", "procps", "sed"),
    *("strace", "tar", "util-linux"),
]


@functools.cache
def mirror() -> str:
    """The Debian mirror that this machine is set up to use."""
    if not shutil.which("apt-get"):
        raise Skip("needs apt-get, to fetch Debian's packages")
    wanted = "Created-By: Packages", "Origin: Debian", "Label: Debian"
    for _ in range(2):
        uris = output("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted)
        if uris:
            return uris.splitlines()[0]
        # The lists of a fresh machine are empty, and tell of no origin yet.
        subprocess.run(["apt-get", "-qq", "update"], check=True, capture_output=True)
    raise Skip("no Debian mirror among apt's sources")


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One at a time of all that share the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


UPDATED: set[Path] = set()  # the lists fetched by this process


class Suite:
    """A Debian suite as apt sees it for one architecture, with lists of its own."""

    def __init__(self, job: Job, name: str, arch: str = "amd64") -> None:
        self.job = job
        self.name = name
        self.arch = arch
        self.folder = CACHE / "apt" / f"{name}-{arch}"
        for sub in ("lists/partial", "cache/archives/partial", "parts"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        kinds = [f"{kind} [signed-by={KEYRING}]" for kind in ("deb", "deb-src")]
        (self.folder / "sources.list").write_text(
            "".join(f"{kind} {mirror()} {name} main\n" for kind in kinds)
        )
        with locked("apt"):
            if self.folder in UPDATED:
                return
            if job.run("apt-get", *self.options(), "-qq", "update"):
                raise Skip(f"Debian {name} for {arch} cannot be had here")
            UPDATED.add(self.folder)

    def options(self) -> list[str]:
        settings = {
            "Dir::Etc::SourceList": self.folder / "sources.list",
            "Dir::Etc::SourceParts": self.folder / "parts",
            "Dir::State::Lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            "APT::Architecture": self.arch,
            "APT::Architectures": self.arch,
            "APT::Sandbox::User": "root",
        }
        return [f"-o{name}={value}" for name, value in settings.items()]

    def names(self, prefix: str) -> list[str]:
        return output("apt-cache", *self.options(), "pkgnames", prefix).split()

    def has(self, packages: Sequence[str]) -> bool:
        return all(name in self.names(name) for name in packages)

    def download(self, packages: Sequence[str], to: Path) -> list[Path]:
        """These packages alone."""
        to.mkdir(parents=True, exist_ok=True)
        words = ["apt-get", *self.options(), "-qq", "download", *packages]
        self.job.must(*words, cwd=to)
        return sorted(to.glob("*.deb"))

    def with_dependencies(self, packages: Sequence[str], to: Path) -> list[Path]:
        """These packages and all that they depend on."""
        (to / "partial").mkdir(parents=True, exist_ok=True)
        with locked("apt"):  # its own lock it would not wait for
            self.job.must(
                "apt-get",
                *self.options(),
                f"-oDir::Cache::archives={to}",
                *("-qq", "-y", "--no-install-recommends", "--download-only"),
                "install",
                *packages,
            )
        return sorted(to.glob("*.deb"))


def unpack(deb: Path, to: Path) -> None:
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
    ) as tar:
        command = ["tar", "-C", str(to), "--keep-directory-symlink", "-xf", "-"]
        subprocess.run(command, stdin=tar.stdout, check=True)
    if tar.returncode:
        raise Failure(f"{deb.name} cannot be unpacked")


def root(job: Job, suite: str, packages: Sequence[str], *, arch: str = "amd64") -> Path:
    """A folder with these packages, and a system to run them; made once."""
    wanted = sorted({*SYSTEM, *packages})
    key = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:8]
    made = CACHE / "roots" / f"{suite}-{arch}-{key}"
    with locked(made.name):
        if made.exists():
            return made
        new = made.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (new / "usr" / name).mkdir(parents=True)
            (new / name).symlink_to(f"usr/{name}")
        debs = Suite(job, suite, arch).with_dependencies(wanted, job.work / "debs")
        for deb in debs:
            unpack(deb, new)
        shutil.rmtree(job.work / "debs")
        for name in ("dev", "proc", "sys", "tmp", "root", "etc"):
            (new / name).mkdir(exist_ok=True)
        (new / "tmp").chmod(0o1777)
        (new / "etc/passwd").write_text(
            "root:x:0:0:root:/root:/bin/sh\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n"
        )
        (new / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        # What maintainer scripts would have linked.
        for link, target in (("awk", "mawk"), ("cc", "gcc")):
            if (new / "usr/bin" / target).exists():
                (new / "usr/bin" / link).symlink_to(target)
        # libseccomp is found by this, as is whatever else ctypes looks for.
        if arch in ("amd64", "i386"):
            job.must("chroot", new, "/sbin/ldconfig")
        new.rename(made)
    return made


# ENTER ROOT COMMAND...: the machine's devices and, for pip, its names and certificates.
# In a mount namespace of its own: nobody else sees the mounts, and they end with it.
# Not by chroot(2), after which no user namespace could be made.
ENTER = """
set -e
root=$1 cache=$2
shift 2
mount --bind "$root" "$root"
attach() {
  [ -e "$2" ] || return 0
  mkdir -p "$root${2%/*}"
  if [ -d "$2" ]; then mkdir -p "$root$2"; else : >> "$root$2"; fi
  mount "$1" "$2" "$root$2"
}
attach --rbind /dev
attach --rbind /sys
attach --bind /etc/resolv.conf
attach --bind /etc/hosts
attach --bind /etc/ssl/certs
attach --bind "$cache"
attach --rbind /proc
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir "$root/tmp/old"
pivot_root "$root" "$root/tmp/old"
cd /
umount -l /tmp/old
rmdir /tmp/old
exec "$@"
"""


def chroot(
    job: Job,
    root: Path,
    *command: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    under: Sequence[str] = (),
    timeout: float = 3000,
) -> int:
    """Run a command in a root, with the cache at its usual place in it."""
    if os.geteuid():
        raise Skip("needs root, for chroot")
    enter = CACHE / "enter"
    enter.write_text(ENTER)
    variables = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        **pip_settings(),
        **(env or {}),
    }
    return job.run(
        *("unshare", "--mount", *under, "sh", enter, root, CACHE),
        *("env", "-i", *([f"--chdir={cwd}"] if cwd else [])),
        *(f"{name}={value}" for name, value in variables.items()),
        *command,
        timeout=timeout,
    )


@functools.cache
def pip_settings() -> dict[str, str]:
    """How pip finds packages on this machine."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name in ("PIP_INDEX_URL", "PIP_CERT", "PIP_DEFAULT_TIMEOUT")
    }
    configured = subprocess.run(
        ["python3", "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
    )
    if configured.returncode == 0:
        found.setdefault("PIP_INDEX_URL", configured.stdout.strip())
    return {**found, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}

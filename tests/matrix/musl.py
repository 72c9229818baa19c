"""The whole suite on a CPython of musl's, the other C library that wheels are made for.

Nobody packages one for Debian: it is compiled, with what it and the tests need.
"""

from __future__ import annotations

import shutil

from matrix import debian, project, pythons
from matrix.base import CACHE, Failure, Job

SUITE = "trixie"
VERSION = "3.13"
PACKAGES = [*pythons.COMPILE, *pythons.NEEDED, "gperf", "musl-tools", "pkgconf"]
LIBRARIES = {
    "zlib": [],
    "libffi": ["--disable-docs", "--disable-exec-static-tramp"],
    "libseccomp": [],
}
PLATFORM = "musllinux_1_2_x86_64"
# As Alpine and its container images have it: musl's own 128 KiB are too little.
STACK = "-DTHREAD_STACK_SIZE=0x100000"

# musl-gcc does not find the kernel's headers, which lie among glibc's, and gives the
# platform glibc's name, which is not the one that Python finds out.
COMPILER = r"""
mkdir -p "$0/include" "$0/bin"
ln -s /usr/include/linux /usr/include/asm-generic "$0/include"
ln -s /usr/include/x86_64-linux-gnu/asm "$0/include"
cat > "$0/bin/cc" << 'END'
#!/bin/sh
[ "$*" = --print-multiarch ] || exec musl-gcc "$@"
END
chmod +x "$0/bin/cc"
"""


def compiled(job: Job) -> pythons.Python:
    """The Python, and the libraries that it finds where it is."""
    root = debian.root(job, SUITE, PACKAGES)
    prefix = CACHE / "cpython" / f"{VERSION}-musl"
    python = pythons.Python(str(prefix / "bin/python3"), root)
    with debian.locked(prefix.name):
        if (prefix / "bin/python3").exists():
            return python
        shutil.rmtree(prefix, ignore_errors=True)
        old, new = debian.Suite(job, project.OLDEST), debian.Suite(job, SUITE)
        shell = pythons.Python("sh", root)
        env = {
            "CC": f"{prefix}/bin/cc",
            "CPPFLAGS": f"-I{prefix}/include {STACK}",
            "LDFLAGS": f"-L{prefix}/lib -Wl,-rpath,{prefix}/lib",
            "PKG_CONFIG_LIBDIR": f"{prefix}/lib/pkgconfig",
        }
        if shell.run(job, shell.path, "-c", COMPILER, prefix):
            raise Failure("the compiler cannot be set up")
        for library, options in LIBRARIES.items():
            pythons.build(job, old, shell, prefix, library, options, env)
        package = f"python{VERSION}"
        pythons.build(job, new, shell, prefix, package, pythons.QUICK, env)
    return python


def run(job: Job) -> None:
    python = compiled(job)
    venv = job.work / "venv"
    checkout = project.copy(job)
    given = project.given(job, "musllinux", "x86_64")
    if python.run(job, python.path, "-m", "venv", venv):
        raise Failure("no environment can be made")
    # Fetched by another Python, as this one has no TLS.
    site = venv / f"lib/python{VERSION}/site-packages"
    project.foreign_site(job, site, PLATFORM, VERSION)
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    pip = [venv / "bin/python", "-m", "pip", "-q", "install", *offline]
    ours = shutil.copy(given, job.work) if given else "."  # where the root shows it
    if python.run(job, *pip, ours, cwd=checkout):
        raise Failure("the project cannot be installed")
    shutil.rmtree(checkout / "build", ignore_errors=True)
    pythons.check(job, python, venv, "gil and abi3 and not debug")
    env = {"MRELEASE_REQUIRE": pythons.REQUIRED}
    pythons.tests(job, python, venv, env, *job.args)

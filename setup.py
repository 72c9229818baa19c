"""Build the C extension; everything else is in pyproject.toml."""

import gzip
import os
import sys
import sysconfig
import tarfile

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

if sys.platform != "linux":
    sys.exit(f"mrelease needs Linux: no process_mrelease(2) on {sys.platform}")

# One binary for every CPython from this version on. Free-threaded builds have no
# such stable ABI before 3.15 and get a binary of their own.
OLDEST = (3, 11)
LIMITED_API = "0x{:02x}{:02x}0000".format(*OLDEST)
WHEEL_TAG = "cp{}{}".format(*OLDEST)
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

# No debug information tells of the folder in which it was built.
ANYWHERE = [f"-ffile-prefix-map={os.getcwd()}=."]
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fanalyzer"]


class Sdist(sdist):
    """A source distribution that two builds make alike, as they do the wheel."""

    def make_archive(self, base_name, kind, root_dir=None, base_dir=None, **owner):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if kind != "gztar" or epoch is None:
            return super().make_archive(base_name, kind, root_dir, base_dir, **owner)

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            executable = info.isdir() or info.mode & 0o100
            info.mode = 0o755 if executable else 0o644
            info.mtime = int(epoch)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            return info

        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=file) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            tar.add(base_dir, filter=plain)
        return name


setup(
    cmdclass={"sdist": Sdist},
    ext_modules=[
        Extension(
            "mrelease._mrelease",
            ["src/_mrelease.c"],
            define_macros=[("Py_LIMITED_API", LIMITED_API)] if ABI3 else [],
            # For the project's own checks: a user's newer compiler may warn of more.
            extra_compile_args=ANYWHERE
            + (STRICT if os.environ.get("MRELEASE_STRICT") else []),
            py_limited_api=ABI3,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}} if ABI3 else {},
)

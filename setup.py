"""Build the C extension; everything else is in pyproject.toml."""

import os
import sys
import sysconfig

from setuptools import Extension, setup

if sys.platform != "linux":
    sys.exit(f"mrelease needs Linux: no process_mrelease(2) on {sys.platform}")

# One binary for every CPython from this version on. Free-threaded builds have no
# such stable ABI before 3.15 and get a binary of their own.
OLDEST = (3, 11)
LIMITED_API = "0x{:02x}{:02x}0000".format(*OLDEST)
WHEEL_TAG = "cp{}{}".format(*OLDEST)
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fanalyzer"]

setup(
    ext_modules=[
        Extension(
            "mrelease._mrelease",
            ["src/_mrelease.c"],
            define_macros=[("Py_LIMITED_API", LIMITED_API)] if ABI3 else [],
            # For the project's own checks: a user's newer compiler may warn of more.
            extra_compile_args=STRICT if os.environ.get("MRELEASE_STRICT") else [],
            py_limited_api=ABI3,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}} if ABI3 else {},
)

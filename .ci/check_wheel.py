"""Check what a wheel holds and asks for: .ci/check_wheel.py WHEEL..."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from zipfile import ZipFile

# Bytes: of the wheel, which is mostly Python, and of the extension in it.
LARGEST = 90_000
LARGEST_EXTENSION = 60_000
# The C library of the oldest image that wheels are made for; newer architectures began
# with a newer one.
GLIBC = (2, 17)
NEWER = {"riscv64": (2, 27)}


def problems(path: Path) -> list[str]:
    found = []
    size = path.stat().st_size
    if size > LARGEST:
        found.append(f"{size} bytes, more than {LARGEST}")
    with ZipFile(path) as wheel:
        names = wheel.namelist()
        extensions = [name for name in names if ".so" in name]
        if len(extensions) != 1:
            found.append(f"{len(extensions)} extensions")
        if sources := [name for name in names if name.endswith((".c", ".h"))]:
            found.append(f"C sources: {', '.join(sources)}")
        if others := [name for name in names if not name.startswith("mrelease")]:
            found.append(f"foreign files: {', '.join(others)}")
        # Written in the extension, as it is not compressed once it has been read.
        binary = b"".join(map(wheel.read, extensions))
    if len(binary) > LARGEST_EXTENSION:
        found.append(f"an extension of {len(binary)} bytes")
    versions = {
        (int(major), int(minor))
        for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", binary)
    }
    newest = max(versions, default=(0, 0))
    machine = path.stem.rpartition("linux_")[2].split("_", 2)[-1]
    allowed = NEWER.get(machine, GLIBC)
    if newest > allowed:
        found.append("asks for GLIBC_{}.{}".format(*newest))
    print(
        f"{path.name}: {size} bytes, {len(binary)} of the extension, "
        "GLIBC_{}.{}".format(*newest)
    )
    return found


def main(paths: list[str]) -> int:
    found = [f"{name}: {text}" for name in paths for text in problems(Path(name))]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

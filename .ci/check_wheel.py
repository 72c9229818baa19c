"""Check what a wheel holds and asks for: .ci/check_wheel.py WHEEL..."""

from __future__ import annotations

import ast
import re
import sys
import zlib
from pathlib import Path
from zipfile import ZipFile

# Bytes: of the wheel, of which parts() tells what takes them, and of the extension,
# compressed: the linkers of some architectures pad its segments to 64 KiB each.
LARGEST = 90_000
LARGEST_EXTENSION = 10_000
# The C library of the oldest image that wheels are made for; newer architectures began
# with a newer one.
GLIBC = (2, 17)
NEWER = {"riscv64": (2, 27)}

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def bare(source: bytes) -> bytes:
    """This Python without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


def parts(wheel: ZipFile) -> dict[str, int]:
    """What takes the room: compressed bytes by kind of file.

    "text" is what the modules would be smaller by without comments and docstrings.
    """
    found = dict.fromkeys(("extension", "code", "text", "metadata"), 0)
    for info in wheel.infolist():
        if info.filename.endswith((".py", ".pyi")):
            code = len(zlib.compress(bare(wheel.read(info)), level=9))
            found["code"] += code
            found["text"] += info.compress_size - code
        elif ".so" in info.filename:
            found["extension"] += info.compress_size
        else:
            found["metadata"] += info.compress_size
    return found


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
        sizes = parts(wheel)
    if sizes["extension"] > LARGEST_EXTENSION:
        found.append(f"an extension of {sizes['extension']} bytes, compressed")
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
    print("  compressed:", ", ".join(f"{name} {sizes[name]}" for name in sizes))
    return found


def main(paths: list[str]) -> int:
    found = [f"{name}: {text}" for name in paths for text in problems(Path(name))]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

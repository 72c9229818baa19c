"""The C functions' arguments: counts, types and ranges, in CPython's words."""

from __future__ import annotations

from typing import Any

import pytest

from mrelease import _mrelease

# Functions with the least and most arguments they take.
COUNTS = {
    "pidfd_open": (1, 2),
    "pidfd_send_signal": (2, 3),
    "process_mrelease": (1, 2),
    "kill_and_release": (1, 1),
    "bar_kill_and_release": (2, 2),
    "kill_and_release_next": (1, 1),
    "getcpu": (0, 0),
    "mlockall": (1, 1),
}
CASES = [
    (name, count)
    for name, (least, most) in COUNTS.items()
    for count in (least - 1, most + 1)
    if count >= 0
]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_a_wrong_number_of_arguments_is_a_type_error(name: str, count: int) -> None:
    with pytest.raises(TypeError, match=rf"\({count} given\)|got {count}"):
        getattr(_mrelease, name)(*[-1] * count)


@pytest.mark.parametrize("name", [name for name, (_, most) in COUNTS.items() if most])
def test_keywords_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="keyword"):
        getattr(_mrelease, name)(pidfd=-1)


def every_argument(value: object) -> list[tuple[str, list[object]]]:
    """Calls with this value at each place, and what does no harm at the others."""
    calls = []
    for name, (_, most) in COUNTS.items():
        for place in range(most):
            arguments: list[object] = [-1, *[0] * (most - 1)]
            arguments[place] = value
            calls.append((name, arguments))
    return calls


@pytest.mark.parametrize("value", [1.5, "1", b"1", None, [1]])
def test_what_is_no_int_is_a_type_error(value: object) -> None:
    for name, arguments in every_argument(value):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            getattr(_mrelease, name)(*arguments)


@pytest.mark.parametrize("value", [2**32, -(2**31) - 1, 2**63, 2**64, -(2**64)])
def test_an_int_that_does_not_fit_is_an_overflow_error_that_names_it(
    value: int,
) -> None:
    names = ("pid", "pidfd", "pipe", "signal", "flags")
    for name, arguments in every_argument(value):
        with pytest.raises(
            OverflowError, match=rf"({'|'.join(names)}) must be between"
        ):
            getattr(_mrelease, name)(*arguments)


def test_negative_flags_are_an_overflow_error() -> None:
    for name in ("pidfd_open", "process_mrelease"):
        with pytest.raises(
            OverflowError, match="flags must be between 0 and 4294967295"
        ):
            getattr(_mrelease, name)(-1, -1)


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_whatever_has_an_index_is_an_int_as_are_bools() -> None:
    for value in (Index(-1), True):
        with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
            _mrelease.pidfd_send_signal(value, 0)


def test_an_exception_of_index_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        _mrelease.pidfd_open(Index(ZeroDivisionError()))

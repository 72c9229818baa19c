"""Random calls: arguments of every kind, and sequences checked against a model.

They are made in a process of its own, in a pid namespace of its own where that can be
had, so that no mistake of theirs could kill anybody. A small number by default, the
same ones each time; with --long at least 100 000, other ones each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from calls import apart, run_python

LONG = {"arguments": 100_000, "sequences": 2_000}
SHORT = {"arguments": 300, "sequences": 12}

Record = Callable[[str, object], None]


def fuzz(module: str, call: str) -> dict[str, int]:
    program = f"""
import json
from hypothesis import settings
import {module}
from fuzz_arguments import profile
print(json.dumps({module}.{call}))
"""
    # Debug builds tell of each __index__() that returns a bool, which is tried as well.
    ignored = ("-W", "ignore:__index__ returned non-int:DeprecationWarning")
    result = run_python(program, under=apart(), options=ignored)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    counts: dict[str, int] = json.loads(result.stdout)
    return counts


@pytest.mark.timeout(3100)
def test_whatever_a_function_is_called_with_it_does_as_documented(
    long: bool, record_property: Record
) -> None:
    wanted = (LONG if long else SHORT)["arguments"]
    # A few more, as a function without arguments is called but once.
    counts = fuzz("fuzz_arguments", f"run({wanted * 1.05}, profile(long={long}))")
    made = sum(counts.values())
    record_property("examples", made)
    assert made >= wanted
    assert min(counts.values()) > 0


@pytest.mark.needs("release")
@pytest.mark.timeout(3100)
def test_whatever_the_order_of_calls_the_kernel_and_we_answer_as_the_model(
    long: bool, record_property: Record
) -> None:
    wanted = (LONG if long else SHORT)["sequences"]
    options = f"profile(long={long}), max_examples={wanted}, stateful_step_count=20"
    counts = fuzz("fuzz_sequences", f"run(settings({options}))")
    for name, count in counts.items():
        record_property(name, count)
    assert counts["sequences"] >= wanted
    assert counts["steps"] > 10 * wanted

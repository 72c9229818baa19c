"""What mrelease can do on this machine and as this user, and what to do for more."""

from __future__ import annotations

import os
import resource
import textwrap
from errno import ENOSYS

from . import _proc
from ._probe import ask, probe
from ._sched import cpus

# Bits of CapEff in /proc/PID/status, capabilities(7).
_CAPABILITIES = {
    "CAP_KILL": 5,
    "CAP_SYS_NICE": 23,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_RESOURCE": 24,
}

# Of Seccomp in /proc/PID/status, proc_pid_status(5).
_SECCOMP = {b"0": "off", b"1": "strict", b"2": "filter"}

_HERE_ONLY = "in this user namespace only"
_UNKNOWN = "unknown"

_FILTERED = (
    "A seccomp filter forbids it. systemd: SystemCallFilter=@system-service "
    "process_mrelease; if systemd's log says that it ignores the name, its libseccomp "
    "is too old, and SystemCallErrorNumber=EPERM keeps the kill working without the "
    "release. Docker allows it since 20.10.18, as do later releases of containerd and "
    "Podman: update them and libseccomp, or give a profile of your own that adds "
    "pidfd_open, pidfd_send_signal and process_mrelease (--security-opt seccomp=FILE; "
    "Kubernetes: seccompProfile of type Localhost)."
)
_SCHEDULING_FILTERED = (
    "A seccomp filter forbids sched_setaffinity, sched_setscheduler or setpriority "
    "(systemd: @resources). If it kills, kill() must be called with boost=False, "
    "mrelease kill with --no-boost; else the victim is just not hurried."
)
_NO_PROC = (
    "There is no /proc of this pid namespace. A kill works, but the victim is not kept "
    "off the caller's CPU or hurried, its memory not measured, and trees and cgroups "
    "cannot be killed. Mount one: mount -t proc proc /proc."
)
_OLD_KERNEL = {
    "pidfd_open": "Nothing can be killed without pidfds: Linux 5.3 has them.",
    "process_mrelease": "A kill works, but the memory waits for the victim: Linux 5.15 "
    "releases it.",
    "pidfd_info": "Only Pidfd.cgroup_id() needs it: Linux 6.13 has it.",
    "cgroup_kill": "Only the killing of whole cgroups gains by it: Linux 5.14 with "
    "cgroup v2 has it.",
}
_NO_CAPABILITY = {
    "CAP_KILL": "Only processes of the same user can be killed.",
    "CAP_SYS_NICE": "A starved victim is released, but not hurried through its exit.",
    "CAP_IPC_LOCK": "Memory can be locked up to RLIMIT_MEMLOCK only (systemd: "
    "LimitMEMLOCK=infinity).",
    "CAP_SYS_RESOURCE": "harden() cannot keep the kernel's OOM killer off (systemd: "
    "OOMScoreAdjust=-1000).",
}
_GRANT = (
    "To grant it: run as root; systemd: AmbientCapabilities=CAP_{0}; Docker, Podman: "
    "--cap-add {0}; Kubernetes: securityContext.capabilities.add (in a container for "
    "root; another user's Python needs it as a file capability)."
)
_ONE_CPU = (
    "With one CPU a victim that wakes up may begin its own exit before the release: "
    "the outcome is then 'exited'."
)


def examine() -> tuple[dict[str, object], dict[str, str]]:
    """The probe, the caller's privileges, seccomp, CPUs; and advice for each lack."""
    report = {**probe(), "scheduling": ask(_try_scheduling), "proc": _proc.is_ours()}
    try:
        report |= _privileges()
    except OSError:  # no /proc
        report |= dict.fromkeys([*_CAPABILITIES, "seccomp"], _UNKNOWN)
    report["cpus"] = cpus()
    return report, _advice(report)


def _privileges() -> dict[str, object]:
    effective = _proc.capabilities()
    granted = True if _proc.in_first_user_namespace() else _HERE_ONLY
    found: dict[str, object] = {
        name: granted if effective >> bit & 1 else False
        for name, bit in _CAPABILITIES.items()
    }
    seccomp = _proc.fields("/proc/self/status").get(b"Seccomp", b"")
    return {**found, "seccomp": _SECCOMP.get(seccomp, _UNKNOWN)}


def _try_scheduling() -> None:
    """What barring and boost() do, on the caller itself, without an effect."""
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))
    try:
        os.sched_setscheduler(0, os.sched_getscheduler(0), os.sched_getparam(0))
    except OSError as error:
        if error.errno != ENOSYS:  # musl's answer, which does not make the call
            raise


def _advice(report: dict[str, object]) -> dict[str, str]:
    advice: dict[str, str] = {}
    for feature, hint in _OLD_KERNEL.items():
        if report[feature] is not True:
            advice[feature] = _FILTERED if report[feature] == "seccomp" else hint
    if report["scheduling"] is not True:
        advice["scheduling"] = _SCHEDULING_FILTERED
    if not report["proc"]:
        advice["proc"] = _NO_PROC
    for capability, hint in _NO_CAPABILITY.items():
        if report[capability] not in (True, _UNKNOWN):
            grant = _GRANT.format(capability.removeprefix("CAP_"))
            advice[capability] = f"{hint} {grant}"
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        advice.pop("CAP_IPC_LOCK", None)
    if _is_spared():
        advice.pop("CAP_SYS_RESOURCE", None)
    if report["cpus"] == 1:
        advice["cpus"] = _ONE_CPU
    return advice


def _is_spared() -> bool:
    """Whether somebody else keeps the kernel's OOM killer off this process."""
    try:
        return _proc.read("/proc/self/oom_score_adj") == b"-1000\n"
    except OSError:  # no /proc
        return False


def text(report: dict[str, object], advice: dict[str, str]) -> str:
    """Both for people: a line a finding, the advice below it, each piece once."""
    lines: list[str] = []
    said: set[str] = set()
    for name, value in report.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif value == "seccomp":
            value = "no: seccomp"
        lines.append(f"{name:<17} {value}")
        hint = advice.get(name)
        if hint and hint not in said:
            indent = " " * 4
            lines += textwrap.wrap(
                hint, 76, initial_indent=indent, subsequent_indent=indent
            )
            said.add(hint)
    return "\n".join(lines)

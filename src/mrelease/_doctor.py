"""What mrelease can do on this machine and as this user, and what to do for more."""

from __future__ import annotations

import os

from . import _proc
from ._probe import probe

# Bits of CapEff in /proc/PID/status, capabilities(7).
_CAPABILITIES = {"CAP_KILL": 5, "CAP_SYS_NICE": 23, "CAP_IPC_LOCK": 14}

# Of Seccomp in /proc/PID/status, proc_pid_status(5).
_SECCOMP = {b"0": "off", b"1": "strict", b"2": "filter"}

_OLD_KERNEL = {
    "pidfd_open": "without pidfds nothing is killed: Linux 5.3 or newer is needed",
    "process_mrelease": "a kill works, but memory waits for the victim: run Linux 5.15",
    "pidfd_info": "only Pidfd.cgroup_id() needs it: run Linux 6.13",
    "cgroup_kill": "only the killing of whole cgroups gains by it: run Linux 5.14",
}
_FILTERED = (
    "allow pidfd_open, pidfd_send_signal and process_mrelease. systemd: "
    "SystemCallFilter=@system-service process_mrelease. Docker, Podman: --security-opt "
    "seccomp=PROFILE, the default profile with the three added. Kubernetes: a profile "
    "of type Localhost"
)
_NO_CAPABILITY = {
    "CAP_KILL": "only this user's processes can be killed: run as root, or in systemd "
    "set AmbientCapabilities=CAP_KILL",
    "CAP_SYS_NICE": "a starved victim is released, but not hurried through its exit: "
    "run as root, or in systemd set AmbientCapabilities=CAP_SYS_NICE",
    "CAP_IPC_LOCK": "the caller's memory can be locked up to RLIMIT_MEMLOCK only: run "
    "as root, or in systemd set LimitMEMLOCK=infinity",
}
_ONE_CPU = "a victim cannot be kept off the caller's CPU, so a sleeping one may win"


def examine() -> tuple[dict[str, object], dict[str, str]]:
    """The probe, the caller's privileges, seccomp, CPUs; and advice for each lack."""
    status = _proc.fields("/proc/self/status")
    effective = int(status[b"CapEff"], 16)
    report = probe()
    for name, bit in _CAPABILITIES.items():
        report[name] = bool(effective >> bit & 1)
    report["seccomp"] = _SECCOMP.get(status.get(b"Seccomp", b""), "unknown")
    report["cpus"] = len(os.sched_getaffinity(0))
    return report, _advice(report)


def _advice(report: dict[str, object]) -> dict[str, str]:
    advice: dict[str, str] = {}
    for feature, hint in _OLD_KERNEL.items():
        if report[feature] is not True:
            advice[feature] = _FILTERED if report[feature] == "seccomp" else hint
    for capability, hint in _NO_CAPABILITY.items():
        if not report[capability]:
            advice[capability] = hint
    if report["cpus"] == 1:
        advice["cpus"] = _ONE_CPU
    return advice


def text(report: dict[str, object], advice: dict[str, str]) -> str:
    """Both for people: a line a finding, and the advice below its finding."""
    lines: list[str] = []
    for name, value in report.items():
        shown = "yes" if value is True else "no" if value is False else value
        lines.append(f"{name:<17} {shown}")
        if name in advice:
            lines.append(f"{'':<17} -> {advice[name]}")
    return "\n".join(lines)

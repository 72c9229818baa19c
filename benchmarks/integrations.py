"""Memory of other software's workers back: its own kill against the same with mrelease.

Each is the real software with the hook of docs/integrations.md, and without. Its worker
takes memory, and dies by what kills it there. Both ways are run in turn, on the machine
as it is and with the worker at nice 19 beside a spinner on each CPU. The figures are
the seconds until 95 % of the memory is back, median [lowest-highest].

    python -m benchmarks.integrations [--size MiB] [--runs N] [--only NAME...]

It writes a table in Markdown. A run is repeated if, just before the kill, the machine
does not show the worker's memory, within an eighth: then other processes have taken or
given back so much that the figure would be theirs. What is not installed is left out,
and said so: pip install 'mrelease[integrations]'.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import mmap
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import psutil

from mrelease import Pidfd, _demo, is_supported, kill, kill_all

ROOT = Path(__file__).parent.parent
LIMIT = 60.0  # seconds until a kill is given up
READY = 60  # seconds for a worker to be there
TRIES = 20  # of a run, for the machine to be quiet enough


sys.path.insert(0, str(ROOT / "examples"))


def hold(size: int, told: str) -> None:
    """What a worker does: take memory, tell its pid, and obey nobody."""
    for number in signal.SIGINT, signal.SIGQUIT, signal.SIGTERM:
        try:
            signal.signal(number, signal.SIG_IGN)
        except ValueError:
            break  # in a thread of Dask's; nobody asks there
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:: mmap.PAGESIZE] = b"x" * (len(memory) // mmap.PAGESIZE)
    Path(f"{told}.part").write_text(str(os.getpid()))
    parent = os.getppid()
    os.rename(f"{told}.part", told)
    while os.getppid() == parent:  # nobody is left if the benchmark is killed
        time.sleep(1)


def holder(size: int, told: str) -> list[str]:
    """A command that does the same."""
    program = f"from benchmarks.integrations import hold; hold({size}, {told!r})"
    return [sys.executable, "-c", program]


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
}


class Scene(NamedTuple):
    """Software that runs: how its worker is made to hold memory, and how killed."""

    fill: Callable[[], object]
    kill: Callable[[], object]


# Each takes the size, the file in which the worker tells its pid, and whether to hook.


@contextmanager
def of_subprocess(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    with ExitStack() as stack:
        children: list[subprocess.Popen[bytes]] = []

        def fill() -> None:
            child = subprocess.Popen(holder(size, told), env=ENVIRONMENT)
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)

        yield Scene(
            fill,
            lambda: kill(children[0], timeout=LIMIT) if hooked else children[0].kill(),
        )


@contextmanager
def of_psutil(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    with of_subprocess(size, told, hooked) as scene:

        def end() -> None:
            child = psutil.Process(int(Path(told).read_text()))
            if hooked:
                kill(child, timeout=LIMIT)
            else:
                child.kill()

        yield Scene(scene.fill, end)


@contextmanager
def of_multiprocessing(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=hold, args=(size, told))
    try:
        yield Scene(
            process.start,
            lambda: kill(process, timeout=LIMIT) if hooked else process.kill(),
        )
    finally:
        process.kill()
        process.join()


@contextmanager
def of_futures(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        try:
            yield Scene(lambda: executor.submit(hold, size, told), killer(hooked))
        finally:
            killer(False)()


@contextmanager
def of_joblib(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    from joblib.externals.loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=1)

    def usual() -> None:
        executor.shutdown(kill_workers=True)

    try:
        yield Scene(
            lambda: executor.submit(hold, size, told),
            killer(True) if hooked else usual,
        )
    finally:
        usual()


def killer(hooked: bool) -> Callable[[], None]:
    """What kills all that multiprocessing, or a likeness of it, has started."""

    def end() -> None:
        children = multiprocessing.active_children()
        if hooked:
            kill_all(children, timeout=LIMIT)
            return
        for child in children:
            child.kill()

    return end


@contextmanager
def of_celery(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    """billiard's pool, killed as by revoke(terminate=True, signal="SIGKILL")."""
    import celery_pool
    from billiard import active_children
    from billiard.pool import Pool

    pool = (celery_pool.ThreadPool if hooked else Pool)(processes=1)
    try:

        def fill() -> None:
            pool.apply_async(hold, (size, told))
            pool.close()  # no other worker in the place of the dead one

        def end() -> None:
            pool.terminate_job(int(Path(told).read_text()), signal.SIGKILL)

        yield Scene(fill, end)
    finally:
        # One that was not killed would not obey, and the pool would wait for it.
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)
        pool.terminate()
        pool.join()


@contextmanager
def of_dask(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    import dask
    from distributed import Client, LocalCluster

    from mrelease.integrations.dask import ReleasePlugin

    with (
        dask.config.set({"distributed.logging.distributed": "error"}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address=None,
            silence_logs="CRITICAL",
        ) as cluster,
        Client(cluster) as client,
    ):
        if hooked:
            client.register_plugin(ReleasePlugin(timeout=LIMIT))
        nanny: Any = cluster.workers[0]

        async def end() -> None:
            nanny.close_gracefully()  # no other worker in the place of the dead one
            await nanny.process.process.kill()

        yield Scene(
            lambda: client.submit(hold, size, told, pure=False).add_done_callback(id),
            lambda: cluster.sync(end),
        )


@contextmanager
def of_gunicorn(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    """A stop that waits for nobody: SIGKILL to the workers at once."""
    folder = Path(told).parent
    (folder / "app.py").write_text(
        "from benchmarks.integrations import hold\n"
        f"def app(environ, start_response): hold({size}, {told!r})\n"
    )
    address = str(folder / "socket")
    command = [sys.executable, "-m", "gunicorn", "--bind", f"unix:{address}"]
    command += ["--timeout", "0", "--graceful-timeout", "0", "--log-level", "critical"]
    if hooked:
        command += ["-c", str(ROOT / "examples/gunicorn_conf.py")]
    with (
        subprocess.Popen([*command, "app:app"], cwd=folder, env=ENVIRONMENT) as master,
        ExitStack() as stack,
    ):
        stack.callback(end_tree, master.pid)
        wait_for(lambda: connects(address), "gunicorn to listen")

        def fill() -> None:
            stack.enter_context(ask(address))

        yield Scene(fill, lambda: master.send_signal(signal.SIGQUIT))


@contextmanager
def ask(address: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        yield


def connects(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(address) == 0


@contextmanager
def of_supervisor(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    """A program that is given no time: by stopsignal=KILL, or by the listener."""
    from xmlrpc.client import ServerProxy

    from supervisor.xmlrpc import SupervisorTransport

    folder = Path(told).parent
    python, _, argument = holder(size, told)
    (folder / "holder.py").write_text(argument)
    listener = f"""
[eventlistener:mrelease]
command={python} {ROOT}/examples/supervisor_listener.py 0
events=PROCESS_STATE_RUNNING,PROCESS_STATE_STOPPING
"""
    (folder / "conf").write_text(
        f"""
[supervisord]
nodaemon=true
pidfile={folder}/pid
logfile=/dev/null
logfile_maxbytes=0
[unix_http_server]
file={folder}/s
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:holder]
command={python} {folder}/holder.py
autostart=false
stopsignal={"TERM" if hooked else "KILL"}
{listener if hooked else ""}
"""
    )
    command = [python, "-m", "supervisor.supervisord", "-c", str(folder / "conf")]
    with (
        subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as daemon,
        ExitStack() as stack,
    ):
        stack.callback(end_tree, daemon.pid)
        wait_for(lambda: connects(f"{folder}/s"), "supervisord to listen")
        transport = SupervisorTransport(None, None, f"unix://{folder}/s")
        rpc: Any = ServerProxy("http://127.0.0.1", transport=transport)
        if hooked:
            wait_for(
                lambda: rpc.supervisor.getProcessInfo("mrelease")["state"] == 20,
                "the listener to run",
            )
        yield Scene(
            lambda: rpc.supervisor.startProcess("holder"),
            lambda: rpc.supervisor.stopProcess("holder", False),
        )


@contextmanager
def of_jupyterhub(size: int, told: str, hooked: bool) -> Iterator[Scene]:
    """A stop at once, which the server does not obey."""
    import logging

    from jupyterhub.spawner import LocalProcessSpawner
    from jupyterhub_spawner import ReleasingSpawner

    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    with of_subprocess(size, told, hooked) as scene:

        def end() -> None:
            pid = int(Path(told).read_text())
            make = ReleasingSpawner if hooked else LocalProcessSpawner
            asyncio.run(make(pid=pid, term_timeout=0).stop(now=True))

        yield Scene(scene.fill, end)


SCENES: dict[str, Callable[[int, str, bool], AbstractContextManager[Scene]]] = {
    "subprocess": of_subprocess,
    "psutil": of_psutil,
    "multiprocessing": of_multiprocessing,
    "concurrent.futures": of_futures,
    "joblib": of_joblib,
    "distributed": of_dask,
    "celery": of_celery,
    "gunicorn": of_gunicorn,
    "supervisor": of_supervisor,
    "jupyterhub": of_jupyterhub,
}


def end_tree(pid: int) -> None:
    """End a server and what it has left."""
    try:
        server = psutil.Process(pid)
        family = [*server.children(recursive=True), server]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def wait_for(done: Callable[[], bool], what: str) -> None:
    # lab's own is not imported: the workers import this, and are to hold little else.
    end = time.monotonic() + READY
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {READY} s for {what}")
        time.sleep(0.01)


def measure(name: str, size: int, hooked: bool, starved: bool) -> _demo.Run:
    """Kill one worker and watch its memory come back, undisturbed by others."""
    for _ in range(TRIES):
        if run := measure_once(name, size, hooked, starved):
            return run
    raise RuntimeError(f"other processes' memory changes too much, {TRIES} times")


def measure_once(name: str, size: int, hooked: bool, starved: bool) -> _demo.Run | None:
    """The same; None if it was disturbed.

    What the worker holds is read from the machine's AnonPages, against their value
    before it took any.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        SCENES[name](size, f"{folder}/told", hooked) as scene,
        _demo._children() as spawn,
    ):
        told = Path(folder, "told")
        count = len(os.sched_getaffinity(0)) if starved else 0
        spinners = [spawn(_demo._SPINNER, os.getpid()) for _ in range(count)]
        time.sleep(0.1)  # what has just started takes memory, too
        before = _demo._anonymous_pages()
        scene.fill()
        wait_for(told.exists, f"the worker of {name}")
        pid = int(told.read_text())
        if starved:
            for tid in os.listdir(f"/proc/{pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(tid), 19)
        for cpu, spinner in zip(os.sched_getaffinity(0), spinners, strict=False):
            os.sched_setaffinity(spinner.pid, {cpu})
            _demo._start_spinning(spinner)
        if abs(_demo._anonymous_pages() - before - size) > size / 8:
            return None
        with Pidfd.open(pid) as victim:
            return watch(size, scene.kill, victim, before)


def watch(
    size: int, end: Callable[[], object], victim: Pidfd, before: int
) -> _demo.Run:
    failed: list[Exception] = []

    def begin() -> None:
        try:
            end()
        except Exception as error:  # raised again below
            failed.append(error)

    thread = Thread(target=begin)
    run = _demo.Run(size)
    thread.start()
    while run.exit is None and run.elapsed < LIMIT:
        if failed:
            break
        run.look(victim.exited, _demo._anonymous_pages() - before)
        time.sleep(min(0.05, 0.001 + run.elapsed / 50))
    thread.join()
    if failed:
        raise failed[0]
    return run


def row(name: str, seen: dict[tuple[bool, bool], list[_demo.Run]]) -> str:
    cells = [name]
    for starved in False, True:
        plain, ours = (
            [run.back for run in seen[hooked, starved]] for hooked in (False, True)
        )
        cells += [_demo._spread(plain, LIMIT), _demo._spread(ours, LIMIT)]
        cells.append(_demo._ratio(plain, ours, LIMIT))
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Workers of other software: time until memory is back."
    )
    parser.add_argument("--size", type=int, default=256, help="MiB (default: 256)")
    parser.add_argument("--runs", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES))
    options = parser.parse_args()
    if not is_supported():
        print("benchmarks.integrations: mrelease doctor says why not", file=sys.stderr)
        return 2
    missing = [name for name in options.only if not importlib.util.find_spec(name)]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    print(
        f"Linux {os.uname().release}, {len(os.sched_getaffinity(0))} CPUs, "
        f"uid {os.geteuid()}, workers of {options.size} MiB, {options.runs} runs of "
        "each. Seconds until 95 % is back.\n\n"
        "| worker of | own kill | mrelease | times sooner "
        "| beside spinners: own kill | mrelease | times sooner |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in options.only:
        if name in missing:
            continue
        seen: dict[tuple[bool, bool], list[_demo.Run]] = {}
        for _ in range(options.runs):
            for starved in False, True:
                for hooked in False, True:
                    run = measure(name, options.size << 20, hooked, starved)
                    seen.setdefault((hooked, starved), []).append(run)
        print(row(name, seen), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

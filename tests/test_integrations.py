"""Servers that kill, with mrelease's hooks: the real ones, started as their users do.

The hooks are the files of examples/, which docs/integrations.md shows.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from calls import TESTS, run_python
from mrelease import kill_tree
from victims import _until

EXAMPLES = TESTS.parent / "examples"
BACK = re.compile(r"pid (\d+) (?:released|exited) after .*, signal (\d+)")

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="needs the source's examples/"
)


@contextmanager
def server(
    folder: Path, *command: str, env: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Run a module's command in a folder; gives its log. It ends by SIGTERM."""
    log = folder / "log"
    path = os.pathsep.join([str(folder), str(EXAMPLES)])
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
        ) as process,
    ):
        try:
            yield log
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        except BaseException:
            print(log.read_text())  # pytest shows it
            raise
        finally:
            if process.poll() is None:
                kill_tree(process, wait=True, timeout=None)


def write(path: Path, text: str) -> None:
    path.write_text(textwrap.dedent(text))


def wait_for_line(log: Path, pattern: re.Pattern[str]) -> re.Match[str]:
    _until(lambda: bool(pattern.search(log.read_text())), f"{pattern.pattern} in a log")
    found = pattern.search(log.read_text())
    assert found
    return found


# Deaf to all that can be ignored, with memory that is worth a release.
DEAF = """
import signal, time
for number in signal.SIGABRT, signal.SIGINT, signal.SIGTERM:
    signal.signal(number, signal.SIG_IGN)
memory = bytearray(64 << 20)
"""


@pytest.mark.needs("gunicorn", "release")
def test_gunicorn_releases_a_worker_that_has_timed_out(tmp_path: Path) -> None:
    write(
        tmp_path / "app.py",
        f"""
        import os, time

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/hang":
                exec({DEAF!r})
                time.sleep(1000)
            start_response("200 OK", [])
            return [str(os.getpid()).encode()]
        """,
    )
    address = tmp_path / "socket"
    command = ["gunicorn", "-c", str(EXAMPLES / "gunicorn_conf.py"), "--timeout", "1"]
    command += ["--bind", f"unix:{address}", "--workers", "1", "app:app"]
    with server(tmp_path, *command) as log:
        wait_for_line(log, re.compile("Listening at"))
        victim = ask(address, "/")
        assert ask(address, "/hang") == ""  # the connection dies with the worker
        pid, number = wait_for_line(log, BACK).groups()
        assert (pid, number) == (victim, "9")
        assert ask(address, "/") not in ("", victim)


def ask(address: Path, path: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(address))
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        try:
            with client.makefile("rb") as answer:
                return answer.read().decode().rpartition("\r\n")[2]
        except ConnectionResetError:
            return ""


@pytest.mark.needs("celery", "release")
def test_celery_releases_a_task_over_its_time_and_one_that_is_revoked(
    tmp_path: Path,
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "queue").mkdir()
    write(
        tmp_path / "tasks.py",
        f"""
        import os, time
        from celery import Celery

        folder = {str(tmp_path)!r}
        app = Celery("tasks", broker="filesystem://", backend=f"file://{{folder}}/results")
        app.conf.broker_transport_options = {{
            "data_folder_in": f"{{folder}}/queue",
            "data_folder_out": f"{{folder}}/queue",
            "control_folder": f"{{folder}}/control",
        }}

        def hang(name):
            with open(f"{{folder}}/{{name}}", "w") as file:
                file.write(str(os.getpid()))
            exec({DEAF!r})
            time.sleep(1000)

        @app.task(time_limit=1)
        def slow():
            hang("slow")

        @app.task
        def slower():
            hang("slower")

        @app.task
        def add(a, b):
            return a + b
        """,
    )
    env = {"CELERY_CUSTOM_WORKER_POOL": "celery_pool:ReleasingPool"}
    command = ["celery", "-A", "tasks", "worker", "--pool", "custom", "-c", "1"]
    command += ["--without-gossip", "--without-mingle", "-l", "WARNING"]
    with server(tmp_path, *command, env=env) as log:
        result = run_python(
            f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import json, os, time
from tasks import add, app, folder, slow, slower

def error(result):
    try:
        result.get(timeout=30)
    except Exception as error:
        return type(error).__name__

errors = [error(slow.delay())]
revoked = slower.delay()
while not os.path.exists(f"{{folder}}/slower"):
    time.sleep(0.01)
app.control.revoke(revoked.id, terminate=True, signal="SIGKILL")
errors.append(error(revoked))
print(json.dumps([errors, add.delay(1, 2).get(timeout=30)]))
"""
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == [
            ["TimeLimitExceeded", "TaskRevokedError"],
            3,
        ]
        killed = [pid for pid, _ in BACK.findall(log.read_text())]
        assert killed == [(tmp_path / name).read_text() for name in ("slow", "slower")]


@pytest.mark.needs("supervisor", "release")
def test_supervisors_listener_releases_what_does_not_obey(tmp_path: Path) -> None:
    write(tmp_path / "deaf.py", DEAF + "time.sleep(1000)\n")
    write(
        tmp_path / "conf",
        f"""
        [supervisord]
        nodaemon=true
        pidfile={tmp_path}/pid
        logfile=/dev/null
        logfile_maxbytes=0
        [unix_http_server]
        file={tmp_path}/s
        [rpcinterface:supervisor]
        supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
        [supervisorctl]
        serverurl=unix://{tmp_path}/s
        [program:deaf]
        command={sys.executable} {tmp_path}/deaf.py
        stopwaitsecs=60
        [eventlistener:mrelease]
        command={sys.executable} {EXAMPLES}/supervisor_listener.py 1
        events=PROCESS_STATE_RUNNING,PROCESS_STATE_STOPPING
        stderr_logfile={tmp_path}/listener
        """,
    )
    configured = ["-c", str(tmp_path / "conf")]

    def control(*words: str) -> str:
        command = [sys.executable, "-m", "supervisor.supervisorctl", *configured]
        return subprocess.run([*command, *words], capture_output=True, text=True).stdout

    with server(tmp_path, "supervisor.supervisord", *configured):
        _until(lambda: control("status").count("RUNNING") == 2, "both to run")
        pid = control("pid", "deaf").strip()
        assert "deaf: stopped" in control("stop", "deaf")
        line = re.compile(rf"^pid {pid} (?:released|exited) ", re.M)
        wait_for_line(tmp_path / "listener", line)
        assert "STOPPED" in control("status", "deaf")


@pytest.mark.needs("jupyterhub", "release")
@pytest.mark.parametrize(
    ("program", "now", "status"),
    [
        ("deaf", False, -signal.SIGKILL),
        ("deaf", True, -signal.SIGKILL),
        ("obeys", False, -signal.SIGINT),
        ("obeys", True, -signal.SIGTERM),
    ],
)
def test_jupyterhubs_spawner_stops_a_server(
    program: str, now: bool, status: int
) -> None:
    server = (DEAF if program == "deaf" else "") + (
        "import time\nprint(flush=True)\ntime.sleep(1000)"
    )
    if program == "obeys":
        server = "import signal; signal.signal(2, signal.SIG_DFL)\n" + server
    result = run_python(
        f"""
import asyncio, subprocess, sys
sys.path.insert(0, {str(EXAMPLES)!r})
from jupyterhub_spawner import ReleasingSpawner

async def stop(child):
    spawner = ReleasingSpawner(
        proc=child, pid=child.pid, interrupt_timeout=WAIT, term_timeout=WAIT
    )
    await spawner.stop(now={now})
    return await spawner.poll()

command = [sys.executable, "-c", {server!r}]
with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
    try:
        child.stdout.readline()
        asyncio.run(stop(child))
        print(child.returncode)
    finally:
        child.kill()
""".replace("WAIT", "1" if program == "deaf" else "30")
    )
    assert result.stdout.split() == [str(status)], result.stderr


# No proxy is started: the hub is asked directly.
HUB = """
import sys
from jupyterhub.proxy import Proxy
from jupyterhub_spawner import ReleasingSpawner

class NoProxy(Proxy):
    should_start = False
    routes = {}
    async def add_route(self, routespec, target, data):
        self.routes[routespec] = dict(routespec=routespec, target=target, data=data)
    async def delete_route(self, routespec):
        self.routes.pop(routespec, None)
    async def get_all_routes(self):
        return self.routes

c.JupyterHub.proxy_class = NoProxy
c.JupyterHub.hub_port = PORT
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.services = [{"name": "test", "api_token": "TOKEN"}]
c.JupyterHub.load_roles = [
    {"name": "test", "scopes": ["admin:users", "admin:servers"], "services": ["test"]}
]
c.JupyterHub.spawner_class = ReleasingSpawner
c.Spawner.cmd = [sys.executable, "FOLDER/single.py"]
c.Spawner.interrupt_timeout = c.Spawner.term_timeout = 1
"""
SINGLE = """
import http.server, os, sys, urllib.parse
from pathlib import Path
from typing import Any

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("X-JupyterHub-Version", "6")
        self.end_headers()

port = urllib.parse.urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"]).port
Path(__file__).with_name("pid").write_text(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.needs("jupyterhub", "release")
def test_a_jupyterhub_stops_a_server_that_is_deaf(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex()
    text = HUB.replace("PORT", str(port)).replace("TOKEN", token)
    write(tmp_path / "jupyterhub_config.py", text.replace("FOLDER", str(tmp_path)))
    write(tmp_path / "single.py", DEAF + SINGLE)
    user = f"http://127.0.0.1:{port}/hub/api/users/{getpass.getuser()}"

    def ask(method: str, url: str) -> tuple[int, Any]:
        """The status, and what came with it."""
        headers = {"Authorization": f"token {token}"}
        request = urllib.request.Request(url, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or "null")

    def is_up() -> bool:
        return bool(ask("GET", user)[1]["servers"].get("", {}).get("ready"))

    with server(tmp_path, "jupyterhub") as log:
        wait_for_line(log, re.compile("JupyterHub is now running"))
        assert ask("POST", user)[0] == 201
        assert ask("POST", f"{user}/server")[0] in (201, 202)
        _until(is_up, "the server to be up")
        victim = (tmp_path / "pid").read_text()
        assert ask("DELETE", f"{user}/server")[0] in (202, 204)
        assert wait_for_line(log, BACK).groups() == (victim, "9")
        _until(lambda: not is_up(), "the hub to know that it is down")
        assert not Path("/proc", victim).exists()
        assert ask("POST", f"{user}/server")[0] in (201, 202)
        _until(is_up, "another server to be up")
        assert (tmp_path / "pid").read_text() != victim
        assert ask("DELETE", f"{user}/server")[0] in (202, 204)
        _until(lambda: not is_up(), "the hub to know that it is down")

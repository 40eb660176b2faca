"""Starts Flower's own commands as processes of their own, forked from one that has imported all.

Flower starts a Python process for each message, and importing Flower and JAX takes seconds of CPU
each time. Here the commands on PATH are small scripts that ask one preloaded process to fork; the
fork calls the command's real entry point with the real arguments. Everything dies with the standard
input of this process.

  python flower_processes.py SOCKET FOLDER     (FOLDER gets the commands)
"""

import importlib
import json
import os
import pathlib
import select
import signal
import socket
import sys

COMMANDS = {
    "flower-superexec": ("flwr.supercore.cli", "flower_superexec"),
    "flower-superlink": ("flwr.superlink.cli", "flower_superlink"),
    "flower-supernode": ("flwr.supernode.cli", "flower_supernode"),
    "flwr": ("flwr.cli.app", "app"),
    "flwr-clientapp": ("flwr.supernode.cli", "flwr_clientapp"),
    "flwr-serverapp": ("flwr.superlink.cli", "flwr_serverapp"),
}
PRELOAD = (
    "flwr.clientapp",
    "flwr.serverapp.strategy",
    "flwr.superlink.main",
    "flwr.supernode.main",
    "dpjax.federated.flower",
    "orbax.checkpoint",
)


def ask(path, argv, environ, folder):
    """Has a command started; returns the connection, which ends with it, and its process id."""
    request = {"argv": argv, "environ": environ, "cwd": folder}
    connection = _send(path, request, [1, 2])
    return connection, int.from_bytes(connection.recv(4), "little")


def start(path, argv, environ, folder, log):
    """As `ask`, with the output in a file."""
    request = {"argv": argv, "environ": environ, "cwd": folder}
    with open(log, "ab") as file:
        connection = _send(path, request, [file.fileno()] * 2)
        return connection, int.from_bytes(connection.recv(4), "little")


def children(path, command):
    """Process ids of a command's processes that run."""
    with _send(path, {"list": command}, [1, 2]) as connection:
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return json.loads(answer)


def _send(path, request, fds):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    message = json.dumps(request).encode()
    socket.send_fds(connection, [len(message).to_bytes(4, "little")], fds)
    connection.sendall(message)
    return connection


def _read(connection, size):
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _serve(path, folder):
    for name in COMMANDS:
        script = pathlib.Path(folder, name)
        script.write_text(
            f"#!{sys.executable} -SE\n"
            f"import os, sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
            "from flower_processes import ask\n"
            f"argv = [{name!r}, *sys.argv[1:]]\n"
            f"ask({path!r}, argv, dict(os.environ), os.getcwd())[0].recv(1)\n"
        )
        script.chmod(0o755)
    for module in [*PRELOAD, *(m for m, _ in COMMANDS.values())]:
        importlib.import_module(module)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    running = {}
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [], 0.1)
        for child in list(running):
            ended, _, usage = os.wait4(child, os.WNOHANG)
            if ended:
                _note(folder, running.pop(child), usage)
        if sys.stdin in ready:
            break
        if server in ready:
            connection, _ = server.accept()
            head, fds, _, _ = socket.recv_fds(connection, 4, 2)
            request = json.loads(_read(connection, int.from_bytes(head, "little")))
            if "list" in request:
                found = [c for c, name in running.items() if name == request["list"]]
                connection.sendall(json.dumps(found).encode())
            elif child := os.fork():
                running[child] = request["argv"][0]
                connection.sendall(child.to_bytes(4, "little"))
            else:
                server.close()
                _run(request, fds, connection)
            for fd in (*fds, connection.detach()):
                os.close(fd)
    for child in running:
        os.kill(child, signal.SIGKILL)
    for child in running:
        _note(folder, running[child], os.wait4(child, 0)[2])


def _note(folder, name, usage):
    """CPU seconds of a process that has ended."""
    with open(os.path.join(folder, "usage.txt"), "a") as file:
        file.write(f"{os.path.basename(name)} {usage.ru_utime + usage.ru_stime:.2f}\n")


def _run(request, fds, connection):
    """In the fork: becomes the command. ``connection`` stays open until it ends."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, fd in ((0, nothing), (1, fds[0]), (2, fds[1])):
            os.dup2(fd, target)
        os.environ.clear()
        os.environ.update(request["environ"])
        os.chdir(request["cwd"])
        sys.argv = request["argv"]
        module, name = COMMANDS[os.path.basename(sys.argv[0])]
        getattr(sys.modules[module], name)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.close()
        os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])

"""Runs code that is not ours in a box of its own: no files but Python's, no network, no processes outside. Off unless the user asks for it.

The box is the system's: user, mount, network, process and IPC namespaces, made by bubblewrap or by util-linux's `unshare`, without any
capability. In it: Python's library read-only, an empty directory that cannot be written, an empty environment, isolated Python (-I).
Limits: wall clock and CPU seconds, memory, nothing written to files, no further processes (root may start some; they end with the box).
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 5  # of CPU; twice as many by the clock
MEMORY = 512 << 20
TOOLS = ("bwrap", "unshare")

# In the child: limits, then the code, then the word that says that it ran to its end. `walls` makes the box's inside (unshare alone).
_CHILD = """
import json, os, resource, sys
given = json.load(sys.stdin)
if given["root"]:
    assert os.readlink("/proc/self/ns/mnt") != given["outside"]
    walls(given["folders"], given["root"])
for limit, most in given["limits"]:
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
exec(compile(given["code"], "answer", "exec"), {"__name__": "answer"})
os.write(given["fd"], given["word"].encode())
"""
_WALLS = """
def walls(folders, root):
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *arguments):
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    def mount(source, target, kind, flags, more=None):
        call("mount", source.encode(), target.encode(), kind, ctypes.c_ulong(flags), more)

    READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, b"tmpfs", NO_SUID | NO_DEVICES, b"size=1m,mode=755")
    for folder in folders:
        os.makedirs(root + folder, exist_ok=True)
        mount(folder, root + folder, None, BIND | RECURSIVE)
        mount("none", root + folder, None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES)
    os.makedirs(root + "/tmp", exist_ok=True)
    mount("none", root, None, REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chroot(root)
    os.chdir("/tmp")
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; those beyond the last are refused
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""


def _folders() -> list[str]:
    """The folders that Python needs: its library and the system's, none inside another."""
    named = [sysconfig.get_path("stdlib"), sysconfig.get_config_var("LIBDIR")]
    named += ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    there = {str(Path(folder)) for folder in named if folder and Path(folder).is_dir()}
    return sorted(folder for folder in there if not any(folder != other and Path(folder).is_relative_to(other) for other in there))


def _command(tool: str | None, python: list[str]) -> list[str]:
    name = Path(tool or "").name
    if tool is not None and name == "bwrap":
        binds = [part for folder in _folders() for part in ("--ro-bind", folder, folder)]
        apart = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        inside = [*binds, "--ro-bind", python[0], python[0], "--dir", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
        return [tool, *apart, "--die-with-parent", "--new-session", "--cap-drop", "ALL", *inside, "--", *python]
    if tool is not None:
        return [tool, *"--user --map-root-user --mount --net --pid --ipc --uts --fork --kill-child=KILL".split(), *python]
    return python


@functools.cache
def find() -> str | None:
    """The path of the tool that makes a box on this machine, tried once; None where none does."""
    inside = "import os; assert os.getpid() < 9 and not os.path.exists('/etc/passwd') and os.listdir('.') == []"
    return next((path for path in map(shutil.which, TOOLS) if path and run(inside, path)), None)


def run(code: str, tool: str | None) -> bool:
    """Whether the code runs to its end, within the limits and without an error, in a box of this tool; None is no box, limits alone.

    Whatever it started is killed.
    """
    folder, (ours, theirs) = tempfile.mkdtemp(), os.pipe()
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", _WALLS + _CHILD]
    limits = [("CPU", SECONDS), ("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)]
    given: dict[str, Any] = {"code": code, "word": secrets.token_hex(8), "fd": theirs, "limits": limits, "folders": _folders(), "root": ""}
    if tool is not None and Path(tool).name == "unshare":
        given |= {"root": folder, "outside": os.readlink("/proc/self/ns/mnt")}
    os.set_blocking(ours, False)
    with os.fdopen(ours, "rb", buffering=0) as end:
        process = subprocess.Popen(
            _command(tool, python), cwd=folder, env={}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, pass_fds=[theirs],
        )  # fmt: skip
        os.close(theirs)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(json.dumps(given).encode(), timeout=2 * SECONDS)
        _kill(process)
        os.rmdir(folder) if tool else shutil.rmtree(folder)  # a box leaves nothing; never delete through a mount
        return process.returncode == 0 and end.read(64) == given["word"].encode()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its whole group, also what outlived it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()

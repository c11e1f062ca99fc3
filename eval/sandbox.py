"""Runs code that a model wrote, in a process of its own with limits. Off unless the user asks for it.

Limits: wall clock and CPU seconds, memory, nothing written to files, no further processes (unless root runs it), an empty directory,
an empty environment, isolated Python (-I). This keeps mistakes in; it is no wall against an attacker, for which a container is needed.
"""

import subprocess
import sys
import tempfile

SECONDS = 5
MEMORY = 512 << 20
_LIMITED = f"""
import resource, sys
for limit, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
exec(compile(sys.argv[1], "answer", "exec"), {{"__name__": "answer"}})
"""


def holds(code: str) -> bool:
    """Whether the code runs to its end within the limits and without an error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _LIMITED, code], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=2 * SECONDS, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0

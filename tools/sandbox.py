"""Runs a stranger's program where it sees only what it is given: no network, no other files, bounded memory.

On Linux the program gets namespaces of its own (user, mount, process, network, IPC) through util-linux, without root:
its root folder lies in memory and holds the interpreter and the named files, read-only, and it has no capabilities.
Elsewhere only the limits of the process hold, and `isolation()` says so.

This file is used twice. Outside, the judge imports it as a module, and class Sandboxed starts a process in new
namespaces; inside them that process runs this same file as a program, whose `main` builds the root folder, enters it
and then turns into the stranger's program.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAMESPACES = ("--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--uts")
UNSHARE = ["unshare", *NAMESPACES, "--fork", "--kill-child"]
SETPRIV = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
MAX_PROCESSES = 256  # threads count
SEARCH_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"

# What a Python interpreter needs of the system, apart from its own folders.
SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Bind(NamedTuple):
    """A file or folder that the program sees at `inside`."""

    outside: Path
    inside: str
    writable: bool = False


class Limits(NamedTuple):
    memory_bytes: int = 8 * 2**30  # of address space, for each process
    file_bytes: int = 2**24  # of a file that it writes, and of everything in its /tmp
    open_files: int = 64


@functools.cache
def isolation() -> str:
    """`namespaces` where they keep a program from the network and from other files, else why there are none."""
    if not sys.platform.startswith("linux"):
        return f"none: {sys.platform} has no user namespaces"
    try:
        probe = subprocess.run([*UNSHARE, *SETPRIV, "true"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none: {error}"
    if probe.returncode != 0:
        return f"none: {probe.stderr.strip()[:200]}"
    return "namespaces"


class Sandboxed:
    """A process `python program...` inside the sandbox.

    File names in `program` are those that the program sees. `env` is added to its environment, and `pipes` are stdin,
    stdout and stderr as for subprocess.Popen.
    """

    def __init__(
        self, program: Sequence[str], binds: Sequence[Bind], limits: Limits, env: dict[str, str], **pipes: Any
    ) -> None:
        # Only a place to mount on: the mounts themselves vanish with the process.
        self.root = Path(tempfile.mkdtemp(prefix="sandbox"))
        base_env = {"PATH": SEARCH_PATH, "HOME": "/tmp", "LANG": "C.UTF-8"}

        if isolation() == "namespaces":
            # `env` may come from a record. It is set inside, after all programs that have capabilities.
            spec = {"root": str(self.root), "program": program, "binds": binds, "bytes": limits.file_bytes, "env": env}
            command = [*UNSHARE, sys.executable, "-I", str(Path(__file__).resolve()), json.dumps(spec, default=str)]
            outer_env = base_env
        else:
            outside_names = {bind.inside: str(bind.outside) for bind in binds}
            command = [sys.executable, "-I", *[outside_names.get(word, word) for word in program]]
            outer_env = env | base_env

        self.popen = subprocess.Popen(
            command,
            env=outer_env,
            preexec_fn=functools.partial(set_limits, limits),
            start_new_session=True,
            **pipes,
        )

    def kill(self) -> None:
        """Stop the program and everything that it started."""
        if self.popen.poll() is not None:
            return  # its process id may be another program's by now

        # The child of `unshare` is the first process of the namespace. Killing it ends what left the process group too.
        with contextlib.suppress(OSError):  # there is no child yet, or no /proc
            children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop the program if it still runs, and leave nothing behind."""
        self.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # closing sends what is buffered, and nobody reads it any more
                    pipe.close()
        shutil.rmtree(self.root, ignore_errors=True)


def set_limits(limits: Limits) -> None:
    """In the new process, before the program starts."""
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard_limit = resource.getrlimit(kind)
        if hard_limit != resource.RLIM_INFINITY:
            value = min(value, hard_limit)
        resource.setrlimit(kind, (value, value))


# ----------------------------------------------------------------------------------------------------------------------
# Inside the new namespaces
# ----------------------------------------------------------------------------------------------------------------------


def build_root(root: str, binds: Sequence[Sequence[Any]], tmpfs_bytes: int) -> None:
    """Make the root folder of the program, and enter it."""
    run("mount", "-t", "tmpfs", "-o", f"size={tmpfs_bytes},mode=755", "tmpfs", root)
    for path in dict.fromkeys((*SYSTEM_PATHS, sys.base_prefix, sys.prefix, *DEVICES)):
        if os.path.exists(path):
            mount_bind(root, path, path, writable=False)
    for outside, inside, writable in binds:
        mount_bind(root, outside, inside, writable)
    for name in ("proc", "tmp", "dev/shm", "old"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    # Some containers do not allow to mount /proc. The program can do without.
    subprocess.run(["mount", "-t", "proc", "proc", f"{root}/proc"], check=False, stderr=subprocess.DEVNULL)

    os.chdir(root)
    run("pivot_root", ".", "old")
    run("umount", "-l", "/old")
    os.rmdir("/old")
    os.chdir("/tmp")


def mount_bind(root: str, outside: str, inside: str, writable: bool) -> None:
    target = root + inside
    if os.path.isdir(outside):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    run("mount", "--rbind", outside, target)
    if not writable:
        run("mount", "-o", "remount,bind,ro,nosuid", target)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def main() -> None:
    spec = json.loads(sys.argv[1])
    # No namespaces inside the namespaces: whoever makes one has all capabilities in it.
    with contextlib.suppress(OSError):
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    build_root(spec["root"], spec["binds"], spec["bytes"])
    # The kernel does not hold the real root to this limit, so the judge should be run by an ordinary user.
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    # `env` follows setpriv, which still has all capabilities: a record's LD_PRELOAD must not reach it.
    variables = [f"{name}={value}" for name, value in spec["env"].items() if name not in os.environ]
    command = [*SETPRIV, "env", *variables, sys.executable, "-I", *spec["program"]]
    os.execvp(SETPRIV[0], command)


if __name__ == "__main__":
    main()

"""Runs a stranger's program where it sees only what it is given: no network, no other files, bounded memory.

On Linux it gets namespaces of its own (user, mount, process, network, IPC) through util-linux, without root: a root
folder in memory that holds the interpreter and the named files, read-only, and no capabilities. Elsewhere only the
limits of the process hold, which `isolation()` says. No command line of its own: tools/verify.py uses it.
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
MOST_PROCESSES = 256  # threads count
SETPRIV = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/alternatives",
)  # what an interpreter needs


class Bind(NamedTuple):
    """A file or folder that the program sees at `inside`."""

    outside: Path
    inside: str
    writable: bool = False


class Limits(NamedTuple):
    memory_bytes: int = 8 * 2**30  # of address space, of each process
    file_bytes: int = 2**24  # of a file that it writes, and of all in its /tmp
    open_files: int = 64


@functools.cache
def isolation() -> str:
    """What keeps a program from the network and from other files: `namespaces`, or why there are none."""
    if not sys.platform.startswith("linux"):
        return f"none: {sys.platform} has no user namespaces"
    try:
        made = subprocess.run([*UNSHARE, *SETPRIV, "true"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none: {error}"
    return "namespaces" if made.returncode == 0 else f"none: {made.stderr.strip()[:200]}"


class Sandboxed:
    """`python program...` behind the walls; names of files in `program` are those inside. `pipes` as for Popen."""

    def __init__(
        self, program: Sequence[str], binds: Sequence[Bind], limits: Limits, env: dict[str, str], **pipes: Any
    ) -> None:
        ours = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8"}
        walls = isolation() == "namespaces"
        self.root = Path(tempfile.mkdtemp(prefix="sandbox"))  # a name to mount on; the mounts go with the process
        if walls:  # `env`, which a record may have written, holds inside only
            spec = {"root": str(self.root), "program": program, "binds": binds, "bytes": limits.file_bytes, "env": env}
            command = [*UNSHARE, sys.executable, "-I", str(Path(__file__).resolve()), json.dumps(spec, default=str)]
        else:
            outside = {bind.inside: str(bind.outside) for bind in binds}
            command = [sys.executable, "-I", *[outside.get(word, word) for word in program]]
        limit = functools.partial(set_limits, limits)
        env = ours if walls else env | ours
        self.popen = subprocess.Popen(command, env=env, preexec_fn=limit, start_new_session=True, **pipes)

    def kill(self) -> None:
        """Stop everything, also what left the process group: the first process inside ends its namespace with it."""
        if self.popen.poll() is not None:
            return  # its id may be another's by now
        with contextlib.suppress(OSError):  # none, or no /proc
            children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop it, if it runs, and leave nothing behind."""
        self.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent yet
                    pipe.close()
        shutil.rmtree(self.root, ignore_errors=True)


def set_limits(limits: Limits) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def build_root(root: str, binds: Sequence[Sequence[Any]], size: int) -> None:
    """Inside the new namespaces: make the root folder and enter it."""
    mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", root)
    interpreter = [[p, p, False] for p in dict.fromkeys((*SYSTEM, sys.base_prefix, sys.prefix)) if os.path.exists(p)]
    devices = [[f"/dev/{name}", f"/dev/{name}", False] for name in ("null", "zero", "random", "urandom")]
    for outside, inside, writable in [*interpreter, *devices, *binds]:
        target = root + inside
        if os.path.isdir(outside):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "a").close()
        mount("--rbind", outside, target)
        if not writable:
            mount("-o", "remount,bind,ro,nosuid", target)
    for name in ("proc", "tmp", "dev/shm", "old"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    subprocess.run(["mount", "-t", "proc", "proc", f"{root}/proc"], check=False, stderr=subprocess.DEVNULL)
    os.chdir(root)
    run("pivot_root", ".", "old")
    run("umount", "-l", "/old")
    os.rmdir("/old")
    os.chdir("/tmp")


def mount(*words: str) -> None:
    run("mount", *words)


def run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def main() -> None:
    spec = json.loads(sys.argv[1])
    with contextlib.suppress(OSError):  # no namespaces in namespaces
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    build_root(spec["root"], spec["binds"], spec["bytes"])
    resource.setrlimit(resource.RLIMIT_NPROC, (MOST_PROCESSES, MOST_PROCESSES))  # the kernel exempts the real root
    command = [*SETPRIV, sys.executable, "-I", *spec["program"]]
    os.execve(shutil.which(SETPRIV[0]) or SETPRIV[0], command, spec["env"] | dict(os.environ))


if __name__ == "__main__":
    main()

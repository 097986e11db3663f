"""Runs a stranger's program where it sees only what it is given: no network, no other files, bounded memory.

On Linux the program gets namespaces of its own (mount, process, network, IPC) through util-linux. An ordinary user
needs a user namespace for that; root does without, and the program runs as an unprivileged user then, because the
kernel does not hold root to its limits. The program's root folder lies in memory and cannot be written. It holds the
interpreter with its packages, the shared libraries and the named files, read-only. A filter of system calls refuses
sockets of every family, locks, key rings, looking at the page cache, and whatever else two processes could talk through
or that leads out (REFUSED_CALLS; only on x86-64 and arm64). Elsewhere only the limits of the process hold, and
`isolation()` says so.

What the program can still read, besides what it was given, is the Python installation. Its help topics are hidden, but
not the docstrings of its modules, so a text made of these is no secret in here (tools/judge.py, `check_hidden`).

This file is used twice. Outside, the judge imports it as a module, and class Sandboxed starts a process in new
namespaces; inside them that process runs this same file as a program, whose `main` builds the root folder, enters it
and then turns into the stranger's program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib.util
import json
import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAMESPACES = ("--net", "--mount", "--pid", "--ipc", "--uts")
UNSHARE = ["unshare", *NAMESPACES, "--fork", "--kill-child"]
USER_NAMESPACE = ["--user", "--map-root-user"]
SETPRIV = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
NOBODY = 65534
AS_NOBODY = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
SEARCH_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"

# What a Python interpreter needs of the system, apart from its own folders, and the two programs that start it.
SYSTEM_PATHS = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
PROGRAMS = ("setpriv", "env")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# Packages that a record may use, with those that torch uses. They may lie in several places (pip install --user).
PACKAGES = (
    *("torch", "numpy", "sentencepiece", "brotli", "zstandard", "triton", "tqdm"),
    *("typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"),
)

# All that is shown of /proc besides the processes. Counters of the whole machine, such as those in vmstat, would let
# one process tell another something.
SHOWN_OF_PROC = {"cpuinfo", "filesystems", "mounts", "net", "self", "thread-self", "version"}


class Bind(NamedTuple):
    """A file or folder that the program sees at `inside`."""

    outside: Path
    inside: str
    writable: bool = False


class Limits(NamedTuple):
    memory_bytes: int = 8 * 2**30  # of address space, for each process
    file_bytes: int = 2**24  # of a file that it writes
    open_files: int = 64
    folder_bytes: int = 2**25  # of everything in its /tmp
    processes: int = 128  # threads count
    may_fork: bool = False  # whether it may start other processes; with few of them, memory is bounded


@functools.cache
def isolation() -> str:
    """`namespaces` where they keep a program from the network and from other files, else why there are none."""
    if not sys.platform.startswith("linux"):
        return f"none: {sys.platform} has no namespaces"
    try:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        probe = Sandboxed(["-c", "print('inside')"], [], Limits(), {}, with_walls=True, **pipes)
    except OSError as error:
        return f"none: {error}"
    try:
        output, _ = probe.popen.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        return "none: an empty program did not end in the sandbox"
    finally:
        probe.close()
    lines = output.decode(errors="replace").split("\n")
    return "namespaces" if lines == ["inside", ""] else f"none: {' '.join(lines).strip()[-200:]}"


def package_folders() -> list[str]:
    """Folders with packages that do not lie in the interpreter's own ones, such as those of pip install --user."""
    own = [f"{prefix}/" for prefix in (*python_folders(), *SYSTEM_PATHS)]
    folders = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = os.path.dirname(os.path.realpath(next(iter(spec.submodule_search_locations))))
        # Any other folder that happens to be on the path, such as a project's, might hold the text.
        is_for_packages = os.path.basename(folder) in ("site-packages", "dist-packages")
        if is_for_packages and not folder.startswith(tuple(own)) and folder not in folders:
            folders.append(folder)
    return folders


def is_visible(path: Path) -> bool:
    """Whether a file or folder outside lies where a program in the sandbox can read it."""
    real = os.path.realpath(path)
    folders = [os.path.realpath(folder) for folder in (*SYSTEM_PATHS, *python_folders(), *package_folders())]
    return any(f"{real}/".startswith(f"{folder}/") for folder in folders)


def python_folders() -> list[str]:
    """The interpreter's own folders. Not its prefix, which is the project itself after `python -m venv .`."""
    folders = []
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        folders += [f"{prefix}/{name}" for name in ("lib", "lib64", "bin", "pyvenv.cfg")]
    return folders


class Sandboxed:
    """A process `python program...` inside the sandbox.

    File names in `program` are those that the program sees. `env` is added to its environment, and `pipes` are stdin,
    stdout and stderr as for subprocess.Popen.
    """

    def __init__(
        self,
        program: Sequence[str],
        binds: Sequence[Bind],
        limits: Limits,
        env: dict[str, str],
        with_walls: bool | None = None,
        **pipes: Any,
    ) -> None:
        # Only a place to mount on: the mounts themselves vanish with the process.
        self.root = Path(tempfile.mkdtemp(prefix="sandbox"))
        self.copies = Path(tempfile.mkdtemp(prefix="sandbox"))
        self.mark = uuid.uuid4().hex
        if with_walls is None:
            with_walls = isolation() == "namespaces"
        packages = package_folders()
        base_env = {"PATH": SEARCH_PATH, "HOME": "/tmp", "LANG": "C.UTF-8", "SANDBOX": self.mark}
        base_env["PYTHONPATH"] = os.pathsep.join(packages)
        base_env["PYTHONDONTWRITEBYTECODE"] = "1"

        if with_walls:
            # `env` may come from a record. It is set inside, after all programs that have capabilities.
            spec = {
                "root": str(self.root),
                "program": program,
                "binds": [self.readable(bind) for bind in binds],
                "packages": packages,
                "limits": limits,
                "env": env,
                "is_root": os.geteuid() == 0,
            }
            user = [] if os.geteuid() == 0 else USER_NAMESPACE
            builder = [sys.executable, "-I", str(Path(__file__).resolve()), json.dumps(spec, default=str)]
            command = [*UNSHARE, *user, *builder]
            outer_env = base_env
        else:
            outside_names = {bind.inside: str(bind.outside) for bind in binds}
            command = [*interpreter(), *[outside_names.get(word, word) for word in program]]
            outer_env = env | base_env

        self.popen = subprocess.Popen(
            command,
            env=outer_env,
            preexec_fn=functools.partial(set_limits, limits),
            start_new_session=True,
            **pipes,
        )

    def readable(self, bind: Bind) -> Bind:
        """The same file for a program that root starts as an unprivileged user, which may not read root's own files."""
        if os.geteuid() != 0:
            return bind
        if bind.writable:
            os.chown(bind.outside, NOBODY, NOBODY)
        elif bind.outside.is_file() and not bind.outside.stat().st_mode & 0o004:
            copy = self.copies / str(len(list(self.copies.iterdir())))
            shutil.copyfile(bind.outside, copy)
            copy.chmod(0o644)
            return bind._replace(outside=copy)
        return bind

    def kill(self) -> None:
        """Stop the program and everything that it started."""
        # The child of `unshare` is the first process of the namespace. Killing it ends what left the process group too.
        if self.popen.poll() is None:
            with contextlib.suppress(OSError):  # there is no child yet, or no /proc
                children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
                for child in children:
                    os.kill(int(child), signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

        # Without namespaces, what left the group is found by its environment.
        for process in marked_processes(self.mark):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """Stop the program if it still runs, and leave nothing behind."""
        self.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # closing sends what is buffered, and nobody reads it any more
                    pipe.close()
        for folder in (self.root, self.copies):
            shutil.rmtree(folder, ignore_errors=True)


def marked_processes(mark: str) -> Iterator[int]:
    """The processes with this text in their environment, where there is a /proc."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            if mark.encode() in path.read_bytes():
                yield int(path.parent.name)


def interpreter() -> list[str]:
    """The command of the interpreter: without the user's packages, and without the program's folder on the path."""
    return [sys.executable, "-s", "-P"]


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
# Inside the new namespaces: files
# ----------------------------------------------------------------------------------------------------------------------


def build_root(spec: dict[str, Any]) -> None:
    """Make the root folder of the program, and enter it."""
    root = spec["root"]
    limits = Limits(*spec["limits"])
    mount_memory(root, 2**20, "mode=755")
    for name in ("tmp", "dev/shm"):  # first, because the interpreter may lie in the first of them
        os.makedirs(f"{root}/{name}")
        mount_memory(f"{root}/{name}", limits.folder_bytes, "mode=1777")
    programs = [path for name in PROGRAMS if (path := shutil.which(name))]
    # The folders of the interpreter may be links, and the system's may be the same ones under other names.
    paths = dict.fromkeys((*SYSTEM_PATHS, *python_folders(), *spec["packages"], *programs, *DEVICES))
    for path in paths:
        if os.path.exists(path) and not os.path.exists(root + path):
            mount_bind(root, path, path, writable=False)
    for outside, inside, writable in spec["binds"]:
        mount_bind(root, outside, inside, writable)

    for stdlib in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")):
        if os.path.isdir(f"{root}{stdlib}/pydoc_data"):
            mount_memory(f"{root}{stdlib}/pydoc_data", 0, "ro")
    mount_proc(f"{root}/proc")
    run("mount", "-o", "remount,bind,ro", root)

    # The new root takes the place of the old one, which comes to lie on top of it and is taken away.
    os.chdir(root)
    run("pivot_root", ".", ".")
    libc_call("umount2", b".", 2)  # MNT_DETACH
    os.chdir("/tmp")


def mount_memory(folder: str, n_bytes: int, options: str) -> None:
    """An empty folder of its own, of at most so many bytes; 0 stands for the least there is."""
    run("mount", "-t", "tmpfs", "-o", f"size={max(n_bytes, 4096)},nosuid,nodev,{options}", "tmpfs", folder)


def mount_proc(folder: str) -> None:
    os.makedirs(folder)
    # Some containers do not allow to mount /proc. The program can do without.
    mounted = subprocess.run(
        ["mount", "-t", "proc", "-o", "ro,nosuid,nodev,noexec", "proc", folder], check=False, stderr=subprocess.DEVNULL
    )
    if mounted.returncode != 0:
        return
    for name in sorted(os.listdir(folder)):
        if name.isdecimal() or name in SHOWN_OF_PROC:
            continue
        if os.path.isdir(f"{folder}/{name}"):
            mount_memory(f"{folder}/{name}", 0, "ro")
        elif os.path.exists(f"{folder}/{name}"):
            run("mount", "--bind", "/dev/null", f"{folder}/{name}")


def mount_bind(root: str, outside: str, inside: str, writable: bool) -> None:
    target = root + inside
    if os.path.isdir(outside):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    run("mount", "--rbind", outside, target)
    if writable:
        return

    # What is mounted below stays writable if it is not remounted too, with the options that it has.
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _, _, _, _, point, options, *_ = line.split(" ")
        if point == target or point.startswith(f"{target}/"):
            kept = [option for option in options.split(",") if option not in ("rw", "ro", "nosuid")]
            run("mount", "-o", ",".join(["remount", "bind", "ro", "nosuid", *kept]), point)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


# ----------------------------------------------------------------------------------------------------------------------
# Inside the new namespaces: system calls
# ----------------------------------------------------------------------------------------------------------------------

# Numbers of system calls on x86-64 and arm64 that are refused; None where a machine has no such call.
REFUSED_CALLS: dict[str, tuple[int | None, int | None]] = {
    # Sockets of every family. A pair of sockets reaches nobody else and stays allowed.
    "socket": (41, 198),
    # Files in memory that no limit counts.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # What two processes could leave for each other: key rings, locks, watches, messages, the page cache.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "flock": (73, 32),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "mlockall": (151, 230),
    "munlock": (150, 229),
    "pidfd_open": (434, 434),
    "mincore": (27, 232),
    "cachestat": (451, 451),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "readahead": (187, 213),
    "fadvise64": (221, 223),
    # Calls that do other calls, or look into other processes and into the kernel.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "syslog": (103, 116),
    # Ways out of the root folder and of the namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}
CLONE = (56, 220)
CLONE3 = 435  # on both
FCNTL = (72, 25)
FORKS = {"fork": (57, None), "vfork": (58, None)}
LOCK_COMMANDS = (5, 6, 7, 36, 37, 38, 1024, 1025, 1026)  # F_GETLK, F_SETLK, F_SETLKW, F_OFD_*LK, leases, F_NOTIFY
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW*
CLONE_THREAD = 0x10000

# By machine: its number in an audit record (linux/audit.h), and which of the two numbers of a call it has.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# A filter is a program in classic BPF (linux/filter.h). It sees struct seccomp_data: the number of the call at byte 0,
# the machine at byte 4, and the arguments from byte 16 on, 8 bytes each.
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
JUMP_IF_AT_LEAST = 0x35
JUMP_IF_ANY_BIT = 0x45
RETURN = 0x06
ALLOW = 0x7FFF0000
REFUSE = 0x00050000  # with the number of the error in the lowest 16 bits
X32_CALLS = 0x40000000  # from here on, numbers are a second set of the same calls


def call_filter(machine: str, may_fork: bool) -> bytes | None:
    """The filter of system calls, or None for a machine whose numbers are not known."""
    if machine not in MACHINES:
        return None
    audit_number, column = MACHINES[machine]
    not_permitted = REFUSE | errno.EPERM
    program: list[tuple[int, int, int, int]] = []  # operation, how far to jump if so and if not, value

    def refuse_if(operation: int, value: int, result: int) -> None:
        program.append((operation, 0, 1, value))
        program.append((RETURN, 0, 0, result))

    # Calls in the numbers of another machine are refused: a process on x86-64 may use those of 32 bits.
    program.append((LOAD, 0, 0, 4))
    program.append((JUMP_IF_EQUAL, 1, 0, audit_number))
    program.append((RETURN, 0, 0, not_permitted))
    program.append((LOAD, 0, 0, 0))
    if machine == "x86_64":
        refuse_if(JUMP_IF_AT_LEAST, X32_CALLS, not_permitted)

    refused = REFUSED_CALLS if may_fork else REFUSED_CALLS | FORKS
    for numbers in refused.values():
        number = numbers[column]
        if number is not None:
            refuse_if(JUMP_IF_EQUAL, number, not_permitted)
    # The flags of clone3 lie in memory, where no filter can see them. The C library falls back on clone.
    refuse_if(JUMP_IF_EQUAL, CLONE3, REFUSE | errno.ENOSYS)

    # clone: no namespaces, and without the permission to fork only threads.
    clone = [(LOAD, 0, 0, 16), (JUMP_IF_ANY_BIT, 0, 1, NEW_NAMESPACES), (RETURN, 0, 0, not_permitted)]
    if not may_fork:
        clone += [(JUMP_IF_ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, not_permitted)]
    clone.append((RETURN, 0, 0, ALLOW))
    program.append((JUMP_IF_EQUAL, 0, len(clone), CLONE[column]))
    program += clone

    # fcntl: no locks.
    program.append((JUMP_IF_EQUAL, 0, 1 + 2 * len(LOCK_COMMANDS), FCNTL[column]))
    program.append((LOAD, 0, 0, 24))
    for command in LOCK_COMMANDS:
        refuse_if(JUMP_IF_EQUAL, command, not_permitted)

    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def install_filter(program: bytes) -> None:
    """Hold this process, and all that it becomes or starts, to a filter of system calls."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    filter_program = Program(len(program) // 8, program)
    libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc_call("prctl", 22, 2, ctypes.byref(filter_program), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def libc_call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that returns 0 unless it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main() -> None:
    spec = json.loads(sys.argv[1])
    limits = Limits(*spec["limits"])
    if not spec["is_root"]:
        # No namespaces inside the namespaces: whoever makes one has all capabilities in it.
        with contextlib.suppress(OSError):
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
    build_root(spec)
    resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))

    program = call_filter(platform.machine(), limits.may_fork)
    if program is not None:
        install_filter(program)
    # `env` follows setpriv, which still has all capabilities: a record's LD_PRELOAD must not reach it.
    variables = [f"{name}={value}" for name, value in spec["env"].items() if name not in os.environ]
    drop = [*SETPRIV, *AS_NOBODY] if spec["is_root"] else SETPRIV
    command = [*drop, "env", *variables, *interpreter(), *spec["program"]]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

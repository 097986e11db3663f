"""tools/sandbox.py: what a stranger's program can reach, and what it cannot."""

from __future__ import annotations

import json
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sandbox

from records import HAS_NAMESPACES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
def test_nothing_outlives_the_sandbox(tmp_path):
    """Not even a process that left the group and does not die with its parent."""
    program = tmp_path / "program.py"
    program.write_text(
        "import ctypes, os, time\nos.setsid()\nctypes.CDLL(None).prctl(1, 0)\nprint(1, flush=True)\ntime.sleep(60)\n"
    )
    binds, pipe = [sandbox.Bind(program, "/x/program.py")], subprocess.PIPE
    inside = sandbox.Sandboxed(["/x/program.py", str(tmp_path)], binds, sandbox.Limits(), {}, stdout=pipe)
    assert inside.popen.stdout.readline() == b"1\n"

    def running() -> list[str]:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return [line.decode() for line in lines if b"/x/program.py" in line and str(tmp_path).encode() in line]

    assert running()
    inside.close()
    patience = time.monotonic() + 20
    while running() and time.monotonic() < patience:
        time.sleep(0.05)
    assert running() == []


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
def test_settings_of_a_record_hold_inside_only(tmp_path, monkeypatch):
    """PATH and the like from a record must not reach the programs that build the walls."""
    (tmp_path / "unshare").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "unshare").chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text("import os\nprint(os.environ['SETTING'], os.environ['PATH'])\n")
    binds, env = [sandbox.Bind(program, "/x/program.py")], {"PATH": str(tmp_path), "SETTING": "1"}
    inside = sandbox.Sandboxed(["/x/program.py"], binds, sandbox.Limits(), env, stdout=subprocess.PIPE)
    out = inside.popen.communicate()[0].decode().split()
    inside.close()
    assert out[0] == "1"
    assert str(tmp_path) not in out[1]
    assert not (tmp_path / "ran").exists()


# What a stranger's program tries, each line for itself. It prints what happened as JSON.
ATTACKS = {
    "opens a file outside": "open({secret!r})",
    "writes a library": "open('/usr/lib/x', 'w')",
    "writes the root folder": "open('/x.txt', 'w')",
    "writes what it was given": "open('/x/program.py', 'a')",
    "writes a sysctl": "open('/proc/sys/kernel/core_pattern', 'w')",
    "fills its folder": "fill('/tmp')",
    "fills shared memory": "fill('/dev/shm')",
    "opens a socket of IP": "socket.socket(socket.AF_INET)",
    "opens a socket of Unix": "socket.socket(socket.AF_UNIX)",
    "opens a socket of a virtual machine": "socket.socket(socket.AF_VSOCK)",
    "opens a socket of the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "opens a socket of ciphers": "socket.socket(socket.AF_ALG)",
    "makes a file in memory": "os.memfd_create('x')",
    "writes a key ring": "call(248, b'user', b'x', b'y', 1, -4)",
    "counts locked pages": "call(149, 0, 0)",
    "reads a counter of the machine": "open('/proc/vmstat').read() or os.stat('/gone')",
    "reads another counter": "open('/proc/meminfo').read() + open('/proc/zoneinfo').read() or os.stat('/gone')",
    "locks a device": "fcntl.lockf(open('/dev/null', 'w'), fcntl.LOCK_EX)",
    "locks a device whole": "fcntl.flock(open('/dev/null'), fcntl.LOCK_EX)",
    "reads what is in the page cache": "os.preadv(os.open('/x/program.py', 0), [bytearray(1)], 0, os.RWF_NOWAIT)",
    "asks for the page cache": "call(27, 0, 4096, ctypes.create_string_buffer(1))",
    "drops the page cache": "os.posix_fadvise(os.open('/x/program.py', 0), 0, 0, os.POSIX_FADV_DONTNEED)",
    "makes a namespace": "call(272, 0x10000000)",
    "changes the root folder": "os.chroot('/tmp')",
    "mounts": "call(165, b'x', b'/tmp', b'tmpfs', 0, 0)",
    "looks into another process": "call(101, 16, 1, 0, 0)",
    "starts a process": "os._exit(0) if os.fork() == 0 else None",
    "touches a device": "os.utime('/dev/null')",
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> dict[str, Any]:
    """What became of the attacks, and what a program finds inside."""
    folder = tmp_path_factory.mktemp("attacked")
    secret = folder / "secret"
    secret.write_text("x")
    program = folder / "program.py"
    tries = [f"    {name!r}: tried(lambda: {code.format(secret=str(secret))})," for name, code in ATTACKS.items()]
    program.write_text(
        """
import ctypes, fcntl, json, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)


def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "failed")


def fill(folder):
    for i in range(100):
        with open(f"{folder}/{i}", "wb") as file:
            file.write(bytes(2**20))


def tried(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return "done"


found = {
"""
        + "\n".join(tries)
        + """
    "user": os.getuid(),
    "root": sorted(os.listdir("/")),
    "temporary": tried(lambda: open("/tmp/x", "w")),
    "pair of sockets": tried(socket.socketpair),
    "helps": os.listdir(os.path.dirname(os.__file__) + "/pydoc_data"),
}
print(json.dumps(found))
"""
    )
    # The file is no longer than others may read: the judge's folders are closed to the user that root turns into.
    binds = [sandbox.Bind(program, "/x/program.py")]
    inside = sandbox.Sandboxed(["/x/program.py"], binds, sandbox.Limits(), {}, stdout=subprocess.PIPE)
    found = json.loads(inside.popen.communicate()[0])
    inside.close()
    assert not inside.root.exists()
    return found


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the calls are those of x86-64")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails(attacked, name):
    assert attacked[name] in ("FileNotFoundError", "PermissionError", "OSError", "BlockingIOError")


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
def test_what_a_program_finds_inside(attacked):
    """Nothing but the interpreter, the libraries and its own file; the help topics of Python are hidden."""
    interpreter = {Path(path).parts[1] for path in (sys.prefix, sys.base_prefix)}
    expected = {"dev", "etc", "lib", "lib32", "lib64", "proc", "tmp", "usr", "x"} | interpreter
    assert set(attacked["root"]) <= expected
    assert (attacked["temporary"], attacked["pair of sockets"], attacked["helps"]) == ("done", "done", [])
    assert attacked["user"] == (sandbox.NOBODY if os.geteuid() == 0 else 0)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
@pytest.mark.parametrize("may_fork", [False, True])
def test_forks_and_files_have_limits(tmp_path, may_fork):
    """700 forks, of which none or few succeed, also for root."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\n"
        "started = 0\n"
        "for _ in range(700):\n"
        "    try:\n"
        "        child = os.fork()\n"
        "    except OSError:\n"
        "        break\n"
        "    if child == 0:\n"
        "        time.sleep(30)\n"
        "        os._exit(0)\n"
        "    started += 1\n"
        "print(started)\n"
    )
    limits = sandbox.Limits(processes=40, may_fork=may_fork)
    binds = [sandbox.Bind(program, "/x/program.py")]
    inside = sandbox.Sandboxed(["/x/program.py"], binds, limits, {}, stdout=subprocess.PIPE)
    started = int(inside.popen.stdout.readline())
    inside.close()
    assert 0 < started < 40 if may_fork else started == 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
def test_a_virtual_environment_in_a_project_does_not_bring_the_project_along(tmp_path):
    """After `python -m venv .`, sys.prefix is the project, with its data in it."""
    project = tmp_path / "project"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(project)], check=True)
    (project / "data").mkdir()
    (project / "data" / "fineweb_val_000000.bin").write_bytes(b"secret")
    (project / "look.py").write_text(
        f"import os\nprint(sorted(os.listdir({str(project)!r})), os.path.exists({str(project / 'data')!r}))\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "import sandbox, subprocess; from pathlib import Path\n"
        f"binds = [sandbox.Bind(Path({str(project / 'look.py')!r}), '/x/look.py')]\n"
        "inside = sandbox.Sandboxed(['/x/look.py'], binds, sandbox.Limits(), {}, stdout=subprocess.PIPE)\n"
        "print(inside.popen.communicate()[0].decode()); inside.close()\n"
    )
    done = subprocess.run([str(project / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("]")[1].strip() == "False"
    assert "look.py" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NAMESPACES, reason="no namespaces here")
def test_packages_of_the_user_are_found(tmp_path):
    """Those of pip install --user and of .pth files lie outside of the interpreter's folders."""
    packages = tmp_path / "home" / "site-packages"
    (packages / "sentencepiece").mkdir(parents=True)
    (packages / "sentencepiece" / "__init__.py").write_text("text = 'found'\n")
    code = (
        f"import sys; sys.path[:0] = [{str(packages)!r}, {str(ROOT / 'tools')!r}]; import sandbox, subprocess\n"
        "program = ['-c', 'import sentencepiece; print(sentencepiece.text)']\n"
        "inside = sandbox.Sandboxed(program, [], sandbox.Limits(), {}, stdout=subprocess.PIPE)\n"
        "print(inside.popen.communicate()[0].decode()); inside.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "found"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_lists(machine):
    """Run by hand, as the kernel runs it: the calls of the list are refused, others are not."""
    [audit_number, column] = sandbox.MACHINES[machine]
    for may_fork in (False, True):
        program = sandbox.call_filter(machine, may_fork)
        for name, numbers in sandbox.REFUSED_CALLS.items():
            if numbers[column] is not None:
                assert filtered(program, audit_number, numbers[column]) == "refused", name
        assert filtered(program, audit_number, 0) == "allowed"
        assert filtered(program, audit_number + 1, 0) == "refused"
        clone, fcntl_number = sandbox.CLONE[column], sandbox.FCNTL[column]
        assert filtered(program, audit_number, clone, sandbox.CLONE_THREAD) == "allowed"
        assert filtered(program, audit_number, clone, 17) == ("allowed" if may_fork else "refused")
        assert filtered(program, audit_number, clone, 0x10000000) == "refused"
        assert filtered(program, audit_number, fcntl_number, 3, 6) == "refused"
        assert filtered(program, audit_number, fcntl_number, 3, 1) == "allowed"


def filtered(program: bytes, audit_number: int, *call: int) -> str:
    """What a filter makes of a system call: its number, then its arguments."""
    number, *arguments = call
    data = struct.pack("<IIQ6Q", number, audit_number, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = [struct.unpack_from("HBBI", program, at) for at in range(0, len(program), 8)]
    at = 0
    loaded = 0
    while True:
        operation, if_so, if_not, value = instructions[at]
        at += 1
        if operation == sandbox.RETURN:
            return "allowed" if value == sandbox.ALLOW else "refused"
        if operation == sandbox.LOAD:
            [loaded] = struct.unpack_from("<I", data, value)
            continue
        holds = {
            sandbox.JUMP_IF_EQUAL: loaded == value,
            sandbox.JUMP_IF_AT_LEAST: loaded >= value,
            sandbox.JUMP_IF_ANY_BIT: loaded & value != 0,
        }[operation]
        at += if_so if holds else if_not

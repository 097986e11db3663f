"""tools/sandbox.py: what a stranger's program can reach, and what it cannot."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import sandbox

from records import HAS_NAMESPACES


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
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


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
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


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
def test_walls_hold_without_the_audit_hook(tmp_path):
    """What a process inside can reach: no file of this test, no network, no place to write but its /tmp."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    program = tmp_path / "program.py"
    program.write_text(f"""
import json, os, socket, subprocess
def tried(act):
    try:
        act()
    except (OSError, subprocess.CalledProcessError) as error:
        return type(error).__name__
    return "done"
print(json.dumps([
    tried(lambda: open({str(secret)!r})),
    tried(lambda: open("/usr/x", "w")),
    tried(lambda: open("/tmp/x", "w")),
    tried(lambda: socket.create_connection(("127.0.0.1", 22), 1)),
    tried(lambda: os.chroot("/tmp")),
    tried(lambda: subprocess.run(["unshare", "--user", "true"], check=True, stderr=subprocess.DEVNULL)),
    tried(lambda: os.utime("/dev/null")),
    [name for _, name in socket.if_nameindex()],
    sorted(os.listdir("/")),
]))
""")
    binds = [sandbox.Bind(program, "/x/program.py")]
    inside = sandbox.Sandboxed(["/x/program.py"], binds, sandbox.Limits(), {}, stdout=subprocess.PIPE)
    out = json.loads(inside.popen.communicate()[0])
    inside.close()
    assert out[:3] == ["FileNotFoundError", "OSError", "done"]
    assert out[3:7] == ["OSError", "PermissionError", "CalledProcessError", "OSError"]
    assert out[7] == ["lo"]
    assert "x" in out[8]
    assert "home" not in out[8]
    assert not inside.root.exists()

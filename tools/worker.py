"""The process that runs a record's code while it is judged: token ids come in, logits go out, and nothing else.

tools/judge.py starts it inside tools/sandbox.py as `worker.py SCRIPT ARTIFACT CLASS` and talks to it over its standard
input and output. A message is the length of a JSON header (4 bytes), the header, and as many bytes of an array as the
header's `bytes` says. An audit hook reports what else the code tries to do. The hook is only a witness: a determined
script can get round it, and what really holds the code is the sandbox. Nor do the messages prove anything, since the
record's code runs in the same process and can write them itself; the judge believes no more of them than of the code.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import types
from pathlib import Path
from typing import IO, Any

HEADER_LENGTH = struct.Struct("<I")
MAX_HEADER_BYTES = 2**16
MAX_REQUEST_BYTES = 2**31

# The fields of a record's config that decide which windows of the text it is scored on.
SCORING_FIELDS = ("vocab_size", "bos_id", "document_masks", "eval_method", "eval_seq_len", "eval_stride")

# The events of sys.addaudithook that are refused, under the name of the check that they fail.
FORBIDDEN_EVENTS = {
    "network": ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"),
    "programs": ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    "pickle": ("pickle.find_class",),
}
# Opening any file elsewhere fails the check of this name.
FORBIDDEN_FILE = "files_read"
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/proc", "/sys", "/dev", "/etc/ld.so.cache")


def send(file: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps({**header, "bytes": len(payload)}).encode()
    file.write(HEADER_LENGTH.pack(len(text)) + text + payload)
    file.flush()


def receive(file: IO[bytes], max_bytes: int = MAX_REQUEST_BYTES) -> tuple[dict[str, Any], bytes]:
    """One message: its header and its payload.

    Raises EOFError if the other side is gone, and ValueError for a message of another form or with a larger payload.
    """
    prefix = file.read(HEADER_LENGTH.size)
    if len(prefix) < HEADER_LENGTH.size:
        raise EOFError
    (length,) = HEADER_LENGTH.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a message has a header of {length} bytes, more than {MAX_HEADER_BYTES}")

    header = json.loads(file.read(length))
    n_bytes = header.get("bytes") if isinstance(header, dict) else None
    if type(n_bytes) is not int or not 0 <= n_bytes <= max_bytes:
        raise ValueError(f"a message has no header with `bytes` from 0 to {max_bytes}")

    payload = file.read(n_bytes)
    if len(payload) < n_bytes:
        raise EOFError
    return header, payload


def readable_folders() -> tuple[str, ...]:
    """Folders, with a slash behind them, that a record may read in: those of Python, the system and temporary files.

    Libraries leave files in the temporary folder, and in the sandbox nothing else is there.
    """
    folders = {*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    if "SANDBOX" in os.environ:
        folders.add(tempfile.gettempdir())
    return tuple(folder.rstrip("/") + "/" for folder in folders if folder)


def refuse_forbidden_events(output: IO[bytes], allowed_files: tuple[str, ...]) -> None:
    """From now on, tell the judge about every forbidden event, and refuse it."""
    # Local copies, so that a script which finds this module cannot change them.
    readable = readable_folders()
    check_of_event = {event: check for check, events in FORBIDDEN_EVENTS.items() for event in events}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        check = check_of_event.get(event)
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not f"{path}/".startswith(readable) and path not in allowed_files:
                check = FORBIDDEN_FILE
        if check is not None:
            detail = f"{event} {args[0]!s:.120}" if args else event
            send(output, {"violation": check, "detail": detail})
            raise PermissionError(f"{detail} is not allowed here")

    sys.addaudithook(hook)


def load_script(path: str) -> types.ModuleType:
    module = types.ModuleType("record_script")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    # An import would also write a .pyc file beside the script.
    exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    return module


def answer(predictor: Any, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of the reply to one request, by a fixed predictor (class A) or an adaptive one (class B).

    A request with `columns` wants one column of each row of logits, or some rows of a prediction.
    """
    import torch

    ids = torch.frombuffer(bytearray(payload), dtype=torch.int64).view(header["shape"])
    if header["do"] == "observe":
        predictor.observe(ids)
        return {"shape": []}, b""

    columns = header.get("columns")
    if header["do"] == "logits":
        result = predictor(ids)
        if columns is not None:
            result = result[torch.arange(len(columns)), columns]
    else:
        result = predictor.predict(ids)
        if columns is not None:
            result = result[columns]
    values = result.detach().float().cpu().contiguous()
    return {"shape": list(values.shape)}, values.numpy().tobytes()


def main() -> int:
    script, artifact, predictor_class = sys.argv[1:]

    # Keep the two pipes of the judge for the messages. What the record prints goes to standard error.
    requests = os.fdopen(os.dup(0), "rb")
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    # Imported before the hook is set, because importing them does what the hook refuses. If one is missing, that is the
    # fault of the judge's installation.
    try:
        import numpy  # noqa: F401
        import sentencepiece  # noqa: F401
        import torch
    except Exception as error:
        send(output, {"judge_error": f"{type(error).__name__}: {error!s:.500}"})
        return 1
    # A record may compile its model, and here is no compiler.
    torch.compiler.set_stance("force_eager")

    refuse_forbidden_events(output, (os.path.abspath(script), os.path.abspath(artifact)))
    try:
        module = load_script(script)
        load = module.load_artifact if predictor_class == "A" else module.load_predictor
        # An adaptive predictor may train, which inference mode would not let it do.
        with torch.inference_mode(predictor_class == "A"):
            predictor = load(Path(artifact), "cpu")
            send(output, {"config": {name: getattr(predictor.config, name) for name in SCORING_FIELDS}})
            while True:
                try:
                    header, payload = receive(requests)
                except EOFError:
                    return 0  # the judge has no more questions
                send(output, *answer(predictor, header, payload))
    except Exception as error:
        send(output, {"error": f"{type(error).__name__}: {error!s:.500}"})
        return 1


if __name__ == "__main__":
    sys.exit(main())

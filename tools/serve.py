"""The process that a record's code runs in when it is judged: token ids come in, logits go out, and nothing else.

tools/judge.py starts it inside tools/sandbox.py as `serve.py SCRIPT ARTIFACT CLASS` and speaks through its standard
input and output: a length (4 bytes), a JSON header of that length, and `bytes` bytes of an array. An audit hook tells
the judge by name what the code tries besides; it is a witness, the walls are those of the sandbox.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import types
from pathlib import Path
from typing import IO, Any

LENGTH = struct.Struct("<I")
JUDGED = ("vocab_size", "bos_id", "document_masks", "eval_method", "eval_seq_len", "eval_stride")  # of the config
EVENTS = {  # of sys.addaudithook, by the name under which the judge reports them
    "network": ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"),
    "programs": ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    "pickle": ("pickle.find_class",),
}
READABLE = ("/usr", "/lib", "/proc", "/sys", "/dev", "/etc/ld.so", sys.prefix, sys.base_prefix)


def send(file: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps({**header, "bytes": len(payload)}).encode()
    file.write(LENGTH.pack(len(text)) + text + payload)
    file.flush()


def receive(file: IO[bytes], most: int = 2**31) -> tuple[dict[str, Any], bytes]:
    """One message; EOFError if the other side is gone, ValueError for what is none or has over `most` bytes."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    header = json.loads(file.read(length)) if length <= 2**16 else None
    if not isinstance(header, dict) or type(header.get("bytes")) is not int or not 0 <= header["bytes"] <= most:
        raise ValueError("a message that is none")
    payload = file.read(header["bytes"])
    if len(payload) < header["bytes"]:
        raise EOFError
    return header, payload


def watch(out: IO[bytes], own_files: tuple[str, ...]) -> None:
    """From now on, tell the judge of forbidden events, and refuse them."""
    readable = READABLE  # and `names`: out of the reach of a script that looks for them in this module
    names = {event: name for name, events in EVENTS.items() for event in events}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        name = names.get(event, "")
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            name = "" if path.startswith(readable) or path in own_files else "files_read"
        if name:
            detail = f"{event} {args[0]!s:.120}" if args else event
            send(out, {"violation": name, "detail": detail})
            raise PermissionError(f"{detail} is not allowed here")

    sys.addaudithook(hook)


def load_script(path: str) -> types.ModuleType:
    module = types.ModuleType("record_script")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look it up there
    exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)  # leaves no .pyc
    return module


def answer(judged: Any, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """What a fixed predictor (A) or an adaptive one (B) says to one request."""
    import torch

    ids = torch.frombuffer(bytearray(payload), dtype=torch.int64).view(header["shape"])
    if header["do"] == "observe":
        judged.observe(ids)
        return {"shape": []}, b""
    result = judged(ids) if header["do"] == "logits" else judged.predict(ids)
    values = result.detach().float().cpu().contiguous()
    return {"shape": list(values.shape)}, values.numpy().tobytes()


def main() -> int:
    script, artifact, predictor_class = sys.argv[1:]
    requests, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of the record go to its standard error
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import numpy  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch

    watch(out, (os.path.abspath(script), os.path.abspath(artifact)))
    try:
        module = load_script(script)
        load = module.load_artifact if predictor_class == "A" else module.load_predictor
        with torch.inference_mode(predictor_class == "A"):
            judged = load(Path(artifact), "cpu")
            send(out, {"config": {name: getattr(judged.config, name) for name in JUDGED}})
            while True:
                try:
                    header, payload = receive(requests)
                except EOFError:
                    return 0
                send(out, *answer(judged, header, payload))
    except Exception as error:
        send(out, {"error": f"{type(error).__name__}: {error!s:.500}"})
        return 1


if __name__ == "__main__":
    sys.exit(main())

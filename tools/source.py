"""Whether people can read all that a record's script does, as far as its text tells. tools/verify.py shows the result.

This is a help to readers, who would otherwise look for the code that is not on the page: text that is run as code, data
in comments and literals, modules that talk to a network. A determined author gets round it. What holds the script is
the sandbox, and all its bytes count, comments too.
"""

from __future__ import annotations

import ast
import codecs
import functools
import io
import re
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

# Importing one of these fails the check `no_network`.
NETWORK_MODULES = {
    *("aiohttp", "asyncio", "datasets", "ftplib", "http", "httpx", "huggingface_hub", "imaplib", "poplib", "requests"),
    *("smtplib", "socket", "socketserver", "ssl", "urllib", "xmlrpc"),
}
# Packages that TRACK sends numbers of a run to. They could also fetch something, so a script may use no more of them.
TRACKERS = {
    "trackio": {"init", "log", "finish"},
    "wandb": {"init", "log", "finish", "login", "Settings"},
}
# Packages beyond the standard library that count no bytes.
PACKAGES = {
    *("brotli", "einops", "flash_attn", "flash_attn_interface", "numba", "numpy", "psutil", "safetensors", "scipy"),
    *("sentencepiece", "tiktoken", "torch", "torchao", "tqdm", "triton", "typing_extensions", "xxhash", "zstandard"),
}
# Modules of the standard library that scripts use. Those that build or load code are missing here.
MODULES = {
    *("__future__", "abc", "argparse", "array", "ast", "atexit", "base64", "bisect", "bz2", "cmath", "codecs"),
    *("collections", "concurrent", "contextlib", "contextvars", "copy", "cProfile", "csv", "ctypes", "dataclasses"),
    *("datetime", "decimal", "difflib", "enum"),
    *(
        "errno",
        "faulthandler",
        "fcntl",
        "fractions",
        "functools",
        "gc",
        "getpass",
        "glob",
        "gzip",
        "hashlib",
        "heapq",
        "html",
    ),
    *("importlib", "inspect", "io", "itertools", "json", "linecache", "locale", "logging", "lzma", "math", "mmap"),
    *(
        "multiprocessing",
        "numbers",
        "operator",
        "os",
        "pathlib",
        "pickle",
        "platform",
        "pprint",
        "pstats",
        "queue",
        "random",
    ),
    *("re", "resource", "secrets", "select", "shlex", "shutil", "signal", "stat", "statistics", "string", "struct"),
    *("subprocess", "sys", "sysconfig", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback"),
    *("tarfile", "types", "typing", "unicodedata", "unittest", "uuid", "warnings", "weakref", "zipfile", "zlib"),
}

# Builtins that run text as code. Attributes of these names, as in torch.compile, are something else.
CODE_BUILTINS = {"exec", "eval", "compile", "__import__"}
# Other ways to code that is not on the page, wherever these names stand.
CODE_NAMES = {
    *(
        "__builtins__",
        "builtins",
        "__code__",
        "__globals__",
        "__loader__",
        "__subclasses__",
        "CodeType",
        "FunctionType",
    ),
    *("spec_from_file_location", "spec_from_loader", "module_from_spec", "exec_module", "load_module", "run_path"),
    *("run_module", "SourceFileLoader", "SourcelessFileLoader", "zipimporter", "cpp_extension", "InteractiveConsole"),
}
UNPICKLING = {"load", "loads", "Unpickler"}  # of pickle

MAX_BYTES = 400_000
MAX_WORDS = 100_000  # names, numbers and signs; the parser needs about 1 kB of memory for each
MAX_LINE = 300  # characters
MAX_LITERAL = 1_500
MAX_DOCSTRING = 4_000
MAX_ALL_LITERALS = 40_000
MAX_NUMBERS = 5_000
MAX_ELEMENTS = 500  # of a list that is written out
MAX_NAME = 60  # characters
MAX_TRAILING_BLANKS = 200

# So many characters of words can be compressed to about half, coded data cannot. Fewer say nothing.
MIN_CHARACTERS = 4_000
MAX_RATIO = 0.57
MAX_DIGITS = 0.4  # of the characters


class SourceFaults(NamedTuple):
    """What is wrong with a script, each fault a sentence that begins with its line."""

    unreadable: tuple[str, ...]
    network: tuple[str, ...]


@functools.lru_cache(maxsize=16)  # the leaderboard and the tests ask again and again
def find_faults(data: bytes) -> SourceFaults:
    """Everything that is wrong with a script. ValueError if it cannot be read as Python, or is too long to be read."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, and at most {MAX_BYTES} can be read")
    source = data.decode("utf-8-sig")
    coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    if codecs.lookup(coding.removesuffix("-sig")).name != "utf-8":
        raise ValueError(f"it declares the coding {coding!r}, in which a comment may be code: use UTF-8")
    n_words = sum(1 for _ in re.finditer(r"\w+|[^\w\s]", source))
    if n_words > MAX_WORDS:
        raise ValueError(f"it has {n_words} words and signs, and at most {MAX_WORDS} can be read")
    with warnings.catch_warnings(action="ignore"):
        nodes = list(ast.walk(ast.parse(data)))

    found = [
        *import_faults(nodes),
        *code_faults(nodes),
        *literal_faults(nodes),
        *number_faults(nodes),
        *name_faults(nodes),
        *line_faults(source),
        *density_faults(nodes, source),
    ]
    network = [f"line {line} imports {module}" for line, module in imports_of(nodes) if module in NETWORK_MODULES]
    network += [f"line {line} {fault}" for line, fault in tracker_faults(nodes)]
    return SourceFaults(tuple(f"line {line} {fault}" for line, fault in found), tuple(network))


def imports_of(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every import, also of importlib.import_module with a literal name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 and node.module else "a module of its own"
            yield node.lineno, module.split(".")[0]
        elif isinstance(node, ast.Call) and called_name(node) == "import_module":
            first = node.args[0] if node.args else None
            is_literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            yield node.lineno, first.value.split(".")[0] if is_literal else "a module that it computes"  # type: ignore[union-attr]


def called_name(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def import_faults(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for line, module in imports_of(nodes):
        if module not in PACKAGES | MODULES | NETWORK_MODULES | TRACKERS.keys():
            yield line, f"imports {module}, which scripts may not import (the list is in tools/source.py)"


def tracker_faults(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Uses of a tracker other than `import wandb` and then wandb.log and the like, by these names."""
    plain_imports = set()
    plain_uses = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            plain_imports |= {(node.lineno, alias.name) for alias in node.names if alias.asname is None}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value
            if node.attr in TRACKERS.get(name.id, ()):
                plain_uses.add(id(name))

    for line, module in imports_of(nodes):
        if module in TRACKERS and (line, module) not in plain_imports:
            yield line, f"imports {module} in another way than import {module}"
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in TRACKERS and id(node) not in plain_uses:
            yield node.lineno, f"uses {node.id} other than as {node.id}.{' or .'.join(sorted(TRACKERS[node.id]))}"


def code_faults(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Uses of what runs text, or data, as code."""
    from_torch = set()  # names such as compile that mean something else here
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            from_torch |= {alias.name for alias in node.names if alias.asname is None}

    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id in (CODE_BUILTINS | CODE_NAMES) - from_torch:
                yield node.lineno, f"uses {node.id}, which runs text as code"
        elif isinstance(node, ast.Attribute):
            if node.attr in CODE_NAMES | {"__import__"}:
                yield node.lineno, f"uses {node.attr}, which leads to code that is not on the page"
            elif isinstance(node.value, ast.Name) and node.value.id == "pickle" and node.attr in UNPICKLING:
                yield node.lineno, f"uses pickle.{node.attr}, which runs what it reads"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in CODE_NAMES or (node.module == "pickle" and alias.name in UNPICKLING):
                    yield node.lineno, f"imports {alias.name}, which leads to code that is not on the page"
        elif isinstance(node, ast.Call) and called_name(node) in ("getattr", "attrgetter", "methodcaller"):
            yield from hidden_names(node.lineno, node.args, is_about_torch=is_of_torch(node.args[:1]))
        elif isinstance(node, ast.Subscript) and is_namespace(node.value):
            yield from hidden_names(node.lineno, [node.slice], is_about_torch=False)


def hidden_names(line: int, nodes: list[ast.expr], is_about_torch: bool) -> Iterator[tuple[int, str]]:
    """Names of code that are written as texts, as in getattr(module, "exec")."""
    names = CODE_BUILTINS | CODE_NAMES
    if is_about_torch:
        names -= {"compile"}
    for node in nodes:
        if isinstance(node, ast.Constant) and node.value in names:
            yield line, f"reaches {node.value} by its name in a text"


def is_of_torch(nodes: list[ast.expr]) -> bool:
    """Whether the first node is torch, or a part of it."""
    node = nodes[0] if nodes else None
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "torch"


def is_namespace(node: ast.expr) -> bool:
    """Whether an expression is a dictionary of a module's names: globals(), vars(...), sys.modules, or a __dict__."""
    if isinstance(node, ast.Call):
        return called_name(node) in ("globals", "locals", "vars")
    return isinstance(node, ast.Attribute) and node.attr in ("__dict__", "modules")


def literal_faults(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Texts and bytes that are too long to be words."""
    docstrings = docstring_nodes(nodes)
    total = 0
    for node in nodes:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, bytes)):
            continue
        size = len(node.value)
        is_docstring = id(node) in docstrings
        if not is_docstring:
            total += size
        if size > (MAX_DOCSTRING if is_docstring else MAX_LITERAL):
            yield node.lineno, f"has a literal of {size} characters: data belong in the artifact"
    if total > MAX_ALL_LITERALS:
        yield 1, f"and others have literals of {total} characters in all: data belong in the artifact"


def docstring_nodes(nodes: list[ast.AST]) -> set[int]:
    """Docstrings, and other texts that are no part of an expression, by identity."""
    return {id(node.value) for node in nodes if isinstance(node, ast.Expr)}


def number_faults(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Tables of numbers."""
    n_numbers = 0
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, complex)):
            n_numbers += 1
            if isinstance(node.value, int) and abs(node.value) > 2**64:
                yield node.lineno, "has a number of more than 64 bits: data belong in the artifact"
        elif isinstance(node, (ast.List, ast.Tuple, ast.Set)) and len(node.elts) > MAX_ELEMENTS:
            yield node.lineno, f"writes out a list of {len(node.elts)} elements: data belong in the artifact"
    if n_numbers > MAX_NUMBERS:
        yield 1, f"and others have {n_numbers} numbers in all: data belong in the artifact"


def name_faults(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Names that are data, or that look like other names."""
    for node in nodes:
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str) and (len(name) > MAX_NAME or not name.isascii()):
                line = getattr(node, "lineno", 1)
                yield line, f"has the name {name[:40]!a}: use letters of ASCII, at most {MAX_NAME}"


def line_faults(source: str) -> Iterator[tuple[int, str]]:
    """Lines that nobody reads to their end."""
    trailing = 0
    for number, line in enumerate(source.split("\n"), 1):
        trailing += len(line) - len(line.rstrip())
        if len(line) > MAX_LINE:
            yield number, f"has more than {MAX_LINE} characters"
    if trailing > MAX_TRAILING_BLANKS + source.count("\r\n"):
        yield 1, f"and others end with {trailing} blanks that nobody sees: remove them"


def density_faults(nodes: list[ast.AST], source: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and literals that are coded data: they hardly compress."""
    docstrings = docstring_nodes(nodes)
    # A sign of a comment inside a literal counts as one, which does no harm here.
    parts: dict[str, list[str]] = {"comments": re.findall("#.*", source), "docstrings": [], "literals": []}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            parts["docstrings" if id(node) in docstrings else "literals"].append(str(node.value))

    for name, texts in parts.items():
        text = "\n".join(texts)
        for begin in range(0, len(text) - MIN_CHARACTERS + 1, MIN_CHARACTERS):
            part = text[begin : begin + MIN_CHARACTERS].encode(errors="replace")
            ratio = len(zlib.compress(part, 9)) / len(part)
            digits = sum(part.count(b"%d" % digit) for digit in range(10)) / len(part)
            if ratio > MAX_RATIO or digits > MAX_DIGITS:
                yield 1, f"and others have {name} that look like data: {len(part)} characters compress to {ratio:.0%}"
                break

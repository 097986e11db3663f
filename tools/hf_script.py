"""The model of a train_gpt.py as a file of its own: its lines, without those that only training needs.

    from hf_script import model_source

    text = model_source(script.read_text(), ["GPT", "GPTConfig", "Cache"])

Nothing is written anew. A definition is taken over with the comment above it if the named ones need it, directly or
through others; imports are taken over as far as they are used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence


def model_source(source: str, roots: Sequence[str]) -> str:
    """The lines of a script that define `roots`, in their order.

    Raises ValueError for a name that the script does not define at its top level.
    """
    statements = ast.parse(source).body
    definitions = dict[str, list[ast.stmt]]()
    for statement in statements:
        for name in names_defined_by(statement):
            definitions.setdefault(name, []).append(statement)
    for root in roots:
        if root not in definitions:
            raise ValueError(
                f"the script does not define {root} at its top level, so that its model cannot be exported"
            )

    needed = set[ast.stmt]()
    names = list(roots)
    seen = set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for statement in definitions.get(name, []):
            needed.add(statement)
            if not is_import(statement):
                names += names_used_by(statement)

    kept = [statement for statement in statements if statement in needed and not is_import(statement)]
    # An annotation is never evaluated, but whoever reads it wants to know where its names come from.
    mentioned = {node.id for statement in kept for node in ast.walk(statement) if isinstance(node, ast.Name)}
    imports = [line for statement in statements for line in import_lines(statement, mentioned)]
    return "\n".join(imports) + "\n\n\n" + joined(source, kept) + "\n"


def is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def names_defined_by(statement: ast.stmt | ast.ExceptHandler) -> Iterator[str]:
    """What a statement at the top level makes known, inside an `if` or `try` too."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        for alias in statement.names:
            yield alias.asname or alias.name.split(".")[0]
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
    elif isinstance(statement, ast.AnnAssign):
        yield from (node.id for node in ast.walk(statement.target) if isinstance(node, ast.Name))
    else:
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, (ast.stmt, ast.ExceptHandler)):
                yield from names_defined_by(child)


def names_used_by(statement: ast.stmt) -> Iterator[str]:
    """The names that are looked up when a statement runs, or what it defines.

    Annotations of arguments are left out. With `from __future__ import annotations` they are never evaluated, and they
    may name what belongs to training.
    """
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        for field, value in ast.iter_fields(node):
            if field == "returns" or (field == "annotation" and isinstance(node, ast.arg)):
                continue
            children = value if isinstance(value, list) else [value]
            todo += [child for child in children if isinstance(child, ast.AST)]


def import_lines(statement: ast.stmt, names: Iterable[str]) -> Iterator[str]:
    """The import statement for those of these names that it makes known."""
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        yield ast.unparse(statement)
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        used = [alias for alias in statement.names if (alias.asname or alias.name.split(".")[0]) in names]
        if used:
            statement.names = used
            yield ast.unparse(statement)


def joined(source: str, statements: Sequence[ast.stmt]) -> str:
    """The lines of each statement, with its decorators and with the comment that stands right above it."""
    lines = source.splitlines()
    text = ""
    was_block = True
    for statement in statements:
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1

        is_block = isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        if text:
            text += "\n\n\n" if is_block or was_block else "\n"
        text += "\n".join(lines[first : statement.end_lineno])
        was_block = is_block
    return text

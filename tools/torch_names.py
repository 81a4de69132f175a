"""Names of torch and Triton that `qdora` uses, held against lists of what their oldest releases have.

    python -m tools.torch_names             print the names that a list lacks; exit code 1 if there are any
    python -m tools.torch_names --record    write the lists anew, where torch 2.11, Triton 3.6 is installed

Taken from the syntax tree of each file, which is not imported:

- dotted names, private ones too, through imports, their aliases and module-level assignments; an alias means
  the same in all of its file;
- keywords of calls of such names, where the running release tells the callable's parameters: not of functions
  in C++ (`torch.empty`), nor of those that take any keyword;
- attributes of anything else (`x.addmm_`), in files that import the package.  The type of `x` is not known:
  such a name must be known where the running release has it in its tensor or in a class that `qdora` names,
  and some such class of the old release had it.  Names that `qdora` defines itself are left out.

Not seen: names in strings (`getattr`, by which code asks for what only newer releases have), keywords of
methods, attributes that objects get in `__init__`, operators that other packages register, other behaviour.

A list has all public names of the public modules that are used, so that most new uses need no new list.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
ATTRIBUTES = "."
"""Owner of the names of attributes whose class is not known."""
ANY = "*"
"""In place of parameters that cannot be looked up."""
OTHERS = ("torch.ops.qdora", "torch.ops.bitsandbytes")
"""What torch has only once another package has registered it."""

Names = dict[str, set[str]]
"""Names by their owner: a module, a class, `CALLABLE()` for its parameters, `ATTRIBUTES`."""


@dataclass(frozen=True)
class Package:
    """A dependency, the oldest release that is supported, and its tensor class."""

    name: str
    oldest: str
    tensor: str

    @property
    def path(self) -> Path:
        """The list."""
        return ROOT / "tests" / "unit" / f"{self.name}-{self.oldest}.txt"


PACKAGES = {
    "torch": Package("torch", "2.11", "torch.Tensor"),
    "triton": Package("triton", "3.6", "triton.language.tensor"),
}


@dataclass(frozen=True, order=True)
class Use:
    """A name where it is used."""

    file: str
    line: int
    owner: str
    name: str

    def __str__(self) -> str:
        keyword = self.owner.endswith("()")
        dotted = f"{self.owner[:-1]}{self.name}=)" if keyword else f"{self.owner.rstrip('.')}.{self.name}"
        return f"{self.file}:{self.line}: {dotted}"


class _Reader(ast.NodeVisitor):
    """The uses of a package in one file."""

    def __init__(self, package: str, file: str, tree: ast.Module) -> None:
        self.package, self.file = package, file
        self.aliases: dict[str, str] = {}
        self.uses: list[Use] = []
        self.calls: list[Use] = []
        self.attributes: list[Use] = []
        self.own: set[str] = set()
        # All imports first: a function may stand above the one that it needs.
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._read_import(node)
        for statement in tree.body:
            if isinstance(statement, ast.Assign):
                self._read_assignment(statement)
        if self.aliases:
            self.visit(tree)

    def _use(self, node: ast.AST, dotted: str) -> None:
        if dotted != self.package and not dotted.startswith(OTHERS):
            owner, _, name = dotted.rpartition(".")
            self.uses.append(Use(self.file, node.lineno, owner, name))  # type: ignore[attr-defined]

    def _read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        of = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            dotted = of + alias.name
            if dotted.split(".")[0] == self.package and not getattr(node, "level", 0):
                self._use(node, dotted)
                # `import torch.distributed` binds `torch`.
                name = alias.asname or alias.name
                self.aliases[name.split(".")[0]] = dotted if of or alias.asname else self.package

    def _read_assignment(self, node: ast.Assign) -> None:
        (target, *_), value = node.targets, node.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for name, of in pairs:
            if isinstance(name, ast.Name) and (dotted := self._dotted(of)):
                self.aliases[name.id] = dotted

    def _dotted(self, node: ast.AST) -> str | None:
        """The full name of `a.b.c` where `a` is the package or of it."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._dotted(node.value)
            return owner and f"{owner}.{node.attr}"
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := self._dotted(node):
            self._use(node, dotted)
            return
        if isinstance(node.ctx, ast.Store):
            self.own.add(node.attr)
        self.attributes.append(Use(self.file, node.lineno, ATTRIBUTES, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if (dotted := self._dotted(node.func)) and not dotted.startswith(OTHERS):
            for keyword in node.keywords:
                if keyword.arg:
                    self.calls.append(Use(self.file, keyword.value.lineno, f"{dotted}()", keyword.arg))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                self.own.add(item.name)
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            self.own |= {target.id for target in targets if isinstance(target, ast.Name)}
        self.generic_visit(node)


def find(dotted: str) -> Any:
    """What a dotted name stands for in the running release.

    Raises: AttributeError: nothing.
    """
    path, *rest = dotted.split(".")
    found = importlib.import_module(path)
    for part in rest:
        owner, path = path, f"{path}.{part}"
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(path)
        except ImportError:
            # A function may hide a module of its name: torch.distributed.rendezvous.
            found = getattr(sys.modules.get(owner), part)
    return found


def parameters(dotted: str) -> set[str]:
    """Names of a callable's parameters; `ANY` where it takes others too, or does not tell."""
    try:
        of = inspect.signature(find(dotted)).parameters.values()
    except (TypeError, ValueError):
        return {ANY}
    return {ANY if p.kind is p.VAR_KEYWORD else p.name for p in of}


def collect(package: Package, files: Iterable[Path]) -> list[Use]:
    """All uses in files, as far as they can be told; attributes by the running release."""
    readers = [
        _Reader(package.name, str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file), tree)
        for file in files
        for tree in [ast.parse(file.read_text(encoding="utf-8"))]
    ]
    uses = [use for reader in readers for use in reader.uses]
    own = {name for reader in readers for name in reader.own}
    known = set().union(*(dir(of_torch) for of_torch in _classes(package, uses))) - own
    attributes = [use for reader in readers for use in reader.attributes if use.name in known]
    calls = [use for reader in readers for use in reader.calls if _tells(use.owner)]
    return sorted({*uses, *attributes, *calls})


def _tells(callable_: str) -> bool:
    try:
        return ANY not in parameters(callable_[:-2])
    except AttributeError:
        return False  # its name is reported


def _classes(package: Package, uses: Iterable[Use]) -> Iterator[type]:
    dotted_uses = {f"{use.owner}.{use.name}" for use in uses if use.owner[-1] not in ".)"}
    for dotted in sorted({package.tensor, *dotted_uses}):
        try:
            found = find(dotted)
        except AttributeError:
            continue
        if isinstance(found, type):
            yield found


def record(package: Package, files: Iterable[Path]) -> Names:
    """What the running release has of the names that are used, and the public names beside them."""
    names: Names = defaultdict(set)
    uses = collect(package, files)
    for use in uses:
        if use.owner.endswith("()"):
            names[use.owner] |= parameters(use.owner[:-2])
            continue
        if use.owner == ATTRIBUTES:
            names[ATTRIBUTES].add(use.name)
            continue
        try:
            find(f"{use.owner}.{use.name}")
        except AttributeError:
            continue
        names[use.owner].add(use.name)
        if isinstance(found := find(use.owner), ModuleType) and "._" not in use.owner:
            names[use.owner] |= _public(found)
    for of_torch in _classes(package, uses):
        names[ATTRIBUTES] |= _public(of_torch)
    return dict(names)


def _public(owner: object) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_")}


def write(names: Names, path: Path, heading: str) -> None:
    """Write a list: a paragraph for each owner."""
    paragraphs = [
        textwrap.fill(
            f"{owner}: {' '.join(sorted(of))}",
            110,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for owner, of in sorted(names.items())
    ]
    path.write_text("\n".join([f"# {heading}", *paragraphs, ""]), encoding="utf-8")


def read(path: Path) -> Names:
    """Read a list that `write` wrote."""
    text = path.read_text(encoding="utf-8").split("\n", 1)[1].replace("\n    ", " ")
    pairs = (line.split(": ") for line in text.splitlines())
    return {owner: set(of.split()) for owner, of in pairs}


def missing(package: Package, files: Iterable[Path], names: Names) -> list[Use]:
    """The uses that a list does not have."""
    return [
        use
        for use in collect(package, files)
        if not {use.name, ANY if use.owner.endswith("()") else use.name} & names.get(use.owner, set())
    ]


def source_files() -> list[Path]:
    """The package's files."""
    return sorted((ROOT / "qdora").rglob("*.py"))


def release(package: Package) -> str | None:
    """The installed release, None where there is none."""
    try:
        return version(package.name)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Check, or record; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the lists anew")
    to_record = parser.parse_args().record
    code = 0
    for package in PACKAGES.values():
        running = release(package)
        if to_record and running is not None and running.startswith(f"{package.oldest}."):
            write(record(package, source_files()), package.path, f"{package.name} {running.split('+')[0]}")
            print(f"{package.path}: written with {package.name} {running}")
        elif to_record or running is None:
            print(f"{package.name}: needs {package.oldest}, installed is {running or 'none'}: left as it is")
            code |= to_record
        else:
            lacking = missing(package, source_files(), read(package.path))
            for use in lacking:
                print(f"{use}: not in {package.path.name}")
            code |= bool(lacking)
    return code


if __name__ == "__main__":
    sys.exit(main())

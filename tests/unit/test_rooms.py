"""The rooms of the package: imports point down only, heavy libraries stay where they belong, nothing is a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import treepo_swift

FLOORS = [
    {'config', 'compat'},
    {'core'},
    {'wire'},
    {'advantage', 'server'},
    {'trainer'},
    {'plugin'},
    {'plugin_file'},
    {'lab', 'view'},
    {'cli'},
]
"""From the ground up. A room imports from itself and from the floors below."""
REFUSED_BELOW = {'trainer': {'server'}}
DOORS = {('trainer.rollout', 'server')}
"""Of the trainer only `rollout` knows the server: in colocate mode it grows trees in the trainer's process."""

HEAVY = {'torch', 'vllm', 'swift', 'transformers'}
REFUSED_LIBRARIES = {'config': HEAVY, 'core': HEAVY | {'asyncio'}, 'wire': HEAVY, 'advantage': HEAVY}
MAY_NAME_TYPES = {'wire'}
"""It packs swift's outputs and names their type: under TYPE_CHECKING, so it loads nothing. Imports of our own count
there as everywhere: a room that is written in terms of a room above can't be read without it."""


class Import(NamedTuple):
    module: str
    """Who imports, without the package's name: ``server.scheduler``, or '' for the package itself."""
    target: str
    """What is imported: a module of ours likewise, else as it stands."""
    ours: bool
    typing: bool
    """Whether it is under TYPE_CHECKING."""
    place: str


def room(module: str) -> str:
    return module.partition('.')[0]


def imports(root: Path) -> Iterator[Import]:
    """Every import of every module, at any level of its file."""
    files = {'.'.join(path.relative_to(root).with_suffix('').parts): path for path in sorted(root.rglob('*.py'))}
    files = {name.removesuffix('__init__').removesuffix('.'): path for name, path in files.items()}
    for module, path in files.items():
        tree = ast.parse(path.read_text())
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and 'TYPE_CHECKING' in ast.unparse(n.test)]
        typing = {id(node) for block in blocks for line in block.body for node in ast.walk(line)}
        package = [root.name, *module.split('.')] if module else [root.name]
        if path.name != '__init__.py':
            package.pop()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                start = '.'.join([*base, *(node.module or '').split('.')]).strip('.')
                # `from package import name`: a module, or something that is defined in the package.
                targets = [f'{start}.{name.name}' for name in node.names]
                inside = [target.removeprefix(f'{root.name}.') in files for target in targets]
                version = [target == f'{root.name}.__version__' for target in targets]
                targets = [t if i or v else start for t, i, v in zip(targets, inside, version, strict=True)]
            else:
                continue
            for target in dict.fromkeys(targets):
                ours = room(target) == root.name
                name = target.removeprefix(root.name).removeprefix('.') if ours else target
                place = f'{path.relative_to(root.parent)}:{node.lineno}'
                yield Import(module, name, ours, id(node) in typing, place)


def breaches(root: Path) -> list[str]:
    """What breaks a rule, each with its place."""
    floor_of = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    found, graph = [], {}
    for line in imports(root):
        here, there = room(line.module), room(line.target)
        if not line.module or line.target == '__version__':
            continue  # The package itself offers names from all rooms.
        if here not in floor_of:
            found.append(f'{line.place}: room {here!r} has no floor in tests/unit/test_rooms.py')
        elif not line.ours:
            if there in REFUSED_LIBRARIES.get(here, ()) and not (line.typing and here in MAY_NAME_TYPES):
                found.append(f'{line.place}: {here} imports {line.target}, and must do without {there}')
        elif not line.target:
            found.append(f'{line.place}: {here} imports from {root.name} itself; name the module')
        else:
            graph.setdefault(line.module, {})[line.target] = line.place
            below = floor_of.get(there, len(FLOORS)) < floor_of[here]
            refused = there in REFUSED_BELOW.get(here, ()) and (line.module, there) not in DOORS
            if here != there and (not below or refused):
                found.append(f'{line.place}: {here} imports {line.target}, and must not know {there}')
    return found + list(circles(graph))


def circles(graph: dict[str, dict[str, str]]) -> Iterator[str]:
    """One line for every import that closes a circle of modules, found depth first."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> Iterator[str]:
        for target, place in graph.get(module, {}).items():
            if target in path:
                yield f'{place}: a circle of imports: {" -> ".join([*path[path.index(target) :], target])}'
            elif target not in done:
                yield from visit(target, [*path, target])
        done.add(module)

    for module in graph:
        if module not in done:
            yield from visit(module, [module])


def test_imports_point_down_only():
    found = breaches(Path(treepo_swift.__file__).parent)
    assert not found, '\n'.join(['These imports break the order of the rooms:', *found])


@pytest.mark.parametrize(
    'file, line, message',
    [
        ('config.py', 'from treepo_swift.core.tree import Node', 'config.py:1: config imports core.tree, and must'),
        (
            'config/sections.py',
            'from ..core import tree',
            'sections.py:1: config imports core.tree, and must not know core',
        ),
        ('core/search.py', 'def f():\n    import asyncio', 'search.py:2: core imports asyncio, and must do without'),
        (
            'core/search.py',
            'if TYPE_CHECKING:\n    import torch.nn',
            'core imports torch.nn, and must do without torch',
        ),
        ('advantage/x.py', 'from swift.utils import f', 'advantage imports swift.utils, and must do without swift'),
        ('wire/packing.py', 'from vllm import LLM', 'wire imports vllm, and must do without vllm'),
        ('wire/note.py', 'from ..server.engine import Engine', 'wire imports server.engine, and must not know server'),
        ('server/x.py', 'from treepo_swift.advantage import estimate', 'server imports advantage, and must not know'),
        (
            'server/x.py',
            'if TYPE_CHECKING:\n    from treepo_swift.trainer import trainer',
            'server imports trainer.trainer',
        ),
        ('trainer/trainer.py', 'from treepo_swift.server import engine', 'trainer imports server.engine, and must not'),
        ('lab/x.py', 'import treepo_swift.cli.main', 'lab imports cli.main, and must not know cli'),
        ('core/x.py', 'from treepo_swift import TreeConfig', 'core imports from treepo_swift itself; name the module'),
        ('attic/x.py', 'import os', "room 'attic' has no floor"),
        ('core/tree.py', 'from .search import x', 'a circle of imports: core.tree -> core.search -> core.tree'),
        ('core/tree.py', 'from treepo_swift.core import tree', 'a circle of imports: core.tree -> core.tree'),
    ],
)
def test_each_rule_can_be_broken(tmp_path, file, line, message):
    root = house(tmp_path)
    assert breaches(root) == []
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    found = breaches(root)
    assert len(found) == 1 and message in found[0], found


def house(folder: Path) -> Path:
    """A package in which everything is as it may be."""
    root = folder / 'treepo_swift'
    for file, text in {
        '__init__.py': 'def __getattr__(name): from .server.scheduler import x',
        'core/__init__.py': '',
        'core/tree.py': 'from treepo_swift import __version__',
        'core/search.py': 'from treepo_swift.config import x\nfrom . import tree\nfrom .tree import y',
        'wire/packing.py': 'import typing\nif typing.TYPE_CHECKING:\n    from swift.infer_engine import x',
        'advantage/__init__.py': 'from .registry import x',
        'advantage/registry.py': 'from treepo_swift.core.tree import x\nimport numpy',
        'server/engine.py': 'import torch, asyncio\nfrom treepo_swift.wire import packing',
        'trainer/rollout.py': 'from treepo_swift.server.engine import x',
        'trainer/trainer.py': 'from .rollout import x\nfrom treepo_swift.advantage import y',
        'plugin.py': 'from .trainer.trainer import x',
        'lab/bench.py': 'from treepo_swift.server.engine import x',
        'cli/main.py': 'from treepo_swift.lab import bench',
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root

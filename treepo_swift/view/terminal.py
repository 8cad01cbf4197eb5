"""Trees in a terminal, by rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treepo_swift.core.inert import one_line
from treepo_swift.wire.record import NodeRecord, TrajectoryRecord, TreeRecord

PREVIEW = 60
"""Characters of a node's text."""
GLYPHS = {'answer': ('✓', 'green'), 'failed': ('✕', 'red'), 'absent': ('✕', 'red'), 'repetition': ('↻', 'yellow')}


def print_trees(records: Sequence[TreeRecord], console: Any = None) -> None:
    """Print each tree; `console` is rich's, for tests."""
    from rich.console import Console

    console = console or Console()
    for record in records:
        console.print(rendered(record))


def rendered(record: TreeRecord) -> Any:
    """A `rich.tree.Tree`: a line a segment, with its tokens, its subgroup's mean reward, and how it ended."""
    from rich.text import Text
    from rich.tree import Tree

    decoded = sum(len(node.tokens) for node in record.nodes if node.kind == 'segment')
    title = Text.assemble(
        (f'step {record.step} ', 'bold'),
        (f'{record.tree}  ', 'dim'),
        f'{len(record.trajectories)} answers, mean reward {_number(record.value)}, {decoded} tokens decoded\n',
        (one_line(record.prompt[-200:]), 'italic'),
    )
    top = Tree(title)
    branches: dict[int, Any] = {0: top}
    ends: dict[int, list[tuple[int, TrajectoryRecord]]] = {}
    for number, trajectory in enumerate(record.trajectories, 1):
        ends.setdefault(trajectory.leaf, []).append((number, trajectory))
    begins = {t.fallback_at: t.fallback_from for t in record.trajectories if t.fallback_at is not None}
    for node in record.nodes:
        branches[node.id] = branches[node.parent].add(_line(node, begins))
        for number, trajectory in ends.get(node.id, ()):
            branches[node.id].add(_end(number, trajectory))
    for number, trajectory in ends.get(0, ()):
        top.add(_end(number, trajectory))
    return top


def _line(node: NodeRecord, begins: dict[int, int | None]) -> Any:
    from rich.text import Text

    text = one_line(node.text if len(node.text) <= PREVIEW else f'{node.text[:PREVIEW]}…')
    line = Text(f'[{node.id}] {len(node.tokens)} tokens ')
    if node.kind == 'environment':
        line.append(text, 'dim italic')
        return line
    if node.size > 1:
        line.append(f'x{node.size} ', 'cyan')
    if node.value is not None:
        line.append(f'{_number(node.value)} ', 'green' if node.value > 0 else 'red')
    if node.id in begins:
        origin = begins[node.id]
        line.append('◆ fallback ' if origin in (None, -1) else f'◆ fallback from #{origin + 1} ', 'magenta')
    line.append(text, 'dim')
    return line


def _end(number: int, trajectory: TrajectoryRecord) -> Any:
    from rich.text import Text

    glyph, style = GLYPHS.get(trajectory.stop, ('▲' if trajectory.stop.endswith('limit') else '■', 'yellow'))
    line = Text(f'{glyph} ', style)
    line.append(f'#{number} {trajectory.stop}', 'bold')
    if trajectory.reward is not None:
        line.append(f'  reward {_number(trajectory.reward)}  advantage {trajectory.advantage:+.2f}')
    elif trajectory.error:
        line.append(f'  {one_line(trajectory.error)}', 'red')
    return line


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:g}'

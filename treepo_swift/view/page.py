"""One self-contained HTML file with the trees in it, and its JSON twin.

A tree is packed by itself (JSON, deflated, base64) and unpacked in the browser when somebody looks at it, so that a
page of a thousand trees opens at once. What lists and filters need is in a small index.

Texts come from a model and are hostile until proven otherwise. In the file they are base64; the scripts only ever write
them as text; and the page's own policy lets nothing load or run but the scripts in it, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from treepo_swift.wire.record import NodeRecord, TrajectoryRecord, TreeRecord

from .advantages import TRAINED, node_advantages

PAGE_FORMAT = 1
SCRIPTS = ('data.js', 'colours.js', 'drawing.js', 'reading.js', 'list.js', 'app.js')
VENDORED = ('d3-hierarchy-3.1.3', 'diff-9.0.0')
MARKERS = re.compile(r'<[|｜][^|｜<>]*[|｜]>|</?think>')
ROLES = ('system', 'user', 'assistant')
PREVIEW = 160
"""Characters of a prompt in the index."""


def describe(records: Sequence[TreeRecord], source: str) -> dict[str, Any]:
    """All that the page shows, as plain values: the JSON twin."""
    prompts: dict[str, int] = {}
    advantages = node_advantages(records)
    trees = []
    for record, values in zip(records, advantages, strict=True):
        prompt = prompts.setdefault(record.prompt, len(prompts))
        trees.append({'summary': _summary(record, prompt), **_tree(record, values)})
    names = list(dict.fromkeys(name for values in advantages for name in values)) or [TRAINED]
    return {'format': PAGE_FORMAT, 'source': source, 'estimators': names, 'prompts': list(prompts), 'trees': trees}


def html(described: dict[str, Any]) -> Iterator[str]:
    """The page, in parts: it may be long."""
    web = files('treepo_swift.view').joinpath('web')

    def read(name: str) -> str:
        return web.joinpath(name).read_text(encoding='utf-8')

    style = read('style.css')
    vendored = [read(f'vendor/{name}.min.js') for name in VENDORED]
    licences = '\n\n'.join(f'{name}\n{read(f"vendor/{name}.LICENSE")}' for name in VENDORED)
    # One scope for all of our own; each file is short and says what it is.
    ours = '(() => {\n"use strict";\n' + '\n'.join(read(name) for name in SCRIPTS) + '\n})();\n'
    scripts = [*vendored, ours]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    index = {
        **{key: described[key] for key in ('format', 'source', 'estimators')},
        'prompts': [_preview(text) for text in described['prompts']],
        'trees': [tree['summary'] for tree in described['trees']],
    }
    before, after = read('index.html').split('<!-- parts -->')
    yield (
        before.replace('<!-- policy -->', f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
        .replace('<!-- style -->', f'<style>{style}</style>')
        .replace('<!-- licences -->', escape(licences))
    )
    yield f'<script type="application/json" id="index">{_inert(json.dumps(index, separators=(",", ":")))}</script>\n'
    yield '<script type="text/plain" id="trees">'
    for tree in described['trees']:
        yield _packed(tree, described['prompts'])
        yield '\n'
    yield '</script>\n'
    for script in scripts:
        yield f'<script>{script}</script>\n'
    yield after


def _preview(prompt: str) -> str:
    """The end of a prompt in one line, without the template's tokens and roles: the question, mostly."""
    lines = [line.strip() for line in MARKERS.sub('\n', prompt).splitlines()]
    line = ' '.join(line for line in lines if line and line not in ROLES)
    return line if len(line) <= PREVIEW else f'...{line[-PREVIEW:]}'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(text: str) -> str:
    """For a data block: nothing in it may end the block or begin a comment. JSON knows the escapes."""
    return text.replace('<', '\\u003c').replace('\u2028', '\\u2028').replace('\u2029', '\\u2029')


def _packed(tree: dict[str, Any], prompts: list[str]) -> str:
    content = {
        **{key: value for key, value in tree.items() if key != 'summary'},
        'prompt': prompts[tree['summary']['prompt']],
    }
    text = json.dumps(content, separators=(',', ':'), ensure_ascii=False)
    # Halves of surrogate pairs can't be in UTF-8.
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return base64.b64encode(deflate.compress(text.encode(errors='replace')) + deflate.flush()).decode()


def _summary(record: TreeRecord, prompt: int) -> dict[str, Any]:
    rewards = [t.reward for t in record.trajectories if t.reward is not None]
    return {
        'id': record.tree,
        'step': record.step,
        'mode': record.mode,
        'prompt': prompt,
        'width': len(record.trajectories),
        'nodes': len(record.nodes),
        'value': record.value,
        'low': min(rewards, default=None),
        'high': max(rewards, default=None),
        'failed': sum(t.reward is None for t in record.trajectories),
        'troubles': record.stats.get('failures', 0),
        'fallbacks': sum(t.fallback_from is not None for t in record.trajectories),
        'stops': dict(Counter(t.stop for t in record.trajectories)),
        'decoded': sum(len(n.tokens) for n in record.nodes if n.kind == 'segment'),
        'independent': sum(len(n.tokens) for path in record.paths() for n in path if n.kind == 'segment'),
    }


def _tree(record: TreeRecord, advantages: dict[str, list[float | None]]) -> dict[str, Any]:
    return {
        'estimator': record.estimator,
        'normalisation': record.normalisation,
        'run': record.run,
        'stats': record.stats,
        'nodes': [_node(node) for node in record.nodes],
        'trajectories': [_trajectory(trajectory) for trajectory in record.trajectories],
        'advantages': advantages,
    }


def _node(node: NodeRecord) -> dict[str, Any]:
    values: dict[str, Any] = {
        'id': node.id,
        'parent': node.parent,
        'depth': node.depth,
        'size': node.size,
        'value': node.value,
        'text': node.text,
        'tokens': node.tokens,
        'pieces': _utf16(node.text, node.pieces),
    }
    if node.kind != 'segment':
        values['environment'] = True
    if node.logprobs is not None:
        values['logprobs'] = [round(value, 2) for value in node.logprobs]
    if node.entropies is not None:
        values['entropies'] = [round(value, 2) for value in node.entropies]
    if node.trained is not None:
        values['trained'] = node.trained
    return values


def _utf16(text: str, pieces: list[int]) -> list[int]:
    """Lengths as JavaScript counts: a character beyond the basic plane is two."""
    if text.isascii() or max(text) <= '\uffff':
        return pieces
    lengths, at = [], 0
    for count in pieces:
        lengths.append(count + sum(character > '\uffff' for character in text[at : at + count]))
        at += count
    return lengths


def _trajectory(trajectory: TrajectoryRecord) -> dict[str, Any]:
    values: dict[str, Any] = {
        'leaf': trajectory.leaf,
        'stop': trajectory.stop,
        'tokens': trajectory.loss_tokens,
        'reward': trajectory.reward,
        'rewards': trajectory.rewards,
        'advantage': trajectory.advantage,
    }
    optional = {
        'segments': trajectory.segments,
        'fallbackFrom': trajectory.fallback_from,
        'fallbackAt': trajectory.fallback_at,
        'error': trajectory.error,
    }
    return {**values, **{key: value for key, value in optional.items() if value is not None}}

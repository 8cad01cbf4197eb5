"""What every estimator would have said of a tree, node by node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from treepo_swift.advantage import estimate_segments
from treepo_swift.wire.record import TreeRecord

ESTIMATORS = (
    *('treepo', 'grpo', 'rloo', 'reinforce_plus_plus', 'progress', 'spo', 'treerl'),
    *('tree_grpo', 'depth_wise', 'spo_tree', 'at2po', 'rtmc', 'fr3e'),
)
"""The package's own. Those that a user registered may want options, or a whole batch; what they said is `TRAINED`."""
TRAINED = 'as trained'
"""The name of what the run itself used: after normalisation over its batch."""


def node_advantages(records: Sequence[TreeRecord]) -> list[dict[str, list[float | None]]]:
    """For each tree the values of its nodes in their order, by estimator; None for what an environment said.

    A node has the mean of what the trajectories through it get for its tokens: for an estimator of segment level that
    is its own value. All but `TRAINED` are before normalisation; all are of one tree alone, so they need no whole
    batch. Placeholders are left out.
    """
    results: list[dict[str, list[float | None]]] = [{TRAINED: _trained(record)} for record in records]
    paths, rewards, owners = [], [], []
    for index, record in enumerate(records):
        for trajectory, segments in zip(record.trajectories, record.segment_paths(), strict=True):
            if trajectory.reward is not None:
                paths.append([f't{index}', *segments])
                rewards.append(trajectory.reward)
                owners.append(index)
    if not paths:
        return results
    for name in ESTIMATORS:
        found: list[dict[int, list[float]]] = [defaultdict(list) for _ in records]
        for owner, path, values in zip(owners, paths, estimate_segments(paths, rewards, estimator=name), strict=True):
            for node, value in zip(path[1:], values, strict=True):
                found[owner][node].append(value)  # type: ignore[index]
        for index, record in enumerate(records):
            results[index][name] = _means(record, found[index])
    return results


def _trained(record: TreeRecord) -> list[float | None]:
    found: dict[int, list[float]] = defaultdict(list)
    for trajectory, path in zip(record.trajectories, record.segment_paths(), strict=True):
        if trajectory.reward is None:
            continue
        values = trajectory.segments or [trajectory.advantage] * len(path)
        for node, value in zip(path, values, strict=True):
            found[node].append(value)
    return _means(record, found)


def _means(record: TreeRecord, found: dict[int, list[float]]) -> list[float | None]:
    values = [found.get(node.id) for node in record.nodes]
    return [None if not value else round(sum(value) / len(value), 3) for value in values]

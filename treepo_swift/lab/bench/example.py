"""ms-swift's own tree example, for comparison."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .workload import Workload

if TYPE_CHECKING:
    from swift.infer_engine import GRPOVllmEngine


def load_example(path: str, engine: GRPOVllmEngine, workload: Workload) -> Any:
    """The scheduler of ms-swift's ``examples/train/grpo/plugin/treepo``, set as our trees are.

    Its file does not import on ms-swift 4.6.0 (`swift.rewards` has no `MultiTurnScheduler` any more): the names
    that it asks for are lent to it while it loads.
    """
    import swift.rewards
    import swift.rollout

    file = Path(path)
    if not file.is_file():
        raise ValueError(f'--example {path}: no such file.')
    lent = [name for name in ('MultiTurnScheduler', 'multi_turns') if not hasattr(swift.rewards, name)]
    for name in lent:
        setattr(swift.rewards, name, getattr(swift.rollout, name, None) or getattr(swift.rollout.multi_turn, name))
    sys.path.insert(0, str(file.parent))
    try:
        module: ModuleType = importlib.import_module(file.stem)
    finally:
        sys.path.remove(str(file.parent))
        for name in lent:
            delattr(swift.rewards, name)
    config = workload.config
    scheduler = module.TreeRolloutScheduler(engine, config.max_depth)
    scheduler.max_tree_width = workload.width
    scheduler.max_tree_deep = config.max_depth
    scheduler.root_divergence = _single('root_divergence', config.root_divergence)
    scheduler.max_divergence = _single('divergence', config.divergence)
    return scheduler


def _single(name: str, value: int | tuple[int, int]) -> int:
    if isinstance(value, tuple):
        raise ValueError(f"{name}={list(value)}: ms-swift's example takes one number.")
    return value

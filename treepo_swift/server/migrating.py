"""Says so where code was written for another tree scheduler: ms-swift's example plugin. See docs/migrating.md."""

from __future__ import annotations

import inspect

HOOKS = {
    'step': ('infer_request', 'response_choice', 'current_turn'),
    'check_finished': ('infer_request', 'response_choice', 'current_turn'),
    'on_turn_end': ('infer_request', 'response_choice', 'current_turn'),
    'on_trajectory_start': ('requests',),
    'check_segment': ('path', 'text'),
    'fork_state': ('parent_id', 'child_id'),
    'release_state': ('state_id',),
}

MOVED = {
    'max_tree_width': "the trainer's --num_generations",
    'max_tree_depth': '--max_turns of `swift rollout`',
    'root_divergence': 'root_divergence in the tree config',
    'max_divergence': 'divergence in the tree config',
    'divergence_strategy': 'branching in the tree config (`logprobs`: logprob, `average`: even)',
}
"""Attributes of the example's scheduler, and what says the same here."""


def check_hooks(scheduler: type) -> None:
    """Raise ``TypeError`` for a hook that could not be called as ms-swift calls it."""
    for name, arguments in HOOKS.items():
        try:
            inspect.signature(getattr(scheduler, name)).bind('self', *arguments)
        except TypeError as e:
            raise TypeError(
                f'{scheduler.__name__}.{name}: it is called as {name}({", ".join(arguments)}), but {e}. '
                'docs/migrating.md shows how to write hooks of other tree schedulers.'
            ) from None


def refuse_moved(scheduler: type, name: str) -> None:
    """Raise ``AttributeError`` where an attribute is set that nobody would read."""
    if name in MOVED:
        raise AttributeError(
            f'{scheduler.__name__}.{name} is not an attribute here: set {MOVED[name]} (docs/migrating.md).'
        )

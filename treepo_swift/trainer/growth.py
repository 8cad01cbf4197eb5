"""What tree will grow, in plain words: the first lines that a run logs."""

from __future__ import annotations

from collections.abc import Iterator

from treepo_swift.config import SHAPE, TreeConfig
from treepo_swift.core.budgets import expected_saving

SYMBOLS = {'segment_length': 'S', 'max_depth': 'D', 'divergence': 'd', 'root_divergence': 'first branches'}


def describe_growth(config: TreeConfig, *, width: int, max_response: int, block_size: int) -> Iterator[str]:
    """One line each: the tree, what it saves, where its numbers come from, how to change them.

    `max_response` and `block_size` are what `TreeConfig.load_for` fitted the config to.
    """
    yield _shape(config, width)
    if config.fork_at != 'turn':
        saving = expected_saving(config, width)
        yield (
            f'where paths use their whole length, such a tree decodes {saving:.0%} fewer tokens than {width} '
            'independent answers. tree/saved_fraction in the log says what it was.'
        )
    yield _origin(config, width, max_response, block_size)


def _shape(config: TreeConfig, width: int) -> str:
    where = {
        'both': 'At every segment boundary, and where a turn begins,',
        'segment': 'At every segment boundary within a turn',
        'turn': 'Where a turn begins',
    }[config.fork_at]
    first, d = (_count(value, width) for value in (config.root_divergence, config.divergence))
    begin = f'each prompt grows one tree of W={width} answers. First branches at the prompt: {first}.'
    if config.max_depth == 1 and config.fork_at == 'segment':
        return f'{begin} Paths have one segment of at most S={config.segment_length} tokens, so nothing forks later.'
    pacing = {'eager': '', 'even': ', spread over all depths'}.get(str(config.pacing), f', paced by {config.pacing}')
    position = config.fork_position.policy
    inside = '' if position == 'boundary' else f' Forks start where fork_position={position!r} says.'
    return (
        f'{begin} {where} a path goes on as d={d} paths, until there are {width}{pacing}. A path has at most '
        f'D={config.max_depth} segments of S={config.segment_length} tokens in a turn, {config.max_response_tokens} '
        f'in all.{inside}'
    )


def _count(value: int | tuple[int, int], width: int) -> str:
    if isinstance(value, tuple):
        return f'{value[0]} to {value[1]} (drawn)'
    return str(min(value, width))


def _origin(config: TreeConfig, width: int, max_response: int, block_size: int) -> str:
    given = [SYMBOLS[key] for key in SHAPE if config.is_given(key)]
    if given:
        source = f'{", ".join(given)}: as you set them; the rest fits --max_completion_length {max_response}'
        if len(given) == len(SHAPE):
            source = f'{", ".join(given)}: as you set them'
    else:
        source = (
            f'nothing of this was set, so it was chosen to fit --max_completion_length {max_response}, '
            f"--num_generations {width} and the engine's KV block of {block_size} tokens"
        )
    variables = ', '.join(f'TREEPO_{key.upper()}' for key in SHAPE)
    return (
        f'{source}. To change it, set {variables}, or name a YAML file by TREEPO_CONFIG; `treepo-swift config` checks '
        'it before a run, and docs/configuration.md lists every key.'
    )

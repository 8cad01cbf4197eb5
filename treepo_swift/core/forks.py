"""How many branches a boundary has, and where they start: forks of live paths, and fallback where none lives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from treepo_swift.config import TreeConfig
from treepo_swift.config.sections import NoFallback

from .budgets import TokenBudget, next_width, paced_width
from .failure import NodeFailure
from .messages import Limits
from .policies import fallback
from .policies.branching import BranchContext, branching_policies
from .policies.fork_position import fork_positions, position_context
from .tree import Node, Path, Tree, turns_before

T = TypeVar('T')


class PolicyError(NodeFailure):
    """A branching or cut policy raised, or returned what it may not return. It fails its tree."""

    def __init__(self, owner: str, problem: str, kind: str = 'returned what it may not') -> None:
        super().__init__(f'{owner} {problem}', kind=f'{owner} {kind}', remedy='Mend the policy, or choose another.')


def check_policies(config: TreeConfig) -> None:
    """Raise ``ValueError`` where `config` names a policy that nobody registered."""
    branching_policies[config.branching.policy]
    if config.fork_position.policy != 'boundary':
        fork_positions[config.fork_position.policy]
    if config.fallback.policy not in ('root', 'none'):
        fallback.cut_policies[config.fallback.policy]


class Forks:
    """Decides for one tree. All that is random in it is drawn from the tree's own generator."""

    def __init__(
        self, config: TreeConfig, *, tree: Tree, width: int, limits: Limits, rng: random.Random, progress: float
    ) -> None:
        check_policies(config)
        self.budget = TokenBudget(config, width)
        self._config = config
        self._tree = tree
        self._width = width
        self._limits = limits
        self._rng = rng
        self._context = BranchContext(config, rng, progress)
        self._first = 0
        """Branches that the root gave at first."""
        self._at_root = 0
        """Branches that begin there by now, but for those of fallback."""

    def from_the_prompt(self, allowance: int | None) -> list[Path]:
        """The paths that a tree starts with; for `allowance` see `TreeSearch.resume`."""
        root = self._tree.root
        first = min(self._draw(self._config.root_divergence), self._width)
        first = min(first, self._paced_width(root, first))
        self._first = min(first, self.budget.affordable([Path(root)], allowance))
        self._at_root = self._first
        return [Path(root) for _ in range(self._first)]

    def branches(self, forking: Sequence[Path], *, live: int, ended: int, allowance: int | None) -> list[int]:
        """How many branches each of `forking` has, which are some or all of the `live` paths; at least one each.

        `ended` paths stopped since the last fork: their budget goes to these. Raises `PolicyError`.
        """
        finished = len(self._tree.trajectories) + live - len(forking)
        cap = min(self._width, max(self._paced_width(path.leaf, self._first) for path in forking))
        total = next_width(
            live=len(forking),
            finished=finished,
            ended=ended,
            width=min(cap, finished + self.budget.affordable(forking, allowance)),
            divergence=self._draw(self._config.divergence),
        )
        name = self._config.branching.policy
        counts = _asked(f'branching policy {name!r}', lambda: branching_policies[name](forking, total, self._context))
        if (
            not isinstance(counts, (list, tuple))
            or len(counts) != len(forking)
            or not all(isinstance(count, int) and count >= 1 for count in counts)
            or sum(counts) != total
        ):
            raise PolicyError(
                f'branching policy {name!r}',
                f'returned {counts!r} for {len(forking)} live paths and {total} branches: it must give every path at '
                'least one, and all of them out.',
            )
        return list(counts)

    def position(self, path: Path, forks: int) -> int:
        """How many tokens of a live path its `forks` at this boundary keep. Raises `PolicyError`."""
        name = self._config.fork_position.policy
        if name == 'boundary':
            return path.leaf.length
        context = position_context(path, self._config, self._rng, self._at_root)
        if context is None:
            return path.leaf.length
        position = _asked(f'fork position {name!r}', lambda: fork_positions[name](path, context))
        if not isinstance(position, int) or not context.low <= position <= context.high:
            problem = f'returned {position!r}, allowed are {context.low} to {context.high} tokens.'
            raise PolicyError(f'fork position {name!r}', problem)
        self._at_root += forks if position == 0 else 0
        return position

    @property
    def may_fall_back(self) -> bool:
        """Whether something can grow where no path lives."""
        return not isinstance(self._config.fallback, NoFallback) or self._config.fallback.fill == 'root'

    @property
    def may_cut(self) -> bool:
        """Whether fallback may start a path from the prefix of a finished one."""
        return self._config.fallback.policy not in ('none', 'root')

    def from_finished(self, allowance: int | None) -> list[Path]:
        """Fallback: paths from prefixes of finished ones, or from the root. Raises `PolicyError`."""
        missing = self._width - len(self._tree.trajectories)
        grown = [path for path in self._tree.trajectories if path.leaf.length]
        needed = min(missing, self.budget.affordable(grown, allowance))
        if self._config.fallback.policy == 'none':
            return self._from_root(needed) if self.may_fall_back else []
        divergence = self._draw(self._config.divergence)
        chosen = fallback.candidates(self._tree.trajectories, self._config, self._rng) if self.may_cut else []
        if not chosen:
            return self._from_root(min(divergence, needed))
        starts: list[Path] = []
        for index in chosen:
            path = self._tree.trajectories[index]
            taken: list[int] = []
            for _ in range(self._config.fallback.cuts):
                taken.append(self._cut(path, taken))
                position = fallback.next_start(path, taken[-1], self._config)
                for _ in range(min(divergence, needed - len(starts))):
                    if self.budget.covers([*(start.leaf.length for start in starts), position]):
                        starts.append(Path(self._tree.node_at(path, position), fallback_from=index))
        return starts

    def _from_root(self, count: int) -> list[Path]:
        return [Path(self._tree.root, fallback_from=-1) for _ in range(self.budget.covered([0] * count))]

    def _cut(self, path: Path, taken: Sequence[int]) -> int:
        """Where the policy cuts a finished path that was `taken` at these places."""
        name = self._config.fallback.policy
        context = fallback.cut_context(path, self._config, self._rng, taken)
        position = _asked(f'fallback {name!r}', lambda: fallback.cut_policies[name](path, context))
        if not isinstance(position, int) or not context.low <= position <= context.high:
            problem = f'returned {position!r}, allowed are {context.low} to {context.high} tokens.'
            raise PolicyError(f'fallback {name!r}', problem)
        return position

    def _paced_width(self, node: Node, first: int) -> int:
        """Most paths that may exist while what follows `node` grows."""
        by_turn = self._config.fork_at == 'turn'
        depth = 1 + (turns_before(node) if by_turn else node.depth)
        last = self._limits.max_turns if by_turn else self._config.max_depth
        return paced_width(self._config, width=self._width, depth=depth, first=first, last=last)

    def _draw(self, number: int | tuple[int, int]) -> int:
        return self._rng.randint(*number) if isinstance(number, tuple) else number


def _asked(owner: str, policy: Callable[[], T]) -> T:
    """What a policy returns; whatever it raises becomes a `PolicyError` that names it."""
    try:
        return policy()
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        # Also SystemExit, and whatever else is no Exception: in a server it would end every later rollout too.
        raised = f'raised {type(e).__name__}'
        raise PolicyError(owner, f'{raised}: {e}', kind=raised) from e

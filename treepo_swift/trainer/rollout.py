"""What the trainer says with its requests, and in colocate mode how it asks the engines in its own processes.

Only this module of the trainer knows the server room. What it asks of servers is in `servers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rollout import multi_turns

from treepo_swift.config import TreeConfig
from treepo_swift.wire.groups import Group, group_requests, request_key, with_copy
from treepo_swift.wire.note import RequestNote

if TYPE_CHECKING:
    from treepo_swift.server.colocate import ColocateTrees

T = TypeVar('T')


def rollout_note(
    config: TreeConfig, *, width: int, step: int, max_steps: int, evaluates: bool, packed: bool = True
) -> RequestNote:
    """What goes with every request of a rollout: trees of `width`, or independent answers for an evaluation."""
    if evaluates and not config.eval_trees:
        # The step makes the seeds of two evaluations differ; the config says how long an answer may be.
        return RequestNote(mode='independent', packed=packed, config=config.to_note(), step=step)
    return RequestNote(
        packed=packed,
        config=config.to_note(),
        num_generations=width,
        step=step,
        progress=min(step / max(max_steps, 1), 1.0),
    )


def check_scheduler(name: str, config: TreeConfig, *, use_gym_env: bool | None) -> None:
    """Raise, before a model loads, what the scheduler and its policies would raise when they are made."""
    from treepo_swift.server.config_checks import check_named

    multi_turns[name].check_class(use_gym_env=bool(use_gym_env))
    check_named(config)


def plant_in_process(engine: Any, name: str, config: TreeConfig, args: Any) -> ColocateTrees:
    """The scheduler `name` over swift's engine in this process, made as ``swift rollout`` makes it."""
    from treepo_swift.server.colocate import ColocateTrees

    options: dict[str, Any] = {'max_turns': args.max_turns}
    if args.use_gym_env:
        options.update(use_gym_env=args.use_gym_env, gym_env=args.gym_env)
    return ColocateTrees(engine, multi_turns[name], config, **options)


def together(work: Callable[[], T], gather: Callable[[list[Any]], list[Any]]) -> T:
    """What `work` returns on this rank, where it raises on none; else all ranks raise.

    `gather` puts the ranks' lists one behind the other, on every rank.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as e:
        error = e
    errors = gather([None if error is None else f'{type(error).__name__}: {error}'])
    if error is not None:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise RuntimeError(f'Rank {rank} failed, and no rank can go on without it. {text}')
    return result


class RankRollout:
    """One rollout over all ranks, each with an engine of its own: groups are dealt out whole, and given back.

    swift cuts a batch into equal parts, so a prompt's requests may lie on two ranks. All ranks call `outputs` at the
    same time; where one fails, all raise.
    """

    def __init__(self, trees: ColocateTrees, *, rank: int, gather: Callable[[list[Any]], list[Any]]) -> None:
        """`gather` as for `together`."""
        self._trees = trees
        self._rank = rank
        self._gather = gather

    def outputs(
        self, requests: Sequence[RolloutInferRequest], size: int | None, request_config: RequestConfig
    ) -> list[RolloutOutput]:
        """The outputs of this rank's `requests`, in their order. Groups are of `size` requests."""
        counts = self._gather([len(requests)])
        keys = self._gather([request_key(request) for request in requests])
        groups = group_requests(keys, [size] * len(keys))
        grown_by = deal_groups(groups, len(keys), len(counts))
        begin = sum(counts[: self._rank])
        here = range(begin, begin + len(requests))
        # Whole groups mostly lie where they grow; then no request and no output travels.
        moves = grown_by != [rank for rank, count in enumerate(counts) for _ in range(count)]
        everything = self._gather(list(requests)) if moves else {p: requests[p - begin] for p in here}
        copies = {position: group.copy for group in groups for position in group.members}
        mine = [position for position, rank in enumerate(grown_by) if rank == self._rank]
        asked = [with_copy(everything[p], copies[p]) for p in mine]
        outputs = together(lambda: self._trees.rollout(asked, request_config) if asked else [], self._gather)
        if not moves:
            return outputs
        given_back = dict(self._gather(list(zip(mine, outputs, strict=True))))
        return [given_back[position] for position in here]


def deal_groups(groups: Sequence[Group], requests: int, ranks: int) -> list[int]:
    """The rank that grows each request: groups go whole and in order, so that ranks have as many or one more.

    Where every rank holds whole groups and as many as the others, each keeps its own.
    """
    grown_by = [0] * requests
    for index, group in enumerate(groups):
        for position in group.members:
            grown_by[position] = index * ranks // len(groups)
    return grown_by

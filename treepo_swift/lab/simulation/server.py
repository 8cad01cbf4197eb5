"""One rollout server: its trees, their places on its data-parallel engines, and one event loop for all of them."""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from collections.abc import Sequence
from heapq import heappop, heappush

from treepo_swift.config.sections import SegmentTokensBudget
from treepo_swift.core.messages import Limits
from treepo_swift.core.search import TreeSearch
from treepo_swift.server.admission import KV_SHARE

from .engine import SimulatedEngine
from .model import EngineModel
from .setup import Setup
from .trees import GrowingTree, Request

FORECAST_TREES = 8
"""Trees that are grown for the forecast of the others' size."""


def plant(setup: Setup, number: int, *, age: int = 0, rank: int = 0) -> GrowingTree:
    """The tree of the batch's prompt `number`; no engine and no other tree changes how it grows."""
    search = TreeSearch(
        setup.tree_config,
        tree_id=str(number),
        prompt_ids=[0] * setup.prompt_tokens,
        width=setup.width,
        limits=Limits(setup.max_response, setup.prompt_tokens + setup.max_response),
        rng=random.Random(f'{setup.seed}:{number}'),
        by_segment=setup.schedule == 'lockstep',
    )
    return GrowingTree(search, setup.lengths, age=age, rank=rank)


def expected_tokens(setup: Setup) -> float:
    """KV tokens that admission sets aside for a tree, once earlier batches have taught it how large trees are."""
    numbers = range(min(setup.prompts, FORECAST_TREES))
    decoded = 0
    for number in numbers:
        tree = plant(setup, number)
        requests = tree.start(None)
        while requests:
            request = requests.pop()
            request.left, request.unreported = 0, request.left
            requests += tree.report(request, keep=lambda request, node: None)
        decoded += tree.search.tree.stats.decoded_tokens
    return setup.prompt_tokens + KV_SHARE * decoded / len(numbers)


class SimulatedServer:
    """Grows the trees of its prompts, all of which come at time 0.

    A tree enters the engine with the fewest trees and stays there. With admission the engine takes as many trees as
    its KV cache is expected to hold at their full size, one at least; the others wait in line for a place.

    The event loop does not delay single requests: where its CPU time is longer than the time that the engines take,
    `stretch` is the ratio of the two, by which all times of this server are to be multiplied.
    """

    def __init__(self, model: EngineModel, setup: Setup, numbers: Sequence[int], *, places: float = math.inf) -> None:
        """`numbers` of this server's prompts in the batch; `places`: most trees of an engine at a time."""
        self.engines = [SimulatedEngine(model, by_age=setup.priority) for _ in range(setup.data_parallel)]
        self.latencies: list[float] = []
        """When each tree was done."""
        self.trajectories = 0
        self.decoded_tokens = 0
        self.trajectory_tokens = 0
        self.requests = 0
        self.segments = 0
        self._setup = setup
        self._model = model
        self._line = deque(numbers)
        self._places = places
        self._first_allowance = self._allowance(len(numbers))
        self._trees = [0] * setup.data_parallel
        self._entered = 0
        # Trees that share a budget per depth and wait for each other there, in the order in which they came.
        self._meeting: dict[GrowingTree, None] = {}
        self._events: list[tuple[float, int]] = []

    @property
    def seconds(self) -> float:
        """When the last tree was done."""
        return max(self.latencies)

    @property
    def event_loop_utilisation(self) -> float:
        """CPU time of the event loop as a share of the engines' time; it may be above 1."""
        cpu = (
            self.segments * self._model.event_seconds
            + self.requests * self._model.request_seconds
            + self.decoded_tokens * self._model.token_seconds
        )
        return cpu / self.seconds

    @property
    def stretch(self) -> float:
        return max(self.event_loop_utilisation, 1.0)

    def run(self) -> None:
        """Until every tree is done."""
        self._submit(self._enter(0.0), 0.0)
        while self._events:
            time, rank = heappop(self._events)
            engine = self.engines[rank]
            if time != engine.next_time:
                continue  # Something came in between.
            requests = []
            for request in engine.advance():
                requests += request.tree.report(request, engine.keep)
                self._look_at(request.tree, time)
            engine.schedule()
            self._expect(rank)
            self._submit(requests + self._meet(time) + self._enter(time), time)
        if self._line or any(self._trees):
            raise RuntimeError(
                f'The simulation stopped with {sum(self._trees)} growing and {len(self._line)} waiting '
                'trees: no engine has anything to do.'
            )

    def _submit(self, requests: Sequence[Request], now: float) -> None:
        by_rank: defaultdict[int, list[Request]] = defaultdict(list)
        for request in requests:
            by_rank[request.tree.rank].append(request)
        for rank, group in by_rank.items():
            self.engines[rank].submit(group, now)
            self._expect(rank)

    def _expect(self, rank: int) -> None:
        if self.engines[rank].next_time < math.inf:
            heappush(self._events, (self.engines[rank].next_time, rank))

    def _enter(self, now: float) -> list[Request]:
        """The first requests of the trees that find a place now."""
        requests = []
        while self._line:
            rank = min(range(len(self._trees)), key=self._trees.__getitem__)
            if self._trees[rank] >= self._places:
                break
            tree = plant(self._setup, self._line.popleft(), age=self._entered, rank=rank)
            self._entered += 1
            self._trees[rank] += 1
            requests += tree.start(self._first_allowance)
            self._look_at(tree, now)
        return requests

    def _meet(self, now: float) -> list[Request]:
        """Share the budget of a depth out once all growing trees wait for it."""
        requests = []
        while self._meeting and len(self._meeting) == sum(self._trees):
            trees, self._meeting = self._meeting, {}
            for tree in trees:
                requests += tree.resume(self._allowance(len(trees)))
                self._look_at(tree, now)
        return requests

    def _allowance(self, trees: int) -> int:
        """A tree's tokens of a depth, where `trees` share those; 0 where they do not."""
        budget = self._setup.config.budget
        return budget.tokens // trees if isinstance(budget, SegmentTokensBudget) else 0

    def _look_at(self, tree: GrowingTree, now: float) -> None:
        if tree.search.waiting:
            self._meeting[tree] = None
        if not tree.search.done:
            return
        self.engines[tree.rank].forget(tree)
        self._trees[tree.rank] -= 1
        self.latencies.append(now)
        grown = tree.search.tree
        self.trajectories += sum(not path.is_placeholder for path in grown.trajectories)
        self.decoded_tokens += grown.stats.decoded_tokens
        self.trajectory_tokens += grown.stats.trajectory_tokens
        self.requests += grown.stats.engine_requests
        self.segments += tree.segments

"""`TreeServers`: whole groups go to servers, and a server that dies does not take the batch with it.

swift's client cuts the requests of a step into equal parts, blind to groups. A prompt whose requests lie in two of them
grows two smaller trees, each with a baseline of its own: wrong advantages, not only less speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rlhf_trainers import VLLMInferClient
from swift.utils import get_logger

from treepo_swift.wire.groups import Group, group_requests, request_key, with_copy
from treepo_swift.wire.note import REQUEST_KEY, RequestNote
from treepo_swift.wire.report import REPORT_KEY

from .servers import ServerError, ask, death

logger = get_logger()


def deal_to_servers(costs: Sequence[float], ranks: Sequence[int]) -> list[int]:
    """Which server takes each group: the costliest first, to the server with the least to do.

    Args:
        costs: what each group is expected to cost, in any unit.
        ranks: data-parallel engines of each server, which share its work.
    """
    load, count = [0.0] * len(ranks), [0] * len(ranks)
    taken_by = [0] * len(costs)
    for group in sorted(range(len(costs)), key=lambda i: -costs[i]):
        # Equal loads (nothing is known of costs yet): the one with fewer groups, then the first.
        server = min(range(len(ranks)), key=lambda s: ((load[s] + costs[group]) / ranks[s], count[s] / ranks[s], s))
        taken_by[group] = server
        load[server] += costs[group]
        count[server] += 1
    return taken_by


class Costs:
    """What a prompt's trees cost when they were last grown; of a new prompt, what the others cost on average."""

    def __init__(self) -> None:
        self._of_prompt: dict[str, int] = {}
        self._sum = 0

    def learn(self, prompt: str, decoded_tokens: int) -> None:
        """`prompt` is its `request_key`."""
        self._sum += decoded_tokens - self._of_prompt.get(prompt, 0)
        self._of_prompt[prompt] = decoded_tokens

    def expect(self, prompt: str) -> float:
        """Decoded tokens; 1 where nothing was ever grown."""
        if prompt in self._of_prompt:
            return self._of_prompt[prompt]
        return self._sum / len(self._of_prompt) if self._of_prompt else 1.0


class TreeServers:
    """The servers of one training, asked by its main process, each in a thread of its own.

    A server that fails a batch and then can't score two tokens is dead: it is left out from then on, weight sync
    included, and its groups are asked of the others once. One that is alive has refused the batch, and that is raised.
    """

    def __init__(self, client: VLLMInferClient, ranks: dict[str, int]) -> None:
        """`ranks`: data-parallel engines of each of the client's urls."""
        self._client = client
        self._ranks = ranks
        self._costs = Costs()

    def infer(
        self,
        infer_requests: Sequence[RolloutInferRequest | dict[str, Any]],
        request_config: RequestConfig | dict[str, Any] | None = None,
        **options: Any,
    ) -> list[RolloutOutput]:
        """What `VLLMInferClient.infer` is asked by swift's trainers; the requests' note says how large groups are."""
        requests = [RolloutInferRequest(**r) if isinstance(r, dict) else r for r in infer_requests]
        config = RequestConfig(**request_config) if isinstance(request_config, dict) else request_config
        note = RequestNote.from_dict(requests[0].data_dict[REQUEST_KEY])
        return self.rollout(requests, note.group_size, config or RequestConfig())

    def rollout(
        self, requests: Sequence[RolloutInferRequest], size: int | None, request_config: RequestConfig
    ) -> list[RolloutOutput]:
        """The outputs of `requests`, in their order. Groups are of `size` requests.

        Raises:
            ServerError: a server refused, all are dead, or one died that had taken over from another.
        """
        groups = group_requests([request_key(request) for request in requests], [size] * len(requests))
        outputs: dict[int, RolloutOutput] = {}
        left = self._ask_all(groups, requests, request_config, outputs)
        if left and (left := self._ask_all(left, requests, request_config, outputs)):
            raise ServerError(
                f'{len(left)} prompts of this batch were lost with a rollout server, and with the next. '
                'Do they end the servers? Their logs say why they died.'
            )
        for group in groups:
            self._learn(group, outputs)
        return [outputs[position] for position in range(len(requests))]

    def _ask_all(
        self,
        groups: Sequence[Group],
        requests: Sequence[RolloutInferRequest],
        request_config: RequestConfig,
        outputs: dict[int, RolloutOutput],
    ) -> list[Group]:
        """Add to `outputs`; the groups that were lost with a server that died."""
        client = self._client
        ranks = [self._ranks.get(url, 1) for url in client.base_urls]
        taken_by = deal_to_servers([self._costs.expect(g.key) for g in groups], ranks)
        dealt: dict[int, list[Group]] = {}
        for group, server in zip(groups, taken_by, strict=True):
            dealt.setdefault(server, []).append(group)

        def ask_one(server: int) -> ServerError | None:
            # In the batch's order, as one server would get them.
            mine = sorted((p, g.copy) for g in dealt[server] for p in g.members)
            asked = [with_copy(requests[position], number) for position, number in mine]
            try:
                answers = ask(client, server, asked, request_config)
            except ServerError as e:
                return e
            outputs.update(zip((position for position, _ in mine), answers, strict=True))
            return None

        with ThreadPoolExecutor(len(dealt)) as threads:
            errors = {s: e for s, e in zip(dealt, threads.map(ask_one, dealt), strict=True) if e is not None}
        dead = {server: error for server, error in errors.items() if death(client, server)}
        for server, error in errors.items():
            if server not in dead:
                raise error
        self._leave_out(dead)
        return [group for server in dead for group in dealt[server]]

    def leave_out_dead(self) -> None:
        """Before a weight sync, which would fail where one server has died since the last batch.

        Raises:
            ServerError: all are dead.
        """
        with ThreadPoolExecutor(self._client.num_servers) as threads:
            causes = threads.map(lambda server: death(self._client, server), range(self._client.num_servers))
            self._leave_out({server: error for server, error in enumerate(causes) if error is not None})

    def _leave_out(self, dead: dict[int, ServerError]) -> None:
        client = self._client
        left = client.num_servers - len(dead)
        if not left:
            raise ServerError(
                f'No rollout server is left. {" ".join(str(error) for error in dead.values())} Start them again, and '
                'the training from its last checkpoint (--resume_from_checkpoint).'
            )
        for server, error in dead.items():
            logger.warning(
                f'treepo: the rollout server {client.base_urls[server]} is dead. The training goes on without it; what '
                f'it had to grow is asked of the other {left}. To have it back, start it again, and the training from '
                f'a checkpoint. {error}'
            )
        for server in sorted(dead, reverse=True):
            forget_server(client, server)

    def _learn(self, group: Group, outputs: dict[int, RolloutOutput]) -> None:
        for position in group.members:
            report: dict[str, Any] = (outputs[position].rollout_infos or {}).get(REPORT_KEY) or {}
            if 'stats' in report:
                self._costs.learn(group.key, report['stats']['decoded_tokens'])


def forget_server(client: VLLMInferClient, server: int) -> None:
    """Leave server number `server` out of all that swift's client does from now on, weight sync included."""
    for name in ('base_urls', 'hosts', 'sessions', 'group_ports', 'pynccl_comms'):
        values = getattr(client, name, None)
        if isinstance(values, list) and len(values) == client.num_servers:
            setattr(client, name, [value for i, value in enumerate(values) if i != server])
    client.num_servers = len(client.base_urls)

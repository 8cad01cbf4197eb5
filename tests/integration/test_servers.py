"""Several rollout servers over real HTTP: whole groups, one law, and what happens when they refuse, die or lie."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from requests import Session

pytest.importorskip('swift')
pytest.importorskip('vllm')

from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest
from swift.rlhf_trainers import VLLMInferClient

from tests.flat import flat
from tests.integration.fake_engine import FakeEngine
from tests.integration.rollout_server import serving
from tests.integration.test_scheduler import scheduler
from tests.integration.test_trainer import listening
from treepo_swift.advantage.batch import tree_advantages
from treepo_swift.config import TreeConfig
from treepo_swift.trainer import servers as servers_module
from treepo_swift.trainer import sync_watch
from treepo_swift.trainer.dealing import Costs, TreeServers, deal_to_servers
from treepo_swift.trainer.rollout import rollout_note
from treepo_swift.trainer.servers import ServerError, ask, death, keep_alive, probe_servers
from treepo_swift.wire.packing import accept_packed
from treepo_swift.wire.report import TreeReport

CONFIG = flat(segment_length=16, max_depth=4)
WIDTH = 4
REQUEST_CONFIG = RequestConfig(max_tokens=64, seed=7, return_details=True, logprobs=True)


def requests(prompts: list[str], *, width: int = WIDTH, config: TreeConfig = CONFIG) -> list[RolloutInferRequest]:
    """`width` requests for each prompt, as the trainer sends them."""
    note = rollout_note(config, width=width, step=3, max_steps=10, evaluates=False).to_dict()
    texts = [prompt for prompt in prompts for _ in range(width)]
    return [
        RolloutInferRequest(messages=[{'role': 'user', 'content': t}], uuid=f'r{i}', data_dict={'treepo': dict(note)})
        for i, t in enumerate(texts)
    ]


@contextmanager
def fleet(count: int, **options: Any) -> Iterator[tuple[VLLMInferClient, list[Any]]]:
    """swift's client of `count` servers, prepared as the trainer prepares it, and the servers."""
    with ExitStack() as stack:
        running = [stack.enter_context(serving(scheduler(FakeEngine()), **options)) for _ in range(count)]
        client = VLLMInferClient(base_urls=[server.url for server in running], connection_timeout=30)
        keep_alive(client.sessions)
        accept_packed(client.sessions)
        yield client, running


def grow(client: VLLMInferClient, batch: list[RolloutInferRequest]) -> list[Any]:
    return TreeServers(client, {}).rollout(batch, WIDTH, REQUEST_CONFIG)


def shape(outputs: list[Any]) -> list[tuple[Any, ...]]:
    """All that training sees of a batch, without what depends on the clock."""
    return [
        (
            o.response.id,
            o.response_token_ids,
            o.response_loss_mask,
            o.rollout_logprobs,
            o.rollout_infos['tree']['nodes'],
        )
        for o in outputs
    ]


def advantages(outputs: list[Any]) -> list[Any]:
    reports = [TreeReport.from_dict(o.rollout_infos['tree']) for o in outputs]
    rewards = [float(sum(o.response_token_ids[0]) % 2) for o in outputs]
    return tree_advantages(reports, rewards, [r.loss_tokens for r in reports], CONFIG)


@pytest.fixture(scope='module')
def alone() -> list[Any]:
    """The batch that the tests below ask for, as one server grows it. The prompt 'b' occurs twice."""
    with fleet(1) as (client, _):
        return grow(client, requests(['a', 'b', 'c', 'b', 'e']))


@pytest.mark.parametrize('count', [2, 3, 7])
def test_any_number_of_servers_grows_the_trees_of_one(alone, count):
    batch = requests(['a', 'b', 'c', 'b', 'e'])
    with fleet(count) as (client, running):
        outputs = grow(client, batch)
    assert shape(outputs) == shape(alone)
    assert advantages(outputs) == advantages(alone)
    sizes = Counter(output.rollout_infos['tree']['id'] for output in outputs)
    assert list(sizes.values()) == [WIDTH] * 5
    # Groups are dealt out evenly: no server has two more than another.
    groups = [sum(len(b) for b in server.worker.batches) / WIDTH for server in running]
    assert sum(groups) == 5 and max(groups) - min(groups) <= 1


def test_what_swifts_trainers_call_asks_the_servers(alone):
    """One hands over objects, the other dictionaries; an evaluation asks for independent answers."""
    batch = requests(['a', 'b', 'c', 'b', 'e'])
    with fleet(2) as (client, running):
        servers = TreeServers(client, {})
        assert shape(servers.infer(infer_requests=batch, request_config=REQUEST_CONFIG)) == shape(alone)
        plain = servers.infer([asdict(r) for r in batch], asdict(REQUEST_CONFIG), use_tqdm=False)
        assert shape(plain) == shape(alone)
        note = rollout_note(CONFIG, width=WIDTH, step=3, max_steps=10, evaluates=True).to_dict()
        for request in batch:
            request.data_dict = {'treepo': note}
        answers = servers.infer(batch, REQUEST_CONFIG)
        assert [a.messages[0]['content'] for a in answers] == [r.messages[0]['content'] for r in batch]
        assert all('tree' not in a.rollout_infos for a in answers)
        assert sorted(len(server.worker.batches[-1]) for server in running) == [10, 10]


def test_swifts_own_client_cuts_these_trees_apart():
    """What this module is for: should swift deal out whole groups one day, it can go."""
    with fleet(2) as (client, _):
        outputs = client.infer(requests(['a', 'b', 'c']), REQUEST_CONFIG, use_tqdm=False)
    sizes = Counter(output.rollout_infos['tree']['id'] for output in outputs)
    assert sorted(sizes.values()) == [2, 2, 4, 4]


def test_the_groups_of_a_server_that_dies_in_mid_batch_grow_on_the_others(alone, caplog):
    batch = requests(['a', 'b', 'c', 'b', 'e'])
    with fleet(3) as (client, running), listening(caplog):
        running[1].worker.dies = lambda command: True
        servers = TreeServers(client, {})
        outputs = servers.rollout(batch, WIDTH, REQUEST_CONFIG)
        assert shape(outputs) == shape(alone)
        (warning,) = [r.getMessage() for r in caplog.records if 'is dead' in r.getMessage()]
        assert (
            running[1].url in warning
            and 'asked of the other 2' in warning
            and 'worker process may have ended' in warning
        )
        # It is left out from now on.
        assert client.base_urls == [running[0].url, running[2].url] and client.num_servers == 2
        assert len(client.sessions) == len(client.hosts) == 2
        asked = len(running[1].worker.batches)
        assert shape(servers.rollout(batch, WIDTH, REQUEST_CONFIG)) == shape(alone)
        assert len(running[1].worker.batches) == asked


def test_a_server_that_can_not_be_reached_is_left_out(alone, caplog):
    with fleet(2) as (client, running), listening(caplog):
        running[0].stop()
        assert shape(grow(client, requests(['a', 'b', 'c', 'b', 'e']))) == shape(alone)
        assert 'can not be reached, or went away' in caplog.text and client.base_urls == [running[1].url]


def test_a_server_that_died_between_batches_is_left_out_before_the_weights_are_sent(caplog):
    with fleet(2) as (client, running), listening(caplog):
        servers = TreeServers(client, {})
        servers.leave_out_dead()
        assert client.num_servers == 2 and not caplog.records
        running[0].worker.dead = True
        servers.leave_out_dead()
        assert client.base_urls == [running[1].url] and f'{running[0].url} is dead' in caplog.text
        running[1].worker.dead = True
        with pytest.raises(ServerError, match='No rollout server is left'):
            servers.leave_out_dead()


def test_no_server_left_is_one_clear_error():
    with fleet(2) as (client, running):
        for server in running:
            server.worker.dies = lambda command: True
        with pytest.raises(ServerError, match='No rollout server is left.*--resume_from_checkpoint') as caught:
            grow(client, requests(['a', 'b', 'c']))
        assert all(server.url in str(caught.value) for server in running)


def test_prompts_that_end_every_server_stop_after_the_second():
    """Poison: what killed two servers is not sent to a third."""
    with fleet(3) as (client, running):
        for server in running:
            server.worker.dies = lambda command: any(
                'poison' in str(r) for r in command['kwargs']['infer_requests'] if isinstance(r, dict) or r.messages
            )
        with pytest.raises(ServerError, match='1 prompts of this batch were lost.*Do they end the servers'):
            grow(client, requests(['a', 'poison', 'c']))
        assert client.num_servers == 1


def test_a_batch_that_a_living_server_refuses_is_not_asked_of_another():
    with ExitStack() as stack:
        running = [stack.enter_context(serving(scheduler(FakeEngine(fails=lambda call: True)))) for _ in range(2)]
        client = VLLMInferClient(base_urls=[server.url for server in running], connection_timeout=30)
        with pytest.raises(ServerError, match=r'(?s)failed \(500\): RolloutError: .*CUDA error'):
            grow(client, requests(['a', 'b']))
        assert client.num_servers == 2 and all(len(server.worker.batches) == 1 for server in running)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that gives `answer` to every request, and closes the connection."""
    listener = socket.create_server(('127.0.0.1', 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                head = b''
                while b'\r\n\r\n' not in head:
                    head += connection.recv(65536)
                length = int(re.search(rb'content-length: (\d+)', head, re.IGNORECASE)[1])
                rest = length - len(head.split(b'\r\n\r\n', 1)[1])
                while rest > 0:
                    rest -= len(connection.recv(65536))
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{listener.getsockname()[1]}'
    finally:
        listener.close()


def answer(body: bytes, *, length: int | None = None, status: str = '200 OK') -> bytes:
    size = len(body) if length is None else length
    return f'HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n'.encode() + body


@pytest.mark.parametrize(
    'said, message',
    [
        (answer(b'[{"response": ', length=5000), 'can not be reached, or went away'),
        (answer(b'[{"response": '), 'can not be read .*is no whole JSON'),
        (answer(b'null'), 'can not be read .*NoneType instead of a list of outputs'),
        (answer(b'[1, 2, 3, 4]'), 'can not be read .*list of outputs'),
        (answer(b'[{}, {}, {}, {}]'), 'can not be read .*Do trainer and server have the same'),
        (answer(b'["{\\"trees\\": [{}], \\"batch\\": null}"]'), 'can not be read .*'),
        (answer(b'["not json"]'), 'can not be read'),
        (answer(b'[]'), 'gave 0 outputs for 4 requests'),
        (
            answer(b'Internal Server Error', status='500 Internal Server Error'),
            r"failed \(500\): 'Internal Server Error'",
        ),
        (answer(b'', status='502 Bad Gateway'), r'failed \(502\): .*Its log says why'),
        (b'', 'can not be reached, or went away'),
    ],
)
def test_what_is_no_answer_is_said_in_a_sentence(said, message):
    with answering(said) as url:
        sessions = VLLMInferClient.__new__(VLLMInferClient)
        from requests import Session

        sessions.base_urls, sessions.sessions, sessions.num_servers = [url], [Session()], 1
        accept_packed(sessions.sessions)
        with pytest.raises(ServerError, match=message) as caught:
            ask(sessions, 0, requests(['a']), REQUEST_CONFIG)
        assert url in str(caught.value)


def test_a_server_whose_front_is_up_but_whose_worker_is_dead_is_not_alive(monkeypatch):
    with fleet(1) as (client, running):
        assert death(client, 0) is None
        running[0].worker.dead = True
        assert client.sessions[0].get(f'{running[0].url}/health/').status_code == 200
        assert 'worker process may have ended' in str(death(client, 0))


def test_a_server_that_does_not_answer_counts_as_dead(monkeypatch):
    monkeypatch.setattr(servers_module, 'ALIVE_SECONDS', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as listener:  # nobody accepts
        from requests import Session

        client: Any = SimpleNamespace(
            base_urls=[f'http://127.0.0.1:{listener.getsockname()[1]}'], sessions=[Session()], num_servers=1
        )
        cause = death(client, 0)
        assert cause is not None and cause.silent and 'has not answered for 0.2 s' in str(cause)


def test_a_connection_that_the_server_closes_under_a_request_is_opened_again():
    """uvicorn closes what was idle for 5 s; a server that stood still for a while closes all of them as it wakes."""
    listener, asked = socket.create_server(('127.0.0.1', 0)), []

    def serve() -> None:
        for answers in (False, True, False, False):
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(1 << 20))
                if answers:
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]')

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f'http://127.0.0.1:{listener.getsockname()[1]}'
    client = SimpleNamespace(base_urls=[url], sessions=[Session()])
    assert ask(client, 0, [], RequestConfig()) == []
    # Not for ever.
    with pytest.raises(ServerError, match='went away'):
        ask(client, 0, [], RequestConfig())
    thread.join(10)
    assert len(asked) == 4 and not thread.is_alive()


def test_connections_are_kept_alive():
    with fleet(1) as (client, running):
        assert probe_servers(client)[0] is not None
        pools = client.sessions[0].get_adapter(running[0].url).poolmanager.pools
        connection = pools[next(iter(pools.keys()))].pool.get()
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 20


# Weight syncs.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_watch, 'QUIET_SECONDS', 0.2)
    monkeypatch.setattr(sync_watch, 'LIMIT_SECONDS', 2.0)


def test_a_sync_that_waits_for_a_dead_worker_ends_the_process(impatient):
    with fleet(2) as (client, running):
        ended: Queue[str] = Queue()
        with sync_watch.SyncWatch(client, ended.put):
            client.sessions[1].get(f'{running[1].url}/health/')
            running[1].worker.dead = True
            message = ended.get(timeout=20)  # where a broadcast would stand
        assert f'The rollout server {running[1].url} failed (500)' in message and running[0].url not in message


def test_a_slow_sync_of_living_servers_goes_on_and_one_that_stands_still_ends(impatient):
    with fleet(1) as (client, running):
        ended: Queue[str] = Queue()
        with sync_watch.SyncWatch(client, ended.put):
            for _ in range(15):  # longer than the limit, with a sign of life now and then
                time.sleep(0.2)
                client.sessions[0].get(f'{running[0].url}/health/')
            assert ended.empty()
        with sync_watch.SyncWatch(client, ended.put):
            assert f'stood still for 2 s. The rollout servers: {running[0].url}' in ended.get(timeout=20)


def test_a_busy_server_is_not_a_dead_one(impatient, monkeypatch):
    silent = ServerError('has not answered')
    silent.silent = True
    monkeypatch.setattr(sync_watch, 'death', lambda *args: silent)
    with fleet(1) as (client, _):
        ended: Queue[str] = Queue()
        with sync_watch.SyncWatch(client, ended.put):
            time.sleep(1)
        assert ended.empty()


def test_a_sync_that_fails_because_a_server_died_names_it():
    with fleet(2) as (client, running):
        with pytest.raises(ServerError, match=f'The weights could not be sent. .*{running[0].url} failed') as caught:
            with sync_watch.SyncWatch(client):
                running[0].worker.dead = True
                raise RuntimeError('Multiple errors: [...]')
        assert 'Multiple errors' in str(caught.value.__cause__)
        running[0].worker.dead = False
        with pytest.raises(RuntimeError, match='of the trainer itself'), sync_watch.SyncWatch(client):
            raise RuntimeError('of the trainer itself')


# How groups are dealt out.


@given(st.lists(st.floats(0.1, 1000), max_size=40), st.lists(st.integers(1, 8), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_dealing_is_fair(costs, ranks):
    taken_by = deal_to_servers(costs, ranks)
    assert len(taken_by) == len(costs) and all(0 <= server < len(ranks) for server in taken_by)
    load = [sum(c for c, s in zip(costs, taken_by) if s == server) / ranks[server] for server in range(len(ranks))]
    for server in range(len(ranks)):
        mine = [c for c, s in zip(costs, taken_by) if s == server]
        # Moving one group away could not have ended the batch sooner.
        assert not mine or all(
            load[server] <= load[other] + max(mine) / ranks[other] + 1e-6 for other in range(len(ranks))
        )


def test_the_longest_go_first_and_to_the_larger_server():
    assert deal_to_servers([1, 1, 1, 9], [1, 1]) == [1, 1, 1, 0]
    assert deal_to_servers([1] * 6, [1, 2]) == [0, 1, 1, 0, 1, 1] or Counter(deal_to_servers([1] * 6, [1, 2])) == {
        1: 4,
        0: 2,
    }
    assert deal_to_servers([], [1]) == []


def test_what_a_prompt_cost_before_is_expected_again():
    costs = Costs()
    assert costs.expect('a') == 1
    costs.learn('a', 100)
    costs.learn('b', 300)
    assert (costs.expect('a'), costs.expect('b'), costs.expect('new')) == (100, 300, 200)
    costs.learn('a', 500)
    assert (costs.expect('a'), costs.expect('new')) == (500, 400)


def test_costs_are_learned_from_the_trees(alone):
    with fleet(1) as (client, _):
        servers = TreeServers(client, {})
        batch = requests(['a', 'b', 'c', 'b', 'e'])
        servers.rollout(batch, WIDTH, REQUEST_CONFIG)
    from treepo_swift.wire.groups import request_key

    decoded = next(o for o in alone if 'stats' in o.rollout_infos['tree']).rollout_infos['tree']['stats'][
        'decoded_tokens'
    ]
    assert servers._costs.expect(request_key(batch[0])) == decoded > 1

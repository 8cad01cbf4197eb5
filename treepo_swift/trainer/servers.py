"""What the trainer asks of its rollout servers: whether they grow trees, trajectories, and log-probs after a sync."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from urllib.parse import urlparse

from pydantic import ValidationError
from requests import Response, Session
from requests.adapters import HTTPAdapter
from requests.exceptions import ConnectionError, JSONDecodeError, ReadTimeout, RequestException
from swift.infer_engine.protocol import RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rlhf_trainers import VLLMInferClient
from urllib3.exceptions import ProtocolError

from treepo_swift.config import ConfigError, TreeConfig
from treepo_swift.wire.note import REQUEST_KEY, RequestNote

ALIVE_SECONDS = 30.0
"""How long a server that failed a batch may take to score two tokens before it counts as dead."""
KEEPALIVE = {'TCP_KEEPIDLE': 20, 'TCP_KEEPINTVL': 10, 'TCP_KEEPCNT': 4}
"""A host that is gone without a word is noticed within a minute (20 s + 4 x 10 s), also in the middle of a batch."""
MAX_SHOWN = 1000
"""Characters of a server's answer that an error shows."""


class ServerError(RuntimeError):
    """A rollout server did not give what it was asked for; the message names it, and says what it answered."""

    silent = False
    """Whether it just did not answer in time: it may be busy."""


class KeepAlive(HTTPAdapter):
    """Lets the kernel ask whether the other side of a silent connection is still there."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        options += [
            (socket.IPPROTO_TCP, getattr(socket, name), value)
            for name, value in KEEPALIVE.items()
            if hasattr(socket, name)  # Linux has them
        ]
        super().init_poolmanager(*args, socket_options=options, **kwargs)


def keep_alive(sessions: Iterable[Session]) -> None:
    """From now on these sessions notice a host that is gone."""
    for session in sessions:
        for scheme in ('http://', 'https://'):
            session.mount(scheme, KeepAlive())


def ask(
    client: VLLMInferClient, index: int, requests: Sequence[RolloutInferRequest], request_config: RequestConfig
) -> list[RolloutOutput]:
    """One output for each of `requests`, from the client's server `index`; waits as long as the connection lives.

    Raises:
        ServerError: whatever came instead.
    """
    url = client.base_urls[index]
    items = _post(client, index, requests, request_config)
    if len(items) != len(requests):
        raise ServerError(f'The rollout server {url} gave {len(items)} outputs for {len(requests)} requests.')
    try:
        return [RolloutOutput.model_validate(item) for item in items]
    except ValidationError as e:
        raise _unreadable(url, e) from None


def _post(
    client: VLLMInferClient,
    index: int,
    requests: Sequence[RolloutInferRequest],
    request_config: RequestConfig,
    *,
    timeout: float | None = None,
) -> list[dict[str, Any]]:
    url = client.base_urls[index]
    content = {'infer_requests': [asdict(r) for r in requests], 'request_config': asdict(request_config)}
    try:
        response = _send(client.sessions[index], f'{url}/infer/', {**content, 'use_tqdm': False}, timeout)
        if response.status_code != 200:
            raise ServerError(_refusal(url, response))
        items = response.json()
    except JSONDecodeError as e:
        raise ServerError(f'The answer of the rollout server {url} is cut off, or no JSON: {e}') from None
    except ReadTimeout:
        error = ServerError(f'The rollout server {url} has not answered for {timeout:g} s.')
        error.silent = True
        raise error from None
    except RequestException as e:
        raise ServerError(
            f'The rollout server {url} can not be reached, or went away ({type(e).__name__}: {e}).'
        ) from None
    except (ValueError, KeyError, TypeError, IndexError) as e:  # what `unpack` raises for packed answers
        raise _unreadable(url, e) from None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _unreadable(url, TypeError(f'{type(items).__name__} instead of a list of outputs'))
    return items


def _send(session: Session, url: str, content: dict[str, Any], timeout: float | None) -> Response:
    try:
        return session.post(url, json=content, timeout=timeout)
    except ConnectionError as e:
        if not _was_closed(e):
            raise
    # A server closes connections that were idle for some seconds, and a request may meet that half-way. One that has
    # died refuses the next connection.
    return session.post(url, json=content, timeout=timeout)


def _was_closed(error: ConnectionError) -> bool:
    """By the other side, before it answered anything."""
    reason = error.args[0] if error.args else None
    return isinstance(reason, ProtocolError) and any(
        isinstance(part, (ConnectionResetError, BrokenPipeError)) for part in reason.args
    )


def _unreadable(url: str, error: Exception) -> ServerError:
    what = ' '.join(str(error).split())[:MAX_SHOWN]
    return ServerError(
        f'The answer of the rollout server {url} can not be read ({type(error).__name__}: {what}). '
        'Do trainer and server have the same treepo_swift and ms-swift?'
    )


def _refusal(url: str, response: Response) -> str:
    if response.status_code in (401, 403):
        return (
            f'The rollout server {url} wants its API key (it answered {response.status_code}). Name a netrc file by '
            f'NETRC in the environment of this command, with the line `machine {urlparse(url).hostname} login rollout '
            'password KEY`; the server needs the plugin too.'
        )
    try:
        detail = str(response.json()['detail'])
    except (ValueError, KeyError, TypeError):
        detail = f'{response.text[:MAX_SHOWN]!r}. Its log says why; its worker process may have ended'
    return f'The rollout server {url} failed ({response.status_code}): {detail}'


def probe_servers(
    client: VLLMInferClient,
    *,
    token_ids: list[int] | None = None,
    config: TreeConfig | None = None,
    timeout: float | None = None,
) -> list[dict[str, Any] | None]:
    """One probe for each server; None where it knows no probes.

    A server scores `token_ids`, and raises where it can not follow `config`.
    """
    with ThreadPoolExecutor(client.num_servers) as threads:
        return list(threads.map(lambda i: _probe(client, i, token_ids, config, timeout), range(client.num_servers)))


def _probe(
    client: VLLMInferClient, index: int, token_ids: list[int] | None, config: TreeConfig | None, timeout: float | None
) -> dict[str, Any] | None:
    note = RequestNote(mode='probe', token_ids=token_ids, config=None if config is None else config.to_note()).to_dict()
    request = RolloutInferRequest(messages=[{'role': 'user', 'content': 'probe'}], data_dict={REQUEST_KEY: note})
    items = _post(client, index, [request], RequestConfig(max_tokens=1, return_details=True), timeout=timeout)
    # A server without the plugin just answers the question.
    answer: dict[str, Any] | None = (items[0].get('rollout_infos') or {}).get(REQUEST_KEY) if items else None
    return answer


def death(client: VLLMInferClient, index: int) -> ServerError | None:
    """Why the server's worker or its engine does not work any more; None where they score two tokens.

    swift's ``/health`` is answered by the process in front of them, and says ok when they have died.
    """
    try:
        _probe(client, index, [0, 0], None, ALIVE_SECONDS)
    except ServerError as e:
        return e
    return None


def find_trees(client: VLLMInferClient) -> list[tuple[str, dict[str, Any]]]:
    """(url, engine info) of every server; empty where none grows trees."""
    answers = probe_servers(client)
    if any(answers) and not all(answers):
        plain = [url for url, answer in zip(client.base_urls, answers, strict=True) if not answer]
        raise ConfigError(
            f'Some rollout servers grow trees and others do not: {", ".join(plain)} '
            'need --multi_turn_scheduler treepo too.'
        )
    return [(url, answer['engine']) for url, answer in zip(client.base_urls, answers, strict=True) if answer]

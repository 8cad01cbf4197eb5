"""An API key from the server's environment to every request of swift's own client, over HTTP."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from requests.auth import HTTPBasicAuth

pytest.importorskip('swift')
pytest.importorskip('vllm')
from swift.pipelines.infer.rollout import SwiftRolloutDeploy
from swift.rlhf_trainers import VLLMInferClient
from swift.rlhf_trainers.vllm_client import VLLMClient

from tests.integration.fake_engine import FakeEngine
from tests.integration.rollout_server import serving
from tests.integration.test_servers import grow, scheduler
from tests.integration.test_servers import requests as batch
from treepo_swift.compat.versions import UnsupportedVersion
from treepo_swift.server import api_key
from treepo_swift.server.api_key import KEY_ENV, REFUSED, guard_server, key_in
from treepo_swift.trainer.servers import ServerError, death, find_trees
from treepo_swift.wire.packing import accept_packed

KEY = 's3cret:with/colon'


@pytest.fixture
def netrc(monkeypatch, tmp_path) -> Iterator[Path]:
    """The file that NETRC names; it holds the key for 127.0.0.1. The server of the test has the guard."""
    monkeypatch.setattr(SwiftRolloutDeploy, '_register_rl_rollout_app', SwiftRolloutDeploy._register_rl_rollout_app)
    guard_server()
    guard_server()
    file = tmp_path / 'netrc'
    file.write_text(f'machine 127.0.0.1 login rollout password {KEY}\n')
    monkeypatch.setenv('NETRC', str(file))
    monkeypatch.setenv(KEY_ENV, KEY)
    yield file


def test_swifts_client_with_a_netrc_file_reaches_every_route(netrc, caplog, capfd):
    with serving(scheduler(FakeEngine())) as server:
        assert KEY_ENV not in os.environ  # not for the worker
        client = VLLMClient(base_urls=[server.url], connection_timeout=30)
        # What it asks first, before plugins are loaded: `init_communicator` asks for this, and then opens the port.
        response = client.sessions[0].get(f'{server.url}/get_world_size/')
        assert response.status_code != 401, response.text
        client.close_communicator()
        assert not [record for record in caplog.records if 'close failed' in record.message]
    os.environ[KEY_ENV] = KEY
    with serving(scheduler(FakeEngine())) as server:  # the fake worker of the first one knows no communicator
        client = VLLMClient(base_urls=[server.url], connection_timeout=30)
        accept_packed(client.sessions)
        assert find_trees(client) and death(client, 0) is None
        assert len(grow(client, batch(['a', 'b']))) == 8
    assert KEY not in caplog.text and KEY not in ''.join(capfd.readouterr())


def test_without_the_key_only_health_answers(netrc):
    netrc.unlink()
    with serving(scheduler(FakeEngine())) as server:
        client = VLLMInferClient(base_urls=[server.url], connection_timeout=30)
        with pytest.raises(ServerError, match=r'wants its API key \(it answered 401\).*`machine 127.0.0.1 login roll'):
            find_trees(client)
        wrong = base64.b64encode(b'rollout:wrong').decode()
        for header in (None, '', 'Bearer', 'Bearer wrong', f'Bearer {KEY}x', KEY, f'Basic {wrong}', 'Basic !', 'Basic'):
            headers = {} if header is None else {'Authorization': header}
            for method, route in (
                ('post', 'infer/'),
                ('get', 'get_world_size/'),
                ('get', 'openapi.json'),
                ('get', 'x'),
            ):
                response = requests.request(method, f'{server.url}/{route}', headers=headers, json={})
                assert (response.status_code, response.json()) == (401, {'detail': REFUSED}), (header, route)
        assert requests.get(f'{server.url}/health/').status_code == 200
        assert not server.worker.batches
        for good in ({'headers': {'Authorization': f'Bearer {KEY}'}}, {'auth': HTTPBasicAuth('anybody', KEY)}):
            assert requests.get(f'{server.url}/openapi.json', **good).status_code == 200


def test_a_server_without_a_key_takes_whatever_comes(netrc, monkeypatch):
    monkeypatch.delenv(KEY_ENV)
    with serving(scheduler(FakeEngine())) as server:
        assert find_trees(VLLMInferClient(base_urls=[server.url], connection_timeout=30))


def test_a_key_on_the_command_line_holds_too(netrc, monkeypatch):
    monkeypatch.delenv(KEY_ENV)
    with serving(scheduler(FakeEngine()), api_key=KEY) as server:
        assert requests.post(f'{server.url}/infer/', json={}, auth=HTTPBasicAuth('x', 'y')).status_code == 401
        assert find_trees(VLLMInferClient(base_urls=[server.url], connection_timeout=30))


def test_a_key_that_no_header_can_hold_is_refused_without_being_said(netrc, monkeypatch):
    for key in ('schlüssel', 'two words', 'line\nbreak'):
        monkeypatch.setenv(KEY_ENV, key)
        with pytest.raises(ValueError, match='printable ASCII') as caught, serving(scheduler(FakeEngine())):
            pass
        assert key not in str(caught.value)


def test_an_ms_swift_without_a_place_for_the_guard_is_refused_where_a_key_is_asked_for(netrc, monkeypatch):
    monkeypatch.delattr(SwiftRolloutDeploy, '_register_rl_rollout_app')
    with pytest.raises(UnsupportedVersion, match=KEY_ENV):
        guard_server()
    monkeypatch.delenv(KEY_ENV)
    guard_server()


def test_keys_are_compared_in_constant_time(netrc, monkeypatch):
    compared = []
    monkeypatch.setattr(api_key.secrets, 'compare_digest', lambda a, b: compared.append((a, b)) or a == b)
    with serving(scheduler(FakeEngine())) as server:
        find_trees(VLLMInferClient(base_urls=[server.url], connection_timeout=30))
    assert (KEY.encode(), KEY.encode()) in compared


def test_a_key_is_found_in_either_form():
    assert key_in(b'Bearer abc') == key_in(b'basic ' + base64.b64encode(b'who:abc')) == b'abc'
    assert key_in(b'Digest abc') == key_in(b'Basic ####') == key_in(b'') == b''


def test_the_plugin_guards_the_server_of_its_process():
    code = (
        'import swift.pipelines.infer.rollout as r, treepo_swift.plugin as p\n'
        'p.register()\nprint(hasattr(r.SwiftRolloutDeploy._register_rl_rollout_app, "__wrapped__"))'
    )
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines()[-1] == 'True', ran.stderr

"""The viewer in a real browser: it draws, follows clicks and keys, filters, and lets no model text do anything."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trees import answer, large, node, small, tree
from treepo_swift.view.page import describe, html

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip(
        f'no browser here ({", ".join(BROWSERS)}): scripts/browser_env.sh installs one', allow_module_level=True
    )
playwright = pytest.importorskip('playwright.sync_api')

HOSTILE = [
    '<script>window.stolen = 1</script>',
    '<img src=x onerror="window.stolen = 2">',
    '</script><script>window.stolen = 3</script>',
    '<!--<script>',
    '"><svg onload=window.stolen=4>',
    "javascript:alert('5')",
    '${window.stolen = 6}',
    'line\u2028separator\u2029and \u202eturned\u202c \x1b[31mred\x07 \ud800half',
    '<a href="https://example.org/">go</a><style>body{display:none}</style>',
    '{{constructor.constructor("window.stolen=7")()}}',
    '🎄 Zwölf € 十二',
]


def write(folder: Path, records: list[Any]) -> Path:
    path = folder / 'trees.html'
    with path.open('w', encoding='utf-8', errors='replace', newline='') as file:
        file.writelines(html(describe(records, 'a test')))
    return path


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page of these trees. Whatever it asks of a network, says on its console or throws fails the test."""
    context = browser.new_context(viewport={'width': 1280, 'height': 800})
    context.set_default_timeout(10_000)
    troubles: list[str] = []

    def open_page(records: list[Any], address: str = '', prepare: Callable[[Any], Any] = lambda page: None) -> Any:
        path = write(tmp_path, records)
        page = context.new_page()
        prepare(page)
        page.on('console', lambda message: troubles.append(f'console: {message.text}'))
        page.on('pageerror', lambda error: troubles.append(f'error: {error}'))
        page.on('dialog', lambda dialog: troubles.append(f'dialog: {dialog.message}'))
        page.on('request', lambda request: None if request.url.startswith('file:') else troubles.append(request.url))
        page.goto(f'{path.as_uri()}{address}')
        page.wait_for_selector('html[data-ready=yes]')
        return page

    yield open_page
    context.close()
    assert troubles == []


def until(page: Any, condition: Callable[[], bool]) -> None:
    """Playwright's own `wait_for_function` needs eval, which the page's policy refuses."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def rows(page: Any) -> list[str]:
    return page.eval_on_selector_all('#list li', 'rows => rows.map(row => row.dataset.position)')


def chosen_node(page: Any) -> str:
    return page.locator('#node-line').inner_text()


FOUR = [
    small('first', step=1),
    small('second', step=2, rewards=(1.0, 1.0, 1.0), text=' dozen'),
    small('third', step=3, rewards=(0.0, 1.0, 0.5)),
    tree('lone', [node(1, 0, ['Yes', '.'])], [answer(1, 1.0, stop='hook')], step=3, prompt='Is it?'),
]


def test_a_tree_is_drawn_with_its_marks(show):
    page = show(FOUR)
    assert page.locator('#list li').count() == 4
    assert page.locator('#tree .edge').count() == 6 + 1  # the path that failed has an edge of its own
    assert page.locator('#tree .fork .dot').count() == 1
    assert page.locator('#tree .diamond').count() == 1
    assert page.locator('#tree .environment .edge').count() == 1
    words = page.locator('#tree').text_content()
    assert 'failed: step of MyScheduler raised KeyError' in words and 'token limit' in words
    heights = page.eval_on_selector_all('#tree text', 'texts => texts.map(text => text.getAttribute("y"))')
    assert len(set(heights)) == 4, 'no label lies on another'
    # The width of an edge follows its tokens, its colour the advantage.
    widths = page.eval_on_selector_all(
        '#tree .edge', 'edges => edges.map(e => parseFloat(e.getAttribute("stroke-width")))'
    )
    assert max(widths) > min(w for w in widths if w != 1.5)
    colours = set(page.eval_on_selector_all('#tree .edge', 'edges => edges.map(e => getComputedStyle(e).stroke)'))
    assert len(colours) > 2


def test_a_click_shows_a_node_with_its_text_and_tokens(show):
    page = show(FOUR)
    page.locator('#tree [data-node="5"] .dot').click()
    assert 'Segment 5' in chosen_node(page)
    assert 'We count: maybe eleven<tool>11</tool> eleven.' == ''.join(
        page.eval_on_selector_all(
            '#panel .part:not(.of-prompt)',
            'parts => parts.map(p => [...p.childNodes].slice(1).map(n => n.textContent).join(""))',
        )
    )
    assert page.locator('#panel .environment').inner_text().endswith('<tool>11</tool>')
    page.locator('#panel .chosen .token').first.hover()
    assert 'token 100' in page.locator('#token-line').inner_text()
    assert page.locator('#panel .token[style*=background]').count() > 0
    page.select_option('#heat', 'none')
    assert page.locator('#panel .token[style*=background]').count() == 0
    page.check('#whitespace')
    assert '·eleven' in page.locator('#panel .chosen').inner_text()


def test_filters_and_orders(show):
    page = show(FOUR)
    page.select_option('#by-contrast', 'flat')
    assert rows(page) == ['1', '3'] and '2 of 4' in page.locator('#count').inner_text()
    page.check('#by-failed')
    assert rows(page) == ['1']
    page.click('#reset')
    until(page, lambda: len(rows(page)) == 4)
    page.select_option('#by-stop', 'hook')
    assert rows(page) == ['3']
    page.select_option('#by-stop', '')
    page.select_option('#by-step', '3')
    assert rows(page) == ['2', '3']
    page.select_option('#by-step', '')
    page.select_option('#sort', 'worst')
    assert rows(page) == ['0', '2', '1', '3']
    page.check('#by-fallback')
    assert rows(page) == ['0', '2', '1']


def test_search_finds_what_crosses_nodes_and_marks_it(show):
    page = show(FOUR)
    page.fill('#search', 'COUNT: DOZ')
    until(page, lambda: rows(page) == ['1'])
    page.locator('#list li').click()
    marks = page.locator('#panel mark')
    until(page, lambda: ''.join(marks.all_inner_texts()) == 'count: doz')
    page.fill('#search', 'dozen')
    until(page, lambda: marks.all_inner_texts() == ['dozen'])
    assert rows(page) == ['1'] and page.locator('#tree .found .dot').count() == 1


def test_the_keyboard_goes_everywhere(show):
    page = show(FOUR)
    press = page.keyboard.press
    press('j')
    until(page, lambda: 'tree=second' in page.url)
    press('k')
    until(page, lambda: 'tree=first' in page.url)
    press(']')  # the same prompt, a step later
    until(page, lambda: 'tree=second' in page.url)
    assert page.locator('#step-now').inner_text() == '2 (2 of 3)'
    for key, node_line in (('ArrowLeft', 'Segment 1'), ('ArrowRight', 'Segment 2'), ('ArrowDown', 'Segment 3')):
        press(key)
        assert node_line in chosen_node(page)
    press('3')
    assert 'mean over depths (Eq. 5)' in page.locator('#panel').inner_text()
    press('c')
    assert 'colour=value' in page.url
    press('/')
    page.keyboard.type('jk')
    assert page.input_value('#search') == 'jk' and 'tree=second' in page.url
    press('Escape')
    press('?')
    assert page.locator('#help').is_visible()


def test_the_slider_moves_one_prompt_over_steps(show):
    page = show(FOUR)
    page.locator('#step-slider').fill('2')
    until(page, lambda: 'tree=third' in page.url)
    page.locator('#list li').nth(3).click()
    until(page, lambda: 'tree=lone' in page.url)
    assert page.locator('#step-slider').is_disabled()


def test_an_address_opens_what_it_names(show):
    page = show(FOUR, '#tree=third&node=3&colour=logprob&tab=answers&search=eleven')
    assert 'Segment 3' in chosen_node(page) and page.locator('#colour').input_value() == 'logprob'
    assert page.locator('#panel tbody tr').count() == 4 and page.input_value('#search') == 'eleven'
    page.locator('#panel tbody tr').nth(2).click()
    assert 'Segment 6' in chosen_node(page) and 'node=6' in page.url


def test_estimators_colour_anew(show):
    page = show(FOUR)
    seen = set()
    for name in ('as trained', 'grpo', 'treerl'):
        page.select_option('#estimator', name)
        seen.add(page.locator('#high').inner_text())
        assert f'({name})' in chosen_node(page)
    assert len(seen) == 3
    page.select_option('#colour', 'entropy')
    assert page.locator('#estimator-label').is_hidden()


def test_two_answers_are_compared_from_their_fork(show):
    page = show(FOUR, '#tree=first&node=2&tab=compare')
    assert 'after segment 1: 3 tokens are the same' in page.locator('#panel').inner_text()
    assert page.locator('#panel .only-left').all_inner_texts() and page.locator('#panel .only-right').all_inner_texts()
    assert 'We count' not in page.locator('#panel .columns').inner_text()


def test_model_text_is_inert(show):
    """Wherever a text can stand, in every tab, and searched for."""
    records = []
    for number, text in enumerate(HOSTILE):
        record = small(f'evil{number} {text}', text=text)
        record.prompt = f'<|im_start|>user\n{text}<|im_end|>'
        record.trajectories[3].error = text
        records.append(record)
    page = show(records)
    for number, text in enumerate(HOSTILE):
        until(page, lambda address=f'tree=evil{number}': address in page.url)
        for tab in '2345':
            page.keyboard.press(tab)
        page.keyboard.press('1')
        said = page.locator('#panel .part.chosen').inner_text()
        # What is no letter may be shown by its code, but nothing is lost.
        assert re.sub(r'\W|U\+\w{4}', '', said) == re.sub(r'\W', '', f'2{text}.'), text
        page.keyboard.press('j')
    page.fill('#search', HOSTILE[0][:12])
    until(page, lambda: 0 < len(rows(page)) < len(HOSTILE))
    assert page.evaluate('window.stolen') is None and page.locator('#side').is_visible()
    assert page.evaluate('document.querySelectorAll("img, iframe, a, style:not(head style), main script").length') == 0


def test_odd_characters_are_named(show):
    page = show([small('evil', text='a\u202eb\x1b[0m')], '#tree=evil&node=2')
    assert page.locator('#panel .odd').all_inner_texts() == ['U+202E', 'U+001B']


def test_the_pages_policy_refuses_scripts_that_are_not_its_own(browser, tmp_path):
    """In depth: even where a text became markup, nothing of it would run."""
    path = write(tmp_path, FOUR)
    evil = '<script>window.stolen = 1</script><img src=x onerror="window.stolen = 2"><div id="shell">'
    path.write_text(path.read_text().replace('<div id="shell">', evil))
    page = browser.new_page()
    refused: list[str] = []
    page.on('console', lambda message: refused.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector('html[data-ready=yes]')
    assert page.evaluate('window.stolen') is None and page.locator('#list li').count() == 4
    assert len([text for text in refused if 'Content Security Policy' in text]) >= 2
    page.close()


def test_a_thousand_trees_open_at_once_and_stay_smooth(show):
    """16 paths of 14 segments each. Wall time, measured on two cores, is in docs/viewer.md; here CPU time counts."""
    some = [large('t', seed=seed, tokens=8) for seed in range(25)]
    records = [dataclasses.replace(some[i % 25], tree=f't{i}', step=i // 8) for i in range(1000)]
    sessions: list[Any] = []

    def prepare(page: Any) -> None:
        session = page.context.new_cdp_session(page)
        session.send('Performance.enable', {'timeDomain': 'threadTicks'})
        sessions.append(session)

    def seconds() -> float:
        """CPU time of the page's main thread so far."""
        metrics = sessions[0].send('Performance.getMetrics')['metrics']
        return next(metric['value'] for metric in metrics if metric['name'] == 'TaskDuration')

    page = show(records, prepare=prepare)
    opened = seconds()
    assert len(some[0].nodes) == 16 * 14 == page.locator('#tree .edge').count()
    assert page.locator('#list li').count() == 1000
    for i in range(1, 11):
        page.keyboard.press('j')
        until(page, lambda address=f'tree=t{i}&': address in page.url)
    moved = (seconds() - opened) / 10
    print(f'opened with {opened:.2f} s of CPU, the next tree with {moved:.3f} s')
    assert opened < 3 and moved < 0.3

"""Makes the pictures of the viewer in docs/images, from the trees of a run.

    bash examples/quickstart/run.sh
    .venv/bin/python scripts/screenshots.py output/quickstart/seed-42-steps-40/train

Needs chromium and the test tools. The pictures in the repository are of 12 steps of the quickstart over its first 16
problems, so that each prompt came back on several steps: `examples/quickstart/README.md` says how.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from treepo_swift.view import load
from treepo_swift.view.page import describe, html
from treepo_swift.wire.record import TreeRecord

IMAGES = Path(__file__).parents[1] / 'docs' / 'images'
SIZE = {'width': 1360, 'height': 820}


def main() -> None:
    parser = argparse.ArgumentParser(description='Make the pictures of the viewer.')
    parser.add_argument('run', type=Path, help='the output folder of a run with trees')
    args = parser.parse_args()
    records = load(args.run)
    shown = max(records, key=interest)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / 'trees.html'
        page.write_text(''.join(html(describe(records, 'output/quickstart/train'))), encoding='utf-8')
        take(page.as_uri(), shown)


def interest(record: TreeRecord) -> tuple[float, ...]:
    """A tree is worth a picture where its forks decide between right and wrong, and where one branch fell back."""
    lowest, highest = (pick((t.reward or 0 for t in record.trajectories), default=0) for pick in (min, max))
    deciding = [node for node in record.nodes if node.size > 1 and lowest < (node.value or 0) < highest]
    fallbacks = sum(t.fallback_from is not None for t in record.trajectories)
    return len(deciding) + 0.5 * min(fallbacks, 1), record.step


def take(address: str, record: TreeRecord) -> None:
    from playwright.sync_api import sync_playwright

    paths = record.paths()
    forks = {node.parent for node in record.nodes if node.size > 1}
    best = max(
        (index for index, t in enumerate(record.trajectories) if t.reward),
        key=lambda index: (sum(node.size > 1 for node in paths[index]), len(paths[index])),
    )
    leaf, trunk = paths[best][-1].id, next(node.id for node in paths[best] if node.id in forks or node.size > 1)
    pictures: list[tuple[str, str, str]] = [
        ('viewer.png', 'light', f'tree={record.tree}&node={leaf}'),
        ('viewer-compare.png', 'light', f'tree={record.tree}&node={leaf}&tab=compare&colour=value'),
        ('viewer-subgroups.png', 'dark', f'tree={record.tree}&node={trunk}&tab=subgroups&estimator=treepo'),
    ]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which('chromium') or shutil.which('google-chrome'))
        for name, scheme, what in pictures:
            context: Any = browser.new_context(viewport=SIZE, color_scheme=scheme)
            page = context.new_page()
            page.goto(f'{address}#{what}')
            page.wait_for_selector('html[data-ready=yes]')
            page.screenshot(path=IMAGES / name)
            context.close()
            print(IMAGES / name, (IMAGES / name).stat().st_size)
        browser.close()


if __name__ == '__main__':
    main()

"""Compare tree methods with plain GRPO at equal decoded tokens, by training a small model on generated tasks."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treepo_swift.lab.arena.settings import Matrix

EPILOG = """MATRIX.yaml names a task (decisions, opening, rare), methods, learning rates and seeds:
  treepo-swift arena examples/arena/decisions/matrix.yaml --out output/arena/decisions
Each run is a line of FOLDER/results.jsonl. Runs that are there are not made again, so a matrix that was stopped goes on
when the same command is given again. It needs torch and transformers, and no GPU: a run takes less than a minute of one
core. With `loop: swift` in the matrix each run is a real one, of `swift rollout` and `swift rlhf`, in minutes.
docs/learning.md says what it measures, and what came of it."""

KEPT = 'matrix.yaml'
"""The matrix beside its results, for ``--report`` alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument('matrix', type=Path, nargs='?', metavar='MATRIX.yaml', help='what is to be run')
    parser.add_argument('--out', type=Path, metavar='FOLDER', help='where results go, and are')
    parser.add_argument('--report', type=Path, metavar='FOLDER', help='report what FOLDER has; train nothing')
    parser.add_argument(
        '--beside',
        type=Path,
        metavar='FOLDER',
        help="with --report: how far its runs are from this folder's, e.g. of another loop",
    )
    parser.add_argument(
        '--snr',
        type=int,
        metavar='N',
        help="no training: signal and noise of each method's gradient over N resampled batches",
    )
    parser.add_argument('--threads', type=int, default=1, metavar='N', help='of torch (default 1)')
    parser.add_argument(
        '--cache',
        type=Path,
        default=Path('output/arena/models'),
        metavar='DIR',
        help='where pre-trained models are kept (default: %(default)s)',
    )


def run(args: argparse.Namespace) -> int:
    try:
        return _arena(args)
    except ImportError as e:
        if e.name not in ('torch', 'transformers', 'safetensors'):
            raise
        raise ValueError(f'{e}. An arena trains with torch and transformers; ms-swift brings both.') from e


def _arena(args: argparse.Namespace) -> int:
    from treepo_swift.lab.arena import arena
    from treepo_swift.lab.arena.settings import Matrix
    from treepo_swift.lab.services import guarded

    if args.report:
        if args.matrix or args.out or args.snr:
            raise ValueError('--report FOLDER takes no matrix, no --out and no --snr: FOLDER has its matrix.')
        if args.beside:
            _beside(args.report, args.beside)
        else:
            _report(Matrix.read(args.report / KEPT), args.report)
        return 0
    if args.beside:
        raise ValueError('--beside FOLDER needs --report FOLDER: it compares two.')
    if not (args.matrix and args.out):
        raise ValueError('give MATRIX.yaml and --out FOLDER, or --report FOLDER.')
    if args.threads < 1:
        raise ValueError(f'--threads {args.threads}: at least 1.')
    matrix = Matrix.read(args.matrix)
    if matrix.loop == 'swift' and args.snr is not None:
        raise ValueError('--snr measures gradients in this process: give it a matrix without loop: swift.')
    args.out.mkdir(parents=True, exist_ok=True)
    if args.snr is not None:
        _signal(matrix, args)
        return 0
    if args.matrix.resolve() != (args.out / KEPT).resolve():
        shutil.copyfile(args.matrix, args.out / KEPT)

    def study() -> None:
        arena.run_arena(matrix, args.out, cache=args.cache, threads=args.threads, say=_say)
        _report(matrix, args.out)

    # Servers and trainings must not outlive a command that is stopped.
    return guarded(study, 'The same command goes on where it stopped.')


def _report(matrix: Matrix, folder: Path) -> None:
    from treepo_swift.lab.arena.plot import plot
    from treepo_swift.lab.arena.report import report
    from treepo_swift.lab.arena.runs import RESULTS, ResultsFile
    from treepo_swift.lab.bench.picture import can_draw

    runs = ResultsFile(folder / RESULTS).of(matrix)
    text = report(matrix, runs)
    written = [folder / 'report.md']
    written[0].write_text(text, encoding='utf-8')
    if can_draw():
        written.append(folder / 'report.png')
        plot(matrix, runs, written[-1])
    else:
        print('No plot: matplotlib is not installed (`pip install matplotlib`, then give --report).')
    print(text)
    print(f'written: {", ".join(map(str, written))}')


def _beside(*folders: Path) -> None:
    from treepo_swift.lab.arena.report import beside
    from treepo_swift.lab.arena.runs import RESULTS, ResultsFile
    from treepo_swift.lab.arena.settings import Matrix

    matrices = [Matrix.read(folder / KEPT) for folder in folders]
    runs = [ResultsFile(folder / RESULTS).of(matrix) for folder, matrix in zip(folders, matrices, strict=True)]
    text = beside(matrices[0], runs[0], matrices[1], runs[1])
    (folders[0] / 'beside.md').write_text(text, encoding='utf-8')
    print(text)
    print(f'written: {folders[0] / "beside.md"}')


def _signal(matrix: Matrix, args: argparse.Namespace) -> None:
    from treepo_swift.lab.arena.signal import measure, rows
    from treepo_swift.lab.bench.table import table

    text = table(rows(measure(matrix, args.snr, args.cache, threads=args.threads, say=_say)), transpose=False)
    (args.out / 'signal.md').write_text(f'{text}\n', encoding='utf-8')
    print(text)
    print(f'written: {args.out / "signal.md"}')


def _say(text: str) -> None:
    print(text, flush=True)

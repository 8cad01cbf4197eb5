"""``treepo-swift``: small commands around the plugin."""

from __future__ import annotations

import argparse
import sys

from treepo_swift.compat.quiet_exit import quiet_exit

from . import arena, bench, config, doctor, eval, plugin, sample, simulate, view

COMMANDS = {
    'doctor': doctor,
    'plugin': plugin,
    'config': config,
    'sample': sample,
    'eval': eval,
    'arena': arena,
    'view': view,
    'bench': bench,
    'simulate': simulate,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status is 0 where all is well."""
    quiet_exit()
    parser = argparse.ArgumentParser(prog='treepo-swift', description='Tree rollouts for GRPO with ms-swift.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    given, engine = _cut(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    if engine is not None:
        args.engine = engine
    try:
        return COMMANDS[args.command].run(args)
    except (OSError, ValueError) as e:
        # What was asked for can't be done, and the message says why: a traceback would hide it.
        print(f'treepo-swift {args.command}: {e}', file=sys.stderr)
        return 1


def _cut(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """The engine's options behind -- apart, for commands that take them: argparse allows none behind a positional."""
    if not argv or not getattr(COMMANDS.get(argv[0]), 'TAKES_ENGINE_OPTIONS', False):
        return argv, None
    end = argv.index('--') if '--' in argv else len(argv)
    return argv[:end], argv[end + 1 :]


if __name__ == '__main__':
    sys.exit(main())

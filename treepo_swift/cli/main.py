"""``treepo-swift``: small commands around the plugin."""

from __future__ import annotations

import argparse
import sys

from treepo_swift.compat.quiet_exit import quiet_exit

from . import bench, config, doctor, plugin, simulate, view

COMMANDS = {'doctor': doctor, 'plugin': plugin, 'config': config, 'view': view, 'bench': bench, 'simulate': simulate}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status is 0 where all is well."""
    quiet_exit()
    parser = argparse.ArgumentParser(prog='treepo-swift', description='Tree rollouts for GRPO with ms-swift.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    return COMMANDS[args.command].run(args)


if __name__ == '__main__':
    sys.exit(main())

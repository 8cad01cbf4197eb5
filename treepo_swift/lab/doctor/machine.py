"""This machine: free memory, free disk, and the ports that a run wants."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from .finding import Finding, fail, ok, warn

GIB = 2**30
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHM = 10 * GIB, 8 * GIB, 1 * GIB
"""The quickstart needs 1 GiB of disk and 6 GiB of memory; a checkpoint of a 7B model 15 GiB, its optimizer 80."""


def disk(folder: Path) -> Finding:
    """`folder` is where checkpoints go; it need not exist yet."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < LITTLE_DISK:
        return warn('disk', f'{free / GIB:.1f} GiB free at {there}', 'free some, or set --output_dir elsewhere')
    return ok('disk', f'{free / GIB:.0f} GiB free at {there}')


def memory() -> Finding:
    try:
        free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
    except (OSError, ValueError, StopIteration):
        return ok('memory', 'not known here')
    if free < LITTLE_MEMORY:
        return warn('memory', f'{free / GIB:.1f} GiB available', 'end what else runs here; see docs/gpu.md for sizes')
    return ok('memory', f'{free / GIB:.0f} GiB available')


def shared_memory() -> Finding:
    """vLLM's processes talk through it; containers have 64 MiB by default."""
    folder = Path('/dev/shm')
    if not folder.is_dir():
        return ok('shared memory', 'no /dev/shm here')
    free = shutil.disk_usage(folder).free
    if free < LITTLE_SHM:
        return warn(
            'shared memory',
            f'{free / 2**20:.0f} MiB free in /dev/shm, through which vLLM and torch pass data',
            'start the container with --ipc=host or --shm-size=16g',
        )
    return ok('shared memory', f'{free / GIB:.0f} GiB free in /dev/shm')


def port(number: int, purpose: str) -> Finding:
    """Whether a command that is about to start can have this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('127.0.0.1', number))
        except OSError:
            return fail(
                'port',
                f'{number} ({purpose}) is taken; `swift rollout` would take the next free one without a word, and the '
                'trainer would meet somebody else',
                f'end what listens there (`ss -ltnp sport = :{number}` names it), or choose another port',
            )
    return ok('port', f'{number} is free ({purpose})')

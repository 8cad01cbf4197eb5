"""The process in which `maths.py` checks mathematical answers: JSON lines in, JSON lines out. Nothing imports this.

It loads swift's `MathAccuracy` and math_verify, and of swift nothing else, which would take ten times as long.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

MEMORY = 8 << 30
"""Bytes of address space that a check may take, a sympy expression being able to ask for any number of them."""


def load_math_accuracy() -> Any:
    """swift's own class, from its file: the package around it is stood in for by what the file imports."""
    package = importlib.util.find_spec('swift')
    assert package is not None and package.origin is not None, 'ms-swift is not installed'
    file = Path(package.origin).parent / 'rewards' / 'orm.py'
    stand_in: Any = types.ModuleType('swift.infer_engine')
    stand_in.InferRequest = object
    sys.modules.update({'swift': types.ModuleType('swift'), 'swift.infer_engine': stand_in})
    spec = importlib.util.spec_from_file_location('swift_orm', file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MathAccuracy()


def main() -> None:
    # What libraries print goes nowhere; answers have a way of their own.
    answers = os.fdopen(os.dup(1), 'w', encoding='ascii')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    check = load_math_accuracy()
    for line in sys.stdin:
        job = json.loads(line)
        # Where nobody is left to kill it, the kernel does.
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(used.ru_utime + used.ru_stime + job['seconds']) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
        try:
            answer = {'reward': check([job['completion']], [job['solution']])[0]}
        except (Exception, SystemExit) as e:
            answer = {'error': f'{type(e).__name__}: {e}'}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    main()

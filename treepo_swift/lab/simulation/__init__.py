"""Simulation of rollouts at any scale: the real tree search over engines of which only the time is simulated."""

from .model import EngineModel
from .result import Result
from .setup import SCHEDULES, Setup
from .simulate import simulate
from .validation import Measurement, read_bench

__all__ = ['SCHEDULES', 'EngineModel', 'Measurement', 'Result', 'Setup', 'read_bench', 'simulate']

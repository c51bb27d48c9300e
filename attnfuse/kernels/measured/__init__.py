"""What ``attnfuse tune`` measured on this machine, and how it corrects what the model says that kernels cost.

Measurements are kept in one file for each device, versions and registry, under the case they were made of. A kernel's
correction is its measured time over its modelled one, so that a case serves sizes near its own. What was not measured
in a case that was counts as off by as much as the others there, on geometric average: choices are ratios.
``ATTNFUSE_CALIBRATE=0`` leaves all to the model. A process reads its file once, so that its choices do not change.
"""

from __future__ import annotations

from attnfuse.kernels.measured.case import Case, case_of, rival
from attnfuse.kernels.measured.corrections import Measured, clear, fastest_schedule, forget, keep, near, state
from attnfuse.kernels.measured.machine import place, present

__all__ = [
    "Case",
    "Measured",
    "case_of",
    "clear",
    "fastest_schedule",
    "forget",
    "keep",
    "near",
    "place",
    "present",
    "rival",
    "state",
]

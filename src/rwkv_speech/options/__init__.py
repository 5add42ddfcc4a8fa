"""Every setting of the program, declared once, in groups: its name, default, help and check.

What a function needs is a group, not all of `Options`. On the command line the names are flat, and `--help` lists them
by group.
"""

from rwkv_speech.options.flags import peft_settings
from rwkv_speech.options.groups import (
    GROUPS,
    PEFT_METHODS,
    QUANTS,
    DataOptions,
    DecodingOptions,
    LiveOptions,
    MachineOptions,
    ModelOptions,
    ServingOptions,
    TrainingOptions,
)
from rwkv_speech.options.options import Options, environment_flags, goes_with, setting_fields

__all__ = [
    "GROUPS", "PEFT_METHODS", "QUANTS", "DataOptions", "DecodingOptions", "LiveOptions", "MachineOptions",
    "ModelOptions", "Options", "ServingOptions", "TrainingOptions", "environment_flags", "goes_with", "peft_settings",
    "setting_fields",
]  # fmt: skip

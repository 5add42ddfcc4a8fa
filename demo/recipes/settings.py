"""Prints the settings in the environment that decide what training learns: a recipe's memory of how it trained."""

import os

from rwkv_speech.options import setting_fields

for group, f in setting_fields():
    if group in ("model", "data", "training") and not f.metadata["resume_ignored"] and os.environ.get(f.name):
        print(f"{f.name}={os.environ[f.name]}")

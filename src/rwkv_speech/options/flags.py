"""How a setting is declared, and the values that flags take besides text and numbers."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any


def flag(default: Any, help: str, *, op: str | Sequence[str] = (), resume_ignored: bool = False, **how: Any) -> Any:
    """A setting: its default, its help, and what argparse needs besides (type, choices, nargs).

    op: the only operation, or operations, that take it.
    resume_ignored: an interrupted training run may go on under another value: it changes nothing in what is learnt, or
        only in what is still to come.
    type: that of the default, if there is one, else text.
    """
    ops = (op,) if isinstance(op, str) else tuple(op)
    how.setdefault("type", str if default in (None, MISSING) else type(default))
    return field(
        default=default, metadata={"help": help, "argparse": how, "ops": ops, "resume_ignored": resume_ignored}
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def seconds_or_0(text: str) -> float:
    return float(text) and seconds(text)


def decibels(text: str) -> list[float]:
    """A range as its ends, `5,20`."""
    values = [float(value) for value in text.split(",")]
    if len(values) != 2 or not -math.inf < values[0] <= values[1] < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no range; expected LOW,HIGH such as 5,20")
    return values


def name_list(text: str) -> list[str]:
    """Names joined by commas, each once."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names joined by commas, each once")
    return names


def trained_parts(text: str) -> str:
    """Parts joined by +, each once: adapter, state, and at most one method of peft."""
    parts = text.split("+")
    methods = [part for part in parts if part not in ("adapter", "state")]
    if not all(map(str.isidentifier, parts)) or len(set(parts)) < len(parts) or len(methods) > 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected adapter, state and one method of peft (lora, dora, miss, ...), or some of these, "
            "joined by +"
        )
    return text


def peft_settings(text: str) -> dict[str, Any]:
    """Settings of a method of peft: JSON, or `r=16,lora_alpha=32,target_modules=key+value`."""
    if text.lstrip().startswith("{"):
        return json.loads(text)
    found: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = map(str.strip, pair.partition("="))
        if not (name.isidentifier() and value) or name in found:
            raise argparse.ArgumentTypeError(f"{text!r}: expected JSON, or r=16,lora_alpha=32,target_modules=key+value")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value.split("+") if "+" in value else value
    return found


def device_list(text: str) -> int | list[int]:
    """A number of devices (`2`), or a list of their indices (`0,3` or `3,`)."""
    indices = [int(i) for i in text.split(",") if i.strip()]
    if not indices:
        raise argparse.ArgumentTypeError(f"{text!r} names no device")
    return indices if "," in text else positive(text)

"""What a value of a profile may be: of a size that some machine could have, nothing twice, a path, a host."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from erlib import paths

_Item = TypeVar("_Item")


def _distinct(values: list[_Item]) -> list[_Item]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]} is given twice, and would be measured once and counted twice")
    return values


Several = Annotated[list[_Item], Field(min_length=1, max_length=1000), AfterValidator(_distinct)]
Count = Annotated[int, Field(gt=0, le=1_000_000)]
Users = Annotated[int, Field(gt=0, le=20_000)]
"""Each has a connection of its own, and a host has some 28,000 ports for those."""
Repeats = Annotated[int, Field(gt=0, le=1000)]
Divisor = Annotated[float, Field(ge=0.001, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=1_000_000)]


def _matches(pattern: str, what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


# Names of folders and hosts stand in paths, NGINX's configuration and command lines: nothing that means more there.
Name = Annotated[str, _matches(r"[A-Za-z0-9][\w.-]{0,63}", "a name: up to 64 of A-Z a-z 0-9 . _ -, no . _ - first")]
Sha256 = Annotated[str, _matches(r"[0-9a-fA-F]{64}", "a sha256: 64 hexadecimal digits")]
SshHost = Annotated[str, _matches(r"\w[\w.@:/%\[\]-]{0,254}", "HOST or USER@HOST, as ssh knows it")]
RayCluster = Annotated[str, _matches(r"auto|[A-Za-z0-9][\w.-]{0,252}:[0-9]{1,5}", "auto or HOST:PORT")]


def _from_root(value: str) -> str:
    if not value.strip() or "://" in value or any(character < " " for character in value):
        raise ValueError(f"{value!r} is no path of a file or directory")
    try:
        path = paths.ROOT / Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{value!r}: there is no such home directory") from None
    if len(os.fsencode(path)) > 4095 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError("is longer than a path can be")
    return str(path)


def _from_root_or_url(value: str) -> str:
    return value if value.startswith(("http://", "https://")) else _from_root(value)


# A relative path starts at the repository, wherever a command is typed: notebooks run in a directory of their own.
LocalPath = Annotated[str, AfterValidator(_from_root)]
PathOrUrl = Annotated[str, AfterValidator(_from_root_or_url)]


def _is_address(value: str) -> str:
    if re.fullmatch(r"[0-9.]+", value):
        address = ipaddress.IPv4Address(value)
        if address.is_multicast or address.is_reserved:
            raise ValueError(f"{value} is no address of a host")
    return value


_HOST = r"[A-Za-z0-9]([\w.-]{0,251}[A-Za-z0-9])?"
Host = Annotated[str, _matches(_HOST, "an IPv4 address or the name of a host"), AfterValidator(_is_address)]

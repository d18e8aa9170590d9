"""Random damage to files, as disks, proxies and people cause it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

_VALUES = [None, True, -1, 0, 3.5, 1e308, 2**70, "", "x", "12", "\x1b[31mred", "a\0b", "../../etc", [], {}, [[]]]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))] if content else content


def emptied(content: bytes, chance: random.Random) -> bytes:
    return b""


def flipped(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\1"
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def zeroed(content: bytes, chance: random.Random) -> bytes:
    """Zero a block, as a disk may after a power failure."""
    start = chance.randrange(len(content) + 1)
    length = min(512, len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def garbage(content: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(max(len(content), 16))


def html(content: bytes, chance: random.Random) -> bytes:
    return b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"


def lengthened(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 600))


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    each.__name__: each for each in (cut, emptied, flipped, zeroed, garbage, html, lengthened)
}


def damage_file(path: Path, chance: random.Random) -> str:
    """Change the bytes of a file, remove it, or replace it by a folder; return the name of the damage."""
    name = chance.choice([*BYTES, "removed", "a folder"])
    if name == "removed":
        path.unlink()
    elif name == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(BYTES[name](path.read_bytes(), chance))
    return name


def damage_json(content: object, chance: random.Random) -> object:
    """Return a copy of a JSON value with one node replaced, removed or duplicated."""
    content = json.loads(json.dumps(content))
    nodes = [(parent, key) for parent in _containers(content) for key in _keys(parent)]
    if not nodes:
        return chance.choice(_VALUES)
    parent, key = chance.choice(nodes)
    change = chance.choice(["replace", "replace", "remove", "double"])
    if change == "replace":
        parent[key] = chance.choice(_VALUES)
    elif change == "remove":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent[f"{key} "] = parent[key]
    return content


def _containers(content: object) -> list:
    """Return all lists and dictionaries in the content, including itself."""
    if not isinstance(content, (dict, list)):
        return []
    inner = content.values() if isinstance(content, dict) else content
    return [content, *(each for value in inner for each in _containers(value))]


def _keys(parent: dict | list) -> list:
    return list(parent) if isinstance(parent, dict) else list(range(len(parent)))


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, symlinks=True)
    return folder

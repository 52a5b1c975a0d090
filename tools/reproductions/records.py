"""The JSON files that the pages are written from."""
import json
from pathlib import Path
from typing import Any

# Significant digits that tell every float32 from its neighbours.
DIGITS = 9
WIDTH = 79


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record: a line for each row of numbers, floats rounded.

    Args:
        path (Path): The file; its folder is made.
        record (dict[str, Any]): Plain data.

    Raises:
        ValueError: If a number is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keys become strings here, as they are when the file is read.
    plain = json.loads(json.dumps(record, allow_nan=False))
    path.write_text(lay_out(rounded(plain)) + '\n')


def rounded(value: Any) -> Any:
    """Round every float in plain data to :data:`DIGITS` digits."""
    if isinstance(value, dict):
        return {key: rounded(member) for key, member in value.items()}
    if isinstance(value, list):
        return [rounded(member) for member in value]
    if isinstance(value, float):
        return float(f'{value:.{DIGITS}g}')
    return value


def lay_out(value: Any, indent: int = 0) -> str:
    """Write plain data as JSON, on as few lines as can be read.

    Args:
        value (Any): What :func:`json.loads` returns.
        indent (int): Of the line that it starts on. Defaults to 0.

    Returns:
        str: One line for what fits, or holds neither lists nor objects.
    """
    line = json.dumps(value)
    if not isinstance(value, dict | list):
        return line
    members = value.values() if isinstance(value, dict) else value
    nested = any(isinstance(member, dict | list) for member in members)
    if not nested or indent + len(line) <= WIDTH:
        return line
    inner = indent + 1
    if isinstance(value, dict):
        lines = [f'{json.dumps(key)}: {lay_out(member, inner)}'
                 for key, member in value.items()]
    else:
        lines = [lay_out(member, inner) for member in value]
    body = ',\n'.join(' ' * inner + text for text in lines)
    return f'{line[0]}\n{body}\n{" " * indent}{line[-1]}'

"""Read the JSON files of a tokenizer.

Owns the errors that name the file. It must not know what the files mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...sdk.errors import CheckpointError


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one when the file does not exist.

    Raises: CheckpointError naming the file, when it cannot be read or holds something else.
    """
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(file), f"cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(str(file), f"must hold a JSON object, holds {type(value).__name__}")
    return value

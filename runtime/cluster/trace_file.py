"""A trace of requests as a CSV file: lengths, and the time since the request before.

Owns the columns' names: ``prompt_tokens``, ``output_tokens`` and, where the rate is wanted, ``gap_ms``. Others are
ignored.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ...sdk.errors import ConfigError

MAX_REQUESTS = 1_000_000


def read_trace(path: Path) -> tuple[list[tuple[int, int]], float | None]:
    """Return (prompt tokens, output tokens) of each request, and requests per second where the trace says.

    Raises: ConfigError naming the file and the line
    """
    requests: list[tuple[int, int]] = []
    elapsed_ms = 0.0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for name in ("prompt_tokens", "output_tokens"):
                if name not in columns:
                    raise ConfigError(
                        str(path), f"has no column {name}; its columns are {', '.join(columns) or 'none'}"
                    )
            for row in rows:
                if len(requests) == MAX_REQUESTS:
                    raise ConfigError(str(path), f"has more than {MAX_REQUESTS} requests")
                # A request that drew nothing still had its prompt computed, which draws one token.
                requests.append((max(1, int(row["prompt_tokens"])), max(1, int(row["output_tokens"]))))
                elapsed_ms += float(row["gap_ms"]) if "gap_ms" in columns else 0.0
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(path), f"line {len(requests) + 2}: {error}") from error
    if not requests:
        raise ConfigError(str(path), "has no requests")
    return requests, len(requests) / elapsed_ms * 1000 if elapsed_ms > 0 else None

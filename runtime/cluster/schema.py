"""The JSON schema of the cluster file, as it is published in ``docs/``.

``python -m slipstream.runtime.cluster.schema > docs/cluster-file.schema.json`` writes it; a test compares the two.
"""

from __future__ import annotations

import json

from .cluster_file import ClusterFile


def schema_text() -> str:
    """Return the schema, with a line's end."""
    schema = ClusterFile.model_json_schema(mode="validation")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")

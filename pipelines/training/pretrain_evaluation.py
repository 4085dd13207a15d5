"""What names the evaluation at the end of a pretraining, and its metrics."""

import hashlib
import json

from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.fingerprints import fingerprint

METRICS_PREFIX = "knn/"


def evaluation_key(config: PretrainConfig) -> str:
    """Name all that the evaluation is computed from, besides the trained model; "" without one."""
    if config.data.val is None:
        return ""
    facts = [
        config.knn.model_dump(mode="json"),
        fingerprint(config.data.train),  # Its names of classes count here, and not in training.
        fingerprint(config.data.val),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

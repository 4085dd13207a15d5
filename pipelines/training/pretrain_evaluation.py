"""Name the evaluation of a pretraining run, and its metrics."""

import hashlib
import json

from pipelines.config.pretrain import HEALTH_PREFIX, PretrainConfig
from pipelines.reading.fingerprints import fingerprint

METRICS_PREFIX = "knn/"
LINEAR_PREFIX = "linear/"
MEASURED_PREFIXES = (METRICS_PREFIX, LINEAR_PREFIX, HEALTH_PREFIX)


def evaluation_key(config: PretrainConfig) -> str:
    """Name all that the evaluation depends on besides the model; "" if there is none."""
    if config.data.val is None and config.health.every_epochs == 0:
        return ""
    facts = [
        config.knn.model_dump(mode="json"),
        config.health.model_dump(mode="json"),
        fingerprint(config.data.train),  # Class names count here, but not in the training.
        None if config.data.val is None else fingerprint(config.data.val),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

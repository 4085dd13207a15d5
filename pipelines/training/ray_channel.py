"""A channel between the driver and its workers through Ray's key-value store."""

import json
from typing import NamedTuple

from ray.experimental import internal_kv

from pipelines.training.stopping import Phase, Told

NAMESPACE = "mae"


class RayChannel(NamedTuple):
    """See `pipelines.training.stopping.Channel`."""

    start: str  # names the start of the command, see RunFolder

    def ask(self) -> None:
        self._put("stop", b"1")

    def is_asked(self) -> bool:
        return self._get("stop") is not None

    def tell(self, told: Told) -> None:
        self._put("told", json.dumps([told.phase.value, *told[1:]]).encode())

    def told(self) -> Told:
        text = self._get("told")
        if text is None:
            return Told()
        phase, *rest = json.loads(text)
        return Told(Phase(phase), *rest)

    # This store is private to Ray, whose version is pinned: every process is connected to it
    # already. The public way, an actor, costs a process.

    def _put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(f"{self.start}-{key}", value, namespace=NAMESPACE)

    def _get(self, key: str) -> bytes | None:
        return internal_kv._internal_kv_get(f"{self.start}-{key}", namespace=NAMESPACE)

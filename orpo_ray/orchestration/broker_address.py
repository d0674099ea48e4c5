"""Address of the broker: how every process of a sweep finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Name under which every process of the sweep finds the broker."""

    name: str
    namespace: str
    """Ray namespace."""

    def connect(self) -> Any:
        """Actor handle of the broker.

        Raises:
            ValueError: no such actor is alive.
        """
        return ray.get_actor(self.name, namespace=self.namespace)

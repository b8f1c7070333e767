"""Bytes that one rank sends, and how long a link takes for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes sent, and the number of transfers."""

    bytes: float = 0.0
    transfers: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes + other.bytes, self.transfers + other.transfers)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.bytes * times, self.transfers * times)

    def seconds(self, bandwidth: float, link: float, collective_seconds: float) -> float:
        """Time on a link of this peak bandwidth in bytes/s.

        Args:
            link: share of it that is reached.
            collective_seconds: what starting a transfer takes.
        """
        return self.bytes / (bandwidth * link) + self.transfers * collective_seconds

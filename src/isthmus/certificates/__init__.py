"""Certificates: bounds on the loss along the line between two given networks, by propagating sets through the graph."""

from isthmus.certificates._certificate import Certificate, Envelope, certify
from isthmus.certificates._weights_only import WeightsOnlyBound, certify_weights_only

__all__ = [
    "Certificate",
    "Envelope",
    "WeightsOnlyBound",
    "certify",
    "certify_weights_only",
]

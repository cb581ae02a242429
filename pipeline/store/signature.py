"""A key that a team shares -> signatures of what its stores keep: who has no key cannot choose what others take from there."""

from __future__ import annotations

import hashlib
import hmac
import os

KEY = "LOWBIT_STORE_KEY"
"""The variable of the environment that holds the key; without it nothing is signed, and signatures are not looked at."""


def signature(seal: str) -> str | None:
    """HMAC-SHA256 of a seal by the team's key, in hex; None if there is no key."""
    key = os.environ.get(KEY)
    return hmac.new(os.fsencode(key), seal.encode(), hashlib.sha256).hexdigest() if key else None


def signed(seal: str, found: str | None) -> bool:
    """Whether `found` is the signature of a seal, or none is asked for."""
    wanted = signature(seal)
    return wanted is None or (found is not None and hmac.compare_digest(wanted.encode(), found.encode()))

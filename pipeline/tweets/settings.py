"""Base of the settings of classifiers and their training."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of the settings: immutable, unknown keys rejected; written without what is the default."""

"""The schema: one dataclass a section, one field a key."""

"""Helpers of this repository's own tests; no part of any package."""

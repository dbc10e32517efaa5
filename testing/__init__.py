"""Helpers of the tests of this repository; not part of any package."""

"""Agents of other libraries, under this suite's evaluation and records: references alongside our own."""

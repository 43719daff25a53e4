"""Agents of other libraries, under this suite's evaluation and records: references beside our own."""

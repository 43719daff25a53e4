"""Results of many runs, from their files only: tables for a terminal, and the report of a directory."""

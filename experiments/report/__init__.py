"""What came out of many runs, from their files alone: tables for a terminal, and the report of a directory."""

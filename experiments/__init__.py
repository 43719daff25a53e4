"""Where all parts meet: command line, runs, records, figures, benchmarks and published results."""

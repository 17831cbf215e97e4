"""The papers' experiments, repeated on the bundled model; findings in docs/experiments.md."""

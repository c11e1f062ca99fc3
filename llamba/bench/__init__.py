"""Benchmarks, each against a peer on the same work in the same process. `llamba.commands.bench` has their arguments."""

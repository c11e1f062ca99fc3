"""Benchmarks, each against a peer on the same work in the same process."""

from llamba.bench import ops

BENCHES = {"ops": ops.main}

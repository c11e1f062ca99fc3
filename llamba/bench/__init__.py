"""Benchmarks, each against a peer on the same work in the same process."""

from llamba.bench import losses, matrices, ops, speculative

BENCHES = {"losses": losses.main, "matrices": matrices.main, "ops": ops.main, "speculative": speculative.main}

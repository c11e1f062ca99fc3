"""Benchmarks, each against a peer on the same work in the same process."""

from llamba.bench import decode, losses, matrices, mfu, multistep, ops, speculative, train

BENCHES = {
    "decode": decode.main, "losses": losses.main, "matrices": matrices.main, "mfu": mfu.main, "multistep": multistep.main, "ops": ops.main,
    "speculative": speculative.main, "train": train.main,
}  # fmt: skip

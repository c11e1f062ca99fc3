#!/usr/bin/env bash
# torch.export refuses a free length where a mask [T, T] is spread over the queries of a group by expand and flatten.
#
# Query heads that share a key head are often laid behind one another, [B, groups, R T, P], so that one product reads the keys once. The
# causal mask is then needed R times. Spread by `repeat` the module exports with free B and T; spread by `expand(...).flatten(...)`, which
# gives the same numbers, export stops: it guards on min(T, T * T) == T, which holds for every T from 3 to 4096, and says that not all
# values of T satisfy it.
# Seen with torch 2.13.0: "repeat: exported" and "expand: - Not all values of T = ... satisfy the generated guard". Fails when expand exports.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv
venv/bin/pip install --quiet numpy==2.4.6 torch==2.13.0
cat > case.py <<'PY'
import torch
from torch.export import Dim


class Grouped(torch.nn.Module):
    """Weights of causal attention with two query heads for each of two key heads."""

    def __init__(self, spread):
        super().__init__()
        self.spread = spread

    def forward(self, q, k):  # [B, T, 4, 8], [B, T, 2, 8]
        queries = q.unflatten(2, (2, 2)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, 2, 2 T, 8]
        scores = queries @ k.transpose(1, 2).transpose(-1, -2)  # [B, 2, 2 T, T]
        place = torch.arange(q.shape[1])
        mask = torch.zeros(1, q.shape[1], q.shape[1]).masked_fill_((place[:, None] < place)[None], -torch.inf)
        return (scores + self.spread(mask)).softmax(-1)


def repeated(mask):
    return mask.repeat(1, 2, 1)[:, None]


def expanded(mask):
    return mask[:, None, None].expand(-1, 1, 2, -1, -1).flatten(2, 3)


q, k = torch.randn(2, 12, 4, 8), torch.randn(2, 12, 2, 8)
assert torch.equal(Grouped(repeated)(q, k), Grouped(expanded)(q, k))
free = {0: Dim("B"), 1: Dim("T", min=3, max=4096)}
torch.export.export(Grouped(repeated), (q, k), dynamic_shapes=(free, free), strict=False)
print("torch", torch.__version__, "repeat: exported")
try:
    torch.export.export(Grouped(expanded), (q, k), dynamic_shapes=(free, free), strict=False)
except torch._dynamo.exc.UserError as error:
    said = next(line for line in str(error).splitlines() if "min(" in line)
    print("expand:", said.strip())
else:
    raise SystemExit("expand exports now: this finding is out of date")
PY
venv/bin/python case.py

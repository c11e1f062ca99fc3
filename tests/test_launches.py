"""What a decoded token costs, counted without a GPU: the graph engine's own path on tensors without content, its kernels those of CUDA.

Every launch and every operation of PyTorch counts the bytes of its inputs and outputs once, whatever it reads twice from the cache.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import ids, student
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import llamba.kernels.block.triton_op as block
import llamba.kernels.decode.triton_op as decode
import llamba.kernels.slots.triton_op as slots
from llamba.bench.decode import DRAFTED, weight_bytes
from llamba.models.convert import student_config
from llamba.models.published import teacher_config
from llamba.speculative import generate, graphs
from llamba.speculative.graphs import Decoder
from llamba.speculative.sampling import Sampler

GB = 1e9
KERNELS = {block: ("norm_rows", "gate_numbers"), decode: ("mamba1", "mamba2"), slots: ("place_heads", "part", "joined")}
GATHERS = {"embedding", "index"}  # read of their first tensor no more than they write
SLOTS = 256  # of a row: the prompt of the bench and its 128 tokens


def place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


class Counted(TorchDispatchMode):
    """Calls and bytes by name, and the bytes read of each weight; views cost nothing."""

    def __init__(self, model: Any):
        super().__init__()
        self.names = {place(weight): name for name, weight in model.named_parameters()}
        self.bytes: Counter = Counter()
        self.calls: Counter = Counter()
        self.weights: Counter = Counter()

    def add(self, name: str, tensors: Sequence[Any]) -> None:
        """Count a call that touches all of these tensors, each once."""
        self.calls[name] += 1
        for at, tensor in {place(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}.items():
            size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # where it is expanded
            self.bytes[name] += size
            if at in self.names:
                self.weights[self.names[at]] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), out))
        before = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in before]
        name = func.name().partition("::")[2].partition(".")[0]
        if name in GATHERS:  # what is read of the first is as much as is written
            self.add(name, [*given[1:], *made])
            self.bytes[name] += made[0].nbytes
            if place(given[0]) in self.names:
                self.weights[self.names[place(given[0])]] += made[0].nbytes
        elif (fresh or func._schema.is_mutable) and not name.startswith("empty"):
            self.add(name, [*given, *fresh])
        return out


class Kernel:
    """Stands for a Triton kernel: its launch is counted and not made."""

    def __init__(self, name: str, heard: list[Counted]):
        self.name, self.heard = name, heard

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        for counted in self.heard:
            if self.name == "place_heads":
                q, k, v, cos, sin, positions, keys, values, out = args[:9]
                counted.add(self.name, [q, k, v, positions, out])
                counted.bytes[self.name] += k.nbytes + v.nbytes  # into their slots; the angles are a row each
            else:
                counted.add(self.name, args)
            if self.name == "mamba2":
                counted.bytes["state"] += args[7].nbytes  # is read and, behind a token that stays, written


class Graph:
    """Stands for a CUDA graph."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.fixture
def counters(monkeypatch) -> Iterator[list[Counted]]:
    """CUDA's graphs and streams, and the kernels, replaced. The counter that is put into the list hears what a capture launches."""
    heard, known = [], []

    @contextmanager
    def captured(graph: Graph) -> Iterator[None]:
        heard.extend(known)
        with known[0]:
            yield
        heard.clear()

    for name, stand_in in {"Stream": lambda d: Stream(), "current_stream": lambda d=None: Stream(), "stream": lambda s: nullcontext(),
                           "CUDAGraph": Graph, "graph": captured}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name, heard))
    monkeypatch.setattr(Graph, "replays", 0)
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda run, device: capture(run, SimpleNamespace(type="cuda")))
    monkeypatch.setenv("LLAMBA_KERNELS", "triton")
    monkeypatch.setattr("llamba.kernels.slots.product_obstacle", lambda *tensors: None)  # nothing is multiplied here
    yield known


def captured_round(count: int, counters: list[Counted]) -> tuple[Counted, Any, list[Any]]:
    """What the graphs of a round of `count` drafted tokens of the 8B-shaped hybrid hold; the model; what a round calls."""
    with torch.device("meta"):
        config = student_config(teacher_config("meta-llama-3-8b"), "mamba2", 0.5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        counters[:] = [Counted(model)]
        made = Decoder(model, None, 1, SLOTS, count, Sampler(), 8)
        parts = made.round(count)
    return counters[0], model, parts


def test_a_token_reads_every_weight_once_and_little_else(counters) -> None:
    found, model, _ = captured_round(0, counters)
    read, weights = sum(found.bytes.values()), weight_bytes(model)
    assert round(weights / GB, 2) == 15.55, "as the bench and the docs say"
    embedding = "model.embed_tokens.weight"
    assert found.weights == {name: weight.nbytes for name, weight in model.named_parameters()} | {embedding: 2 * 4096}
    assert sum(found.weights.values()) == weights
    layers, heads, groups, width = 16, 32, 8, 128
    states = layers * heads * width * width * 4
    assert found.bytes["state"] == states
    slots = layers * 2 * SLOTS * groups * width * 2
    assert read - weights - 2 * states - slots < 20e6, "what layers hand to each other"
    assert round(read / GB, 2) == 15.65


def test_a_token_is_one_graph_of_few_launches(counters) -> None:
    """Between two products of matrices stands one launch; five tokens cost what one costs."""
    for count in (0, DRAFTED):
        found, model, parts = captured_round(count, counters)
        attention, mixers, layers = 16, 16, 32
        assert found.calls["linear"] == 4 * attention + 2 * mixers + 3 * layers + 1
        launched = {"mamba2": mixers, "norm_rows": 2 * layers + 1, "gate_numbers": layers}
        launched |= dict.fromkeys(("place_heads", "part", "joined"), attention)
        assert {name: found.calls[name] for name in launched} == launched
        rest = sum(found.calls.values()) - found.calls["linear"] - sum(launched.values())
        assert rest <= 60, found.calls
        assert sum(found.weights.values()) - weight_bytes(model) == count * 2 * 4096, "a row of the embedding for each token"
        Graph.replays = 0
        for part in parts:
            part()
        assert Graph.replays == 1


def test_every_token_is_one_replay(monkeypatch) -> None:
    """The host reads the mail of a round while the next one runs, so the last token costs one more."""
    model, replays = student("mamba2"), []

    def capture(run, device):
        return lambda: (replays.append(1), run())

    monkeypatch.setattr(graphs, "capture", capture)
    made = generate(model, ids(1, 5), max_new_tokens=12, eos_token_id=None, engine="graphs")
    assert len(made.new[0]) == 12 and len(replays) == 12 + 1

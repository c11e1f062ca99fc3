"""What masks with four dimensions, lengths and document numbers say, obeyed by every mixer or refused in a sentence."""

from typing import Any

import pytest
import torch
from models import MIXERS, ids, student
from torch import Tensor
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask

EVERY_MIXER = (*MIXERS, "gated_delta", "kda", "toeplitz", "low_rank", "none")
A, B = 6, 5


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def forms(mask: Tensor) -> dict[str, Tensor]:
    """A mask [T, S] as bool, and as numbers that are added."""
    added = torch.zeros(mask.shape, dtype=torch.float64)
    return {
        "bool": mask[None, None],
        "least": added.masked_fill(~mask, torch.finfo(torch.float64).min)[None, None],
        "inf": added.masked_fill(~mask, -torch.inf)[None, None],
        "heads": mask[None, None].expand(1, 4, -1, -1),
    }


def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **{"use_cache": False, **more}).logits


@pytest.mark.parametrize("mixer", EVERY_MIXER)
def test_documents_and_padding_of_four_dimensions_are_obeyed(mixer: str) -> None:
    model, first, second = student(mixer), ids(1, A, seed=1), ids(1, B, seed=2)
    packed, want = torch.cat((first, second), 1), torch.cat((logits(model, first), logits(model, second)), 1)
    for form, mask in forms(torch.block_diag(causal(A), causal(B)).bool()).items():
        assert (logits(model, packed, attention_mask=mask) - want).abs().max() < 1e-6, form  # angles are fp32
    left, right, hole = (torch.ones(A + B, dtype=torch.bool) for _ in range(3))
    left[:4], right[-3:], hole[2:5] = False, False, False
    for real in (left, right, hole):
        flat = logits(model, packed, attention_mask=real[None].long())[:, real]
        for form, mask in forms(causal(A + B) & real).items():
            got = logits(model, packed, attention_mask=mask)[:, real]
            assert (got - flat).abs().max() < 1e-12, form
    opened = causal(A + B) & left
    opened[:4] = True  # what transformers makes of rows without anything to see
    assert torch.allclose(logits(model, packed, attention_mask=opened[None, None])[:, left], logits(
        model, packed, attention_mask=(causal(A + B) & left)[None, None])[:, left], rtol=0, atol=1e-12)  # fmt: skip


def test_rows_with_documents_and_padding_of_their_own() -> None:
    """Row 0: padding, then two documents; row 1: one document."""
    model, tokens = student(), ids(2, 12)
    mask = causal(12).repeat(2, 1, 1)
    mask[0, :, :3], mask[0, 8:, :8] = False, False
    got = logits(model, tokens, attention_mask=mask[:, None])
    for row, span in ((0, slice(3, 8)), (0, slice(8, 12)), (1, slice(0, 12))):
        assert (got[row, span] - logits(model, tokens[row : row + 1, span])[0]).abs().max() < 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_that_transformers_makes_mean_the_same(implementation: str) -> None:
    model, tokens = student(dtype=torch.float32), ids(2, 9)  # transformers' eager attention of fp64 has NaN at padding
    model.set_attn_implementation(implementation)
    flat = torch.ones(2, 9, dtype=torch.long)
    flat[0, :4] = 0
    made = create_causal_mask(config=model.config, inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=flat,
                              past_key_values=None, position_ids=torch.arange(9)[None])  # fmt: skip
    assert made.ndim == 4
    got, want = logits(model, tokens, attention_mask=made), logits(model, tokens, attention_mask=flat)
    assert torch.equal(got[flat.bool()], want[flat.bool()])
    by_kind = logits(model, tokens, attention_mask={"full_attention": made})
    assert torch.equal(by_kind[flat.bool()], want[flat.bool()])


def test_what_such_a_mask_says_beyond_that_is_refused() -> None:
    model, tokens = student(), ids(1, 14)
    endings, banded, ahead, biased = causal(14), causal(14).triu(-3), causal(14), torch.zeros(14, 14, dtype=torch.float64)
    endings[11:, 6:11] = False
    ahead[2, 5] = True
    biased[~causal(14)] = -torch.inf
    biased[5, 3] = -0.5
    heads = causal(14)[None, None].repeat(1, 4, 1, 1)
    heads[0, 1, 9, 2] = False
    wrong: dict[str, Any] = {
        r"more than padding and documents in a row \(row 0, token 11\)": endings[None, None],
        r"more than padding and documents in a row \(row 0, token 4\)": banded[None, None],
        r"more than padding and documents in a row \(row 0, token 2\)": ahead[None, None],
        "it adds biases": biased[None, None],
        "it differs between heads": heads,
        "must be bool, or numbers": causal(14).long()[None, None],
        r"must be \[B, 1, 14, 14\] for 14 tokens behind 0; got \[1, 1, 13, 14\]": causal(14)[None, None, :13],
        "or have 4 dimensions; got shape": causal(14)[None],
        "or have 4 dimensions; got shape ": torch.ones(1, 9),
        "with 2 or 4 dimensions; got list": [[1] * 14],
    }
    for message, mask in wrong.items():
        with pytest.raises(ValueError, match=message):
            logits(model, tokens, attention_mask=mask)
    alone = student(attention=1.0)  # nothing recurrent: as the teacher takes it
    assert logits(alone, tokens, attention_mask=endings[None, None]).isfinite().all()


def test_with_a_cache_the_past_is_seen_whole() -> None:
    model, tokens, more = student(), ids(2, 9), ids(2, 3, seed=1)
    for static in (False, True):
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=16) if static else None
            cache = model(tokens, past_key_values=cache, use_cache=True).past_key_values
            mask = torch.zeros(2, 1, 3, 16 if static else 12, dtype=torch.bool)
            mask[:, :, :, :9], mask[:, :, :, 9:12] = True, causal(3)
            hidden = mask.clone()
            hidden[1, :, :, :2] = False
            with pytest.raises(ValueError, match=r"hides tokens that the cache has read; pass a 2-D mask with a cache \(row 1"):
                model(more, attention_mask=hidden, past_key_values=cache)
            got = model(more, attention_mask=mask, past_key_values=cache).logits
        assert (got - logits(model, torch.cat((tokens, more), 1))[:, -3:]).abs().max() < 1e-12


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_lengths_of_a_packed_row_without_positions(mixer: str) -> None:
    """Also with positions that go on, and document numbers with such positions: attention stays within a document too."""
    model, first, second = student(mixer), ids(1, A, seed=1), ids(1, B, seed=2)
    packed, want = torch.cat((first, second), 1), torch.cat((logits(model, first), logits(model, second)), 1)
    ends = torch.tensor([0, A, A + B], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": A, "max_length_k": A}
    on = torch.arange(A + B)[None]
    for more in (lengths, lengths | {"position_ids": on}, {"seq_idx": (on >= A).long(), "position_ids": on}):
        assert (logits(model, packed, **more) - want).abs().max() < 1e-6, more
    for wrong in ([0, A], [0, A, A, A + B], [1, A + B], [0, A + B + 1]):
        with pytest.raises(ValueError, match="cu_seq_lens must rise from 0 to the 11 tokens of one packed row"):
            logits(model, packed, cu_seq_lens_q=torch.tensor(wrong))
    with pytest.raises(ValueError, match="of one packed row; got"):
        logits(model, packed.repeat(2, 1), **lengths)
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must be the same"):
        logits(model, packed, cu_seq_lens_q=ends, cu_seq_lens_k=torch.tensor([0, A + B]))
    with pytest.raises(ValueError, match="cannot be combined with a cache"), torch.no_grad():
        model(packed, past_key_values=model(first).past_key_values, **lengths)


@pytest.mark.slow
@torch.no_grad()
def test_a_traced_graph_obeys_such_a_mask_or_refuses_it() -> None:
    torch._dynamo.reset()
    model, tokens = student(), ids(1, A + B)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    for real in (torch.ones(A + B, dtype=torch.bool), torch.arange(A + B) > 2):
        mask = (torch.block_diag(causal(A), causal(B)).bool() & real)[None, None]
        got = compiled(tokens, attention_mask=mask, use_cache=False).logits[:, real]
        assert (got - logits(model, tokens, attention_mask=mask)[:, real]).abs().max() < 1e-9
    with pytest.raises(RuntimeError, match="more than padding and documents"):
        compiled(tokens, attention_mask=causal(A + B).triu(-3)[None, None], use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("attention", [0.5, 0.0])
def test_documents_said_twice_are_the_same_documents(attention: float) -> None:
    """Numbers or lengths of documents beside positions that restart, as TRL's packing passes them."""
    model, tokens, lengths = student(attention=attention), ids(1, 21), [7, 5, 9]
    ends = torch.tensor([0, 7, 12, 21], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    numbers = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    alone = torch.cat([model(part, use_cache=False).logits for part in tokens.split(lengths, 1)], 1)
    for said in ({"seq_idx": numbers}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, {"seq_idx": numbers, "cu_seq_lens_q": ends}):
        assert (model(tokens, position_ids=positions, use_cache=False, **said).logits - alone).abs().max() < 1e-10, list(said)

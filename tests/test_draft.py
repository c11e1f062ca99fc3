"""Drafts: what is taken from the teacher, pruned heads, the stage, the commands, and the benchmark."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from models import ids, student, teacher
from transformers import AutoModelForCausalLM

from llamba.bench import shapes, speculative
from llamba.bench.graft import can_graft, graft
from llamba.cli import main
from llamba.data.batches import Rows
from llamba.models.convert import convert
from llamba.models.draft import chosen_layers, draft_config, make_draft
from llamba.models.hybrid import PrunedHead
from llamba.running.plan import plan
from llamba.running.run import run
from llamba.settings import Data, Distill, Draft, Recipe, Student
from llamba.speculative import generate
from llamba.stages.draft import frequent_tokens, objective
from llamba.training.losses import IGNORE

ROOT = Path(__file__).parent.parent


def test_layers_are_evenly_spaced_from_the_first_to_the_last_as_published() -> None:
    assert chosen_layers(2, 32) == [0, 31] and chosen_layers(4, 32) == [0, 10, 20, 31] and chosen_layers(1, 8) == [0]
    assert chosen_layers([1, 5], 8) == [1, 5] and chosen_layers(8, 8) == list(range(8))
    with pytest.raises(ValueError, match="at most the teacher's 8 layers; got 9"):
        chosen_layers(9, 8)
    with pytest.raises(ValueError, match="0 to 7; got"):
        chosen_layers([8], 8)


@pytest.mark.parametrize("name", ["llama", "llama-3.2", "mistral", "phi", "qwen2", "qwen3"])
def test_a_draft_has_the_teachers_weights(name: str, tmp_path: Path) -> None:
    source = teacher(name)
    whole = make_draft(source, [0, 1, 2, 3])
    assert type(whole) is type(source) and torch.equal(whole(ids(1, 9)).logits, source(ids(1, 9)).logits)
    draft = make_draft(source, 2)
    for got, want in zip(draft.model.layers[1].parameters(), source.model.layers[3].parameters(), strict=True):
        assert torch.equal(got, want)
    tokens = torch.tensor([0, 2, 5, 50, 100])
    make_draft(source, 2, tokens).save_pretrained(tmp_path)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path)
    want, got = draft(ids(2, 9)).logits, pruned(ids(2, 9)).logits
    assert torch.allclose(got[..., tokens], want[..., tokens], rtol=1e-10, atol=1e-10)
    missing = torch.ones(101, dtype=torch.bool).index_fill(0, tokens, False)
    assert bool((got[..., missing] == -torch.inf).all())


def test_a_pruned_draft_changes_nothing_of_what_comes_out() -> None:
    model = student("mamba2")
    draft = make_draft(teacher(), 2, torch.arange(0, 101, 2))
    want = generate(model, ids(2, 7), max_new_tokens=14, eos_token_id=None).new
    assert generate(model, ids(2, 7), draft=draft, max_new_tokens=14, eos_token_id=None).new == want
    theirs = model.generate(
        ids(1, 7), attention_mask=torch.ones(1, 7, dtype=torch.long), assistant_model=draft, max_new_tokens=14, eos_token_id=None,
        do_sample=False,
    )  # fmt: skip
    assert theirs[0, 7:].tolist() == generate(model, ids(1, 7), max_new_tokens=14, eos_token_id=None).new[0]
    assert generate(model, ids(2, 7), draft=draft, max_new_tokens=14, eos_token_id=None, temperature=1.0, top_k=5).tokens == 28


def test_a_draft_with_another_tokenizer_through_hugging_faces_universal_mode(small, tokenizer) -> None:
    """Its tokens are made text and read again by the target's tokenizer; what comes out is the target's own."""
    other = small.tokenizer(words="red blue cat dog runs sleeps and the big".split(), size=290)
    model, draft = convert(small.llama(len(tokenizer)), init="paper"), small.llama(len(other), seed=1)
    assert len(other) != len(tokenizer)
    prompt = tokenizer("red green blue cat", return_tensors="pt")
    more = {**prompt, "max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    want = model.generate(**more)
    assert torch.equal(model.generate(**more, assistant_model=draft, tokenizer=tokenizer, assistant_tokenizer=other), want)


def test_places_of_tokens_in_a_pruned_head() -> None:
    head = PrunedHead(4, 3, 10, False)
    head.tokens.copy_(torch.tensor([2, 5, 9]))
    assert head.places(torch.tensor([[9, 0, IGNORE, 2]]), IGNORE).tolist() == [[2, IGNORE, IGNORE, 0]]


def test_frequent_tokens_are_counted_over_targets(tmp_path: Path) -> None:
    np.array([1, 2, 2, 3, 3, 3, 7, 7, 7, 7], np.int32).tofile(tmp_path / "tokens")
    np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1], np.uint8).tofile(tmp_path / "targets")
    np.array([10], np.int64).tofile(tmp_path / "lengths")
    assert frequent_tokens(Rows(tmp_path), 3, 9).tolist() == [1, 2, 3]  # 2 and 3 twice, 1 once as 7, which is larger


@pytest.mark.parametrize("head", [None, 20])
def test_the_objective_is_kl_to_the_student_over_the_tokens_that_the_draft_has(head: int | None) -> None:
    stage, target = Draft(kl=0.7, ce=0.4, head=head), student("mamba2")
    kept = torch.arange(101) if head is None else torch.arange(3, 3 + head)
    draft = make_draft(teacher(), 2, None if head is None else kept)
    tokens = ids(2, 12)
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(12) < 5, IGNORE), "attention_mask": torch.ones_like(tokens)}
    log_q, log_p = (model(tokens, use_cache=False).logits[:, :-1][..., kept].log_softmax(-1) for model in (draft, target))
    labels = batch["labels"][:, 1:]
    has = torch.isin(labels, kept)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[has].sum().item()
    ce = -sum(log_q[b, t, kept.tolist().index(int(labels[b, t]))].item() for b, t in has.nonzero().tolist())
    if head is not None:
        cut = torch.nn.Linear(32, head, bias=False, dtype=torch.float64)
        cut.weight.data.copy_(target.lm_head.weight[kept])
        target.set_output_embeddings(cut)
    sums = objective(stage, draft, target, batch)
    assert 0 < int(sums.targets) == int(has.sum()) < labels.numel()
    assert sums.kl.item() == pytest.approx(kl, rel=1e-9) and sums.ce.item() == pytest.approx(ce, rel=1e-9)
    assert sums.loss.item() == pytest.approx(0.7 * kl + 0.4 * ce, rel=1e-9)


@pytest.fixture(scope="module")
def finished(teacher_folder: Path, chat_file: Path, tmp_path_factory) -> Path:
    """A run folder with a distilled student and a draft of it."""
    short = dict(lr=1e-3, warmup=1, batch=4, micro_batch=4, precision="fp32", save_every=10, log_every=1)
    out = tmp_path_factory.mktemp("drafted") / "run"
    recipe = Recipe(
        teacher=str(teacher_folder), student=Student(), data=Data(train=str(chat_file), length=48),
        stages=[Distill(steps=2, **short), Draft(steps=12, layers=2, head=120, **short)], output=str(out),
    )  # fmt: skip
    assert run(recipe) == out / "1-distill"
    return out


def test_the_stage_leaves_a_draft_that_has_learnt_and_the_student_as_it_was(finished: Path) -> None:
    draft = AutoModelForCausalLM.from_pretrained(finished / "2-draft")
    assert draft.config.num_hidden_layers == 2 and draft.config.head_tokens == 120 == len(draft.lm_head.tokens)
    losses = [json.loads(line)["loss"] for line in (finished / "2-draft" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert not (finished / "2-draft" / "untrained").exists() and (finished / "2-draft" / "tokenizer.json").exists()


@pytest.mark.parametrize("stage", [{"layers": 0}, {"layers": [2, 1]}, {"layers": []}, {"head": 0}, {"kl": 0.0, "ce": 0.0}])
def test_bad_draft_stages_are_refused(stage: dict) -> None:
    with pytest.raises(ValueError, match="draft"):
        Draft(**stage)


def test_a_head_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="draft.head must be 1 to the vocabulary's 101 tokens; got 102"):
        draft_config(teacher().config, 2, 102)


def test_generate_speaks_of_speed_and_acceptance_and_says_the_same(finished: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text((finished / "2-draft" / "config.json").read_text())
    command = ["generate", str(finished), "red green", "--max-new-tokens", "12", "--device", "cpu"]
    main(command)
    want = capsys.readouterr().out
    for draft in (str(finished / "2-draft"), "lookup"):
        main([*command, "--draft", draft, "--lookahead", "3"])
        got = capsys.readouterr()
        assert got.out == want and "tokens/s" in got.err
    main([*command, "--chat", "--draft", str(finished)])  # the draft that the run has made
    assert "drafted tokens accepted" in capsys.readouterr().err
    for wrong, message in (
        (["--draft", "lookup", "--lookahead", "fast"], "error: lookahead must be 1 to 31"),
        (["--lookahead", "3"], "error: --lookahead needs --draft"),
        (["--draft", str(tmp_path)], f"error: {tmp_path} must be a model folder with weights"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert message in capsys.readouterr().err


def test_the_benchmark_of_models_reports_what_it_measured(finished: Path, tmp_path: Path, capsys) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "red cat"}]}) + "\n")
    command = ["bench", "speculative", "--model", str(finished), "--draft", str(finished / "2-draft"), "--prompts", str(prompts)]
    main([*command, "--lookahead", "1,3,2x1,auto", "--tokens", "8", "--repeats", "1", "--out", str(out), "--device", "cpu"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["lookahead"] for row in rows] == [0, 1, 3, "2x1", "auto"] and all(row["same"] for row in rows[1:])
    fixed = rows[2]
    want = fixed["tokens_per_round"] / (1 + fixed["verify_overhead"] + 3 * fixed["draft_cost"])
    assert fixed["predicted"] == pytest.approx(want)
    assert fixed["speedup"] == pytest.approx(fixed["tokens_per_second"] / rows[0]["tokens_per_second"])
    for wrong, message in (
        (["bench", "speculative"], "needs either --model"), (command[:4], "needs --model with --draft"),
        ([*command, "--lookahead", "fast"], "must be numbers"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def test_a_rehearsed_draft_meets_the_acceptance_that_is_set() -> None:
    preset = shapes.chosen("table1-2.8b")["table1-2.8b"]
    model, draft = (shapes.build(config, 32, torch.float32, "cpu") for config in (preset.target, preset.draft))
    assert not can_graft(model, draft)
    prompt = list(range(3, 23))
    rows = {rate: speculative.measure(model, draft, [prompt], [3], 80, 1, rate, endless=True)[1] for rate in (0.0, 0.7, 1.0)}
    assert rows[0.0]["tokens_per_round"] == 1.0 and rows[1.0]["tokens_per_round"] == 4.0 and all(row["same"] for row in rows.values())
    assert rows[0.7]["tokens_per_round"] == pytest.approx(1 + 0.7 + 0.49 + 0.343, abs=0.5)


def test_a_grafted_target_agrees_with_its_draft_as_often_as_is_wanted() -> None:
    """Nothing is told: the draft's own tokens stand at the rate that was set, and all of them where the other layers add nothing."""
    preset = shapes.chosen("table5-zephyr-25-2")["table5-zephyr-25-2"]
    model, draft = (shapes.build(config, 32, torch.float32, "cpu") for config in (preset.target, preset.draft))
    made, prompt = graft(model, draft), list(range(3, 23))
    assert model.config.num_hidden_layers == 8 and len(made.writes) == 2 * 6
    made.scale(0.0)
    assert made.agreement(prompt, 40) == 1.0
    assert speculative.measure(model, draft, [prompt], [3], 40, 1, endless=True)[1]["acceptance"] > 0.9  # but for the end of the text
    found = made.tune(0.6, prompt, 60)
    assert found == pytest.approx(0.6, abs=0.1)
    row = speculative.measure(model, draft, [prompt], [3], 60, 1, endless=True)[1]
    assert row["same"] and row["tokens_per_round"] == pytest.approx(1 + 0.6 + 0.36 + 0.216, abs=0.6)


@pytest.mark.slow
def test_presets_print_what_was_published_beside_what_is_measured(tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    for preset in ("table1-7b", "table5-llama3-50-4"):
        main(["bench", "speculative", "--preset", preset, "--shrink", "32", "--tokens", "24", "--repeats", "1", "--out", str(out)])
    text, rows = capsys.readouterr().out, list(map(json.loads, out.read_text().splitlines()))
    assert "table1-7b, shrunk by 32, rehearsed drafts" in text and "table5-llama3-50-4, shrunk by 32, grafted drafts" in text
    assert "published on H100: 3.6 tokens a round, 2.0 x, 272 tok/s" in text and "published on 3090: 2.7 tokens a round, 1.6 x" in text
    assert [(row["preset"], row["lookahead"]) for row in rows] == [
        ("table1-7b", 0), *(("table1-7b", count) for count in (3, 4, 3, 4)), ("table5-llama3-50-4", 0), ("table5-llama3-50-4", 3),
        ("table5-llama3-50-4", 4),
    ]  # fmt: skip
    assert rows[1]["published"]["gpu"] == "3090" and not rows[1]["grafted"] and rows[-1]["grafted"]


def test_published_rows_and_shapes() -> None:
    known = shapes.presets()
    assert [round(row.acceptance, 2) for row in known["table5-zephyr-50-2"].rows] == [0.64]
    assert round(known["table1-7b"].rows[0].acceptance, 2) == 0.85 and known["table1-2.8b"].rows[2].acceptance > 0.999
    with torch.device("meta"):
        sizes = {
            name: [sum(p.numel() for p in AutoModelForCausalLM.from_config(c).parameters()) / 1e9 for c in (preset.target, preset.draft)]
            for name, preset in known.items()
            if name in ("table1-2.8b", "table5-zephyr-50-2")
        }
    assert 2.6 < sizes["table1-2.8b"][0] < 3.0 and 0.12 < sizes["table1-2.8b"][1] < 0.14
    assert 7.2 < sizes["table5-zephyr-50-2"][0] < 8.0 and 0.6 < sizes["table5-zephyr-50-2"][1] < 0.75
    with pytest.raises(ValueError, match="preset must be table1, table5 or one of"):
        shapes.chosen("table9")


@pytest.mark.parametrize(("name", "parameters"), [("llama3_draft", "1,532"), ("zephyr_draft", "698")])
def test_draft_recipes_plan(name: str, parameters: str) -> None:
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="recipe")["recipe"]
    assert re.search(rf"draft: trains {parameters}\.\d+ M \(all\)", str(plan(recipe)))

"""Matrix orientation and hidden-state alignment as training stages: losses against their definitions, and what training does."""

import json
import os
import random
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from language import conversation
from models import ids, student, teacher
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from llamba.data.tokens import StageData, tokenize
from llamba.models.activations import CAPTURED
from llamba.models.convert import convert
from llamba.models.hybrid import mixer_layers
from llamba.models.mixers import Recurrence
from llamba.settings import Data, Distill, Hidden, Matrix, TokenTraining
from llamba.stages import STAGES, hidden, matrix
from llamba.training import checkpoints
from llamba.training.learnable import train_only
from llamba.training.losses import IGNORE
from llamba.training.metrics import METRICS, read_metrics
from llamba.training.trainer import DistillTrainer
from llamba.training.wrapped_forward import run_as_forward

TEACHER = Path(__file__).parent.parent / "recipes" / "tiny" / "teacher"
SHORT = dict(batch=8, micro_batch=8, precision="fp32", warmup=0, log_every=1)
OBJECTIVES = {"matrix": matrix.objective, "hidden": hidden.objective}


def batch(*lengths: int) -> dict[str, Tensor]:
    """Right-padded rows; the first three tokens of each are no targets."""
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    tokens = ids(len(lengths), longest)
    labels = tokens.masked_fill(mask == 0, IGNORE)
    labels[:, :3] = IGNORE
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def pair(stage: TokenTraining, kind: str = "mamba2", name: str = "llama", **more):
    """A teacher and a student of it, ready for the stage, in fp64."""
    source, made = teacher(name), student(kind, name, **more)
    made.train()
    if stage.name == "matrix":
        for model in (source, made):
            model.set_attn_implementation(CAPTURED)
    own = {f"layers.{index}.self_attn." for index in mixer_layers(made.config)}
    train_only(made, {name for name, _ in made.base_model.named_parameters() if name.startswith(tuple(own)) and _takes_part(stage, name)})
    return made, source


def _takes_part(stage: TokenTraining, name: str) -> bool:
    return stage.name != "matrix" or name.split("self_attn.")[1].partition(".")[0] not in ("out_proj", "norm", "v_proj", "o_proj", "dense")


# the losses


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
def test_matrix_loss_is_the_distance_to_eager_attention(kind: str, squared: bool) -> None:
    """Oracle: transformers' attentions (fp32 softmax), whole matrices, row by row."""
    stage, rows = Matrix(squared=squared), batch(20, 14)
    made, source = pair(stage, kind, "phi")
    got = matrix.objective(stage, made, source, rows)
    want = {}
    with torch.no_grad():
        for row, length in enumerate((20, 14)):
            tokens = rows["input_ids"][row : row + 1, :length]
            source.set_attn_implementation("eager")
            out = source.model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
            for index in mixer_layers(made.config):
                layer = made.model.layers[index]
                mixing = layer.self_attn.mixing(layer.input_layernorm(out.hidden_states[index]), Recurrence())
                gap = mixing.rows(mixing.inputs, slice(None)) - out.attentions[index]
                distance = gap.square().sum((2, 3))
                mean = (distance if squared else distance.sqrt()).mean()
                want[index] = want.get(index, 0) + mean * (length - 3)
    assert int(got.targets) == 17 + 11 and set(got.layers) == {0, 2}
    for index, value in want.items():
        assert torch.allclose(got.layers[index], value, rtol=1e-5)
    assert torch.allclose(got.loss, sum(want.values()) / 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi"])
@pytest.mark.parametrize("stage", [Hidden(), Hidden(target="block"), Hidden(target="block", ahead=3)], ids=["mixer", "block", "ahead"])
def test_hidden_loss_is_the_distance_of_outputs(stage: Hidden, name: str) -> None:
    """Oracle: rows run alone through the family's own modules; layer 3 is compared before the final norm."""
    rows = batch(20, 14)
    made, source = pair(stage, "mamba2", name, attention=[0])
    norm = dict(source.model.named_children()).get("norm") or source.model.final_layernorm
    got, want = hidden.objective(stage, made, source, rows), dict.fromkeys((1, 2, 3), 0.0)
    with torch.no_grad():
        for row, length in enumerate((20, 14)):
            tokens, before = rows["input_ids"][row : row + 1, :length], {}
            hook = norm.register_forward_pre_hook(lambda module, args, before=before: before.update(last=args[0]))
            states = source.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
            hook.remove()
            states = [*states[:4], before["last"]]
            rotary = source.model.rotary_emb(states[0], position_ids=torch.arange(length)[None])
            call = {"position_embeddings": rotary, "attention_mask": None}
            for index in want:
                ours, theirs = made.model.layers, source.model.layers[index]
                if stage.target == "mixer":
                    out = ours[index].self_attn(ours[index].input_layernorm(states[index]))[0]
                    goal = theirs.self_attn(hidden_states=theirs.input_layernorm(states[index]), **call)[0]
                else:
                    after = min(4, index + stage.ahead)
                    out, goal = states[index], states[after]
                    for place in range(index, after):
                        out = ours[place](out, position_embeddings=rotary, attention_mask=None)
                want[index] += (out - goal)[0, 2 : length - 1].norm(dim=-1).sum()
    for index, value in want.items():
        assert torch.allclose(got.layers[index], value, rtol=1e-10)
    assert torch.allclose(got.loss, sum(want.values()) / 3) and int(got.targets) == 28


STAGES_HERE = {
    "matrix": Matrix(), "sampled": Matrix(squared=True, rows=7), "mixer": Hidden(), "block": Hidden(target="block"),
    "ahead": Hidden(target="block", ahead=2),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES_HERE.values(), ids=STAGES_HERE)
def test_gradients_are_those_of_the_plain_sum(stage, monkeypatch) -> None:
    """Oracle: autograd through all layers' graphs at once (blocks: Hugging Face's norm is fp32); every trained weight has a gradient."""
    made, source = pair(stage, attention=[1])  # with ahead=2, layer 3 takes part in two losses
    weights = [weight for weight in made.parameters() if weight.requires_grad]
    torch.manual_seed(0)
    got = torch.autograd.grad(OBJECTIVES[stage.name](stage, made, source, batch(20, 14)).loss * 3, weights)

    def plain(parts):
        values = [part.value() for part in parts]
        return torch.stack(values).sum(), values

    monkeypatch.setattr(f"llamba.stages.{stage.name}.one_graph_at_a_time", plain)
    torch.manual_seed(0)
    want = torch.autograd.grad(OBJECTIVES[stage.name](stage, made, source, batch(20, 14)).loss * 3, weights)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() and bool(other.any())


@pytest.mark.parametrize("name", ["llama", "mistral", "phi", "qwen3"])
def test_a_student_that_copies_the_teachers_attention_is_at_no_distance(name: str) -> None:
    for stage, bound in ((Matrix(), 1e-100), (Hidden(), 1e-12), (Hidden(target="block", ahead=2), 1e-12)):
        made, source = pair(stage, "attention", name, init="attention")
        assert OBJECTIVES[stage.name](stage, made, source, batch(20, 14)).loss <= bound
        made, source = pair(stage, "attention", name, init="random")
        assert OBJECTIVES[stage.name](stage, made, source, batch(20, 14)).loss > 1


def test_sharded_models_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    """FSDP2 over one process, as the trainer places the models: layers run as modules of their own, and every gradient arrives."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for stage in (Matrix(), Hidden(), Hidden(target="block", ahead=2)):
            made, source = pair(stage)
            function = partial(OBJECTIVES[stage.name], stage)
            want = function(made, source, batch(20, 14))
            trained = {name: weight for name, weight in made.named_parameters() if weight.requires_grad}
            gradients = dict(zip(trained, torch.autograd.grad(want.loss, list(trained.values())), strict=True))
            for module in (*source.model.layers, *made.model.layers, made):
                fully_shard(module, mesh=mesh)
            got = run_as_forward(made, made, partial(function, made, source), batch(20, 14))
            got.loss.backward()
            assert torch.allclose(got.loss, want.loss, rtol=1e-10)
            for name, weight in made.named_parameters():
                if weight.requires_grad:
                    assert torch.allclose(weight.grad.full_tensor(), gradients[name], rtol=1e-5, atol=1e-8), name
    finally:
        dist.destroy_process_group()


# the stages


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """Conversations in the embedded teacher's language."""
    path = tmp_path_factory.mktemp("language") / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(random.Random(index), 96)}) + "\n" for index in range(96)))
    return path


def test_one_command_runs_matrix_hidden_distill_each_lowering_its_own_loss(tmp_path: Path, monkeypatch, embedded: Path) -> None:
    """MOHAWK's recipe on the embedded teacher, through its command line."""
    keys = [f"teacher={TEACHER}", f"output={tmp_path / 'run'}", f"data.train={embedded}", f"data.eval={embedded}", "data.length=96"]
    keys += ["student.attention=0.5", "student.init=attention"]
    for stage in ("matrix", "hidden", "distill"):
        few = {"tokens": "none", "steps": 8, "batch": 8, "micro_batch": 8, "lr": 2e-3, "warmup": 0, "weight_decay": 0, "log_every": 1}
        keys += [f"stages.{stage}.{key}={value}" for key, value in few.items()]
    keys += ["stages.hidden.target=block", "stages.distill.precision=fp32"]
    monkeypatch.setattr(sys, "argv", ["phi_mohawk.py", *keys])
    runpy.run_path(str(TEACHER.parents[1] / "phi_mohawk.py"), run_name="__main__")
    for number, name in enumerate(("matrix", "hidden", "distill"), 1):
        lines = read_metrics(tmp_path / "run" / f"{number}-{name}" / METRICS)
        assert len(lines) == 9 and lines[7]["loss"] < 0.8 * lines[0]["loss"], (name, [line.get("loss") for line in lines])
        assert set(lines[8]) == {"step", "eval_loss", "eval_kl", "eval_ce"} if name == "distill" else {"step", "eval_loss"}
        if name != "distill":
            for line in lines[:8]:
                assert list(line["layers"]) == ["0", "2", "4", "6"]
                assert line["loss"] == pytest.approx(sum(line["layers"].values()) / 4, rel=1e-4) and line["tokens_per_s"] > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory, chat_file, tokenizer) -> StageData:
    folder = tmp_path_factory.mktemp("data") / "rows"
    config = Data(train=str(chat_file), length=48)
    tokenize(config, tokenizer, "all", folder)
    return StageData(config, 0, folder)


def stage_losses(stage, student_folder: Path, teacher_folder: Path, data: StageData, out: Path) -> list[float]:
    STAGES[stage.name](stage, str(student_folder), str(teacher_folder), data, out)
    return [line["loss"] for line in read_metrics(out / METRICS)]


@pytest.mark.parametrize("name", ["matrix", "hidden", "distill"])
@pytest.mark.parametrize("kind", ["low_rank", "toeplitz", "attention"])
def test_ablation_mixers_are_trained_too(tmp_path: Path, teacher_folder: Path, data: StageData, name: str, kind: str) -> None:
    convert(str(teacher_folder), mixer=kind, init="random").save_pretrained(tmp_path / "student")
    kinds = {"matrix": Matrix, "hidden": Hidden, "distill": partial(Distill, kl=1.0, ce=0.0, clip=1.0)}
    stage = kinds[name](**SHORT, lr=5e-3, steps=6)
    losses = stage_losses(stage, tmp_path / "student", teacher_folder, data, tmp_path / "out")
    assert losses[-1] < 0.97 * losses[0]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaHybridForCausalLM"


@pytest.mark.parametrize("stage", [Matrix(**SHORT, steps=4), Hidden(**SHORT, steps=4)], ids=["matrix", "hidden"])
def test_accumulation_changes_nothing_and_what_is_outside_stays(tmp_path: Path, teacher_folder: Path, data: StageData, stage) -> None:
    made = convert(str(teacher_folder), mixer="mamba2", init="paper")
    made.save_pretrained(tmp_path / "student")
    before = made.state_dict()
    first = stage_losses(stage, tmp_path / "student", teacher_folder, data, tmp_path / "whole")
    parts = type(stage)(**{**SHORT, "micro_batch": 2}, steps=4)
    assert first == pytest.approx(stage_losses(parts, tmp_path / "student", teacher_folder, data, tmp_path / "parts"), rel=1e-5)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    inside_matrix = {"in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"}
    wanted = inside_matrix | ({"out_proj.weight", "norm.weight"} if stage.name == "hidden" else set())
    assert moved == {f"model.layers.{index}.self_attn.{name}" for index in (0, 2) for name in wanted}
    if stage.name == "matrix":
        for index in (0, 2):  # z and x rows (32 + 16) and their part of the convolution stand outside the matrix
            key = f"model.layers.{index}.self_attn."
            assert torch.equal(before[key + "in_proj.weight"][:48], after[key + "in_proj.weight"][:48])
            assert torch.equal(before[key + "conv1d.weight"][:16], after[key + "conv1d.weight"][:16])


@pytest.mark.parametrize("stage", [Matrix(**SHORT, squared=True, rows=9, steps=5, save_every=2), Hidden(**SHORT, steps=5, save_every=2)])
def test_a_stage_that_was_interrupted_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch, teacher_folder: Path, data: StageData, stage
) -> None:
    """The rows that are sampled, too, are those of the uninterrupted run."""
    convert(str(teacher_folder)).save_pretrained(tmp_path / "student")
    whole = stage_losses(stage, tmp_path / "student", teacher_folder, data, tmp_path / "whole")
    own = DistillTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step == 3:
            raise InterruptedError
        return own(self, *args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(DistillTrainer, "training_step", stopping)
        stage_losses(stage, tmp_path / "student", teacher_folder, data, tmp_path / "parts")
    assert [found.name for found in checkpoints.complete(tmp_path / "parts" / "checkpoints")] == ["checkpoint-2"]
    assert stage_losses(stage, tmp_path / "student", teacher_folder, data, tmp_path / "parts") == whole
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_models_that_do_not_fit_are_refused(tmp_path: Path, teacher_folder: Path, data: StageData, small, tokenizer) -> None:
    convert(str(teacher_folder), mixer="mamba1").save_pretrained(tmp_path / "mamba1")
    convert(str(teacher_folder), mixer="none").save_pretrained(tmp_path / "none")
    small.llama(len(tokenizer), num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    small.llama(len(tokenizer), num_attention_heads=2).save_pretrained(tmp_path / "few-heads")
    convert(str(teacher_folder)).save_pretrained(tmp_path / "half")
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "other")
    wrong = [
        (Matrix, "mamba1", teacher_folder, "use the hidden stage"),
        (Matrix, "none", teacher_folder, "leave the stage out"),
        (Hidden, "none", teacher_folder, "nothing to train: the mixer 'none' has no weights"),
        (Hidden, "mamba1", tmp_path / "shallow", "the same num_hidden_layers, got 4 in .*mamba1 and 2 in"),
        (Matrix, "mamba1", tmp_path / "few-heads", "the same num_attention_heads, got 4"),
        (Hidden, "shallow", tmp_path / "shallow", "needs a student with converted layers"),
        (Matrix, "half", tmp_path / "half", r"reads the teacher's attention, and .*half has none in layers \[0, 2\]"),
        (Hidden, "half", tmp_path / "other", "model_type must be one of .* got 'gpt_neox'"),
    ]
    for kind, made, teacher_model, words in wrong:
        with pytest.raises(ValueError, match=words):
            stage_losses(kind(**SHORT, steps=1), tmp_path / made, teacher_model, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Matrix, rows=8), "matrix.rows needs matrix.squared=true"),
        (partial(Matrix, rows=0, squared=True), "matrix.rows must be a number > 0"),
        (partial(Matrix, train="all"), "matrix.train must be 'mixers'"),
        (partial(Hidden, ahead=2), "need hidden.target='block'"),
        (partial(Hidden, train="all"), "need hidden.target='block'"),
    ],
)
def test_stages_that_cannot_be_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


ALIGN_RECIPE = """
from llamba import Data, Hidden, Matrix, Recipe, Student, launch

short = dict(batch=8, micro_batch=2, precision="fp32", lr=5e-4, warmup=0, log_every=1, steps=6)
recipe = Recipe(
    teacher={teacher!r},
    student=Student(mixer="mamba2", attention=[1]),
    data=Data(train={train!r}, length=48),
    stages=[Matrix(**short), Hidden(**short), Hidden(**short, target="block", ahead=2, train="all")],
    output="run",
)

if __name__ == "__main__":
    launch(recipe)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cpu_ddp", "zero2", "zero3"])
def test_two_processes_align_as_one(tmp_path: Path, teacher_folder: Path, chat_file: Path, launcher: str) -> None:
    """Over gloo, with uneven targets: the losses of one process that accumulates twice as often."""
    (tmp_path / "recipe.py").write_text(ALIGN_RECIPE.format(teacher=str(teacher_folder), train=str(chat_file)))
    config = Path(__file__).parent.parent / "recipes" / "accelerate" / f"{launcher}.yaml"
    several = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2", "--mixed_precision", "no"]
    fixed = {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name, how in (("one", []), ("two", several)):
        command = [sys.executable, *how, "recipe.py", f"output={name}"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **fixed}, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
    for stage in ("1-matrix", "2-hidden", "3-hidden"):
        one, two = (read_metrics(tmp_path / name / stage / METRICS) for name in ("one", "two"))
        assert json.loads((tmp_path / "two" / stage / "stage.json").read_text())["results"]["processes"] == 2
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4), stage
        assert two[-1]["layers"] == pytest.approx(one[-1]["layers"], rel=1e-4), stage

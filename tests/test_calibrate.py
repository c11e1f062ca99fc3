"""The closed-form start: joins fitted to the teacher's attention, against the same least squares written out."""

import json
from pathlib import Path

import pytest
import torch
from models import TEACHERS, ids, teacher
from safetensors.torch import load_file
from torch import Tensor

from llamba.cli import main
from llamba.models.calibrate import PROJECTION_RIDGE, RIDGE, SCORE_RIDGE, STEP_RIDGE, STEPS
from llamba.models.convert import convert
from llamba.running import run
from llamba.settings import Data, Recipe, Student

NEAR = {"window": 4, "sinks": 1, "rotary": True}


def of_layer(model, rows, index: int):
    """Inputs, angles and outputs of a layer's attention, row by row."""
    caught = []

    def keep(module, positional, named, output) -> None:
        caught.append((named["hidden_states"], named["position_embeddings"], output[0]))

    hook = model.base_model.layers[index].self_attn.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for row in rows:
            model(row[None])
    hook.remove()
    return caught


def least_squares(design: Tensor, aim: Tensor, ridges: list[tuple[int, float]]) -> Tensor:
    """Of so many coefficients each with a ridge that is a part of the mean square of their columns."""
    columns = design.split([count for count, _ in ridges], 1)
    own = [part.square().sum(0).mean().mul(ridge).sqrt().expand(part.shape[1]) for part, (_, ridge) in zip(columns, ridges, strict=True)]
    below = torch.cat(own).diag()
    return torch.linalg.lstsq(torch.cat((design, below)), torch.cat((aim, aim.new_zeros(len(below))))).solution


def fitted_head(features: Tensor, view: tuple[Tensor, ...], recurrent: Tensor, whole: Tensor, far: Tensor) -> Tensor:
    """Coefficients [W + 2 P] of one head in fp64, by designs that are written out and a derivative by autograd."""
    seen, lse, mean = view
    W, P = features.shape[1], seen.shape[1]

    def made(found: Tensor) -> Tensor:
        score, gain, share = found.split([W, P, P])
        mass = torch.sigmoid(features @ score - lse)[:, None]
        return ((1 - mass) * seen + mass * (gain * recurrent + share * mean)).flatten()

    true = torch.sigmoid(far - lse)
    weight = true * (1 - true) * seen.norm(dim=-1)
    score = least_squares(features * weight[:, None], far * weight, [(W, SCORE_RIDGE)])
    mass = torch.sigmoid(features @ score - lse)[:, None, None]
    design = torch.cat([mass * value[:, :, None] * torch.eye(P) for value in (recurrent, mean)], 2).flatten(0, 1)
    found = torch.cat((score, least_squares(design, (whole - (1 - mass[..., 0]) * seen).flatten(), [(P, RIDGE), (P, RIDGE)])))
    for _ in range(STEPS):
        slope, missing = torch.autograd.functional.jacobian(made, found), whole.flatten() - made(found)
        moved = found + least_squares(slope, missing, [(W, STEP_RIDGE), (P, RIDGE), (P, RIDGE)])
        if (whole.flatten() - made(moved)).square().sum() >= missing.square().sum():
            break
        found = moved
    return found


@torch.no_grad()
@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("mixer", ["mamba2", "gated_delta", "discrete_mamba2"])
def test_what_stands_for_the_rest_is_fitted_as_by_designs_written_out(mixer: str, index: int) -> None:
    """To what the teacher's layer does, on what the student's layers below make, the fitted ones among them."""
    source, rows = teacher(), ids(3, 40)
    made = convert(source, mixer=mixer, attention=[0], options=NEAR, calibrate=rows)
    one = made.base_model.layers[index].self_attn
    c, sight = one.config, NEAR["window"] + NEAR["sinks"]
    hidden, seen, lse, mean, recurrent = [], [], [], [], []
    for given, angles, _ in of_layer(made, rows, index):
        view, own = one.sides(given, angles)
        for part, value in zip((hidden, seen, lse, mean, recurrent), (given, view.seen, view.lse, view.mean, own), strict=True):
            part.append(value[0, sight:])
    pairs = [one.whole(given, angles) for given, angles, _ in of_layer(source, rows, index)]
    whole, far = (torch.cat([part[0, sight:] for part in parts]) for parts in zip(*pairs, strict=True))
    hidden, seen, lse, mean, recurrent = map(torch.cat, (hidden, seen, lse, mean, recurrent))
    more = torch.arange(1, 41 - sight, dtype=torch.float64).repeat(3)[:, None].log()
    features = torch.cat((hidden, torch.ones_like(more), more), 1)
    scale = features.square().mean(0).sqrt()
    gain = one.join if one.norm is None else one.norm.weight
    for head in range(c.heads):
        view = seen[:, head], lse[:, head], mean[:, head // (c.heads // c.groups)]
        found = fitted_head(features / scale, view, recurrent[:, head], whole[:, head], far[:, head])
        score = torch.cat((one.in_proj.weight[head - c.heads], one.rest_bias[head, None], one.rest_growth[head, None]))
        got = torch.cat((score * scale, *(weights.view(c.heads, -1)[head] for weights in (gain, one.rest_mean))))
        assert torch.allclose(got, found, rtol=1e-4, atol=1e-5)
    fitted = {origin.tensor for origin in made.conversion.layers[index] if "fitted on 120 tokens" in origin.source}
    assert fitted == {one.gain[0], "in_proj.weight[rest]", "rest_bias", "rest_growth", "rest_mean"}


@torch.no_grad()
def test_a_mixer_without_a_window_has_its_gains_fitted() -> None:
    source, rows = teacher(), ids(3, 40)
    one = convert(source, mixer="mamba2", attention=[0], calibrate=rows).base_model.layers[1].self_attn
    sides = [one.sides(given, angles) for given, angles, _ in of_layer(source, rows, 1)]
    recurrent = torch.cat([own[0] for _, own in sides])  # layer 0 is the teacher's: the same inputs
    whole = torch.cat([one.whole(given, angles)[0][0] for given, angles, _ in of_layer(source, rows, 1)])
    for head in range(one.config.heads):
        design = (recurrent[:, head, :, None] * torch.eye(one.config.head_dim)).flatten(0, 1)
        want = least_squares(design, whole[:, head].flatten(), [(one.config.head_dim, RIDGE)])
        assert torch.allclose(one.norm.weight.view(one.config.heads, -1)[head].double(), want, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-biased", "phi"])
@pytest.mark.parametrize("index", [1, 3])
def test_a_projection_is_moved_as_one_least_squares_fit_would(name: str, index: int) -> None:
    source, rows = teacher(name), ids(3, 40)
    made = convert(source, mixer="mamba2", attention=[0], calibrate=rows)
    caught: list[torch.Tensor] = []
    out = made.base_model.layers[index].self_attn.out_proj
    hook = out.register_forward_pre_hook(lambda module, given: caught.append(given[0][0]))
    of_layer(made, rows, index)
    hook.remove()
    joined = torch.cat(caught)  # [n, I]
    attention = source.base_model.layers[index].self_attn
    before = (attention.dense if name == "phi" else attention.o_proj)(joined)
    aim = torch.cat([output[0] for *_, output in of_layer(source, rows, index)]) - before
    ridge = (PROJECTION_RIDGE * joined.square().sum(0).mean()).sqrt() * torch.eye(joined.shape[1], dtype=torch.float64)
    move = torch.linalg.lstsq(torch.cat((joined, ridge)), torch.cat((aim, aim.new_zeros(len(ridge), aim.shape[1])))).solution
    assert (out(joined) - before - joined @ move).abs().max() < 1e-9 * before.abs().max()
    assert move.abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", list(TEACHERS))
def test_what_is_fitted_to_is_the_teachers_attention(name: str) -> None:
    source, rows = teacher(name), ids(1, 40)
    one = convert(source, mixer="mamba2", attention=[0], options=NEAR).base_model.layers[1].self_attn
    ((given, angles, output),) = of_layer(source, rows, 1)
    assert torch.allclose(
        one.out_proj(one.whole(given, angles)[0].flatten(-2)), output, rtol=0, atol=1e-7 if name == "qwen3" else 1e-9
    )  # transformers' norm of it is in fp32


@torch.no_grad()
def test_a_fit_comes_closer_to_attention_and_leaves_a_whole_window_as_it_is() -> None:
    source, rows, other = teacher(), ids(8, 64), ids(2, 64, seed=3)

    def error(**more) -> float:
        student = convert(source, mixer="mamba2", attention=[0], **more)
        (given, angles, _), *_ = of_layer(source, other, 1)
        want = source.base_model.layers[1].self_attn(given, angles, None)[0]
        return float((student.base_model.layers[1].self_attn(given, position_embeddings=angles)[0] - want).square().sum())

    assert error(options=NEAR, calibrate=rows) < 0.9 * error(options=NEAR)
    assert error(calibrate=rows) < error()
    near, sight = convert(source, mixer="mamba2", attention=[0], options=NEAR, calibrate=rows), NEAR["window"] + NEAR["sinks"]
    assert (near(other).logits - source(other).logits)[:, :sight].abs().max() < 1e-9, "what is in sight is attention"
    assert (near(other).logits - source(other).logits)[:, sight:].abs().max() > 1e-4
    whole = convert(source, mixer="mamba2", attention=[0], options={"window": 64, "rotary": True}, calibrate=rows)
    assert (whole(other).logits - source(other).logits).abs().max() < 1e-9
    nothing = convert(source, attention=1.0, calibrate=rows)
    assert torch.equal(nothing(other).logits, source(other).logits), "there was nothing to fit"


def test_rows_that_do_not_serve_are_refused() -> None:
    source = teacher()
    with pytest.raises(ValueError, match="calibrate needs rows of 1 to .* token ids, got no rows"):
        convert(source, calibrate=[])
    with pytest.raises(ValueError, match="calibrate is for mixers that read whole heads; got mixer='mamba1'"):
        convert(source, mixer="mamba1", calibrate=ids(1, 8))


def test_a_run_fits_the_start_of_its_student_on_its_own_data(teacher_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    data, window = Data(train=[str(chat_file), "stage:pseudo_label"], length=48, weights=[0.5, 0.5]), {"window": 2}
    student = Student(attention=[0], options=window, calibrate=200)
    out = run.run(Recipe(str(teacher_folder), student, data, [], str(tmp_path / "run")))
    record = json.loads((out / "conversion.json").read_text())
    sources = {line["source"] for layer in record["converted"].values() for line in layer if line["tensor"] == "norm.weight"}
    assert all(source.startswith("fitted on 2") for source in sources) and len(sources) > 0, sources
    weights = load_file(out / "model.safetensors")
    assert any(name.endswith("norm.weight") and "self_attn" in name and value.abs().max() > 0 for name, value in weights.items())
    with pytest.raises(ValueError, match="student.calibrate needs a source in data.train that no stage makes"):
        Recipe(str(teacher_folder), student, Data(train="stage:pseudo_label"), [], str(tmp_path / "other"))


def test_the_command_fits_what_the_function_fits(teacher_folder: Path, chat_file: Path, tmp_path: Path, capsys) -> None:
    options = ["--mixer", "mamba2", "--option", "window=4", "--attention", "0.5"]
    main(["convert", str(teacher_folder), str(tmp_path / "out"), *options, "--calibrate", str(chat_file), "--tokens", "300"])
    said = capsys.readouterr().out
    assert "fitting joins to attention on 300 tokens" in said and "of attention's square left" in said
    rows = run.calibration_rows(Data(train=str(chat_file), length=512, streaming=True), str(teacher_folder), 300)
    expected = convert(str(teacher_folder), mixer="mamba2", options={"window": 4}, calibrate=rows).state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    fitted = [name for name in found if name.endswith("norm.weight") and ".self_attn." in name]
    assert fitted and all(torch.equal(found[name], expected[name]) and found[name].any() for name in fitted)
    with pytest.raises(SystemExit):
        main(["convert", str(teacher_folder), str(tmp_path / "no"), "--calibrate", str(chat_file), "--tokens", "0"])
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err

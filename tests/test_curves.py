"""The report's curves: what is read, what is drawn, and the table."""

import json
import os
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from llamba.cli import main
from llamba.running import run as running
from llamba.settings import Data, Distill, Hidden, Recipe, Student
from llamba.training import curves
from llamba.training.layer_ranking import Ranking
from llamba.training.layer_ranking import draw as draw_ranking
from llamba.training.metrics import read_metrics
from llamba.training.reporters import reporters


def write_stage(folder: Path, lines: list[dict], seconds: float | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')
    if seconds is not None:
        (folder / "stage.json").write_text(json.dumps({"seconds": seconds}))
        (folder / "DONE").touch()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten stages' worth of order: 2-hidden comes before 10-distill; the last one is still running."""
    distances = [{"layers": {"0": 4.0 / step, "10": 3.0 / step, "2": 2.0 / step}} for step in (1, 2, 4)]
    lines = [{"step": i, "loss": 9.0 / i, "tokens": 100 * i, "tokens_per_s": 50.0 * i} | distances[i - 1] for i in (1, 2, 3)]
    write_stage(tmp_path / "2-hidden", lines, seconds=90)
    numbers = [{"step": i, "loss": 2.0 / i, "kl": 1.0 / i, "lr": 1e-3, "tokens": 10 * i, "tokens_per_s": 7.0} for i in (1, 2)]
    write_stage(tmp_path / "10-distill", [*numbers, {"step": 2, "eval_loss": 1.5}])
    write_stage(tmp_path / "11-dpo", [{"step": 1, "loss": 0.7, "margin": -0.1}])
    (tmp_path / "0-convert").mkdir()
    return tmp_path


def test_curves(run):
    hidden, distill, dpo = curves.curves_of(run)
    assert [stage.name for stage in (hidden, distill, dpo)] == ["2-hidden", "10-distill", "11-dpo"]
    assert (hidden.done, distill.done) == (True, False)
    assert hidden.layers() == ["0", "2", "10"] and hidden.losses() == ["loss"]
    assert hidden.curve("layers", "10") == ([100, 200, 300], [3.0, 1.5, 0.75])
    assert distill.losses() == ["loss", "kl", "eval_loss"] and distill.layers() == []
    assert distill.curve("eval_loss") == ([20], [1.5])
    assert dpo.axis == "step" and dpo.losses() == ["loss", "margin"]


def test_report_prints_a_table_and_draws(run, capsys):
    main(["report", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["2-hidden", "3", "300", "9.0000", "3.0000", "-", "100", "1.5"]
    assert lines[3].split() == ["10-distill", "2", "20", "2.0000", "1.0000", "1.5000", "7", "-", "not", "finished"]
    assert lines[4].split() == ["11-dpo", "1", "-", "0.7000", "0.7000", "-", "-", "-", "not", "finished"]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    own = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: (own(figure, *args, **more), figures.append(figure))[0])
    return figures


def ticks(axis) -> list[str]:
    """The labels that stand on an axis, within its limits."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_every_axis_is_named_and_its_numbers_are_plain(run, drawn):
    curves.draw(curves.curves_of(run), run / "report.png")
    axes = [one for one in drawn[0].axes if one.axison]
    assert all(one.get_ylabel() and one.get_xlabel() for one in axes)
    assert [one.get_ylabel() for one in axes][0] == "L2 distance, mean over target tokens"
    labels = [label for one in axes for axis in (one.xaxis, one.yaxis) for label in ticks(axis)]
    assert labels and not [label for label in labels if not re.fullmatch(r"-?[\d,]+(\.\d+)?", label)]
    assert all(len(ticks(one.yaxis)) >= 2 for one in axes)


@pytest.mark.parametrize("layers", [3, 20])
def test_every_layer_is_named(tmp_path, drawn, layers):
    lines = [{"step": i, "loss": 1.0 / i, "layers": {str(n): (n + 1) / i for n in range(layers)}} for i in (1, 2, 3)]
    write_stage(tmp_path / "1-hidden", lines)
    curves.draw(curves.curves_of(tmp_path), tmp_path / "report.png")
    panel = drawn[0].axes[1]
    if layers == 3:
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["0", "1", "2"]
    else:
        bar = drawn[0].axes[-1]
        assert bar.get_ylabel() == "layer" and bar.get_ylim() == (0, 19)
        assert len({line.get_color() for line in panel.lines}) == layers


def test_curves_that_coincide_are_both_seen(tmp_path, drawn):
    """A loss that is its KL alone: the two lines differ in more than colour, and the lower one is the wider."""
    write_stage(tmp_path / "1-distill", [{"step": i, "loss": 2.0 / i, "kl": 2.0 / i, "ce": 2.0 / i} for i in (1, 2, 30)])
    curves.draw(curves.curves_of(tmp_path), tmp_path / "report.png")
    lines = drawn[0].axes[0].lines
    assert lines[0].get_linewidth() > 2 * lines[1].get_linewidth() and lines[1].get_linestyle() != lines[2].get_linestyle()
    assert drawn[0].axes[0].get_yscale() == "log"


@pytest.mark.parametrize("scores", [[0.9, 0.3, 0.0002, 0.01], [0.9, -0.001, 0.0, 0.01], [0.5, 0.4, 0.3, 0.2]])
def test_small_bars_are_seen(tmp_path, drawn, scores):
    """Each score that is not 0 has a bar of a twentieth of the picture's height at least, and the colours are explained."""
    draw_ranking(Ranking("swap", 0.0, scores, None, 1), [0, 1], tmp_path / "layers.png")
    panel = drawn[0].axes[0]
    low, high = panel.get_window_extent().y0, panel.get_window_extent().y1
    inside = [min(box.y1, high) - max(box.y0, low) for box in (bar.get_window_extent() for bar in panel.patches)]
    assert all(seen > 0.05 * (high - low) for seen, score in zip(inside, scores, strict=True) if score)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["keeps attention", "gets a mixer"]
    assert panel.get_ylabel() == "nats per target token"


def test_report_refuses_what_is_no_run(tmp_path):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    with pytest.raises(ValueError, match="must be a run folder with a stage that has begun to train"):
        curves.curves_of(tmp_path / "nowhere")


class Recorder(TrainerCallback):
    """Stands for a reporter: transformers makes one from the name and calls it with every log."""

    seen: list[tuple[str, dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((args.run_name, dict(logs)))


def test_numbers_go_to_reporters(tmp_path, teacher_folder, chat_file, monkeypatch):
    """The same numbers as in metrics.jsonl, those of single layers too, under the run's and the stage's name."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "seen", [])
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    short = dict(batch=4, micro_batch=4, steps=2, warmup=0, precision="fp32", log_every=1, report_to=["recorder"])
    stages = [Hidden(**short), Distill(**short)]
    last = running.run(Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), stages, str(tmp_path / "run")))
    for name, key in (("1-hidden", "layers/0"), ("2-distill", "kl")):
        logged = [logs for run, logs in Recorder.seen if run == f"run/{name}" and "loss" in logs]
        written = read_metrics(last.parent / name / "metrics.jsonl")
        assert [logs["loss"] for logs in logged] == [line["loss"] for line in written] and all(key in logs for logs in logged)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(last / "tensorboard")


def test_reporters_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    with pytest.raises(ValueError, match="report_to must name reporters among .*wandb, got 'wandbb'"):
        reporters(["wandbb"], tmp_path)

    def missing():
        raise RuntimeError("it needs the package x")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", missing)
    with pytest.raises(ValueError, match="report_to=recorder cannot be used here: it needs the package x"):
        reporters(["recorder"], tmp_path)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "mine" and reporters(None, tmp_path) == []

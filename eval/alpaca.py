"""AlpacaEval 2: win rate and length-controlled win rate against GPT-4 Turbo's outputs, by alpaca_eval's own code and any judge.

    OUT/alpaca_eval/model_answer/MODEL.jsonl          answers
    OUT/alpaca_eval/MODEL/model_outputs.json          the same, in alpaca_eval's format
    OUT/alpaca_eval/MODEL/JUDGE/annotations.json      preferences (1: reference, 2: model)
    OUT/judge/JUDGE.jsonl                             every reply, under a key of judge, URL, parameters and whole prompt

alpaca_eval makes the prompts, reads the log-probabilities and fits the length model; the requests are ours.
"""

import importlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamba.eval import fetch, foreign, stats
from llamba.eval.answerer import Settings
from llamba.eval.answers import Question, answer_all, say_what_stopped
from llamba.eval.journal import Journal
from llamba.eval.judge import Failure, Judge, JudgeClient, Reply, Request, digest, escape
from llamba.eval.local_judge import transport
from llamba.eval.scores import model_name, require_packages, save, save_items, score

INSTRUCTIONS = 805
OFFICIAL = "gpt4_1106_preview"  # AlpacaEval 2's baseline
PARAMETERS: dict[str, Any] = {"max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5}  # weighted_alpaca_eval_gpt4_turbo's
REFERENCE, GAMED = "alpaca_eval/gpt4_1106_preview_outputs.json", "alpaca_eval/df_gamed.csv"
_TEMPLATE = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
_PLACES = re.compile(r"\{(instruction|output_[12])\}")


@dataclass(frozen=True)
class Options:
    """What to do. `outputs`: a file in alpaca_eval's format in the place of a model's answers."""

    data: str | None = None
    outputs: str | None = None
    limit: int | None = None
    temperature: float = 0.7
    win_rate_only: bool = False
    max_failed: float = 0.05
    estimate_only: bool = False
    refits: int = 300


class _NothingAsked(Exception):
    """Leaves alpaca_eval once the estimate is known."""


def package() -> Any:
    """The alpaca_eval package (0.6.6). It imports pkg_resources, which setuptools no longer has, and turns the root logger up."""
    require_packages("alpaca_eval", "scikit-learn")
    if "alpaca_eval" not in sys.modules:
        level, real = logging.getLogger().level, sys.modules.get("pkg_resources")
        sys.modules["pkg_resources"] = _pkg_resources()
        try:
            import alpaca_eval.main  # noqa: F401
        finally:
            logging.getLogger().setLevel(level)
            del sys.modules["pkg_resources"]
            if real is not None:
                sys.modules["pkg_resources"] = real
        bars = sys.modules["alpaca_eval.utils"]
        vars(bars)["tqdm"] = types.SimpleNamespace(tqdm=lambda steps, **kwargs: steps)  # the bar of our requests is enough
    return sys.modules["alpaca_eval"]


def _pkg_resources() -> types.ModuleType:
    """The two functions of pkg_resources that alpaca_eval calls."""
    from packaging.version import parse

    made: Any = types.ModuleType("pkg_resources")
    made.get_distribution = importlib.metadata.distribution
    made.parse_version = parse
    return made


def _glm() -> Any:
    package()
    return importlib.import_module("alpaca_eval.metrics.glm_winrate")


def check_for_length_control(instructions: Sequence[str], reference: Sequence[str]) -> None:
    """Raises ValueError where a length-controlled win rate would be meaningless: its difficulties are joined by row number."""
    advice = "; give all of them in that order, or pass --win-rate-only"
    if len(reference) != INSTRUCTIONS or len(set(reference)) != INSTRUCTIONS:
        raise ValueError(f"a length-controlled win rate needs the {INSTRUCTIONS} official references, got {len(reference)}{advice}")
    if len(instructions) != INSTRUCTIONS:
        raise ValueError(f"a length-controlled win rate needs all {INSTRUCTIONS} instructions, got {len(instructions)}{advice}")
    if wrong := [row for row, pair in enumerate(zip(instructions, reference, strict=True)) if pair[0] != pair[1]]:
        raise ValueError(f"a length-controlled win rate needs the official order of instructions, and row {wrong[0]} differs{advice}")


def _clean(text: str) -> str:
    """Text that neither ends a chat message nor is taken for a place of the template."""
    return _PLACES.sub(r"{ \1}", escape(text))


def _outputs(name: str, out: Path, reference: Sequence[dict[str, Any]], settings: Settings, options: Options) -> list[dict[str, Any]]:
    """Rows {instruction, output, generator}: from `options.outputs`, or a model's answers."""
    if options.outputs is not None:
        rows = _of_pairs(Path(options.outputs))
        if options.limit is not None:
            asked_for = {row["instruction"] for row in reference}
            rows = [row for row in rows if row["instruction"] in asked_for]
        _check_instructions(options.outputs, [row["instruction"] for row in rows], reference)
        return [row | {"generator": name} for row in rows]
    asked = [Question(i, (row["instruction"],), options.temperature) for i, row in enumerate(reference)]
    rows = answer_all(name, model_name(name), asked, settings, out / "alpaca_eval/model_answer" / f"{model_name(name)}.jsonl")
    if cut := say_what_stopped(rows):
        print(cut)
    return [
        {
            "dataset": ref.get("dataset"),
            "instruction": ref["instruction"],
            "output": row["choices"][0]["turns"][0],
            "generator": model_name(name),
        }
        for ref, row in zip(reference, rows, strict=True)
    ]


def _of_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows of instruction and output from a file. Raises ValueError, with file and row, where one is missing."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file in alpaca_eval's format, and is not there")
    found = []
    for where, row in foreign.rows(path):
        row = {"generator": OFFICIAL} | {key: value for key, value in row.items() if key != "generator" or value is not None}
        found.append(row | {key: foreign.text((where, row), key) for key in ("instruction", "output", "generator")})
    return found


def _check_instructions(file: str, given: Sequence[str], reference: Sequence[dict[str, Any]]) -> None:
    known = {row["instruction"] for row in reference}
    other = [row for row, instruction in enumerate(given) if instruction not in known]
    if not given or other or len(set(given)) < len(given):
        what = f"row {other[0]} has another" if other else "some stand there twice" if given else "it is empty"
        raise ValueError(f"{file} must hold outputs for instructions of AlpacaEval, each once; {what}")


def has_verdict(reply: Reply) -> bool:
    """Whether a reply says how likely m and M are."""
    return reply["logprobs"] is not None and any(top["token"] in ("m", "M") for top in reply["logprobs"]["content"][0]["top_logprobs"])


def _preflight(reply: Reply) -> str | None:
    if reply["logprobs"] is not None:
        return None
    return "this judge returns no log-probabilities, which AlpacaEval's preferences are made of; choose a judge or a server that does"


class Completions:
    """What alpaca_eval calls with all its prompts: asks through the journal. `failed`: the requests without a verdict."""

    def __init__(self, judge: Judge, out: Path, estimate_only: bool) -> None:
        self.judge, self.out, self.estimate_only = judge, out, estimate_only
        self.failed: dict[str, Failure] = {}
        self.took = ""

    def __call__(self, prompts: Sequence[str], **kwargs: Any) -> dict[str, Any]:
        """Replies in alpaca_eval's format; an empty one where there is no verdict."""
        chat = package().utils.prompt_to_chatml
        requests = [Request(chat(prompt), PARAMETERS) for prompt in prompts]
        with Journal(self.out / "judge" / f"{self.judge.slug}.jsonl") as journal:
            asker = JudgeClient(self.judge, journal, lambda: transport(self.judge), 1)
            print(asker.announce(requests, has_verdict), flush=True)
            if self.estimate_only:
                raise _NothingAsked
            self.failed = asker.ask(requests, has_verdict, _preflight)
            self.took = asker.took(self.failed)
            keys = [request.key(self.judge) for request in requests]
            replies = [asker.known.get(key) if key not in self.failed else None for key in keys]
        if all(reply is None or not has_verdict(reply) for reply in replies):
            reason = next(iter(self.failed.values())).reason
            raise ValueError(f"none of {len(requests)} judgments can be used ({reason}); run again to ask once more")
        made = [{"logprobs": r["logprobs"], "text": r["text"]} if r and has_verdict(r) else "" for r in replies]
        zeros = [0.0] * len(made)
        return {"completions": made, "completions_all": made, "price_per_example": zeros, "time_per_example": zeros}


def _config(judge: Judge, folder: Path) -> Path:
    """alpaca_eval's configuration of this judge; its name, and so the leaderboard's, is the judge's slug."""
    package()
    prompt = Path(sys.modules["alpaca_eval"].__file__ or "").parent / "evaluators_configs" / _TEMPLATE
    parser = {"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False}
    config = {
        "prompt_template": str(prompt), "fn_completions": "openai_completions", "completions_kwargs": PARAMETERS,
        "fn_completion_parser": "logprob_parser", "completion_parser_kwargs": parser, "completion_key": "completions_all", "batch_size": 1,
    }  # fmt: skip
    path = folder.resolve() / judge.slug / "configs.yaml"  # alpaca_eval looks for a relative one beside its own code
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({judge.slug: config}, indent=2))  # JSON is YAML
    return path.parent


def annotate(rows: list[dict[str, Any]], reference: list[dict[str, Any]], judge: Judge, folder: Path, ask: Completions) -> Any:
    """alpaca_eval's annotations of the model's outputs against the reference's, as a DataFrame in the reference's order."""
    import pandas as pd

    alpaca = package()

    class Annotator(alpaca.annotators.PairwiseAnnotator):  # type: ignore[name-defined,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for single in self.annotators.values():
                single.fn_completions = ask

    def frame(part: list[dict[str, Any]]) -> Any:
        keep = [{"instruction": _clean(r["instruction"]), "output": _clean(r["output"]), "generator": r["generator"]} for r in part]
        return pd.DataFrame(keep)

    with _quiet():
        _, annotations = alpaca.main.evaluate(
            model_outputs=frame(rows), reference_outputs=frame(reference), annotators_config=_config(judge, folder), Annotator=Annotator,
            output_path=None, precomputed_leaderboard=None, is_return_instead_of_print=True, fn_metric="get_winrate", sort_by="win_rate",
            annotation_kwargs={"chunksize": None}, caching_path=None, is_avoid_reannotations=False, is_store_missing_annotations=False,
        )  # fmt: skip
    return pd.DataFrame(annotations)


class _quiet(warnings.catch_warnings):
    """No warnings of pandas and scikit-learn about alpaca_eval's calls, no log lines of it, no lasting sklearn settings."""

    def __enter__(self) -> Any:
        import sklearn

        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self.config = sklearn.config_context()
        self.config.__enter__()
        logging.disable(logging.ERROR)
        return entered

    def __exit__(self, *error: Any) -> None:
        logging.disable(logging.NOTSET)
        self.config.__exit__(*error)
        super().__exit__(*error)


class LengthControl:
    """alpaca_eval's length-controlled win rate with local data, and its interval: rows resampled, the model refitted.

    `annotations`: all rows in the official order. The penalty is chosen once, by alpaca_eval's cross-validation.
    """

    def __init__(self, annotations: Any, gamed: Path) -> None:
        self.glm = _glm()
        self.glm.hf_hub_download = lambda filename, **kwargs: str(gamed)
        self.annotations, self.info = annotations, self.glm.GLM_INFO["length_controlled_v1"]
        fit = self.glm.fit_LogisticRegressionCV

        def noting_the_penalty(*args: Any, **kwargs: Any) -> Any:
            fitted = fit(*args, **kwargs)
            self.penalty = float(fitted.C_[0])
            return fitted

        self.glm.fit_LogisticRegressionCV = noting_the_penalty
        try:
            with _quiet():
                more = {"save_weights_dir": None, "is_add_glm_preference_inplace": False}
                self.own: dict[str, float] = self.glm.get_length_controlled_winrate(annotations, **more)
        finally:
            self.glm.fit_LogisticRegressionCV = fit

    def _fit(self, annotations: Any) -> tuple[Any, Any]:
        lam = self.info["regularize_to_baseline_lambda"]
        train, test, weight = self.glm._get_featurized_data(annotations, self.info["formula"], lam)
        known = train["preference"].notna()
        fitted = self.glm.fit_LogisticRegressionCV(train[known], "preference", n_splits=0, C=self.penalty, sample_weight=weight[known])
        return fitted, test

    def __call__(self, drawn: NDArray[np.int64] | None) -> float:
        """The win rate in per cent, of all rows or of drawn ones."""
        if drawn is None:
            return float(self.own["length_controlled_winrate"])
        with _quiet():
            fitted, test = self._fit(self.annotations.iloc[drawn])
        return float(100 * fitted.predict_proba(test)[:, 1].mean())


def run(name: str, out: Path, settings: Settings, judge: Judge, options: Options) -> str:
    """Answer, judge, report; returns the report. Everything that is there already is used.

    Raises ValueError before anything is paid for where the length-controlled win rate could not be made, and, after everything is
    written, where more than `max_failed` of the judgments failed.
    """
    package()
    reference = _of_pairs(fetch.data_file(REFERENCE, options.data))[: options.limit]
    gamed = None if options.win_rate_only else fetch.data_file(GAMED, options.data)
    instructions = [row["instruction"] for row in reference]
    if gamed is not None and options.outputs is None:
        check_for_length_control(instructions, instructions)  # before hours of answering
    if not options.estimate_only and not (out / "judge" / f"{judge.slug}.jsonl").exists():
        judge.key()
    rows = _outputs(name, out, reference, settings, options)
    if gamed is not None:
        check_for_length_control([row["instruction"] for row in rows], instructions)
    folder = out / "alpaca_eval" / rows[0]["generator"]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model_outputs.json", rows)
    ask = Completions(judge, out, options.estimate_only)
    try:
        annotations = annotate(rows, reference, judge, folder, ask)
    except _NothingAsked:
        return "nothing was asked"
    _write(folder / judge.slug / "annotations.json", json.loads(annotations.to_json(orient="records")))
    text = _report(rows, annotations, judge, out, gamed, options, len(ask.failed))
    if len(ask.failed) > options.max_failed * len(rows):
        print(text)
        raise ValueError(
            f"{len(ask.failed)} of {len(rows)} judgments failed, above --max-failed {options.max_failed}; run again to ask anew"
        )
    return f"{text}\n{ask.took}"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    os.replace(partial, path)


def _report(
    rows: list[dict[str, Any]], annotations: Any, judge: Judge, out: Path, gamed: Path | None, options: Options, failed: int
) -> str:
    model = rows[0]["generator"]
    preferences = zip(annotations["instruction"], annotations["preference"].astype(float), strict=True)
    wins: stats.Values = {digest(instruction)[:16]: [100 * (p - 1)] for instruction, p in preferences if p == p}
    limited = {} if options.limit is None else {"limit": len(wins)}
    more = limited | {"failed": failed, "judge_is": judge.identity, "average_length": float(np.mean([len(row["output"]) for row in rows]))}
    raw = stats.bootstrap(wins)
    table = [score("alpaca_eval", "win rate", model, raw, judge.slug, **more)]
    lines = [f"AlpacaEval 2 of {model}, judged by {judge.slug}", f"  win rate                    {raw}"]
    if gamed is not None:
        control = LengthControl(annotations, gamed)
        controlled = stats.refit_interval(len(annotations), control, resamples=options.refits)
        table.append(
            score("alpaca_eval", "length-controlled win rate", model, controlled, judge.slug, **more, df_gamed=fetch.identity(gamed))
        )
        lines.append(f"  length-controlled win rate  {controlled}")
        if not fetch.identity(gamed)["published"]:
            lines.append(f"  ({gamed} is not the published file: not comparable with published numbers)")
    lines.append(f"  {raw.n} judged, {failed} failed; mean length {more['average_length']:.0f} characters")
    save(out, table)
    save_items(out, "alpaca_eval", model, judge.slug, wins, judge_named=judge.model)
    return "\n".join(lines)

"""What the papers claim of conversions, and whether a study's scores agree: claims as values, verdicts by margins, tables in Markdown.

A score that is a distance is compared by its ratio, a share of questions by its difference. The margin is two standard errors of that
difference: of distances by the spread over seeds, of shares by the number of questions. A ratio closer to 1 than LEAST decides nothing;
what should be as good may lose EQUAL.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llamba.recipes.real.exam import DIGITS, PHONE, PREFERRED

AGREES, DISAGREES, UNKNOWN, MISSING = "agrees", "disagrees", "cannot tell", "not measured"
LEAST, EQUAL = 0.1, 0.03  # of a distance: a smaller difference is none that can be told; a smaller loss is none
OFF = ", recurrence off"
DISTANCES = ("chat KL", "text KL")
LATE = ("chat KL, second half",)
SHARES = (PHONE, DIGITS)
ALIGNED = (*SHARES, PREFERRED)
MADE_OF = "Mamba-in-Llama (2408.15237)"
RULE = (
    "Mean ± standard deviation over seeds; KL in nats per token. A verdict needs two standard errors of the difference: of a distance by "
    f"the spread over seeds (the larger of both arms' own and the median of all arms that have two), and at least {LEAST:.0%} of it, since "
    f"all arms have the same few windows; of a share by the number of questions. As good is what loses less than {EQUAL:.0%}. Where "
    "several scores judge a claim, those that can tell must say the same."
)

Scores = dict[str, float]  # of one seed, by what was measured


@dataclass(frozen=True)
class Claim:
    """One arm is better than another (or, `equal`, as good), where it stands, and what judges it here: names of scores."""

    better: str
    worse: str
    source: str
    by: tuple[str, ...] = (*DISTANCES, *SHARES)
    equal: bool = False


CLAIMS = (
    Claim("teacher", "50%", f"{MADE_OF}, Table 2: MT-Bench 8.00 against 7.32", SHARES),
    Claim("50%", "25%", f"{MADE_OF}, Table 2: MT-Bench 7.32 against 6.74; Table 6: perplexity 2.09 against 2.20"),
    Claim("25%", "12.5%", f"{MADE_OF}, Table 2: MT-Bench 6.74 against 6.48"),
    Claim("12.5%", "0%", f"{MADE_OF}, Table 2: MT-Bench 6.48 against 5.64"),
    Claim("50%, not fitted", "50%, random weights", f"{MADE_OF}, Table 7: perplexity 2.09 against 7.4"),
    Claim("50%, all trained", "50%, no mixers, all trained", f"{MADE_OF}, Table 9: LAMBADA perplexity 6.20 against 151.98"),
    Claim("50%", "50%, all trained", f"{MADE_OF}, Table 7: perplexity 2.09 with frozen MLPs against 9.1"),
    Claim("50%, all trained, two rates", "50%", "MOHAWK (2408.10189), Table 5: mean accuracy 62.7 against 61.4 with frozen MLPs"),
    Claim(
        "0%, not fitted, hidden first", "0%, not fitted",
        "MOHAWK (2408.10189), Table 2: mean accuracy 62.3 with stages 2 and 3 against 54.5 with 3",
    ),
    Claim("0%", "0%, not fitted", "no paper's: joins fitted in closed form before any step"),
    Claim("25%, not fitted, by steps", "25%, not fitted", f"{MADE_OF}, Table 7: perplexity 2.20 against 2.29"),
    Claim(
        "25%, selected layers", "25%",
        "HALO (2601.22156), selectors, 25% kept: commonsense 55.9 against 54.0 uniform, needles at 32K 94.1 against 68.2",
    ),
    Claim("0%" + OFF, "0%", "2510.05901, abstract: such hybrids rely almost entirely on their window (in words)", LATE, equal=True),
    Claim("50%" + OFF, "50%", "2510.05901, abstract: such hybrids rely almost entirely on their window (in words)", LATE, equal=True),
    Claim("50% + SFT + DPO", "50%", f"{MADE_OF}, Table 6: MT-Bench 6.69 against 5.55", ALIGNED),
    Claim("50% + SFT + DPO", "50% + SFT", f"{MADE_OF}, Table 6: MT-Bench 6.69 against 5.61", ALIGNED),
    Claim("50% + SFT + DPO", "50% + DPO", f"{MADE_OF}, Table 6: MT-Bench 6.69 against 5.42", ALIGNED),
)  # fmt: skip


class Found(NamedTuple):
    """A verdict, and the two arms' means that it rests on."""

    verdict: str
    better: float = math.nan
    worse: float = math.nan


def typical_spread(arms: Sequence[Sequence[float]]) -> float:
    """The median over arms of the standard deviation over seeds of a distance's logarithm; infinite where no arm has two seeds."""
    found = [_spread(values) for values in arms if len(values) > 1]
    return statistics.median(found) if found else math.inf


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(map(math.log, values)) if len(values) > 1 else 0.0


def by_distance(better: Sequence[float], worse: Sequence[float], typical: float, equal: bool = False) -> str:
    """Of an arm's distances over seeds and another's: is the first's lower? `equal`: is it no higher?

    The spread is the larger of both arms' own and the `typical` one of all arms, since two seeds say little of an arm's own.
    """
    gain = statistics.fmean(map(math.log, worse)) - statistics.fmean(map(math.log, better))
    own = math.sqrt((_spread(better) ** 2 + _spread(worse) ** 2) / 2)
    margin = max(math.log1p(LEAST), 2 * max(own, typical) * math.sqrt(1 / len(better) + 1 / len(worse)))
    if equal:
        return DISAGREES if gain < -margin else AGREES if margin < math.inf and gain >= -math.log1p(EQUAL) else UNKNOWN
    return AGREES if gain > margin else DISAGREES if gain < -margin else UNKNOWN


def by_share(better: Sequence[float], worse: Sequence[float], questions: int) -> str:
    """Of an arm's per cent of so many questions over seeds and another's: is the first's higher? All seeds have the same questions."""
    one, other = statistics.fmean(better) / 100, statistics.fmean(worse) / 100
    variance = sum(p * (1 - p) for p in ((share * questions + 1) / (questions + 2) for share in (one, other)))
    margin = 2 * math.sqrt(variance / questions)
    return AGREES if one - other > margin else DISAGREES if other - one > margin else UNKNOWN


def together(verdicts: Sequence[str]) -> str:
    """The verdict of those scores that can tell, where they say the same."""
    told = {verdict for verdict in verdicts if verdict in (AGREES, DISAGREES)}
    if len(told) == 1:
        return told.pop()
    return UNKNOWN if told or UNKNOWN in verdicts else MISSING


def judged(claim: Claim, arms: dict[str, list[Scores]], counts: dict[str, int]) -> dict[str, Found]:
    """A claim's verdict by each of its scores. `arms`: each arm's scores by seed; `counts`: questions behind each share."""
    found = {}
    for name in claim.by:
        better, worse = ([scores[name] for scores in arms.get(arm, []) if name in scores] for arm in (claim.better, claim.worse))
        if not better or not worse:
            found[name] = Found(MISSING)
            continue
        means = statistics.fmean(better), statistics.fmean(worse)
        if name in counts:
            found[name] = Found(by_share(better, worse, counts[name]), *means)
        else:
            typical = typical_spread([[one[name] for one in seeds if one.get(name, 0) > 0] for seeds in arms.values()])
            found[name] = Found(by_distance(better, worse, typical, claim.equal), *means)
    return found


def _cell(values: Sequence[float], share: bool) -> str:
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.1f}" if share else f"{statistics.fmean(values):.4g}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.1f}" if share else f"{text} ± {statistics.stdev(values):.2g}"


def arms_table(arms: dict[str, list[Scores]]) -> str:
    """A row an arm, a column a score: mean ± standard deviation over seeds."""
    columns = list(dict.fromkeys(name for seeds in arms.values() for scores in seeds for name in scores))
    lines = [f"| arm | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for arm, seeds in arms.items():
        cells = [_cell([scores[name] for scores in seeds if name in scores], "%" in name) for name in columns]
        lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table(arms: dict[str, list[Scores]], counts: dict[str, int]) -> str:
    """A row a claim: both arms, the paper's number, the two arms' means with the verdict by each score, and the verdict of all."""
    lines = ["| better, says the paper | than | the paper | here, score by score | here |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        found = judged(claim, arms, counts)
        parts = [
            f"{name}: {one.better:.4g} against {one.worse:.4g}, {one.verdict}" for name, one in found.items() if one.verdict != MISSING
        ]
        verdict = together([one.verdict for one in found.values()])
        than = f"(as good as) {claim.worse}" if claim.equal else claim.worse
        lines.append(f"| {claim.better} | {than} | {claim.source} | {'; '.join(parts) or '-'} | {verdict} |")
    return "\n".join(lines)

"""What a job says on the terminal while it works."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

from seuf_ray.artifacts import AttributionReport, EvaluationReport, SearchReport, TrialRecord, UnlearningPlan
from seuf_ray.attribution.topics import TopicComparison
from seuf_ray.config import SearchConfig
from seuf_ray.search import objectives
from seuf_ray.unlearning import Progress

_started = time.perf_counter()


def heading(text: str) -> None:
    """`[ 12.3 s] text`: a stage begins."""
    print(f"\n[{time.perf_counter() - _started:6.1f} s] {text}", flush=True)


def show_engine(engine: str, why: str) -> None:
    """What will run the model, and why that."""
    print(f"  {engine}: {why}", flush=True)


def show_attribution(report: AttributionReport) -> None:
    """The leading experts, and the warnings."""
    data = report.data
    print(f"  {data.num_tokens:,} forget tokens in {data.num_rows:,} rows from {', '.join(data.sources)}")
    for texts in (data, report.retain):
        if texts is not None and texts.num_bad_rows:
            print(f"  {texts.num_bad_rows:,} malformed rows left out, the first is {texts.first_bad}")
    layers, ranked = {row.layer: row for row in report.layers}, report.ranked()
    for (score, (layer, expert)), (following, _) in pairwise(ranked[:6]):
        lead = f"{score / following:.2f} x the next" if following else ""
        stays = (
            f"a target in {layers[layer].stability[expert]:4.0%} of resamplings" if report.bootstrap else ""
        )
        print(f"  layer {layer:2d} expert {expert:3d}   {report.score} {score:.4f}   {lead:15s}  {stays}")
    for warning in report.warnings:
        print(f"  WARNING: {warning}")


class Meter:
    """Says every few seconds how many tokens are done, how fast, and how long the rest will take.

    Args:
        max_tokens: of each set; None: all there are.
        num_sets: that are counted together.
    """

    def __init__(self, max_tokens: int | None = None, num_sets: int = 1, every: float = 5.0) -> None:
        self.max_tokens, self.num_sets, self.every = max_tokens, num_sets, every
        self._tokens: Counter[str] = Counter()
        self._shares: defaultdict[str, float] = defaultdict(float)
        self._started: float | None = None
        self._first = 0

    def count(self, tokens: int, data: str, share: float) -> None:
        """So many more tokens of set `data`, about this `share` of it (0: nobody knows)."""
        self._tokens[data] += tokens
        self._shares[data] += share
        now = time.perf_counter()
        if self._started is None:  # before the first result models were loaded, which tells nothing of speed
            self._started = self._shown = now
            self._first = tokens
        elif now - self._shown >= self.every:
            self._shown = now
            print(f"  {self.line(now - self._started)}", flush=True)

    def line(self, seconds: float) -> str:
        """`[####----------------]  20 %  1,234 of about 6,170 tokens, 620 a second, 8 s to go`.

        Args:
            seconds: since the first result.
        """
        done = self._tokens.total()
        speed = (done - self._first) / seconds
        if (total := self._total()) is None:
            return f"{done:,} tokens, {speed:,.0f} a second"
        share, left = min(done / total, 1.0), (total - done) / max(speed, 1e-9)
        return f"{bar(share)}  {done:,} of about {total:,} tokens, {speed:,.0f} a second, {left:,.0f} s to go"

    def _total(self) -> int | None:
        """Tokens of all sets, by what has come of each; None while nothing can be said of one."""
        totals = [self._tokens[name] / share for name, share in self._shares.items() if share > 0]
        if len(totals) < self.num_sets:
            return (
                None
                if self.max_tokens is None
                else max(self.num_sets * self.max_tokens, self._tokens.total())
            )
        most = math.inf if self.max_tokens is None else self.max_tokens
        return max(round(sum(min(total, most) for total in totals)), self._tokens.total())


def bar(share: float, width: int = 20) -> str:
    """`[#####---------------]  25 %`."""
    full = int(share * width)
    return f"[{'#' * full}{'-' * (width - full)}] {share:4.0%}"


def show_layer(done: int, layers: int, seconds: float, tokens: int, bytes_read: int) -> None:
    """One layer of a streamed pass is done; `tokens` of them went through it."""
    left = seconds / done * (layers - done)
    print(
        f"  {bar(done / layers)}  layer {done} of {layers}, {bytes_read / 2**30:.2f} GiB read, "
        f"{tokens * done / layers / seconds:,.0f} tokens a second, {left:,.0f} s to go",
        flush=True,
    )


def show_topics(comparison: TopicComparison) -> None:
    """Two topics side by side: overlap of their top experts, rank correlation, the best expert of each."""
    a, b = (", ".join(sources) for sources in comparison.sources)
    print(f"A: {a}\nB: {b}\nby {comparison.score}; overlap of the top {comparison.top_m}\n")
    print(f"{'':8s} {'overlap':>8s} {'rank correlation':>17s}   best layer/expert of A, of B")
    for row in comparison.rows:
        name = "model" if row.layer is None else f"layer {row.layer}"
        (layer_a, best_a), (layer_b, best_b) = row.best
        best = f"{layer_a}/{best_a}, {layer_b}/{best_b}"
        print(f"{name:8s} {row.overlap:8.2f} {row.correlation:17.3f}   {best}")


def show_plan(plan: UnlearningPlan) -> None:
    """What will train, and how much of the model that is."""
    what = (
        "every parameter"
        if plan.is_full
        else ", ".join(f"layer {at} expert {e}" for at, e in plan.experts[:8])
    )
    more = f" and {len(plan.experts) - 8} more" if len(plan.experts) > 8 else ""
    routers = f", {len(plan.routers)} router(s)" if plan.routers and not plan.is_full else ""
    print(
        f"  {what}{more}{routers}: {plan.num_trainable:,} of {plan.model.num_parameters:,} parameters", end=""
    )
    print(f" ({plan.trainable_fraction:.4%} trainable)", flush=True)


def show_needs(needs: Sequence[tuple[str, str]]) -> None:
    """What the job will take, before it does."""
    print("  what this takes (sizes are exact, the rest are estimates):")
    for name, text in needs:
        print(f"    {name:11s} {text}", flush=True)


def progress_printer(steps: int) -> Callable[[Progress], None]:
    """A listener that prints one line per small evaluation."""

    def show(progress: Progress) -> None:
        metrics = progress.metrics
        terms = "  ".join(
            f"{k.removeprefix('loss/')} {v:+.3f}" for k, v in metrics.items() if k.startswith("loss/")
        )
        kept = [v for k, v in metrics.items() if k.startswith("overlap_top1/forget/")]
        drift = f"overlap {sum(kept) / len(kept):.3f}" if kept else ""
        print(
            f"  step {progress.step:4d}/{steps}  forget {metrics.get('forget_accuracy', float('nan')):.3f}  "
            f"utility {metrics.get('utility', float('nan')):.3f}  {drift}  {terms}",
            flush=True,
        )
        if progress.stopped:
            print(f"  stopped: {progress.stopped}", flush=True)

    return show


def show_evaluation(report: EvaluationReport) -> None:
    """Headline figures, and every question source."""
    print(
        f"  forget accuracy {report.forget_accuracy:.3f}   utility {report.utility_accuracy:.3f}   "
        f"perplexity {report.perplexity:.1f}"
    )
    if report.patch is not None:
        overlap, kl = report.drift("overlap_top1", "forget"), report.drift("kl", "forget")
        print(f"  routing on forget tokens: top-1 overlap {overlap:.3f}, KL {kl:.4f} nats per token")
    for source, found in {**report.forget, **report.utility}.items():
        print(f"    {source:32s} {found.mean:.3f}  of {found.count:.0f}", flush=True)


def show_kept(kept: int, total: int) -> None:
    """A search goes on."""
    print(f"  {kept} of {total} trials are kept from the run before", flush=True)


def show_room(room: int, wanted: int) -> None:
    """Fewer worker groups find room than might run side by side."""
    print(f"  room for {room} of {wanted} trials at once (search.max_concurrent)", flush=True)


def trial_printer(config: SearchConfig) -> Callable[[TrialRecord, Sequence[TrialRecord], int], None]:
    """A listener that prints the table of a search row by row; `*` marks the best so far, or the front's."""
    head = f"  {'trial':>9s}  {'end':9s} {'score':>7s} {'forget':>6s} {'utility':>7s} {'drift':>6s} {'seconds':>7s}\n"

    def show(record: TrialRecord, known: Sequence[TrialRecord], total: int) -> None:
        nonlocal head
        print(head, end="")  # with the first row: until then other things are said
        head = ""
        star = "*" if record in objectives.chosen(known, config) else " "
        figures = [record.figures.get(name) for name in objectives.FIGURES]
        score = objectives.score(record.figures, config) if objectives.is_result(record) else None
        cells = [
            f"{'-' if v is None else format(v, '.3f'):>{w}s}"
            for v, w in zip([score, *figures], (7, 6, 7, 6), strict=True)
        ]
        name = f"{star} {record.number:3d} ({len(known)}/{total})  {record.status:9s}"
        print(f"{name} {' '.join(cells)} {record.seconds:7.1f}  {_settings(record)}", flush=True)
        if record.status in ("diverged", "refused", "failed"):
            print(f"        {record.why}", flush=True)

    return show


def _settings(record: TrialRecord) -> str:
    values = {path: f"{v:.3g}" if isinstance(v, float) else str(v) for path, v in record.assignment.items()}
    return "  ".join(f"{path.removeprefix('training.')} {value}" for path, value in values.items())


def show_search(report: SearchReport) -> None:
    """The best trial, as overrides, or how many are on the front; and what mattered."""
    if report.best is None:
        print("  no trial came to a result: search.json says why each ended", flush=True)
        return
    if report.goal == "pareto":
        numbers = ", ".join(map(str, report.chosen))
        print(f"  on the front are {len(report.chosen)} of {len(report.trials)} trials: {numbers}")
        print(f"  patch/ is of trial {report.best}, of these the one with the widest gap (utility - forget):")
    else:
        print(f"  trial {report.best} is the best: {report.objective}")
    for line in report.overrides:
        print(f"    {line}")
    if report.importance:
        shares = ", ".join(f"{path} {share:.0%}" for path, share in report.importance.items())
        print(f"  what explains the score: {shares}", flush=True)

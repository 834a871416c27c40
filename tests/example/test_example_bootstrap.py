"""The paired bootstrap against slow loops, for coverage on simulated data, and on experiment folders."""

import csv
import random
import statistics

import numpy as np
import pytest

from mtmd.results import bootstrap
from mtmd.results.bootstrap import METRICS, paired_bootstrap
from mtmd.results.compare import compare_experiments, read_scores
from mtmd.results.metrics import msa_metrics


@pytest.fixture(scope="module")
def systems():
    """Three runs of one system, two of a worse one, on 60 utterances with some neutral ones."""
    rng = np.random.default_rng(0)
    targets = np.clip(np.round(rng.normal(0, 1.6, 60) * 5) / 5, -3, 3)
    targets[:5] = 0
    hard = rng.normal(0, 0.5, 60)  # what both find hard
    first = targets + hard + rng.normal(0, 0.3, (3, 60))
    second = 0.7 * targets + hard + rng.normal(0, 0.6, (2, 60))
    second[0, :3] = 0  # on the border between negative and positive
    # Numbers that float32 holds, through which all metrics go.
    return tuple(values.astype(np.float32).astype(np.float64) for values in (first, second, targets))


def mean_metric(metric, predictions, targets):
    return float(np.mean([msa_metrics(row, targets)[metric] for row in predictions]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_difference_is_that_of_the_mean_metrics_over_the_seeds(systems, metric):
    first, second, targets = systems
    expected = mean_metric(metric, first, targets) - mean_metric(metric, second, targets)
    found = paired_bootstrap(first, second, targets, metric=metric, resamples=50)
    assert found.difference == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("over_seeds", [False, True], ids=["utterances", "seeds"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_resample_is_what_the_metric_says_of_the_drawn_utterances(systems, metric, over_seeds):
    """The metric as sums over utterances, beside the metric itself on each draw."""
    first, second, targets = systems
    tallies = [bootstrap._tallies(metric, scores, targets) for scores in (first, second)]
    drawn = bootstrap._draw(np.random.default_rng(7), metric, tallies, 20, over_seeds=over_seeds)
    rng = np.random.default_rng(7)
    places = rng.integers(60, size=(20, 60))
    picked = [rng.integers(len(scores), size=(20, len(scores))) for scores in (first, second)]
    for number, chosen in enumerate(places):
        means = []
        for scores, picks in zip((first, second), picked, strict=True):
            rows = scores[picks[number]] if over_seeds else scores
            means.append(mean_metric(metric, rows[:, chosen], targets[chosen]))
        assert drawn[number] == pytest.approx(means[0] - means[1], abs=1e-10)


def slow_interval(first, second, targets, *, over_seeds, resamples):
    """The bootstrap of the MAE as one would write it down, with another random generator."""
    dice = random.Random(3)
    differences = []
    for _ in range(resamples):
        utterances = [dice.randrange(len(targets)) for _ in targets]
        means = []
        for system in (first, second):
            rows = [dice.choice(system) for _ in system] if over_seeds else system
            means.append(statistics.fmean(abs(row[u] - targets[u]) for row in rows for u in utterances))
        differences.append(means[0] - means[1])
    differences.sort()
    low, high = differences[round(0.025 * resamples)], differences[round(0.975 * resamples)]
    return low, high, statistics.stdev(differences)


@pytest.mark.parametrize("over_seeds", [False, True], ids=["utterances", "seeds"])
def test_the_interval_is_that_of_an_independent_slow_loop(over_seeds):
    rng = np.random.default_rng(1)
    targets = rng.normal(size=40)
    shift = (
        np.array([-0.4, 0.0, 0.4])[:, None] if over_seeds else 0.0
    )  # seeds that differ, or drawing them shows nothing
    first, second = (targets + shift + rng.normal(0, width, (3, 40)) for width in (0.4, 0.5))
    low, high, deviation = slow_interval(
        first.tolist(), second.tolist(), targets.tolist(), over_seeds=over_seeds, resamples=3000
    )
    found = paired_bootstrap(first, second, targets, over_seeds=over_seeds, resamples=20_000)
    # An end of an interval from 3,000 draws has a standard error of about 0.05 deviations.
    assert found.low == pytest.approx(low, abs=0.2 * deviation)
    assert found.high == pytest.approx(high, abs=0.2 * deviation)


def simulate(rng, *, utterances, seeds, gap=0.1, seed_effect=0.0):
    """Two systems with known expected errors: the first is worse by `gap`. Errors share what is hard."""
    hard = rng.exponential(0.4, utterances)
    systems = []
    for extra in (0.3 + gap, 0.3):
        effect = rng.normal(0, seed_effect, (seeds, 1))
        systems.append(hard + rng.exponential(extra, (seeds, utterances)) + effect + 1)
    return systems


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits, rounds = 0, 400
    for number in range(rounds):
        first, second = simulate(rng, utterances=100, seeds=2)
        found = paired_bootstrap(first, second, np.zeros(100), resamples=400, seed=number)
        hits += found.low <= 0.1 <= found.high
    assert 0.91 <= hits / rounds <= 0.98  # 0.95 give or take 3.5 standard errors, and what 400 draws blur


def test_p_is_small_as_often_as_it_says_when_nothing_differs():
    rng = np.random.default_rng(6)
    small, rounds = 0, 400
    for number in range(rounds):
        first, second = simulate(rng, utterances=100, seeds=2, gap=0.0)
        small += paired_bootstrap(first, second, np.zeros(100), resamples=400, seed=number).p < 0.05
    assert 0.015 <= small / rounds <= 0.09


def test_drawing_the_seeds_covers_differences_between_seeds_and_utterances_alone_do_not():
    rng = np.random.default_rng(8)
    hits, rounds = np.zeros(2), 200
    for number in range(rounds):
        first, second = simulate(rng, utterances=100, seeds=8, seed_effect=0.15)
        for place, over_seeds in enumerate((False, True)):
            found = paired_bootstrap(first, second, np.zeros(100), over_seeds=over_seeds, resamples=300, seed=number)
            hits[place] += found.low <= 0.1 <= found.high
    alone, both = hits / rounds
    assert both > 0.86
    assert alone < 0.65


def test_pairing_narrows_the_interval_when_both_find_the_same_hard():
    rng = np.random.default_rng(2)
    targets, hard = np.zeros(300), rng.exponential(1.0, 300)
    first, second = hard + rng.exponential(0.1, 300), hard + rng.exponential(0.1, 300)
    paired = paired_bootstrap(first, second, targets, resamples=1000)
    mixed = paired_bootstrap(first, rng.permutation(second), targets, resamples=1000)
    assert paired.high - paired.low < 0.3 * (mixed.high - mixed.low)


def test_identical_systems_differ_by_nothing():
    scores = np.random.default_rng(0).normal(size=(2, 30))
    found = paired_bootstrap(scores, scores, np.zeros(30), resamples=100)
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_same_seed_gives_the_same_interval_however_the_draws_are_cut_up(systems):
    once, again, other = (paired_bootstrap(*systems, resamples=700, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once.low != other.low


def test_swapping_the_systems_turns_the_sign(systems):
    first, second, targets = systems
    forth, back = paired_bootstrap(first, second, targets), paired_bootstrap(second, first, targets)
    assert (forth.difference, forth.low, forth.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert forth.p == back.p
    assert forth.high < 0  # the first is better: the simulated systems are far apart
    assert forth.p < 0.01


def test_p_is_never_zero():
    found = paired_bootstrap(np.full(50, 1.0), np.full(50, 9.0), np.zeros(50), resamples=99)
    assert found.p == pytest.approx(2 / 100)


def test_an_undefined_correlation_gives_nan_and_undefined_resamples_are_left_out():
    targets = np.array([0.0, 1.0, 2.0, 3.0])
    constant = paired_bootstrap(np.full(4, 0.3), targets, targets, metric="corr", resamples=50)
    assert np.isnan([constant.difference, constant.low, constant.high, constant.p]).all()
    few = paired_bootstrap(targets + 0.1 * targets**2, targets[::-1], targets, metric="corr", resamples=500)
    assert np.isfinite([few.difference, few.low, few.high, few.p]).all()
    neutral = paired_bootstrap(targets[:2], targets[1::-1], np.zeros(2), metric="acc2_non0", resamples=50)
    assert np.isnan(neutral.difference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": np.zeros((2, 4))}, r"first: expected a score for each of 5 targets, got 4"),
        ({"second": np.zeros((2, 2, 5))}, r"second: expected shape \(S, N\) or \(N,\), not empty, got \(2, 2, 5\)"),
        ({"targets": np.zeros((5, 1))}, r"targets: expected shape \(N,\), not empty, got \(5, 1\)"),
        ({"targets": np.zeros(0)}, r"targets: expected shape \(N,\), not empty, got \(0,\)"),
        ({"first": np.full(5, np.nan)}, "first: expected finite numbers, got 5 NaN or infinite of 5"),
        ({"metric": "rmse"}, "metric: expected one of acc7, .*, got 'rmse'"),
        ({"resamples": 0}, "resamples: expected at least 1, got 0"),
        ({"confidence": 95}, "confidence: expected a number between 0 and 1, got 95"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    values = {"first": np.zeros(5), "second": np.zeros(5), "targets": np.zeros(5), **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        paired_bootstrap(values.pop("first"), values.pop("second"), values.pop("targets"), **values)


# Experiment folders


def write_predictions(folder, scores, targets, *, audio=None, ids=None):
    folder.mkdir(exist_ok=True)
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "split", "id", "target", "score", "text", "audio", "vision"])
        for seed, row in enumerate(scores, start=1):
            for place, (score, target) in enumerate(zip(row, targets, strict=True)):
                name = ids[place] if ids else f"clip{place}"
                heard = "" if audio is None or np.isnan(audio[seed - 1][place]) else audio[seed - 1][place]
                writer.writerow([seed, "test", name, target, score, score, heard, ""])
                writer.writerow([seed, "valid", name, target, 0.0, 0.0, "", ""])
    return folder


def test_folders_are_compared_as_their_arrays_are(tmp_path, systems):
    first, second, targets = systems
    folders = [write_predictions(tmp_path / name, rows, targets) for name, rows in (("a", first), ("b", second))]
    read = read_scores(folders[0])
    assert read.seeds == [1, 2, 3]
    assert np.array_equal(read.scores, first)
    over_utterances, over_seeds = compare_experiments(*folders, resamples=200)
    assert over_utterances == paired_bootstrap(first, second, targets, resamples=200)
    assert over_seeds == paired_bootstrap(first, second, targets, over_seeds=True, resamples=200)
    some, _ = compare_experiments(*folders, seeds=[2], resamples=200)
    assert some == paired_bootstrap(first[1], second[1], targets, resamples=200)
    clipped, _ = compare_experiments(*folders, limit=1.0, resamples=200)
    assert clipped == paired_bootstrap(*(np.clip(one, -1, 1) for one in systems), resamples=200)


def test_a_branch_is_compared_where_both_experiments_have_its_modality(tmp_path, systems):
    first, second, targets = systems
    heard = [first.copy(), second.copy()]
    heard[0][:, :4] = np.nan
    heard[1][:, 2:8] = np.nan
    folders = [
        write_predictions(tmp_path / name, rows, targets, audio=audio)
        for name, rows, audio in zip("ab", (first, second), heard, strict=True)
    ]
    found, _ = compare_experiments(*folders, column="audio", resamples=200)
    assert found == paired_bootstrap(first[:, 8:], second[:, 8:], targets[8:], resamples=200)
    with pytest.raises(ValueError, match="no test utterance has a 'vision' prediction in both"):
        compare_experiments(*folders, column="vision")


@pytest.mark.parametrize("others", [1, 3])
def test_a_single_seed_has_no_interval_over_seeds(others, tmp_path, systems):
    """Also where the other experiment has several: how far a seed may lie from another, one run does not tell."""
    first, second, targets = systems
    one = write_predictions(tmp_path / "a", first[:1], targets)
    other = write_predictions(tmp_path / "b", second[:others], targets)
    assert compare_experiments(one, other, resamples=50)[1] is None
    assert compare_experiments(other, one, resamples=50)[1] is None


def test_folders_that_cannot_be_compared_are_refused(tmp_path, systems):
    first, _, targets = systems
    one = write_predictions(tmp_path / "a", first, targets)
    other = write_predictions(tmp_path / "b", first, targets, ids=[f"other{place}" for place in range(60)])
    with pytest.raises(ValueError, match=r"b: expected predictions for the test utterances of .*a \(60 of them\)"):
        compare_experiments(one, other)
    with pytest.raises(ValueError, match="expected predictions of seed 9, got those of 1, 2, 3"):
        read_scores(one, seeds=[1, 9])
    with pytest.raises(FileNotFoundError, match="expected the predictions of a finished experiment"):
        read_scores(tmp_path / "none")
    lines = (one / "predictions.csv").read_text().splitlines()
    (one / "predictions.csv").write_text("\n".join(line for line in lines if not line.startswith("2,test,clip7,")))
    with pytest.raises(ValueError, match="expected the same utterances for every seed, but seed 2 has others"):
        read_scores(one)

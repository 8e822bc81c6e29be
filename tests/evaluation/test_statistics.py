from __future__ import annotations

import numpy as np
import pytest

from tenpak.evaluation import bootstrap


def mean(totals):
    return {"mean": totals["value"] / totals["tokens"]}


def test_iid_data_gives_the_analytic_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    error = bootstrap({"value": values, "tokens": np.ones(400)}, mean, resamples=4000)["mean"]
    # The spread of a standard deviation estimated from 4000 draws is 1 / sqrt(8000) = 1.1 %: five of these.
    assert error == pytest.approx(values.std(ddof=0) / np.sqrt(400), rel=0.056)


def test_a_ratio_gives_the_error_of_linearisation():
    generator = np.random.default_rng(1)
    tokens = generator.integers(50, 150, size=500).astype(float)
    values = tokens * 2.0 + generator.normal(0, 30, size=500)
    ratio = values.sum() / tokens.sum()
    analytic = np.sqrt(np.mean((values - ratio * tokens) ** 2) / 500) / tokens.mean()
    assert bootstrap({"value": values, "tokens": tokens}, mean, resamples=4000)["mean"] == pytest.approx(
        analytic, rel=0.06
    )


def test_the_log_of_a_perplexity_follows_the_delta_method():
    nll = np.random.default_rng(2).gamma(9.0, 0.25, size=600)
    error = bootstrap(
        {"nll": nll, "tokens": np.ones(600)}, lambda t: {"ppl": np.exp(t["nll"] / t["tokens"])}, resamples=4000
    )["ppl"]
    assert error == pytest.approx(np.exp(nll.mean()) * nll.std() / np.sqrt(600), rel=0.06)


def test_figures_are_paired():
    hard = np.random.default_rng(3).normal(5.0, 3.0, size=300)
    sums = {"a": hard, "b": hard + 0.1, "tokens": np.ones(300)}
    errors = bootstrap(sums, lambda t: {"a": t["a"] / t["tokens"], "difference": (t["b"] - t["a"]) / t["tokens"]})
    assert errors["a"] > 0.1
    assert errors["difference"] == pytest.approx(0.0, abs=1e-12)


def test_seeded():
    sums = {"value": np.arange(30.0), "tokens": np.ones(30)}
    assert bootstrap(sums, mean, seed=5) == bootstrap(sums, mean, seed=5)
    assert bootstrap(sums, mean, seed=5) != bootstrap(sums, mean, seed=6)


def test_one_window_has_no_standard_error():
    assert bootstrap({"value": np.ones(1), "tokens": np.ones(1)}, mean) == {"mean": None}


@pytest.mark.parametrize("resamples", [2, 63, 64, 65, 1000])
def test_every_resample_is_drawn(resamples):
    seen = []

    def figures(totals):
        seen.append(len(totals["tokens"]))
        assert (totals["tokens"] == 20).all()  # n of n windows each time
        return mean(totals)

    bootstrap({"value": np.arange(20.0), "tokens": np.ones(20)}, figures, resamples=resamples)
    assert sum(seen) == resamples

"""Survival that follows drift, on simulated loads whose drift is known.

Errors are measured twice: over the last rounds, as the metrics see it, and with the
maps held still on a large load of the same kind, which has no noise to speak of. The
first has a floor (`reliability.ece_floor`) of several percent with few requests.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest

from tests.calibration.workloads import CHAT, CODE, MATH, WIDTH, Kind, Load
from vllm_dspark.calibration.drift import CONFIDENCE, DriftOptions
from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.fitting import fit
from vllm_dspark.calibration.online import OnlineOptions, OnlineSurvival
from vllm_dspark.calibration.reliability import ece
from vllm_dspark.calibration.rounds import Floats, Ints, Rounds, survival
from vllm_dspark.calibration.scaling import Scaling, logit, scale

SWITCH = 300


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """STS as in the paper, fitted on math as `vllm-dspark calibrate` does it."""
    load = Load(40, [MATH], seed=99)
    rounds = []
    for _ in range(100):
        rounds.append((*load.round(), load.ids))
        load.turn_over()
    confidence, accepted, ids = zip(*rounds, strict=True)
    prompts = np.unique(np.concatenate(ids), return_inverse=True)[1]
    table, count = np.concatenate(confidence), len(prompts)
    recorded = Rounds(
        table,
        np.full(count, WIDTH),
        np.concatenate(accepted),
        prompts,
        np.zeros(count, dtype=np.int64),
        np.array(["math"] * count),
    )
    return Calibration("hash", {1.0: fit(recorded, allow_bias=False).scaling}, "math")


class Server:
    """A load and its estimator; a round trims where the survival is below ``trim``."""

    def __init__(
        self,
        load: Load,
        online: OnlineSurvival,
        trim: float = 0.0,
        with_confidence: bool = True,
    ) -> None:
        self.load, self.online = load, online
        self._trim, self._with_confidence = trim, with_confidence

    def round(self) -> tuple[Floats, Ints]:
        """One round: survivals gone by, and what would have been accepted."""
        confidence, accepted = self.load.round()
        ids = self.load.ids
        given = confidence if self._with_confidence else None
        made = self.online.apply(ids, [1.0] * len(ids), given)
        lengths = (made.survival >= self._trim).sum(axis=1)
        self.online.update(made, lengths, np.minimum(accepted, lengths))
        self.online.forget(self.load.turn_over())
        return made.survival, accepted

    def rounds(self, count: int) -> tuple[Floats, Ints]:
        survivals, accepted = zip(*(self.round() for _ in range(count)), strict=True)
        return np.concatenate(survivals), np.concatenate(accepted)

    def switch(self, kinds: list[Kind]) -> None:
        self.online.forget(self.load.replace_all(kinds))


def errors(survivals: Floats, accepted: Ints) -> Floats:
    """ECE by position, over all rounds whether trimmed or not."""
    found = [ece(survivals[:, k], accepted > k) for k in range(WIDTH)]
    return np.array(found)


def still_errors(online: OnlineSurvival, kinds: Sequence[Kind]) -> Floats:
    """ECE by position of the maps as they are now, on 15,000 rounds."""
    online = copy.deepcopy(online)
    online._maps.learn = lambda *_: None  # type: ignore[method-assign]
    server = Server(Load(128, list(kinds), seed=12345), online)
    server.rounds(30)  # offsets of the new requests settle
    return errors(*server.rounds(120))


@pytest.mark.parametrize("trim", [0.0, 0.3])
@pytest.mark.parametrize("requests", [32, 256])
def test_back_under_3_percent_after_math_becomes_chat(
    calibration: Calibration, requests: int, trim: float
) -> None:
    online = OnlineSurvival(WIDTH, calibration)
    server = Server(Load(requests, [MATH], seed=1), online, trim)
    server.rounds(SWITCH)
    server.switch([CHAT])
    # It does drift: at once the error is far over the limit where it matters.
    assert (errors(*server.rounds(10))[:4] > 0.04).all()
    server.rounds(190)
    assert (errors(*server.rounds(100)) < 0.03).all()
    assert (still_errors(online, [CHAT]) < 0.03).all()


def test_the_file_alone_would_stay_wrong(calibration: Calibration) -> None:
    confidence, accepted = Load(5000, [CHAT], seed=2).round()
    scaled = survival(calibration.scaling(1.0).apply(confidence))
    assert (errors(scaled, accepted)[:5] > 0.06).all()


@pytest.mark.parametrize("requests", [1, 8])
def test_few_requests_are_enough(calibration: Calibration, requests: int) -> None:
    """300 rounds of one stream are 300 outcomes at most: medians over seeds."""
    found = []
    for seed in range(5):
        online = OnlineSurvival(WIDTH, calibration)
        server = Server(Load(requests, [MATH], seed), online, trim=0.3)
        server.rounds(SWITCH)
        server.switch([CHAT])
        server.rounds(300)
        found.append(still_errors(online, [CHAT]))
    assert (np.median(found, axis=0) < 0.03).all()


def test_mixed_load_is_calibrated_within_each_kind(calibration: Calibration) -> None:
    server = Server(Load(60, [CODE, CHAT], seed=3), OnlineSurvival(WIDTH, calibration))
    server.rounds(100)
    sums = {CODE: np.zeros(WIDTH), CHAT: np.zeros(WIDTH)}
    counts = {CODE: 0, CHAT: 0}
    for _ in range(200):
        kinds = server.load.current
        survivals, accepted = server.round()
        hits = accepted[:, None] > np.arange(WIDTH)
        for i, kind in enumerate(kinds):
            sums[kind] += hits[i] - survivals[i]
            counts[kind] += 1
    for kind, total in sums.items():
        assert (np.abs(total / counts[kind]) < 0.04).all(), kind


def test_starts_from_the_file(calibration: Calibration) -> None:
    confidence, _ = Load(20, [MATH], seed=4).round()
    made = OnlineSurvival(WIDTH, calibration).apply(
        list(range(20)), [1.0] * 20, confidence
    )
    expected = survival(calibration.scaling(1.0).apply(confidence))
    assert made.survival == pytest.approx(expected, abs=2e-3)  # logits end at ±8


def test_each_request_by_its_temperature() -> None:
    settings = {0.0: Scaling((0.5, 0.5), (0.0, 0.0)), 1.0: Scaling((2.0, 1.0), (0, 1))}
    online = OnlineSurvival(2, Calibration("hash", settings, ""))
    confidence = np.full((3, 2), 0.8)
    made = online.apply(["a", "b", "c"], [0.0, 0.7, 0.0], confidence)
    for row, number in enumerate([0.0, 1.0, 0.0]):
        maps = settings[number]
        expected = [
            float(scale(np.array([0.8]), maps.temperature[k], maps.bias[k])[0])
            for k in range(2)
        ]
        assert made.conditional[row] == pytest.approx(expected)


def test_without_file_raw_confidences_are_learned(calibration: Calibration) -> None:
    online = OnlineSurvival(WIDTH)
    Server(Load(32, [CHAT], seed=5), online).rounds(300)
    assert (still_errors(online, [CHAT]) < 0.03).all()


def test_history_alone_learns_rates_and_requests() -> None:
    server = Server(
        Load(32, [CODE, CHAT], seed=6), OnlineSurvival(WIDTH), with_confidence=False
    )
    server.rounds(100)
    lengths: dict[Kind, list[float]] = {CODE: [], CHAT: []}
    pairs = []
    for _ in range(200):
        kinds, ids = server.load.current, server.load.ids
        before = server.online.history(ids, [1.0] * len(ids))
        survivals, accepted = server.round()
        assert np.array_equal(before, survivals)
        pairs.append((survivals, accepted))
        for kind, row in zip(kinds, survivals, strict=True):
            lengths[kind].append(float(row.sum()))
    # Requests live for about 40 rounds, the first of which are like everyone's.
    assert np.mean(lengths[CODE]) > np.mean(lengths[CHAT]) + 0.5
    survivals, accepted = (np.concatenate(x) for x in zip(*pairs, strict=True))
    assert (errors(survivals, accepted) < 0.04).all()


def test_a_new_request_is_told_from_others_within_a_few_rounds() -> None:
    online = OnlineSurvival(WIDTH)
    for _ in range(10):
        made = online.apply(["code", "chat"], [1.0, 1.0], None)
        online.update(made, np.array([7, 7]), np.array([5, 1]))
    code, chat = online.history(["code", "chat"], [1.0, 1.0])
    assert code.sum() > chat.sum() + 1


def test_history_follows_a_drift() -> None:
    server = Server(
        Load(64, [MATH], seed=7), OnlineSurvival(WIDTH), with_confidence=False
    )
    server.rounds(SWITCH)
    server.switch([CHAT])
    assert (errors(*server.rounds(10))[:4] > 0.1).all()
    server.rounds(190)
    assert (errors(*server.rounds(100)) < 0.045).all()


@pytest.mark.parametrize("trim", [0.3, 0.6])
def test_trimming_by_confidence_does_not_bias_history(trim: float) -> None:
    """Verified are the promising drafts; history is of all."""
    load = Load(32, [MATH, CODE, CHAT], seed=8)
    server = Server(load, OnlineSurvival(WIDTH), trim)
    server.rounds(100)
    guessed, truth, verified = [], [], []
    for _ in range(150):
        guessed.append(server.online.history(load.ids, [1.0] * 32).mean(axis=0))
        survivals, accepted = server.round()
        hits = accepted[:, None] > np.arange(WIDTH)
        truth.append(hits.mean(axis=0))
        verified.append(hits[:, 0][survivals[:, 0] >= trim])
    gap = np.mean(guessed, axis=0) - np.mean(truth, axis=0)
    assert (np.abs(gap) < 0.04).all()
    if trim > 0.5:  # what it would be had only verified drafts been counted
        assert np.concatenate(verified).mean() - np.mean(truth, axis=0)[0] > 0.06


def test_trimmed_positions_take_over_what_others_learned() -> None:
    """Only position 1 is ever verified, and its confidences are far too high."""
    online = OnlineSurvival(WIDTH)
    random = np.random.default_rng(0)
    confidence = np.full((64, WIDTH), 0.9)
    names = list(range(64))
    for _ in range(300):
        made = online.apply(names, [1.0] * 64, confidence)
        hits = (random.random(64) < 0.5).astype(np.int64)
        online.update(made, np.ones(64, dtype=np.int64), hits)
    c = online.apply(["new"], [1.0], confidence[:1]).conditional[0]
    assert c[0] == pytest.approx(0.5, abs=0.06)
    assert (c[1:] < 0.75).all()


def test_only_conditional_outcomes_count() -> None:
    """A rejected draft says nothing about the ones behind it, nor do unverified."""
    online = OnlineSurvival(3, options=_independent())
    before = online.apply(["x"], [1.0], np.full((1, 3), 0.7)).conditional
    for i in range(50):
        made = online.apply([i], [1.0], np.full((1, 3), 0.7))
        # Draft 1 accepted, draft 2 rejected: 3 is unknown.
        online.update(made, np.array([3]), np.array([1]))
    after = online.apply(["y"], [1.0], np.full((1, 3), 0.7)).conditional
    assert after[0, 0] > before[0, 0] + 0.05
    assert after[0, 1] < before[0, 1] - 0.3
    assert after[0, 2] == pytest.approx(before[0, 2], abs=0.01)


def _independent() -> OnlineOptions:
    """Positions learn next to nothing from each other."""
    return OnlineOptions(drift=DriftOptions(common_positions=1e6))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.1, 1.5])
def test_bad_values_degrade_to_history(bad: float) -> None:
    online = OnlineSurvival(WIDTH)
    server = Server(Load(8, [CHAT], seed=9), online)
    server.rounds(50)
    confidence, accepted = server.load.round()
    confidence[2] = bad
    confidence[3, 4] = bad
    ids = server.load.ids
    temperatures = [1.0] * 8
    history = online.history(ids, temperatures)
    made = online.apply(ids, temperatures, confidence)
    assert made.survival[2] == pytest.approx(history[2])
    assert not made.usable[2].any() and made.usable[3, :4].all()
    assert not made.usable[3, 4:].any()
    assert np.isfinite(made.survival).all()
    assert (np.diff(made.survival, axis=1) <= 0).all()
    online.update(made, np.full(8, WIDTH), accepted)
    again = online.apply(ids, temperatures, confidence)
    assert np.isfinite(again.survival).all()


def test_extreme_confidences_and_outcomes_stay_finite() -> None:
    online = OnlineSurvival(3)
    for accepted in ([0, 0], [3, 3]) * 50:
        made = online.apply(["a", "b"], [1.0, 1.0], np.array([[1.0] * 3, [0.0] * 3]))
        online.update(made, np.array([3, 3]), np.array(accepted))
        assert np.isfinite(made.survival).all()
        assert (made.survival >= 0).all() and (made.survival <= 1).all()


def test_predictions_use_earlier_rounds_only() -> None:
    """What a round brings, and rows of other requests, change nothing in it."""
    confidence, accepted = Load(4, [CODE], seed=10).round()
    one, two = OnlineSurvival(WIDTH), OnlineSurvival(WIDTH)
    ids = list("abcd")
    first = one.apply(ids, [1.0] * 4, confidence)
    # c_k of later positions does not move a_1..a_k.
    other = confidence.copy()
    other[:, 3:] = 0.01
    second = two.apply(ids, [1.0] * 4, other)
    assert np.array_equal(first.survival[:, :3], second.survival[:, :3])
    kept = first.survival.copy()
    one.update(first, np.full(4, WIDTH), accepted)
    assert np.array_equal(first.survival, kept)


def test_ended_requests_are_forgotten_and_late_outcomes_are_fine() -> None:
    server = Server(Load(16, [CODE], seed=11, length=3), OnlineSurvival(WIDTH))
    server.rounds(400)
    online = server.online
    assert len(online) <= 16
    assert online._offsets._value.shape[1] <= 64 and len(online._setting) <= 64
    made = online.apply(["late"], [1.0], np.full((1, WIDTH), 0.5))
    online.forget(["late", "never seen"])
    online.apply(["next"], [1.0], np.full((1, WIDTH), 0.5))
    before = float(online._offsets.of(CONFIDENCE, online._find(["next"], [1.0]))[0, 0])
    online.update(made, np.array([WIDTH]), np.array([WIDTH]))
    after = float(online._offsets.of(CONFIDENCE, online._find(["next"], [1.0]))[0, 0])
    assert before == after == 0.0  # the row may have been the late one's
    assert (online._offsets._value[:, 0] == 0).all()  # what all that are gone share


def test_window_agrees_with_the_definition() -> None:
    options = OnlineOptions(window_steps=50)
    server = Server(Load(32, [CODE], seed=12), OnlineSurvival(WIDTH, options=options))
    server.rounds(40)
    survivals, accepted = server.rounds(50)  # pushes those 40 out
    window = server.online.window
    assert window.ece() == pytest.approx(errors(survivals, accepted), abs=1e-5)
    assert window.counts().tolist() == [1600] * WIDTH
    assert (window.floor() > 0.005).all() and (window.floor() < 0.03).all()


def test_window_counts_verified_positions_only() -> None:
    online = OnlineSurvival(3)
    assert np.isnan(online.window.ece()).all()
    made = online.apply(["a", "b"], [1.0, 1.0], np.full((2, 3), 0.5))
    online.update(made, np.array([2, 0]), np.array([2, 0]))
    assert online.window.counts().tolist() == [1, 1, 0]
    assert online.window.ece()[:2] == pytest.approx([0.5, 0.75])


def test_same_outcomes_same_predictions() -> None:
    runs = []
    for _ in range(2):
        server = Server(Load(8, [CODE, CHAT], seed=13), OnlineSurvival(WIDTH))
        runs.append(server.rounds(50)[0])
    assert np.array_equal(*runs)


def test_narrower_drafts_and_wrong_input() -> None:
    online = OnlineSurvival(3)
    made = online.apply(["a"], [1.0], np.full((1, 2), 0.9))
    assert made.survival.shape == (1, 2)
    online.update(made, np.array([2]), np.array([1]))
    assert online.apply([], [], np.zeros((0, 3))).survival.shape == (0, 3)
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        online.apply(["a"], [1.0], np.full((1, 4), 0.9))
    with pytest.raises(ValueError, match="temperatures"):
        online.apply(["a"], [], np.full((1, 3), 0.9))
    with pytest.raises(ValueError, match="accepted"):
        online.update(made, np.array([1]), np.array([2]))
    with pytest.raises(ValueError, match="covers 1 positions"):
        OnlineSurvival(2, Calibration("hash", {1.0: Scaling((1.0,), (0.0,))}, ""))
    with pytest.raises(ValueError, match="prior 1"):
        OnlineOptions(prior=1.0)
    with pytest.raises(ValueError, match="memory_steps 0"):
        DriftOptions(memory_steps=0)


def test_logits_agree_with_the_offline_ones() -> None:
    inner = np.linspace(0.001, 0.999, 50)[:, None]
    made = OnlineSurvival(1).apply(list(range(50)), [1.0] * 50, inner)
    assert made.logit == pytest.approx(logit(inner))

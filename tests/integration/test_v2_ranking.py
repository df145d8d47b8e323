"""The device's choice of drafts: the planner's, in tensors; lossless, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.schedule.exact import Policy, bias, random_request, ties_by_later
from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.online import OnlineSurvival
from vllm_dspark.calibration.scaling import Scaling
from vllm_dspark.integration.v2.ranking import best, maps_for, survivals
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.step import VerifyStep


def on_device(
    survival: np.ndarray, num_drafts: np.ndarray, reserved: np.ndarray, count: int
) -> list[int]:
    made = torch.from_numpy(survival.astype(np.float32))
    rows = (torch.from_numpy(rows.astype(np.int32)) for rows in (num_drafts, reserved))
    return best(made, *rows, count).tolist()


def test_it_is_the_planners_choice() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        rows, width = random.integers(1, 6, size=2)
        # Exact in float32, and with many ties.
        conditional = random.integers(0, 5, (rows, width)) / 4
        survival = np.cumprod(conditional, axis=1)
        drafts = random.integers(0, width + 1, rows)
        reserved = random.integers(0, width + 1, rows)
        first = int(np.minimum(drafts, reserved).sum())
        more = int(random.integers(0, drafts.sum() - first + 1))
        step = VerifyStep(survival, rows, lambda b: np.ones(len(b)), num_drafts=drafts)
        budget = planner.Budget(reserved, more, planner.Stop.BUDGET)
        expected = planner.plan_within(step, budget).verify_lens.tolist()
        assert on_device(survival, drafts, reserved, first + more) == expected


def by_device(count: int) -> Policy:
    def policy(survival: np.ndarray) -> np.ndarray:
        rows, width = survival.shape
        all_of_it = np.full(rows, width)
        return np.array(on_device(survival, all_of_it, np.zeros(rows), count))

    return policy


def test_nothing_that_knows_a_draft_decides_about_it() -> None:
    """Confidences that know the tokens, ties among them; sums over all drafts."""
    random = np.random.default_rng(1)
    found, cheating = [], []
    for _ in range(100):
        requests = [random_request(random, 2) for _ in range(2)]
        count = int(random.integers(1, 4))
        found.append(bias(requests, by_device(count)))
        cheating.append(bias(requests, ties_by_later(count)))
    assert max(found) < 1e-12
    assert max(cheating) > 0.01  # the cases can tell


def test_maps_are_those_of_the_scheduler() -> None:
    scalings = {
        0.0: Scaling((1.5, 0.7, 1.2), (-0.5, 0.1, 0.4)),
        1.0: Scaling((0.8, 1.1, 0.9), (0.3, -0.2, 0.6)),
    }
    calibration = Calibration("hash", scalings, "made up")
    online = OnlineSurvival(3, calibration)
    random = np.random.default_rng(2)
    ids, temperatures = ("a", "b", "c"), (0.0, 1.0, 0.7)
    for _ in range(40):  # online recalibration and offsets of requests
        raw = random.uniform(0.01, 0.99, (3, 3))
        made = online.apply(ids, temperatures, raw)
        accepted = np.array([3, 0, int(random.integers(4))])
        online.update(made, np.full(3, 3), accepted)
    raw = np.append(random.uniform(0, 1, (2, 3)), [[0.0, 1.0, 0.5]], axis=0)
    raw = raw.astype(np.float32)
    expected = online.apply(ids, temperatures, raw).survival
    maps = online.maps(ids, temperatures)
    order = [2, 0, 1]
    batch = [ids[i] for i in order] + ["stranger"]
    packed = torch.from_numpy(maps_for(maps, ids, batch))
    own = np.concatenate([raw[order], [[0.5, 0.25, 1.0]]]).astype(np.float32)
    found = survivals(torch.from_numpy(own), packed, maps.limit).numpy()
    np.testing.assert_allclose(found[:3], expected[order], atol=1e-5)
    assert np.abs(expected - np.cumprod(raw, axis=1)).max() > 0.05
    # One that the maps do not know keeps its confidences.
    np.testing.assert_allclose(found[3], [0.5, 0.125, 0.125], atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5])
def test_a_confidence_that_is_none_ends_its_request(bad: float) -> None:
    raw = torch.tensor([[0.9, bad, 0.9], [0.8, 0.8, 0.8]])
    for maps in (None, torch.zeros(4, 2, 3)):
        found = survivals(raw, maps, 8.0)
        assert found[0, 1:].tolist() == [0.0, 0.0] and (found[1] > 0).all()
        assert found.isfinite().all()

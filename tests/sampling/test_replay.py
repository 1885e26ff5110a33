import copy

import pytest
import torch

from genmodels.sampling.replay import Replay


@pytest.fixture
def replay():
    replay = Replay(64, (1, 2, 2), 0.25, seed=3)
    replay.fill()
    return replay


def test_slots_are_without_replacement_and_a_function_of_seed_step_and_process(replay):
    draws = [replay.slots(48, step).tolist() for step in range(20)]
    assert all(len(set(slots)) == 48 for slots in draws)
    assert len({tuple(slots) for slots in draws}) == 20
    again = Replay(64, (1, 2, 2), 0.25, seed=3)
    again.fill()
    assert [again.slots(48, step).tolist() for step in range(20)] == draws
    for other, rank in ((Replay(64, (1, 2, 2), 0.25, seed=4), 0), (again, 1)):
        other.fill(rank=rank)
        assert other.slots(48, 0).tolist() != draws[0]
        assert not torch.equal(other.entries, replay.entries)


def test_slots_are_uniform(replay):
    visits = torch.zeros(64)
    for step in range(400):
        visits[replay.slots(16, step)] += 1
    # Binomial(400, 1/4): mean 100, sd 8.7.
    assert visits.sum() == 6400 and (visits - 100).abs().max() < 5 * 8.7
    assert 6 < visits.std() < 12


def test_first_entries_are_uniform_in_the_box():
    replay = Replay(4000, (2, 1, 1), 0.05, seed=0)
    replay.fill()
    assert replay.entries.min() >= -1 and replay.entries.max() < 1
    assert abs(float(replay.entries.mean())) < 5 * (1 / 3 / 8000) ** 0.5
    assert float(replay.entries.var()) == pytest.approx(1 / 3, rel=0.05)


def test_a_share_starts_afresh_and_the_others_go_on(replay):
    kept, total = 0, 0
    for step in range(200):
        before = replay.entries.clone()
        slots, states = replay.draw(32, step)
        same = (states == before[slots]).flatten(1).all(1)
        kept, total = kept + int(same.sum()), total + 32
        assert (replay.visits[slots][~same] == 1).all()  # a new life begins
        replay.put(slots, states + 0.5)
        torch.testing.assert_close(replay.entries[slots], states + 0.5)
        others = torch.ones(64, dtype=torch.bool)
        others[slots] = False
        assert torch.equal(replay.entries[others], before[others])
    # Binomial(6400, 3/4): sd 35. A life lasts 1 / 0.25 visits on average.
    assert abs(kept - 4800) < 5 * 35
    assert 2.5 < replay.visits.float().mean() < 6


def test_state_goes_on_exactly(replay):
    replay.put(*replay.draw(32, 0))
    other = Replay(64, (1, 2, 2), 0.25, seed=3)
    other.load({key: value.clone() for key, value in replay.state().items()})
    for step in (1, 2):
        for one in (replay, other):
            slots, states = one.draw(32, step)
            one.put(slots, states.sin())
    assert torch.equal(other.entries, replay.entries) and torch.equal(other.visits, replay.visits)


def test_processes_own_equal_shares(replay):
    state, parts = replay.state(), []
    for rank in range(4):
        own = Replay(64, (1, 2, 2), 0.25, seed=3)
        own.load(state, rank, 4)
        parts.append(own.entries)
    assert torch.equal(torch.cat(parts), replay.entries)
    with pytest.raises(ValueError, match="method.buffer=64: must be a multiple of 3"):
        replay.fill(0, 3)


def test_a_copy_shares_the_buffer(replay):
    assert copy.deepcopy({"model": replay})["model"] is replay


def test_errors_name_the_key(replay):
    with pytest.raises(ValueError, match="method.buffer=64: gives 64 entries .* batch \\(65\\)"):
        replay.slots(65, 0)
    with pytest.raises(ValueError, match="method.buffer=32: the checkpoint's holds 64"):
        Replay(32, (1, 2, 2), 0.25, seed=3).load(replay.state())

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from ringfence.defenses import Defense
from ringfence.defenses.interleave import InterleaveDefense
from ringfence.errors import RecipeError
from ringfence.text.batch import Example, collate
from ringfence.text.roles import Role
from ringfence.training.stream import TrainStream

PAD = 999


class Rider(Defense):
    def __init__(self, riders, every=1, name="rider"):
        self.riders, self.every, self.name = riders, every, name


def rows(count, kind="row", seed=0):
    rng = random.Random(seed)
    made = []
    for n in range(count):
        length = rng.randint(2, 60)
        made.append(
            Example([n] * length, [Role.QUERY] + [Role.RESPONSE] * (length - 1), f"{kind}:{n}")
        )
    return made


def origins(stream):
    return [row.origin for row in stream.rows]


def riders_per_step(stream):
    counts = [len(stream[place]) - 1 for place in range(len(stream))]
    return [
        sum(counts[at : at + stream.step_rows]) for at in range(0, len(counts), stream.step_rows)
    ]


# ------------------------------------------------------------------ order


@pytest.mark.parametrize(("count", "step_rows"), [(100, 4), (101, 4), (7, 16), (1, 1), (65, 8)])
def test_every_row_once_an_epoch(count, step_rows):
    stream = TrainStream(rows(count), [], [], step_rows, seed=0)
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert sorted(origins(stream)) == sorted(f"row:{n}" for n in range(count))
        assert len(stream) == count
        assert stream.steps_per_epoch == -(-count // step_rows)
        assert [stream[place] for place in range(count)] == [[(row, False)] for row in stream.rows]


def full_stream(seed):
    return TrainStream(
        rows(50), rows(9, "retain"), [InterleaveDefense(0.2, rows(30, "safe")), Rider(0.5)], 4, seed
    )


def everything(stream):
    return [
        [(example.origin, flag) for example, flag in stream[place]] for place in range(len(stream))
    ]


def test_order_is_a_function_of_seed_and_epoch():
    stream = full_stream(3)
    seen = []
    for epoch in range(4):
        stream.set_epoch(epoch)
        seen.append(everything(stream))
    assert len({str(epoch) for epoch in seen}) == 4
    resumed = full_stream(3)
    random.seed(1)
    for epoch in (2, 0, 3, 1):
        resumed.set_epoch(epoch)
        assert everything(resumed) == seen[epoch]
    assert everything(full_stream(4)) != seen[0]


def test_rows_are_shuffled():
    """Mean place of each row over epochs is near the middle."""
    stream = TrainStream(rows(64), [], [], 2, seed=0)
    places = Counter()
    for epoch in range(200):
        stream.set_epoch(epoch)
        for place, origin in enumerate(origins(stream)):
            places[origin] += place / 200
    sd = math.sqrt((64**2 - 1) / 12 / 200)
    assert all(abs(place - 31.5) < 4.5 * sd for place in places.values())


def test_like_lengths_stand_together():
    def padding(lengths):
        steps = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]
        return sum(len(step) * max(step) - sum(step) for step in steps)

    stream = TrainStream(rows(640), [], [], 8, seed=0)
    lengths = [len(row) for row in stream.rows]
    assert padding(lengths) < 0.4 * padding(random.Random(0).sample(lengths, len(lengths)))
    means = [sum(lengths[at : at + 8]) / 8 for at in range(0, 640, 8)]
    assert means != sorted(means)
    halves = sum(means[:40]) / 40, sum(means[40:]) / 40
    assert abs(halves[0] - halves[1]) < 6


def test_only_the_last_step_is_short():
    stream = TrainStream(rows(45), [], [], 4, seed=0)
    steps = [stream.rows[at : at + 4] for at in range(0, 45, 4)]
    assert [len(step) for step in steps] == [4] * 11 + [1]
    for step in steps:
        assert [len(row) for row in step] == sorted(len(row) for row in step)


# ------------------------------------------------------------------ interleaving


@pytest.mark.parametrize(
    ("ratio", "pool", "expected"),
    [(0.05, 40, 5), (0.1, 10, 10), (0.25, 10, 25), (0.001, 10, 1), (2, 30, 200)],
)
def test_interleaved_rows_are_as_many_in_every_epoch(ratio, pool, expected):
    stream = TrainStream(rows(100), [], [InterleaveDefense(ratio, rows(pool, "safe"))], 8, seed=0)
    for epoch in range(3):
        stream.set_epoch(epoch)
        counts = Counter(origins(stream))
        safe = [counts[f"safe:{n}"] for n in range(pool)]
        assert sum(safe) == expected
        assert max(safe) - min(safe) <= 1
        assert all(counts[f"row:{n}"] == 1 for n in range(100))
        assert len(stream) == 100 + expected


def test_interleaved_rows_are_drawn_anew_each_epoch():
    stream = TrainStream(rows(100), [], [InterleaveDefense(0.05, rows(20, "safe"))], 8, seed=0)
    drawn = Counter()
    sets = set()
    for epoch in range(100):
        stream.set_epoch(epoch)
        safe = frozenset(origin for origin in origins(stream) if origin.startswith("safe"))
        drawn.update(safe)
        sets.add(safe)
    assert len(sets) > 90
    assert len(drawn) == 20
    # 25 +- 4.5 sd of a binomial with p = 1/4.
    assert all(7 <= count <= 46 for count in drawn.values())


def test_interleaved_rows_are_trained_on():
    stream = TrainStream(rows(10), [], [InterleaveDefense(1, rows(10, "safe"))], 5, seed=0)
    assert all(not is_retain for place in range(20) for _, is_retain in stream[place])


# ------------------------------------------------------------------ riders


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.375, 1 / 3, 1.0, 1.5, 3.0])
@pytest.mark.parametrize(("count", "step_rows"), [(96, 8), (97, 8), (40, 20)])
def test_riders_are_evenly_spread(ratio, count, step_rows):
    stream = TrainStream(rows(count), rows(10, "retain"), [Rider(ratio)], step_rows, seed=0)
    exact = Fraction(ratio).limit_denominator(1000)
    for epoch in range(2):
        stream.set_epoch(epoch)
        for start in range(0, count, step_rows):
            so_far = 0
            for within, place in enumerate(range(start, min(start + step_rows, count)), 1):
                (row, flag), *riders = stream[place]
                assert (row, flag) == (stream.rows[place], False)
                assert all(
                    is_retain and rider.origin.startswith("retain") for rider, is_retain in riders
                )
                so_far += len(riders)
                assert so_far == math.ceil(within * exact)
        assert min(riders_per_step(stream)) >= 1


@pytest.mark.parametrize(
    ("ratio", "step_rows", "expected"), [("0.07", 100, 7), ("0.55", 100, 55), ("1.1", 50, 55)]
)
def test_riders_of_decimal_ratios(ratio, step_rows, expected):
    stream = TrainStream(
        rows(2 * step_rows), rows(10, "retain"), [Rider(float(ratio))], step_rows, seed=0
    )
    assert riders_per_step(stream) == [expected] * 2


def test_retain_rows_take_turns():
    stream = TrainStream(rows(100), rows(30, "retain"), [Rider(0.5)], 10, seed=0)
    counts = Counter(rider.origin for riders in stream.riders for rider in riders)
    assert sum(counts.values()) == 50
    assert set(counts.values()) == {1, 2}
    assert len(counts) == 30
    first = [rider.origin for riders in stream.riders for rider in riders]
    stream.set_epoch(1)
    assert first != [rider.origin for riders in stream.riders for rider in riders]


def test_the_longest_riders_go_with_the_longest_rows():
    stream = TrainStream(rows(64), rows(300, "retain", seed=1), [Rider(0.5)], 8, seed=0)
    steps = []
    for start in range(0, 64, 8):
        bundles = [stream[place] for place in range(start, start + 8)]
        steps.append(
            (
                max(len(bundle[0][0]) for bundle in bundles),
                [len(r) for b in bundles for r, _ in b[1:]],
            )
        )
    steps.sort()
    for (width, shorter), (wider, longer) in pairwise(steps):
        assert width == wider or max(shorter) <= min(longer)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_every_counts_steps_over_epochs(every):
    # 7 steps, the last one short.
    stream = TrainStream(rows(26), rows(5, "retain"), [Rider(0.5, every)], 4, seed=0)
    step = 0
    for epoch in range(4):
        stream.set_epoch(epoch)
        for count in riders_per_step(stream):
            short = (step + 1) % 7 == 0
            assert count == ((1 if short else 2) if step % every == 0 else 0)
            step += 1
    assert step == 28


def test_defenses_share_riders():
    stream = TrainStream(
        rows(48), rows(5, "retain"), [Rider(0.25, 2), Defense(), Rider(0.75, 3)], 4, seed=0
    )
    expected = [max(1 if step % 2 == 0 else 0, 3 if step % 3 == 0 else 0) for step in range(12)]
    assert riders_per_step(stream) == expected


def test_no_rider_unless_asked_for():
    stream = TrainStream(rows(20), rows(5, "retain"), [Defense(), Rider(0.0)], 4, seed=0)
    assert riders_per_step(stream) == [0] * 5


def test_less_than_one_rider_a_step_is_refused():
    with pytest.raises(
        RecipeError,
        match=r"defenses\.rider: 0\.2 retain rows .* a step of 4 rows; raise retain_ratio",
    ):
        TrainStream(rows(20), rows(5, "retain"), [Rider(0.2)], 4, seed=0)
    assert (
        riders_per_step(TrainStream(rows(20), rows(5, "retain"), [Rider(0.25)], 4, seed=0))
        == [1] * 5
    )


# ------------------------------------------------------------------ batches

P, Q, S, R, T = Role.PREFIX, Role.QUERY, Role.POSTFIX, Role.RESPONSE, Role.TEMPLATE


def bundles():
    train = Example([11, 12, 13, 14, 15, 16, 17], [P, Q, S, R, R, T, R], "train")
    other = Example([21, 22, 23], [Q, R, R], "other")
    keep = Example([31, 32, 33, 34, 35], [P, Q, R, R, R], "keep")
    return [[(train, False), (keep, True)], [(other, False)]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_against_a_plain_loop(side):
    batch = collate(bundles(), PAD, side)
    flat = [item for bundle in bundles() for item in bundle]
    assert batch["retain"].tolist() == [False, True, False]
    assert {tuple(batch[name].shape) for name in batch if name != "retain"} == {(3, 7)}
    for row, (example, is_retain) in enumerate(flat):
        start = 0 if side == "right" else 7 - len(example)
        for at in range(7):
            here = {name: int(batch[name][row, at]) for name in batch if name != "retain"}
            if start <= at < start + len(example):
                token, role = example.input_ids[at - start], example.roles[at - start]
                learnt = role == Role.RESPONSE and not is_retain
                assert here == {
                    "input_ids": token,
                    "attention_mask": 1,
                    "position_ids": at - start,
                    "roles": int(role),
                    "labels": token if learnt else -100,
                }
            else:
                assert (here["input_ids"], here["attention_mask"]) == (PAD, 0)
                assert (here["roles"], here["labels"]) == (int(Role.PAD), -100)
                assert here["position_ids"] >= 0


def test_sides_hold_the_same_tokens():
    left, right = collate(bundles(), PAD, "left"), collate(bundles(), PAD, "right")
    for name in ("input_ids", "position_ids", "roles", "labels"):
        for row in range(3):
            assert left[name][row][left["attention_mask"][row] == 1].equal(
                right[name][row][right["attention_mask"][row] == 1]
            )


def test_pad_id_inside_a_row_is_no_padding():
    example = Example([PAD, 5, PAD], [Q, R, R], "x")
    batch = collate([[(example, False)], [(Example([1, 2, 3, 4], [Q, R, R, R], "y"), False)]], PAD)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, PAD, -100], [-100, 2, 3, 4]]


def test_kinds_of_tensors():
    batch = collate(bundles(), PAD)
    assert batch["retain"].dtype == torch.bool
    assert {batch[name].dtype for name in batch if name != "retain"} == {torch.int64}

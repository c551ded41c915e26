import pytest
import torch

from data.batches import Batches, Dataset, Split


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n=10):
    """Examples whose value is their number."""
    return Split((torch.arange(n).float().view(n, 1),), torch.arange(n))


def graph(n=6):
    inputs = (torch.rand(n, 2), torch.eye(n).to_sparse_csr())
    return Split(inputs, torch.tensor([1, 0, 1]), torch.tensor([4, 2, 5]))


def dataset(train, validation=None):
    return Dataset(train, numbered(4), validation, None, None, "numbers")


def test_an_epoch_covers_every_example_once_in_a_new_order():
    batches = Batches(numbered(), 3, shuffle=True, drop_last=False, generator=seeded())
    epochs = [torch.cat([b.targets for b in batches]) for _ in range(2)]
    assert len(batches) == 4
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(10))


def test_inputs_and_targets_stay_together():
    for batch in Batches(numbered(), 3, shuffle=True, drop_last=False, generator=seeded()):
        assert torch.equal(batch.inputs[0].flatten().long(), batch.targets)
        assert batch.rows is None


def test_drop_last_leaves_out_the_short_batch():
    batches = Batches(numbered(), 3, shuffle=True, drop_last=True)
    assert [len(b.targets) for b in batches] == [3, 3, 3]
    assert len(batches) == 3


def test_without_shuffling_the_order_is_the_splits():
    batches = Batches(numbered(), 4, shuffle=False, drop_last=False)
    assert torch.equal(torch.cat([b.targets for b in batches]), torch.arange(10))


def test_equal_seeds_give_equal_batches():
    first, second = (
        [b.targets.tolist() for b in Batches(numbered(), 3, shuffle=True, drop_last=False, generator=seeded(0))]
        for _ in range(2)
    )
    assert first == second


def test_a_full_batch_is_the_split_itself():
    split = graph()
    (batch,) = Batches(split, None, shuffle=True, drop_last=False)
    assert batch.inputs is split.inputs
    assert batch.targets is split.targets
    assert batch.rows is split.rows


def test_batches_of_a_graph_choose_rows_and_keep_the_graph():
    split = graph()
    for batch in Batches(split, 2, shuffle=False, drop_last=False):
        assert batch.inputs is split.inputs
    assert torch.equal(batch.rows, torch.tensor([5]))
    assert torch.equal(batch.targets, torch.tensor([1]))


def test_an_autoencoders_target_is_its_input_and_not_a_copy():
    x = torch.rand(10, 3)
    for batch in Batches(Split((x,), x), 5, shuffle=True, drop_last=False):
        assert batch.targets is batch.inputs[0]


class Shift:
    """Adds what it has drawn."""

    def draw(self, m, generator):
        return torch.randint(100, (m,), generator=generator)

    def __call__(self, examples, draws):
        return examples + draws.view(-1, 1)


def shifted(generator, **settings):
    return Batches(
        numbered(), 4, drop_last=False, augment=Shift(), generator=generator, augment_generator=generator, **settings
    )


def test_augmentation_sees_the_first_input_and_what_was_drawn_for_it():
    draws = torch.randint(100, (4,), generator=seeded())
    batch = next(iter(shifted(seeded(), shuffle=False)))
    assert torch.equal(batch.inputs[0].flatten(), torch.arange(4) + draws)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_goes_on_in_its_middle_to_the_same_batches(shuffle):
    whole, part = seeded(), seeded()
    expected = list(shifted(whole, shuffle=shuffle))[1:]
    for batch, other in zip(shifted(part, shuffle=shuffle).epoch(1), expected, strict=True):
        assert torch.equal(batch.inputs[0], other.inputs[0])
    assert torch.equal(whole.get_state(), part.get_state())


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_have_equal_parts_of_every_batch(shuffle):
    whole = shifted(seeded(), shuffle=shuffle)
    shares = [shifted(seeded(), shuffle=shuffle, share=(rank, 2)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert len({len(part.targets) for part in parts}) == 1
        assert torch.equal(torch.cat([part.inputs[0] for part in parts]), batch.inputs[0])
        assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)


@pytest.mark.parametrize(("evaluated", "expected"), [(None, 10), (3, [0, 3, 6]), (11, 10)])
def test_the_training_loss_is_of_as_many_examples_as_asked_for(evaluated, expected):
    whole = Dataset(numbered(), numbered(4), None, None, None, "numbers", evaluated)
    if isinstance(expected, list):
        assert whole.measured.targets.tolist() == expected
    else:
        assert whole.measured is whole.train


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_impossible_batch_sizes_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        Batches(numbered(), batch_size, shuffle=True, drop_last=True)


def test_a_split_smaller_than_the_batch_is_one_batch_when_nothing_is_dropped():
    assert [len(b.targets) for b in Batches(numbered(), 11, shuffle=False, drop_last=False)] == [10]


def test_holdout_divides_the_training_examples():
    held = dataset(numbered(50)).holdout(0.1, seeded())
    assert len(held.validation) == 5
    every = torch.cat([held.train.targets, held.validation.targets])
    assert torch.equal(every.sort().values, torch.arange(50))
    assert torch.equal(held.test.targets, torch.arange(4))


def test_holdout_keeps_a_validation_split_that_exists():
    own = dataset(numbered(), validation=numbered(2))
    assert own.holdout(0.1, seeded()) is own


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01])
def test_a_holdout_with_an_empty_part_is_refused(fraction):
    with pytest.raises(ValueError, match="cannot hold out"):
        dataset(numbered()).holdout(fraction, seeded())


def test_moving_keeps_shared_tensors_shared():
    split = graph()
    moved = dataset(split, Split(split.inputs, split.targets, split.rows)).to("meta")
    assert moved.train.inputs[0].device.type == "meta"
    assert moved.train.inputs[0] is moved.validation.inputs[0]
    x = torch.rand(3, 2)
    alone = Split((x,), x).to("meta")
    assert alone.targets is alone.inputs[0]

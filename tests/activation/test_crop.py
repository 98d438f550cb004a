"""States go with the tokens that a cache takes back, whichever way its Transformers counts them."""

import pytest
import torch
from transformers import DynamicCache

from hf_glu.activation.context.states import ROLLBACK, load_state, store_states
from hf_glu.compat.of_models import cropped
from hf_glu.errors import OptionError


def length_that_stays(max_length):
    """As up to Transformers 5.14."""


def number_that_goes(tokens_to_remove):
    """As from Transformers 5.15 on."""


@pytest.mark.parametrize(
    ("crop", "argument", "count"),
    [
        (length_that_stays, 7, 3),
        (length_that_stays, 10, 0),
        (length_that_stays, 12, 0),
        (length_that_stays, -4, 4),
        (number_that_goes, -4, 4),
        (number_that_goes, 4, 4),
        (number_that_goes, 0, 0),
    ],
)
def test_how_many_tokens_go(crop, argument, count):
    assert cropped(crop, argument, lambda: 10) == count


def filled(tokens):
    cache, states = DynamicCache(), torch.randn(1, tokens, 4)
    cache.update(torch.randn(1, 1, tokens, 2), torch.randn(1, 1, tokens, 2), 0)
    store_states(cache, "slot", states)
    return cache, states


@pytest.mark.parametrize("count", [1, 3, ROLLBACK])
def test_the_state_is_that_of_the_last_token_that_stays(count):
    cache, states = filled(40)
    cache.crop(-count)
    assert cache.get_seq_length() == 40 - count
    torch.testing.assert_close(load_state(cache, "slot"), states[:, -1 - count], rtol=0, atol=0)


def test_what_is_gone_cant_be_taken_back():
    cache, _ = filled(40)
    with pytest.raises(OptionError, match="can't be taken back"):
        cache.crop(-ROLLBACK - 1)
    assert cache.get_seq_length() == 40


class Earlier(DynamicCache):
    """A cache as it was up to Transformers 5.14."""

    def crop(self, max_length):
        excess = -max_length if max_length < 0 else max(0, self.get_seq_length() - max_length)
        for layer in self.layers:
            layer.keys, layer.values = (each[..., : each.shape[-2] - excess, :] for each in (layer.keys, layer.values))


@pytest.mark.parametrize(("argument", "stay"), [(37, 37), (-3, 37), (40, 40), (50, 40)])
def test_a_length_that_stays_is_understood(argument, stay):
    cache, states = Earlier(), torch.randn(1, 40, 4)
    cache.update(torch.randn(1, 1, 40, 2), torch.randn(1, 1, 40, 2), 0)
    store_states(cache, "slot", states)
    cache.crop(argument)
    assert cache.get_seq_length() == stay
    torch.testing.assert_close(load_state(cache, "slot"), states[:, stay - 1], rtol=0, atol=0)

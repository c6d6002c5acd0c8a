"""A cache with room holds what transformers' own holds, and is no copy at every token."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hapo.cache import LEAST_ROOM, RoomyLayer, give_room, rows_can_move
from hapo.samplers.decoding import decode_alike
from hapo.samplers.transformers import sampling

from .test_decoding import PAD, SHAPE, tiny


@pytest.fixture(autouse=True)
def _as_in_generation():
    with torch.no_grad():
        yield


def states(rows: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, tokens, 4, generator=generator)
    return keys, values


def held(layer: DynamicLayer) -> torch.Tensor:
    return torch.stack([layer.keys, layer.values])


def test_it_holds_what_transformers_layer_holds_whatever_is_done_to_its_rows():
    theirs, ours = DynamicLayer(), RoomyLayer()
    steps = [
        lambda layer: layer.update(*states(3, 5)),
        lambda layer: layer.update(*states(3, 1, 1)),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0, 0, 1])),
        lambda layer: layer.update(*states(4, 1, 2)),
        lambda layer: layer.update(*states(4, 2 * LEAST_ROOM, 3)),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 1])),
        lambda layer: layer.update(*states(2, 1, 4)),
        lambda layer: layer.crop(-3),
        lambda layer: layer.update(*states(2, 2, 5)),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.update(*states(2, 1, 6)),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.update(*states(4, 1, 7)),
    ]
    for step in steps:
        given = [step(layer) for layer in (theirs, ours)]
        assert torch.equal(held(ours), held(theirs))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert given[0] is None or all(map(torch.equal, *given))


def test_a_token_is_written_where_there_is_room():
    layer = RoomyLayer()
    layer.update(*states(2, 3))
    layer.update(*states(2, 1))
    place = layer.keys.data_ptr()
    for _ in range(LEAST_ROOM):
        layer.update(*states(2, 1))
    assert layer.keys.data_ptr() == place
    layer.update(*states(2, LEAST_ROOM))
    assert layer.keys.data_ptr() != place


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.reorder_cache(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(1),
        lambda layer: layer.reset(),
    ],
)
def test_rows_that_are_dropped_are_not_held(change):
    layer = RoomyLayer()
    layer.update(*states(64, 3))
    layer.update(*states(64, 1))
    wide = weakref.ref(layer.keys.untyped_storage())
    change(layer)
    assert wide() is None


def test_states_that_do_not_fit_are_treated_as_transformers_layer_does():
    layer = RoomyLayer()
    layer.update(*states(3, 2))
    with pytest.raises(RuntimeError):
        layer.update(*states(1, 1))
    layer.update(*(x.double() for x in states(3, 1)))
    assert layer.keys.dtype == torch.float64
    with torch.enable_grad():
        keys, values = (x.requires_grad_() for x in states(3, 1))
        made = [layer.update(keys, values)[0].sum() for _ in range(2)]
        sum(made).backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 3))  # the second time it stands there twice


def test_copies_of_a_cache_do_not_share_their_room():
    layer = RoomyLayer()
    layer.update(*states(2, 3))
    layer.update(*states(2, 1))
    other = copy.deepcopy(layer)
    layer.update(*states(2, 1, 8))
    other.update(*states(2, 1, 9))
    assert torch.equal(layer.keys[..., -1:, :], states(2, 1, 8)[0])
    assert torch.equal(other.keys[..., -1:, :], states(2, 1, 9)[0])


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LlamaConfig, lambda **c: MistralConfig(**c, sliding_window=4)])
def test_answers_are_the_same(config, attention, do_sample):
    model = tiny(config(**SHAPE, attn_implementation=attention))
    ids = torch.randint(8, 40, (4, 6), generator=torch.Generator().manual_seed(1))
    ids[0, :2] = PAD
    options = GenerationConfig(do_sample=do_sample, max_new_tokens=20, pad_token_id=PAD, eos_token_id=1)
    made = []
    for loop in (None, decode_alike):
        torch.manual_seed(3)
        made.append(
            model.generate(ids, attention_mask=ids != PAD, generation_config=options, custom_generate=loop)
        )
    assert torch.equal(*made)


def layers_of(monkeypatch) -> set[type]:
    """The kinds of layers that a generation fills, as it goes on."""
    seen: set[type] = set()
    update = DynamicLayer.update

    def watched(self, *args, **kwargs):
        seen.add(type(self))
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", watched)
    return seen


@pytest.mark.parametrize("do_sample", [False, True])
def test_sampling_gives_room(monkeypatch, do_sample):
    model, seen = tiny(LlamaConfig(**SHAPE)), layers_of(monkeypatch)
    options = GenerationConfig(do_sample=do_sample, max_new_tokens=2, pad_token_id=PAD, eos_token_id=1)
    with sampling(model):
        model.generate(torch.tensor([[5, 9]]), generation_config=options)
    assert seen == {RoomyLayer}


def test_only_empty_layers_that_are_copied_get_room():
    config = LlamaConfig(**SHAPE)
    cache = DynamicCache(config=config)
    cache.update(*states(1, 2), 0)
    give_room({"past_key_values": cache})
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, RoomyLayer]
    assert rows_can_move(cache)
    windows = DynamicCache(config=MistralConfig(**SHAPE, sliding_window=4))
    give_room({"past_key_values": windows})
    assert {type(layer) for layer in windows.layers} == {DynamicSlidingWindowLayer}
    lazy = DynamicCache()
    give_room({"past_key_values": lazy})
    lazy.update(*states(1, 2), 0)
    assert type(lazy.layers[0]) is RoomyLayer
    static = StaticCache(config=config, max_cache_len=8)
    before = list(static.layers)
    give_room({"past_key_values": static})
    assert static.layers == before
    give_room({})

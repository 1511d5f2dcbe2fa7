"""Grid positions: id by id and for whole rows they equal the grammar's, and a model trains and decodes with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from anytoken import AnyToken
from anytoken.data.packing import pack
from anytoken.data.views import TrainingSequence
from anytoken.grammar import Grammar, Phase, State
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.extend_vocab import add_modality
from anytoken.model.grid_positions import NOWHERE, CodeWalk, Place, code_places
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.codes import CodeGrid, CodeSequence
from anytoken.utils.errors import ConfigError

Make = Callable[..., AnyToken]
SIZES = {"row": 8, "column": 8, "step": 16, "codebook": 8}


def make_space() -> TokenSpace:
    """Every kind of shape: grids of one to four axes, runs, several codebooks, both orders, global codes."""
    space = TokenSpace(5, max_size_token=6)
    space.append_modality("image", [4], CodeGrid(("rows", "cols"), (1, 1), (3, 3)))
    clip = CodeGrid(("steps", "rows", "cols"), (1, 1, 1), (3, 2, 3), num_codebooks=2, num_global_codes=2)
    space.append_modality("clip", [3, 2], clip, 3)
    space.append_modality("speech", [3, 2], CodeSequence(1, 5, num_codebooks=2, num_global_codes=1), 2)
    space.append_modality("music", [3, 2, 4], CodeSequence(2, 6, num_codebooks=3, order="delay"))
    delayed = CodeGrid(("rows", "cols"), (1, 1), (3, 2), num_codebooks=3, order="delay")
    space.append_modality("depth", [2, 2, 2], delayed)
    space.append_modality("palette", [3], CodeGrid(("colors",), (1,), (5,)))
    space.append_modality("field", [3], CodeGrid(("sets", "steps", "rows", "cols"), (1,) * 4, (2,) * 4))
    return space


SPACE = make_space()
GRAMMAR = Grammar(SPACE)
CONFIG = AnyTokenConfig.from_token_space(SPACE, grid_positions=SIZES)


def place_of(state: State) -> Place:
    """The place of the code that may follow in this state, by the grammar's own tables."""
    if state.phase not in (Phase.GLOBAL, Phase.CODES):
        return NOWHERE
    segment = GRAMMAR.segments[state.kind]
    if state.phase is Phase.GLOBAL:
        return (0, 0, 0, segment.num_codebooks + state.read + 1)
    frame, book = segment.place(state.total, state.read)
    frames = int(np.prod(state.size)) if state.size else segment.shape.max_length  # type: ignore[union-attr]
    if frame >= (state.total // segment.num_codebooks or frames):
        return NOWHERE
    if not state.size:
        return (0, 0, frame + 1, book + 1)
    where = [int(one) + 1 for one in np.unravel_index(frame, state.size)]
    if len(where) > 3:
        where = [frame // int(np.prod(state.size[-2:])) + 1, *where[-2:]]
    step, row, column = [0] * (3 - len(where)) + where
    return (row, column, step, book + 1)


def sample(random: np.random.Generator, length: int) -> tuple[list[int], list[Place]]:
    """A random legal sequence of at most `length` ids, and the place after each."""
    state, ids, places = GRAMMAR.start(), [], []
    while not (GRAMMAR.finished(state) and random.random() < 0.3):
        spans = GRAMMAR.allowed(state, length - len(ids)) if len(ids) < length else ()
        if not spans:
            break
        ids.append(int(random.integers(*spans[random.integers(len(spans))])))
        state = GRAMMAR.advance(state, ids[-1])
        places.append(place_of(state))
    return ids, places


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_packed_and_padded_rows_have_the_grammars_places(seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    context, bins, expected = 160, [], torch.zeros(rows, 160, 4, dtype=torch.long)
    for row in range(rows):
        start, sequences = 0, []
        while context - start >= 20:
            ids, places = sample(random, context - start)
            walk = CodeWalk(CONFIG.code_layout or {})
            assert [walk.step(one) for one in ids] == places
            expected[row, start : start + len(ids)] = torch.tensor(places)
            sequences.append(TrainingSequence(np.array(ids), np.ones(len(ids), dtype=bool)))
            start += len(ids)
        bins.append(sequences)
    batch = pack(bins, context, SPACE.pad)
    assert torch.equal(code_places(CONFIG, batch["input_ids"], batch["position_ids"]), expected)
    # Alone and padded on the left, each is the same.
    ids = torch.from_numpy(bins[0][0].ids)
    padded = torch.cat([torch.full((7,), SPACE.pad), ids])[None]
    assert torch.equal(code_places(CONFIG, padded)[0, 7:], expected[0, : len(ids)])


def test_samples_cover_every_shape() -> None:
    """Or the property above would show little."""
    random = np.random.default_rng(0)
    drawn = [sample(random, 160) for _ in range(200)]
    opened = {token for ids, _ in drawn for token in ids}
    assert opened >= {SPACE.open_token(name) for name in SPACE.modalities}
    places = torch.tensor([place for _, some in drawn for place in some])
    assert places.amax(0).tolist() == [
        3,
        5,
        6,
        4,
    ]  # rows, palette columns, frames of music, 2 + 2 codebooks of a clip


def test_a_sample_that_is_cut_off_does_not_reach_into_the_next() -> None:
    image = [
        SPACE.open_token("image"),
        SPACE.size_token(2),
        SPACE.size_token(3),
        SPACE.code_range("image").start,
    ]
    ids = torch.tensor([[*image, 1, 1, 1]])
    apart = code_places(CONFIG, ids, torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))
    assert apart[0, 2:].tolist() == [[1, 1, 0, 1], [1, 2, 0, 1], [0] * 4, [0] * 4, [0] * 4]
    assert code_places(CONFIG, ids)[0, 4:].any()


# ---- the model ----


def placed(make: Make, **more: Any) -> AnyToken:
    """A random model with grid positions that matter."""
    model = make(grid_positions=SIZES, **more)
    torch.manual_seed(2)
    with torch.no_grad():
        for table in model.lm.model.grid_positions.tables.values():
            table.weight[1:] = torch.randn_like(table.weight[1:])
    return model


def image_ids(model: AnyToken, rows: int, columns: int, seed: int = 0) -> list[int]:
    """bos, the user's turn, an image of this size, the end."""
    space = model.token_space
    codes = model.token_space.code_range("image")
    random = np.random.default_rng(seed)
    drawn = random.integers(codes.start, codes.stop, rows * columns).tolist()
    header = [space.open_token("image"), space.size_token(rows), space.size_token(columns)]
    return [space.bos, space.user, 5, *header, *drawn, space.close_token("image"), space.end]


def logits_of(lm: Any, ids: list[int], **given: Any) -> Tensor:
    return lm(input_ids=torch.tensor([ids]), **given).logits[0]


def test_they_begin_as_a_model_without_them(make_whole_model: Make) -> None:
    plain, grid = make_whole_model(), make_whole_model(grid_positions=SIZES)
    weights = {name: one for name, one in grid.lm.state_dict().items() if "grid_positions" not in name}
    plain.lm.load_state_dict(weights)
    ids = image_ids(plain, 2, 2)
    assert torch.equal(logits_of(plain.lm, ids), logits_of(grid.lm, ids))
    other = placed(make_whole_model)
    other.lm.load_state_dict(weights, strict=False)
    changed = ((logits_of(other.lm, ids) - logits_of(plain.lm, ids)).abs() > 1e-4).any(-1)
    assert changed.tolist() == [False] * 5 + [True] * (len(ids) - 5)  # from the header's end on


def test_packed_and_padded_rows_give_what_single_ones_give(make_whole_model: Make) -> None:
    model = placed(make_whole_model)
    samples = [image_ids(model, 2, 3), image_ids(model, 3, 1, seed=1)]
    expected = [logits_of(model.lm, ids, use_cache=False) for ids in samples]
    positions = torch.cat([torch.arange(len(ids)) for ids in samples])[None]
    packed = model.lm(
        input_ids=torch.tensor([samples[0] + samples[1]]), position_ids=positions, use_cache=False
    )
    torch.testing.assert_close(packed.logits[0], torch.cat(expected), rtol=0, atol=1e-5)
    short, length = samples[1], len(samples[0])
    missing = length - len(short)
    ids = torch.tensor([samples[0], [model.token_space.pad] * missing + short])
    mask = torch.ones_like(ids)
    mask[1, :missing] = 0
    padded = model.lm(input_ids=ids, attention_mask=mask).logits[1, missing:]
    torch.testing.assert_close(padded, expected[1], rtol=0, atol=1e-5)


def test_a_cache_has_to_be_told_places(make_whole_model: Make) -> None:
    model = placed(make_whole_model)
    ids = image_ids(model, 2, 3)
    expected = logits_of(model.lm, ids)
    cache = model.lm(input_ids=torch.tensor([ids[:6]]), use_cache=True).past_key_values
    places = code_places(model.lm.config, torch.tensor([ids]))
    with pytest.raises(ValueError, match="give code_places"):
        model.lm(input_ids=torch.tensor([ids[6:]]), past_key_values=cache)
    found = logits_of(model.lm, ids[6:], past_key_values=cache, code_places=places[:, 6:])
    torch.testing.assert_close(found, expected[6:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give input_ids"):
        model.lm(inputs_embeds=torch.zeros(1, 2, 32))


def test_a_saved_checkpoint_and_an_adapter_keep_them(make_whole_model: Make, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = placed(make_whole_model)
    ids = image_ids(model, 3, 2)
    expected = logits_of(model.lm, ids)
    again = AutoModelForCausalLM.from_pretrained(model.save_pretrained(tmp_path / "checkpoint"))
    assert again.config.grid_positions == SIZES and again.config.code_layout == model.lm.config.code_layout
    assert torch.equal(logits_of(again, ids), expected)
    wrapped = get_peft_model(again, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits_of(wrapped, ids), expected)
    wrapped(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    assert all(one.grad is not None for name, one in wrapped.named_parameters() if "lora_B" in name)


def test_a_new_modality_has_places(make_whole_model: Make, grid_tokenizer: Any) -> None:
    model = placed(make_whole_model)
    ids = image_ids(model, 2, 2)
    expected = logits_of(model.lm, ids)
    processor = add_modality(model.lm, model.processor, grid_tokenizer)
    old = logits_of(model.lm, ids)[:, : expected.shape[1]]
    torch.testing.assert_close(old, expected, rtol=0, atol=1e-5)
    space = processor.token_space
    header = [space.open_token("board"), space.size_token(2), space.size_token(1)]
    places = code_places(model.lm.config, torch.tensor([[*header, space.code_range("board").start]]))
    assert places[0].tolist() == [[0] * 4, [0] * 4, [1, 1, 0, 1], [2, 1, 0, 1]]


def test_hidden_states_begin_with_them(make_whole_model: Make) -> None:
    model = placed(make_whole_model)
    ids = torch.tensor([image_ids(model, 2, 2)])
    first = model.lm(input_ids=ids, output_hidden_states=True).hidden_states[0]
    places = model.lm.model.grid_positions(code_places(model.lm.config, ids))
    assert torch.equal(first, model.lm.get_input_embeddings()(ids) + places)


def placed_batch(model: AnyToken, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images of several sizes and random codes, padded on the right; labels that follow from row and column alone.

    Neither earlier codes nor the number of ids before a code tell its label.
    """
    codes = model.token_space.code_range("image")
    chosen = np.random.default_rng(7).integers(codes.start, codes.stop, (5, 5))
    ids = torch.full((16, 6 + 25), model.token_space.pad)
    labels = torch.full_like(ids, -100)
    for one, wanted in zip(ids, labels, strict=True):
        height, width = random.integers(1, 6, 2).tolist()
        length = 6 + height * width
        one[:length] = torch.tensor(image_ids(model, height, width, int(random.integers(2**32)))[:length])
        wanted[6:length] = torch.from_numpy(chosen[:height, :width].flatten())
    return ids, labels


def loss_after_training(model: AnyToken, steps: int = 80) -> float:
    """The loss of `placed_batch` that is left."""
    random, losses = np.random.default_rng(0), []
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=1e-2)
    for _ in range(steps):
        ids, labels = placed_batch(model, random)
        mask = (ids != model.token_space.pad).long()
        loss = model.lm(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-10:]))


def transposed(config: AnyTokenConfig, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Wrong places: codes are counted column by column."""
    swapped = ids.clone()
    swapped[:, [4, 5]] = ids[:, [5, 4]]
    return code_places(config, swapped, positions)[..., [1, 0, 2, 3]]


@pytest.mark.slow
def test_what_row_and_column_decide_is_learnt_with_right_places_only(
    make_whole_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loss_after_training(make_whole_model(grid_positions=SIZES))
    none = loss_after_training(make_whole_model())
    monkeypatch.setattr("anytoken.model.modeling.code_places", transposed)
    wrong = loss_after_training(make_whole_model(grid_positions=SIZES))
    assert right < 0.2 * min(none, wrong)


@pytest.mark.parametrize("sizes", [{}, {"row": 0}, {"rows": 4}])
def test_sizes_are_checked(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="for some of row, column, step, codebook"):
        AnyTokenConfig.from_token_space(SPACE, grid_positions=sizes)
    with pytest.raises(ConfigError, match="from_token_space"):
        AnyTokenConfig(grid_positions={"row": 4})


def test_some_axes_suffice_and_a_place_beyond_a_table_has_its_last_row() -> None:
    lm = AnyTokenForCausalLM(
        AnyTokenConfig.from_token_space(
            SPACE, grid_positions={"column": 2}, hidden_size=8, num_hidden_layers=1
        )
    )
    table = lm.model.grid_positions.tables["column"]
    torch.nn.init.normal_(table.weight)
    assert table.weight.shape == (3, 8) and list(lm.model.grid_positions.tables) == ["column"]
    found = lm.model.grid_positions(torch.tensor([[9, 1, 9, 9], [0, 2, 0, 0], [0, 5, 0, 0]]))
    assert torch.equal(found, table.weight[[1, 2, 2]])
